"""A table of scores as text cells: evaluations write it into their JSON, console, report and model card render it."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class ScoreTable:
    """Cells of one table, formatted; `notes` are sentences below it that say what may be compared."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]

    def to_json(self) -> dict:
        return asdict(self)

    def markdown(self) -> str:
        """The table under a heading of level three."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return "\n\n".join([f"### {self.title}", body, *self.notes])

    def show(self, console) -> None:
        """Print it on a rich console."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=escape(self.title), title_justify="left")
        for number, column in enumerate(self.columns):
            table.add_column(escape(column), justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*map(escape, row))
        console.print(table)
        for note in self.notes:
            console.print(escape(note), soft_wrap=True)
