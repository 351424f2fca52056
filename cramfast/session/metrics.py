"""What a run shows and writes while it trains: metrics.jsonl, TensorBoard, a progress line, the matmul peak."""

import contextlib
import errno
import json
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cramfast.errors import UserError
from cramfast.runtime.distributed import Team
from cramfast.runtime.stopwatch import Stopwatch
from cramfast.session import checkpoint
from cramfast.session.budget import Progress
from cramfast.session.record import parse_row

# Large enough to hide launch and packing, small enough for a fraction of a second.
PEAK_SIZE = {"cpu": 2048, "cuda": 8192}
PEAK_ATTEMPTS = 3
STEADY = 1.15  # repeats on a quiet machine lie within a few percent; one busy core of two makes it 1.5 and more
COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # far beyond any cache
PLAIN_INTERVAL_S = 10.0  # between lines where no terminal can redraw one


class MatmulPeak(NamedTuple):
    """FLOP/s of a matmul, and whether other work on the machine disturbed every attempt to measure it."""

    flops: float
    busy: bool


def measure_matmul_peak(dtype: torch.dtype, device: torch.device) -> MatmulPeak:
    """The best of a few large square matmuls: the peak that MFU refers to.

    Where the machine does other work meanwhile, it is measured again, three times in all: the threads got less of
    their cores than they asked for, or the repeats differ.
    """
    size = PEAK_SIZE.get(device.type, 2048)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b  # the first packs and compiles
    best, busy = math.inf, True
    for _ in range(PEAK_ATTEMPTS):
        seconds, share = _timed(lambda: a @ b, device)
        best = min(best, *seconds)
        busy = statistics.median(seconds) > STEADY * min(seconds) or share < 1 / STEADY
        if not busy:
            break
    return MatmulPeak(2 * size**3 / best, busy)


def _timed(work: Callable[[], object], device: torch.device) -> tuple[list[float], float]:
    """(seconds of each of six repeats, share of this process's threads that the cores worked on; 1 on a GPU)."""
    seconds = []
    cores = time.process_time()
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    cores = time.process_time() - cores
    return seconds, cores / (sum(seconds) * torch.get_num_threads()) if device.type == "cpu" else 1.0


