"""Steps whose loss, gradient norm and verdict are still on the device, and the clock that times them.

The loop enqueues steps on a GPU without waiting for any. At a log point, about once a second, the figures of all steps
since the one before are read in one copy; that is the only time the loop waits for the GPU. A CPU has nothing to wait
for, so there every step is a log point.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cramfast.runtime.distributed import ALONE, Team
from cramfast.session.budget import Budget, Progress, Replay
from cramfast.session.metrics import synchronize

LOG_INTERVAL_S = {"cpu": 0.0, "cuda": 1.0}  # seconds between log points
CAPACITY = 1024  # steps between two log points at most


class Clock:
    """Seconds of training since `start`, without what is done inside `stopped`; of several processes, by the first
    one's clock, which all of them ask together."""

    def __init__(self, device: torch.device, team: Team = ALONE):
        self.device, self.team = device, team
        self.start()

    def start(self) -> None:
        self.began, self.paused = time.perf_counter(), 0.0

    def elapsed(self) -> float:
        return self.team.of_first(time.perf_counter() - self.began - self.paused)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Leave out a compilation; the device is idle at both ends, so that no training hides in it."""
        synchronize(self.device)
        before = time.perf_counter()
        yield
        synchronize(self.device)
        self.paused += time.perf_counter() - before


@dataclass(frozen=True)
class Step:
    """What the host knows of a step once it is enqueued; `settings` go to its row as they are."""

    position: tuple[int, int]
    tokens: int
    flops: float
    settings: dict[str, Any]


class Figures(NamedTuple):
    """What only the device knows of a step, and its share of the time between two log points."""

    loss: float
    grad_norm: float
    skipped: bool
    seconds: float


class Ledger:
    """The steps since the last log point, in order.

    Seconds between two log points are measured by the host's clock, from the first step's start until the device has
    finished the last one, and shared out by FLOPs. In between, `ahead` gives the host's view: at most four
    microbatches (feed.Upload) further than the device.
    """

    def __init__(self, clock: Clock):
        self.clock = clock
        self.steps: list[Step] = []
        self.seconds = 0.0  # from the first of them to the host's end of the last
        self.on_device = torch.zeros(CAPACITY, 3, device=clock.device)  # a row a step: loss, norm, skipped

    def begin(self) -> None:
        """A step starts; the first one after a log point starts the clock."""
        if not self.steps:
            self.clock.start()

    def add(self, step: Step, loss: Tensor, verdict: Tensor) -> None:
        """Keep a step whose figures are still being computed.

        Args:
            step: what is known of it.
            loss: 0-d, the mean over its targets.
            verdict: (2,), the gradient's norm and whether the update was skipped: AdamW.verdict.
        """
        row = self.on_device[len(self.steps)]
        row[0] = loss
        row[1:] = verdict
        self.steps.append(step)
        self.seconds = self.clock.elapsed()

    def ahead(self, progress: Progress) -> Progress:
        """Progress as if every step since the log point that `progress` describes were done and well."""
        if not self.steps:
            return progress
        epoch, index = self.steps[-1].position
        return replace(
            progress, step=progress.step + len(self.steps), epoch=epoch, index=index,
            tokens=progress.tokens + sum(step.tokens for step in self.steps),
            flops=progress.flops + sum(step.flops for step in self.steps),
            seconds=progress.seconds + self.seconds,
        )  # fmt: skip

    def due(self, budget: Budget | Replay, progress: Progress) -> bool:
        """Whether it is time for a log point: an interval has passed, the ledger is full or the budget is spent."""
        interval = LOG_INTERVAL_S[self.clock.device.type]
        late = self.seconds >= interval or len(self.steps) == CAPACITY
        return late or budget.fraction(self.ahead(progress)) >= 1

    def read(self) -> list[tuple[Step, Figures]]:
        """Wait for the device, and hand over the steps since the last log point."""
        steps, self.steps = self.steps, []
        figures = self.on_device[: len(steps)].tolist()
        seconds = self.clock.elapsed()
        flops = sum(step.flops for step in steps)
        return [
            (step, Figures(loss, grad_norm, skipped != 0, seconds * (step.flops / flops)))
            for step, (loss, grad_norm, skipped) in zip(steps, figures, strict=True)
        ]
