"""One training run after the other, each in a process of its own, with a bar over all of them."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from cramfast.config import TrainConfig
from cramfast.errors import UserError
from cramfast.runtime.interrupt import Interrupt
from cramfast.scaling import table
from cramfast.scaling.plan import flags
from cramfast.session.budget import Progress as Spent
from cramfast.session.budget import parse_budget
from cramfast.session.metrics import duration

POLL_S = 0.5
TAIL_BYTES = 4096  # of metrics.jsonl: more than its longest row


@dataclass(frozen=True)
class Job:
    """A run to do: where, with what, for about how long; `labels` go to its row of the table."""

    name: str
    config: TrainConfig
    estimate_s: float
    labels: dict[str, Any]
    switches: tuple[str, ...] = ()


class Plain:
    """A line before and after each run, where no terminal can redraw a bar."""

    def __init__(self, console: Console):
        self.console = console

    def __enter__(self) -> "Plain":
        return self

    def __exit__(self, *exception) -> None:
        pass

    def show(self, done_s: float, total_s: float, left_s: float, text: str, new: bool) -> None:
        if new:
            self.console.print(f"{done_s / total_s:6.1%}  {text}  about {duration(left_s)} left", soft_wrap=True)


class Bar(Plain):
    """One redrawn line."""

    def __init__(self, console: Console):
        percentage = TextColumn("{task.percentage:5.1f} %")
        self.bar = Progress(
            BarColumn(bar_width=24), percentage, TextColumn("{task.description}"), console=console, transient=True
        )
        self.task = self.bar.add_task("", total=1.0)

    def __enter__(self) -> "Bar":
        self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self.bar.stop()

    def show(self, done_s: float, total_s: float, left_s: float, text: str, new: bool) -> None:
        self.bar.update(self.task, completed=done_s / total_s, description=f"{text}  {duration(left_s)} left")


class Runner:
    """Does the jobs that have no row yet, in order, and appends a row as soon as one is finished.

    Args:
        folder: of the plan; runs lie in folder/runs, their output in folder/logs.
        name: of the table.
        keep_checkpoints: else those of a finished run are removed.
    """

    def __init__(self, folder: Path, console: Console, name: str = table.TABLE, keep_checkpoints: bool = False):
        self.folder, self.console, self.name, self.keep = folder, console, name, keep_checkpoints
        self.display = Bar(console) if console.is_terminal else Plain(console)

    def work(self, jobs: list[Job]) -> list[dict[str, Any]]:
        """All rows of these jobs, in their order.

        Raises:
            UserError: a run failed; everything finished before is in the table.
        """
        rows = {row["name"]: row for row in table.read_table(self.folder, self.name)}
        missing = [job for job in jobs if job.name not in rows]
        total = sum(job.estimate_s for job in jobs) or 1.0
        done = total - sum(job.estimate_s for job in missing)
        spent = estimated = 0.0
        with self.display as display:
            for job in missing:
                pace = spent / estimated if estimated else 1.0
                title = f"run {jobs.index(job) + 1} of {len(jobs)}: {job.name}"
                display.show(done, total, pace * (total - done), title, new=True)
                started = time.perf_counter()
                for fraction, loss in self.train(job):
                    ahead, text = done + fraction * job.estimate_s, f"{title}  loss {loss:.3f}"
                    display.show(ahead, total, pace * (total - ahead), text, new=False)
                rows[job.name] = row = self.finish(job)
                spent, estimated = spent + time.perf_counter() - started, estimated + job.estimate_s
                done += job.estimate_s
                text = f"{job.name}: held-out loss {row['loss']:.4f}, {row['tokens_per_s']:,.0f} tokens/s"
                self.console.print(text, highlight=False, soft_wrap=True)
        return [rows[job.name] for job in jobs]

    def train(self, job: Job) -> Iterator[tuple[float, float]]:
        """Start or go on with a run, and yield (share done, training loss) until it is finished.

        Raises:
            UserError: it failed, or was stopped from outside.
        """
        run_dir = self.folder / "runs" / job.name
        begun = (run_dir / "config.json").exists()
        if begun and last_row(run_dir)[0] >= 1:  # finished, but killed before its row was written
            return
        words = ["--resume", str(run_dir)] if begun else [*flags(job.config), "--run-dir", str(run_dir)]
        command = [sys.executable, "-m", "cramfast.scaling.switched", ",".join(job.switches) or "-", *words]
        log = self.folder / "logs" / f"{job.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as output:
            # In a session of its own a Ctrl-C does not reach it as well: a second signal would end it without saving.
            process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
            try:
                with Interrupt() as interrupt:
                    while process.poll() is None and not interrupt.requested:
                        time.sleep(POLL_S)
                        yield last_row(run_dir)
            finally:
                if process.poll() is None:
                    process.terminate()  # the trainer saves a checkpoint, then ends
                    process.wait()
        if process.returncode in (130, -signal.SIGTERM):  # before its first step it has nothing to save
            raise UserError(f"{job.name} was stopped and its state is saved — the same command goes on with it")
        if process.returncode:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
            reason = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1])
            raise UserError(f"{job.name}: its training failed ({reason}) — {log} has all of its output")

    def finish(self, job: Job) -> dict[str, Any]:
        """Write the row of a finished run and remove what is no longer needed."""
        run_dir = self.folder / "runs" / job.name
        row = table.row_of(run_dir, {"name": job.name} | job.labels)
        table.append(self.folder, row, self.name)
        if not self.keep:
            shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
        return row


def last_row(run_dir: Path) -> tuple[float, float]:
    """(share of the budget spent, training loss) by the newest step in a run's record; (0, nan) before the first.

    A share of 1 is given only once the final evaluation is there.
    """
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return 0.0, float("nan")
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().splitlines()
    rows = list(filter(None, map(_row, lines)))
    steps = [row for row in rows if "microbatches" in row]
    if not steps:
        return 0.0, float("nan")
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    spent = {key: steps[-1][key] for key in ("step", "tokens", "flops", "seconds")}
    share = parse_budget(config["budget"]).fraction(Spent(**spent))
    final = rows[-1].get("step") == steps[-1]["step"] and "heldout_loss" in rows[-1]
    return (share if final else min(share, 0.999)), steps[-1]["loss"] or float("nan")


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # cut off, at the start of the tail or by a kill
        return None
    return row if isinstance(row, dict) else None
