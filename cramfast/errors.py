"""One kind of error for everything a user can mend: one line that names the place and the remedy."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input, a damaged file, a full disk: the message names the file, line or key, and the remedy."""


def command(main: Callable[[], None]) -> None:
    """Run a command line; a UserError becomes one red line and exit status 2, never a traceback."""
    from rich.console import Console
    from rich.markup import escape

    try:
        main()
    except UserError as error:
        Console(stderr=True).print("[bold red]error:[/]", escape(str(error)), highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("[yellow]interrupted[/]")
        sys.exit(130)
