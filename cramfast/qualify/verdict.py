"""What came of the trial of one operator, and the line that says it."""

import time
from dataclasses import asdict, dataclass, field, replace

import torch

from cramfast.kernels import dispatch
from cramfast.qualify.candidates import Task, of

MARGIN = 1.05  # how much faster than the floor an implementation must be


@dataclass(frozen=True)
class Verdict:
    """What an operator runs on unasked.

    Attributes:
        op, windowed, floor: as in candidates.Task.
        implementation, reason: what runs, and why, as lines and records say it.
        problems: implementation -> what is wrong with it, "" of those that qualified.
        seconds: implementation -> median of a pass, of those that were timed, the floor among them.
        open: something was not tried or not timed, which says nothing against it: the next run tries it.
    """

    op: str
    windowed: bool
    floor: str
    implementation: str
    reason: str
    problems: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    open: bool = False

    @property
    def name(self) -> str:
        """As Task.name."""
        return Task(self.op, self.windowed, self.floor, ()).name

    @property
    def line(self) -> str:
        """ "attention cpp: qualified on this card 2026-12-01, 1.4x torch_varlen"."""
        return f"{self.name} {self.implementation}: {self.reason}"

    @property
    def replaces_floor(self) -> bool:
        """Whether something else than the floor was chosen."""
        return self.implementation != self.floor

    def on_floor(self, why: str) -> "Verdict":
        """The same operator, back on its floor."""
        return replace(self, implementation=self.floor, reason=why)

    def failed(self, why: str) -> "Verdict":
        """The operator on its floor because of what the implementation in its place did, which is remembered of it."""
        if not self.replaces_floor:
            return self
        named = f"{self.implementation} {why}"
        return replace(self.on_floor(named), problems={**self.problems, self.implementation: why})

    def json(self) -> dict:
        """Plain values, from which Verdict(**values) makes it again."""
        return asdict(self)


def decide(
    task: Task,
    problems: dict[str, str],
    seconds: dict[str, float],
    late: str = "",
    missed: dict[str, str] | None = None,
) -> Verdict:
    """The fastest of those that qualified, if it beats the floor by 5 %; else the floor.

    Args:
        problems: of those that were tried; without an entry, one was not.
        late: why the others were not, or could not be judged or timed.
        missed: the same of single ones.
    """
    why = {name: (missed or {}).get(name, late) for name in task.tried if name not in problems}
    failed = [f"{name} {problem}" for name, problem in problems.items() if problem]
    missed = [f"{name} was not tried: {reason}" for name, reason in why.items()]
    right = [name for name in task.tried if problems.get(name) == ""]
    timed = sorted((name for name in right if name in seconds), key=seconds.get) if task.floor in seconds else []
    kept = (task.op, task.windowed, task.floor)
    if timed and seconds[timed[0]] * MARGIN <= seconds[task.floor]:
        ratio = seconds[task.floor] / seconds[timed[0]]
        reason = f"qualified on this card {time.strftime('%Y-%m-%d')}, {ratio:.1f}x {task.floor}"
        return Verdict(*kept, timed[0], "; ".join([reason, *failed, *missed]), problems, seconds, bool(missed))
    slower = [f"{name} is right, but {seconds[task.floor] / seconds[name]:.2f}x as fast" for name in timed]
    untimed = [f"{name} is right, but was not timed: {late}" for name in right if name not in timed]
    reasons = [*failed, *slower, *untimed, *missed] or ["stock PyTorch; nothing else can run here"]
    return Verdict(*kept, task.floor, "; ".join(reasons), problems, seconds, bool(missed or untimed))


_in_force: list[Verdict] = []


def in_force() -> list[Verdict]:
    """What was settled last in this process."""
    return list(_in_force)


def settle(verdicts: list[Verdict], device: str, dtype: torch.dtype) -> None:
    """Let these verdicts, and no others, decide in this process."""
    _in_force[:] = verdicts
    dispatch.unsettle()
    for each in verdicts:
        for stored in {dtype, of(each.op, dtype)}:  # AdamW is dispatched by its buffers, and shown by the run's dtype
            dispatch.settle(each.op, device, stored, each.implementation, each.reason, windowed=each.windowed)


def as_flags(verdicts: list[Verdict], every: list[Verdict], asked: tuple[str, ...] = ()) -> str:
    """The --kernels line that takes stock PyTorch for these operators besides what was asked for already.

    Args:
        every: the verdicts of all operators. A pair names both forms of attention, so where their floors differ it is
            the last one, the padded form, which both can take.
    """
    pairs = dict.fromkeys(asked)
    for op in dict.fromkeys(each.op for each in verdicts):
        floors = {each.floor for each in (*verdicts, *every) if each.op == op}
        pairs[f"{op}={floors.pop() if len(floors) == 1 else dispatch.FLOOR[op][-1]}"] = None
    return f"--kernels {' '.join(pairs)}"
