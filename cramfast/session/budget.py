"""How much a run may spend, in time, tokens, FLOPs or steps, and what it has spent."""

import math
import re
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from cramfast.errors import UserError
from cramfast.session.record import parse_row

SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
UNITS_KEPT = ("steps", "tokens", "flops", "seconds")  # order of Progress.schedule_from
UNITS = {**dict.fromkeys(SECONDS, "seconds"), "tokens": "tokens", "flops": "flops", "steps": "steps"}


@dataclass
class Progress:
    """What a run has done by the end of a step; saved with every checkpoint.

    `seconds` counts training alone: no compilation, evaluation, checkpoint or pause between two sessions.
    `epoch` and `index` are the data position: the next microbatch of `microbatch_tokens`.
    """

    step: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    epoch: int = 0
    index: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    loss_scale: float = 1.0
    steady_steps: int = 0
    """Updates since the loss scale last changed."""
    microbatch_tokens: int = 0
    """Size of the microbatches; 0 in a run that has made no step, and in records of before it was kept."""
    schedule_from: tuple[float, ...] = ()
    """Steps, tokens, FLOPs and seconds after which the learning rate's schedule began anew; nothing: it never did."""

    def spent(self, unit: str) -> float:
        """So many seconds, tokens, flops or steps."""
        return self.step if unit == "steps" else getattr(self, unit)


def resized(progress: Progress, tokens: int) -> Progress:
    """The same progress, its place in the data counted in microbatches of another size.

    An epoch is packed anew for each size, so a few sequences at the seam may be seen twice or not at all.
    """
    before = progress.microbatch_tokens or tokens
    return replace(progress, index=progress.index * before // tokens, microbatch_tokens=tokens)


@dataclass(frozen=True)
class Budget:
    """An amount of one quantity; `unit` is seconds, tokens, flops or steps."""

    unit: str
    amount: float
    microbatch_tokens = 0  # whatever fits

    def fraction(self, progress: Progress) -> float:
        """Share spent, 1 or more when nothing is left."""
        return progress.spent(self.unit) / self.amount

    def schedules(self, progress: Progress) -> tuple[float, float]:
        """How far the learning rate's schedule is, and that of batch, masks and lengths: the spent fraction, but that
        one that began anew goes over what was left then, while the others stay at their ends."""
        if not progress.schedule_from:
            return (self.fraction(progress),) * 2
        began = progress.schedule_from[UNITS_KEPT.index(self.unit)]
        left = self.amount - began
        return min(1.0, (progress.spent(self.unit) - began) / left) if left > 0 else 1.0, 1.0

    def microbatches(self, progress: Progress, planned: int) -> int:
        """Microbatches of the next step: what the schedule planned."""
        return planned


@dataclass(frozen=True)
class Replay:
    """The budget of a recorded run: fractions and batch sizes are read, not measured, so that it repeats exactly.

    `microbatch_tokens` is the size that the run used, 0 where its record does not say; `anew` has, for steps under a
    schedule that had begun anew, how far that was.
    """

    fractions: tuple[float, ...]
    counts: tuple[int, ...]
    microbatch_tokens: int = 0
    anew: tuple[float | None, ...] = ()

    def fraction(self, progress: Progress) -> float:
        """Share that the recorded run had spent before this step; 1 after its last."""
        return self.fractions[progress.step] if progress.step < len(self.fractions) else 1.0

    def schedules(self, progress: Progress) -> tuple[float, float]:
        """As Budget.schedules() was in this step."""
        anew = self.anew[progress.step] if progress.step < len(self.anew) else None
        return (self.fraction(progress),) * 2 if anew is None else (anew, 1.0)

    def microbatches(self, progress: Progress, planned: int) -> int:
        """Microbatches the recorded run used in this step."""
        return self.counts[progress.step]


def parse_budget(text: str) -> Budget:
    """Read 24h, 90m, 300s, 2e9tokens, 1e15flops or 500steps.

    Raises:
        UserError: another form, or nothing to spend.
    """
    match = re.fullmatch(r"([0-9.]+(?:e[+]?[0-9]+)?)\s*([a-z]+)", text.strip().lower())
    try:
        amount, suffix = float(match[1]), match[2]
        unit = UNITS[suffix]
    except (TypeError, ValueError, KeyError):
        raise UserError(
            f"budget={text!r} is not understood — use 24h, 90m, 300s, 2e9tokens, 1e15flops or 500steps"
        ) from None
    amount *= SECONDS.get(suffix, 1.0)
    if not 0 < amount < math.inf:
        raise UserError(f"budget={text!r} is no amount to spend — use a positive, finite one")
    return Budget(unit, amount)


def read_replay(metrics: Path) -> Replay:
    """Fractions and microbatch counts of every step in a run's metrics.jsonl.

    Raises:
        UserError: no such file, steps missing from it, or microbatches that changed their size.
    """
    try:
        lines = metrics.read_text(encoding="utf-8").splitlines()
    except OSError:
        raise UserError(f"{metrics}: not found — --replay takes the folder of a finished run") from None
    size, sizes, rows = 0, set(), []
    for row in takewhile(bool, map(parse_row, lines)):  # up to a line that a kill left unfinished
        size = row["run"].get("microbatch_tokens", 0) if "run" in row else size
        if row.keys() >= {"step", "fraction", "microbatches"}:
            rows.append(row)
            sizes.add(size)
    if not rows:
        raise UserError(f"{metrics}: no step is recorded there — --replay takes the folder of a finished run")
    if [row["step"] for row in rows] != list(range(1, len(rows) + 1)):
        raise UserError(f"{metrics}: steps are missing — the record of this run is damaged and cannot be replayed")
    if len(sizes) > 1:
        raise UserError(
            f"{metrics}: memory ran out in that run and its microbatches became smaller on the way, which a replay "
            f"cannot repeat — train anew with --microbatch-tokens {min(sizes)}"
        )
    return Replay(
        tuple(row["fraction"] for row in rows),
        tuple(row["microbatches"] for row in rows),
        sizes.pop(),
        tuple(row.get("schedule") for row in rows),
    )
