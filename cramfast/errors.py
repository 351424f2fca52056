"""One kind of error for everything a user can mend: one line that names the place and the remedy."""

import os
import re
import select
import signal
import sys
from collections.abc import Callable
from types import FrameType

INTERRUPTED = 130  # exit status: 128 and the number of SIGINT, as shells have it
UNREAD = 128 + signal.SIGPIPE


# What a terminal obeys in place of showing it: C0 and C1 controls but line ends and tabs, and marks that reverse the
# order of what is read (Boucher and Anderson, arXiv:2111.00169).
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class UserError(Exception):
    """Bad input, a damaged file, a full disk: the message names the file, line or key, and the remedy."""


def printable(text: str) -> str:
    """The text with an escape, as \\x1b, for each character that a terminal would obey."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _one_line(text: str) -> str:
    """Of a message that another library's has broken, or a name with a line end in it."""
    return re.sub(r"\s*[\n\r\x85\u2028\u2029]\s*", " ", text.strip())


def note(text: str) -> None:
    """Say something that a user should know of, in one line of stderr."""
    print(f"note: {printable(' '.join(text.split()))}", file=sys.stderr)


def stop_signals() -> list[int]:
    """SIGINT, SIGTERM, and SIGHUP of a terminal that is closed, but under nohup, which ignores it."""
    hangup = [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN)
    return [signal.SIGINT, signal.SIGTERM, *hangup]


def command(main: Callable[[], None]) -> None:
    """Run a command line; a UserError becomes one red line and exit status 2, never a traceback.

    SIGTERM and SIGHUP end it as Ctrl-C does: by an exception, so that half-written files are removed. Output that
    nobody reads any more, as after `| head`, ends it without a word. File names that are no Unicode are printed with
    escapes in place of what cannot be encoded.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this, as some daemons do
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as the process lives
    sys.stdout.reconfigure(errors="backslashreplace")
    for number in stop_signals():
        signal.signal(number, signal.default_int_handler)
    from rich.console import Console
    from rich.markup import escape

    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except UserError as error:
        Console(stderr=True).print(
            "[bold red]error:[/]", escape(printable(_one_line(str(error)))), highlight=False, soft_wrap=True
        )
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("[yellow]interrupted[/]")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        if not reader_left():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still to be flushed
        sys.exit(UNREAD)


def reader_left() -> bool:
    """Whether whoever read our output is gone, as after `| head`."""
    output = select.poll()
    output.register(1, 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


def leave_at_once(number: int, frame: FrameType | None) -> None:
    """Handler of stop_signals() during imports, where an exception would end in a traceback of another library."""
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)
