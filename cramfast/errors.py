"""One kind of error for everything a user can mend: one line that names the place and the remedy."""

import os
import select
import signal
import sys
from collections.abc import Callable
from types import FrameType

INTERRUPTED = 130  # exit status: 128 and the number of SIGINT, as shells have it
UNREAD = 128 + signal.SIGPIPE


class UserError(Exception):
    """Bad input, a damaged file, a full disk: the message names the file, line or key, and the remedy."""


def command(main: Callable[[], None]) -> None:
    """Run a command line; a UserError becomes one red line and exit status 2, never a traceback.

    SIGTERM ends it as Ctrl-C does: by an exception, so that half-written files are removed. Output that nobody reads
    any more, as after `| head`, ends it without a word. File names that are no Unicode are printed with escapes in
    place of what cannot be encoded.
    """
    sys.stdout.reconfigure(errors="backslashreplace")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    from rich.console import Console
    from rich.markup import escape

    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except UserError as error:
        Console(stderr=True).print("[bold red]error:[/]", escape(str(error)), highlight=False, soft_wrap=True)
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
    """Handler of SIGINT and SIGTERM during imports, where an exception would end in a traceback of another library."""
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)
