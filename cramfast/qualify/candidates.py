"""What is tried for each operator of a run, and in which order."""

from dataclasses import dataclass

import torch

from cramfast.config import TrainConfig
from cramfast.kernels import dispatch

# By what each can save of a step, so that what a limit of time leaves out costs least.
ORDER = ("attention", "layernorm_glu", "cross_entropy", "adamw", "layernorm", "glu")
# Begin the names of others' operators, which promise no equal bits; nor do they after a rotation of ours.
STOCK = ("torch_", "padded", "reference", "apex", "stock")
LOOP = "reference"  # the definition, not a candidate: attention as a Python loop


@dataclass(frozen=True)
class Task:
    """An operator to be settled.

    Attributes:
        windowed: local attention; a model may have both forms.
        floor: the stock implementation that runs if nothing beats it.
        tried: the others that can run here, the likely fastest first.
    """

    op: str
    windowed: bool
    floor: str
    tried: tuple[str, ...]

    @property
    def name(self) -> str:
        """The operator as lines and files name it."""
        return f"{self.op} (local)" if self.windowed else self.op


def tasks(config: TrainConfig) -> list[Task]:
    """The operators that nothing was asked for by name."""
    device, dtype = config.device, getattr(torch, config.dtype)
    ops = sorted(dispatch.OPERATORS, key=lambda op: ORDER.index(op) if op in ORDER else len(ORDER))
    return [
        task(op, device, dtype, windowed)
        for op in ops
        for windowed in ((False, True) if op == "attention" and config.model.global_every > 1 else (False,))
        if dispatch.choose(op, device, of(op, dtype), windowed).reason != "asked for"
    ]


def task(op: str, device: str, dtype: torch.dtype, windowed: bool = False) -> Task:
    """What is to be tried for one operator."""
    where = (op, device, of(op, dtype), windowed)
    floor = dispatch.floor(*where)
    tried = (name for name in dispatch.candidates(*where) if name not in (floor, LOOP))
    return Task(op, windowed, floor, tuple(tried))


def of(op: str, dtype: torch.dtype) -> torch.dtype:
    """What the operator is dispatched by: AdamW's buffers are float32, whatever the weights are stored in."""
    return torch.float32 if op == "adamw" else dtype


def promises_equal_bits(implementation: str) -> bool:
    """Whether two runs must agree bit for bit: ours, and whatever is not known to be stock."""
    return not implementation.startswith(STOCK)
