"""The command line: python -m cramfast.scaling {run,fit,claims,report} ..."""

from cramfast.errors import command
from cramfast.runtime.arguments import program
from cramfast.scaling import claims, fit, report, run

COMMANDS = {"run": run.Arguments, "fit": fit.Arguments, "claims": claims.Arguments, "report": report.Arguments}
WIDTH = 140  # columns where no terminal says how many it has


def main() -> None:
    """Parse, run, print."""
    import tyro
    from rich.console import Console

    arguments = tyro.extras.subcommand_cli_from_dict(COMMANDS, prog=program("scaling"))
    console = Console()
    arguments.run(console if console.is_terminal else Console(width=WIDTH))


if __name__ == "__main__":
    command(main)
