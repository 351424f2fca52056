"""The command line: python -m cramfast.evaluate {perplexity,glue,task,blimp,cola} MODEL ..."""

from cramfast.errors import command
from cramfast.evaluate import blimp, cola, glue, owntask, perplexity
from cramfast.runtime.arguments import program

COMMANDS = {
    "perplexity": perplexity.Arguments,
    "glue": glue.Arguments,
    "task": owntask.Arguments,
    "blimp": blimp.Arguments,
    "cola": cola.Arguments,
}
WIDTH = 140  # columns where no terminal says how many it has


def main() -> None:
    """Parse, run, print."""
    import tyro
    from rich.console import Console

    arguments = tyro.extras.subcommand_cli_from_dict(COMMANDS, prog=program("evaluate"))
    arguments.machine.start()
    console = Console()
    arguments.run(console if console.is_terminal else Console(width=WIDTH))


if __name__ == "__main__":
    command(main)
