"""The command in front of all others: `cramfast train ...` is `python -m cramfast.train ...`.

Knows the commands by name and imports none of them before it is asked for, so that --help is there at once.
"""

import difflib
import importlib
import signal
import sys
from pathlib import Path

from cramfast.errors import UserError, command, leave_at_once, stop_signals

# Name, and what it does; a package among them keeps its command line in its own __main__.py.
COMMANDS = {
    "train": "pretrain an encoder on text; ends with a report and a Hugging Face folder",
    "prepare": "turn text into a folder that several runs share, with duplicates and odd documents left out",
    "export": "write a run as a Hugging Face folder, and check it with the installed transformers",
    "evaluate": "score a model: GLUE, BLiMP, perplexity, or a task of your own",
    "report": "write a run or a prepared text as one self-contained HTML page",
    "plan": "say what a budget buys before it is spent: tokens, speed, memory, loss",
    "scaling": "train many sizes, fit a scaling law, and name the best size for your hours",
    "doctor": "say what runs on this machine, why, and what is missing",
}
PACKAGES = ("evaluate", "scaling")


def usage(front: str) -> str:
    """What --help prints; `front` is how this program was called."""
    lines = (f"  {name:<10}{what}" for name, what in COMMANDS.items())
    return "\n".join(
        [
            f"usage: {front} COMMAND ...",
            "",
            "Pretrain a BERT-class encoder from raw text on one machine.",
            "",
            "commands:",
            *lines,
            "",
            f"`{front} COMMAND --help` lists the options of a command; `{front} --version` names the version.",
            f"To begin: `{front} train` learns for minutes from text that it finds on this machine.",
        ]
    )


def refuse(name: str, front: str) -> None:
    """Raise UserError for a command that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    remedy = f"did you mean `{front} {near[0]}`?" if near else f"choose one of {', '.join(COMMANDS)}"
    raise UserError(f"{front} has no command {name!r} — {remedy}")


def version() -> str:
    """The installed version, as `pip` knows it; "" in a checkout that is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"cramfast {version('cramfast')}"
    except PackageNotFoundError:
        return ""


def main() -> None:
    """Print the help, or hand the rest of the command line to a command."""
    for number in stop_signals():
        signal.signal(number, leave_at_once)  # while a command imports torch
    front = "python -m cramfast" if Path(sys.argv[0]).name == "__main__.py" else "cramfast"
    name, *words = sys.argv[1:] or ["--help"]
    if name == "help" and words:
        name, *words = *words, "--help"  # `cramfast help train`
    if name in ("-h", "--help", "help"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as after `| head`
        print(usage(front))
        return
    if name == "--version":
        if not (found := version()):
            sys.exit("cramfast is not installed, and has no version — pip install -e .")
        print(found)
        return
    if name not in COMMANDS:
        command(lambda: refuse(name, front))
    sys.argv = [f"{front} {name}", *words]
    module = f"cramfast.{name}.__main__" if name in PACKAGES else f"cramfast.{name}"
    command(importlib.import_module(module).main)


if __name__ == "__main__":
    main()
