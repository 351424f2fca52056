"""The stages before training on screen: a live line on a terminal, one printed line a stage elsewhere."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Stages:
    """Shows (stage, done, total) calls; total 0 stands for an unknown one. Use as a context."""

    def __init__(self):
        self.console = Console()
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),  # it may hold a folder's name
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
        )
        self.tasks: dict[str, int] = {}

    def __enter__(self) -> "Stages":
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self.bar.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not self.console.is_terminal:
            if stage not in self.tasks:
                self.tasks[stage] = 0
                self.console.print(f"  {stage}", markup=False, soft_wrap=True)
            return
        if stage not in self.tasks:
            self.tasks[stage] = self.bar.add_task(stage, total=None)
        self.bar.update(self.tasks[stage], completed=done, total=total or None)