def measure_copy_bandwidth(device: str) -> float:
    """Bytes read plus bytes written a second by torch's copy of a buffer far beyond any cache, median of seven."""
    size = COPY_BYTES[device]
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / statistics.median(Stopwatch(device).seconds(lambda: target.copy_(source), 7))


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what was enqueued; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class MetricsLog:
    """metrics.jsonl and TensorBoard of one run folder; opened again on resume, it drops rows beyond `step`.

    Attributes:
        evaluated: the step of the last held-out evaluation, None before the first.

    Raises, from every method:
        UserError: the disk refused; what was written before is complete lines.
    """

    def __init__(self, run_dir: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter  # half a second to import, needed only by a training run

        self.path = run_dir / "metrics.jsonl"
        with self.refusals_named():
            self.evaluated = truncate(self.path, step) if self.path.exists() else None
            self.file = self.path.open("ab", buffering=0)  # nothing may wait in a buffer for a kill
            self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def row(self, row: dict[str, Any]) -> None:
        """Write one step or one evaluation; `step` and `tokens` are its places on the axes."""
        self.write(row)
        with self.refusals_named():
            for key, value in row.items():
                if key not in ("step", "tokens") and math.isfinite(value):
                    self.board.add_scalar(key, value, row["step"])

    def evaluation(self, progress: Progress, loss: float, accuracy: float, **more: float) -> dict[str, float]:
        """Write a held-out evaluation, `more` figures of it included; return its figures."""
        spent = {key: getattr(progress, key) for key in ("step", "tokens", "flops", "seconds")}
        figures = {"heldout_loss": loss, "heldout_accuracy": accuracy} | more
        self.row(spent | figures)
        self.evaluated = progress.step
        return figures

    def write(self, row: dict[str, Any]) -> None:
        """Write any row; a number that is not finite becomes null, because JSON has none."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        line = json.dumps(finite).encode() + b"\n"
        with self.refusals_named():
            if self.file.write(line) < len(line):  # the disk took a part: the next resume cuts it off
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        """Force the rows to disk, before a checkpoint that counts on them."""
        with self.refusals_named():
            os.fsync(self.file.fileno())

    @contextlib.contextmanager
    def refusals_named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path.parent}: metrics cannot be written ({error.strerror or error}); "
                f"{checkpoint.kept(self.path.parent)} — free disk space, then --resume {self.path.parent}"
            ) from None

    def __enter__(self) -> "MetricsLog":
        self.hook, threading.excepthook = threading.excepthook, self.quiet_board
        return self

    def quiet_board(self, thrown: threading.ExceptHookArgs) -> None:
        """What the disk refuses TensorBoard's thread is raised once more by its writer, so its traceback is one too
        many."""
        if not (thrown.exc_type and issubclass(thrown.exc_type, OSError)):
            self.hook(thrown)

    def __exit__(self, kind, *_) -> None:
        threading.excepthook = self.hook
        self.file.close()
        try:
            with self.refusals_named():
                self.board.close()
        except UserError:
            if kind is None:  # else the error that ends the run already says it
                raise


class NoLog(MetricsLog):
    """What a process keeps that is not the first of several: nothing but the step of the last evaluation."""

    def __init__(self, evaluated: int | None):
        self.evaluated = evaluated

    def row(self, row: dict[str, Any]) -> None: ...

    def write(self, row: dict[str, Any]) -> None: ...

    def sync(self) -> None: ...

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(self, *exception) -> None: ...


def open_log(run_dir: Path, step: int, team: Team) -> MetricsLog:
    """The run's log; only process 0 writes."""
    log = MetricsLog(run_dir, step) if team.rank == 0 else None
    evaluated = team.first(lambda: log.evaluated)
    return log or NoLog(evaluated)


def truncate(path: Path, step: int) -> int | None:
    """Cut metrics.jsonl before the first row beyond `step`, or before a line that a kill left unfinished.

    Returns:
        The step of the last held-out evaluation that stays, None where there is none.
    """
    end, evaluated = 0, None
    with path.open("rb") as file:
        for line in file:
            row = parse_row(line)
            if row is None or row.get("step", 0) > step or not line.endswith(b"\n"):
                break
            end += len(line)
            evaluated = row["step"] if "heldout_loss" in row else evaluated
    os.truncate(path, end)
    return evaluated


class Display:
    """One redrawn line on a terminal, a plain line every ten seconds elsewhere.

    Attributes:
        evaluation: figures of the last held-out evaluation, shown beside those of every step.
    """

    def __init__(self):
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        self.bar = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:5.1f} %"),
            )
            self.bar = Bar(*columns, TextColumn("{task.fields[figures]}"), console=console)
            self.task = self.bar.add_task("training", total=1.0, figures="")
        self.evaluation: dict[str, float] = {}
        self.last_plain = -math.inf

    def __enter__(self) -> "Display":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        if self.bar:
            self.bar.stop()

    def step(self, row: dict[str, Any], fraction: float, left_s: float) -> None:
        """Show a step's row; `fraction` of the budget is spent now and about `left_s` seconds remain."""
        heldout, blimp = (self.evaluation.get(key, math.nan) for key in ("heldout_loss", "blimp_accuracy"))
        shown = f"held-out {heldout:.3f}" if math.isfinite(heldout) else "held-out –"
        shown += f"  BLiMP {blimp:.1%}" if math.isfinite(blimp) else ""
        figures = (
            f"step {row['step']}  loss {row['loss']:.3f}  {shown}  "
            f"{row['tokens_per_s']:,.0f} tokens/s  MFU {row['mfu']:.0%}  {duration(left_s)} left"
        )
        now = time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=min(1.0, fraction), figures=figures)
        elif now - self.last_plain >= PLAIN_INTERVAL_S or fraction >= 1:
            self.last_plain = now
            print(f"{min(1.0, fraction):6.1%}  {figures}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """0:09, 12:34 or 3:25:45; a question mark when unknown."""
    if not math.isfinite(seconds):
        return "?"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
