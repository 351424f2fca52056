"""One whole microbatch by the floor and by the chosen implementations, from the same weights.

Both are compared with the floor in float32: loss, norm of the gradient and each tensor's gradient may be at most twice
as far from it as the floor's own are. Of a tensor that is the length of the difference beside its own, which a wrong
size shows as a wrong direction (cosine) does. Implementations asked for by name run on both sides. AdamW has no part in
a pass; its judge has seen its own updates.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from cramfast.batches.feed import to_device, training_source
from cramfast.batches.loader import Batch
from cramfast.config import TrainConfig
from cramfast.kernels import dispatch
from cramfast.model.electra import Discriminator
from cramfast.model.encoder import Encoder
from cramfast.optim.adamw import AdamW, LossScale
from cramfast.optim.make import make_optimizer
from cramfast.qualify.judge import whole_float32
from cramfast.qualify.regime import ragged
from cramfast.qualify.verdict import Verdict, settle
from cramfast.text.specials import FIRST_WORD, MASK

CLOSE = 1e-3  # of a gradient's length: says nothing, as between two orders of adding up in float32
FARTHER = 2.0  # than the floor; as for a single operator
HALVINGS = 24  # of the loss scale, until the floor's own gradient is finite
UNSEEN = ("adamw",)

# Stages of which no operator is to be blamed: drawing weights, compiling and planning the microbatches, passes of stock
# PyTorch. The first of each compiles and allocates.
PARTS = MODEL, TEXT, FLOOR, WIDE = "model", "text", "pass of the floor", "pass in float32"
RUN = "a whole microbatch"  # the stage of one operator

Tell = Callable[[str, str], None]  # with an operator's name or "", and a stage


def untold(name: str, stage: str) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class Pass:
    """Loss and gradient of a microbatch; `gradient` is (P,) float32 on the host, the loss scale taken out."""

    loss: float
    gradient: Tensor

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and bool(self.gradient.isfinite().all())

    @property
    def norm(self) -> float:
        return float(torch.linalg.vector_norm(self.gradient, dtype=torch.float64))


class Comparison:
    """The floor's pass and its truth, for a model, a batch and a loss scale.

    Args:
        model, optimizer: with an empty flat gradient, which is empty again afterwards; no weight is changed.
        verdicts: what is settled in this process, and is again after every pass.
        tell: called before each pass.
    """

    def __init__(
        self, model: nn.Module, optimizer: AdamW, batch: Batch, scale: float, verdicts: list[Verdict],
        tell: Tell = untold,
    ):  # fmt: skip
        self.model, self.optimizer, self.batch, self.verdicts = model, optimizer, batch, verdicts
        self.tell = tell
        flat = optimizer.flat
        self.dtype = torch.float32 if flat.half is None else flat.half.dtype
        self.device = flat.master.device
        for _ in range(HALVINGS):
            tell("", FLOOR)
            self.scale = scale
            self.floor = self.run([])
            if self.floor.finite:
                break
            scale /= 2  # as training does with it
        tell("", WIDE)
        with in_float32(model, optimizer), whole_float32(), dispatch.using("all", "auto", device=self.device.type):
            self.true = self.run([])

    def run(self, taken: list[Verdict]) -> Pass:
        """One pass with these in place of the floor."""
        settle([*taken, *(v.on_floor(v.reason) for v in self.verdicts if v not in taken)], self.device.type, self.dtype)
        flat = self.optimizer.flat
        try:
            loss = self.model.loss(self.batch)
            loss.backward(torch.full_like(loss, self.scale))
            return Pass(float(loss.detach()), flat.grad.cpu() / self.scale)
        finally:
            flat.grad.zero_()
            settle(self.verdicts, self.device.type, self.dtype)

    def departure(self, found: Pass) -> str:
        """In what a pass departs from the floor; "" where it agrees."""
        if not self.floor.finite:
            return ""  # weights or text are beyond repair, and the run's own rule about such updates stands
        if not found.finite:
            return f"loss {found.loss:.4g} and norm {found.norm:.3g}, which the floor keeps finite"
        slack = max(torch.finfo(self.dtype).eps / 4, 1e-5)
        for what, value, floor, true in (
            ("loss", found.loss, self.floor.loss, self.true.loss),
            ("norm of the gradient", found.norm, self.floor.norm, self.true.norm),
        ):
            if abs(value - true) > FARTHER * abs(floor - true) + slack * abs(true):
                return f"{what} {value:.6g}, the floor's {floor:.6g}, in float32 {true:.6g}"
        flat = self.optimizer.flat
        views = (flat.views(each.gradient) for each in (found, self.floor, self.true))
        for (name, ours), (_, floor), (_, true) in zip(*views, strict=True):
            off, allowed = distance(ours, true), FARTHER * distance(floor, true) + CLOSE
            if off > allowed:
                return f"gradient of {name} off by {off:.2g} of its length, allowed {allowed:.2g}"
        return ""

    def departed(self, one_by_one: bool = False) -> dict[str, str]:
        """Operator -> in what it departs, of those that have to go back to the floor; nothing where all agree.

        Args:
            one_by_one: add one operator after the other even if all together agree, or were never tried.
        """
        chosen = [v for v in self.verdicts if v.replaces_floor and v.op not in UNSEEN]
        if not chosen:
            return {}
        if not one_by_one:
            self.tell("", RUN)
            if not (whole := self.departure(self.run(chosen))):
                return {}
        kept: list[Verdict] = []
        found: dict[str, str] = {}
        for verdict in chosen:
            self.tell(verdict.name, RUN)
            if departure := self.departure(self.run([*kept, verdict])):
                found[verdict.name] = departure
            else:
                kept.append(verdict)
        if not found and not one_by_one:  # all at once it was wrong, one by one it is not: none is to be trusted
            return {verdict.name: whole for verdict in chosen}
        return found


def distance(gradient: Tensor, true: Tensor) -> float:
    """Length of the difference beside the length of the truth; 0 where both are zero."""
    gradient, true = gradient.double(), true.double()
    length, difference = float(torch.linalg.vector_norm(true)), float(torch.linalg.vector_norm(gradient - true))
    if not difference:
        return 0.0
    return difference / length if length else math.inf


@contextlib.contextmanager
def in_float32(model: nn.Module, optimizer: AdamW) -> Iterator[None]:
    """Inside, the matrices are float32 copies of their half-precision values; afterwards what they were."""
    half = {name: p.data for name, p in model.named_parameters() if p.dtype != torch.float32}
    named = dict(model.named_parameters())
    try:
        for name, stored in half.items():
            named[name].data = stored.float()
        yield
    finally:
        for name, stored in half.items():
            named[name].data = stored


def of_new_model(
    config: TrainConfig, prepared: Path | None, verdicts: list[Verdict], one_by_one: bool, tell: Tell = untold
) -> dict[str, str]:
    """Comparison.departed() for the run's first weights and its first microbatch, or one of random words without text;
    in microbatches of half the size, a quarter, ... where float32 finds no room."""
    tell("", MODEL)
    torch.manual_seed(config.seed)
    with torch.device(config.device):  # drawn there, which of a large model a CPU takes many seconds for
        model = (Discriminator if config.objective == "rtd" else Encoder)(config.model)
    model.z_loss = config.z_loss
    optimizer = make_optimizer(config, model)
    scale = LossScale.START if config.dtype == "float16" else 1.0
    for size in sizes(config.microbatch_tokens, config.sequence_len):
        tell("", TEXT)
        try:
            batch = first_batch(config, prepared, size)
            return Comparison(model, optimizer, batch, scale, verdicts, tell).departed(one_by_one)
        except torch.OutOfMemoryError:
            optimizer.flat.grad.zero_()
        torch.cuda.empty_cache()
    raise torch.OutOfMemoryError(f"a microbatch of {size} tokens in float32")


def sizes(tokens: int, least: int) -> Iterator[int]:
    """`tokens`, half of it, ... down to the least that makes sense."""
    while tokens >= least:
        yield tokens
        tokens //= 2


def first_batch(config: TrainConfig, prepared: Path | None, tokens: int) -> Batch:
    """The run's first microbatch in this size, on its device."""
    batch = random_batch(config, tokens)
    if prepared:
        batch = training_source(config, prepared, tokens).batch(0, 0, config.mask_fraction)
    return to_device(batch, torch.device(config.device))


def random_batch(config: TrainConfig, tokens: int) -> Batch:
    """Random words in sequences of many lengths, where there is no text."""
    generator = torch.Generator().manual_seed(config.seed)
    lengths = ragged(tokens, min(config.sequence_len, tokens // 2))
    ids = torch.randint(FIRST_WORD, config.model.vocab_size, (tokens,), generator=generator)
    masked = torch.randperm(tokens, generator=generator)[: max(1, round(config.mask_fraction * tokens))].sort()[0]
    target = ids[masked]
    ids[masked] = MASK
    offsets = torch.tensor([0, *lengths]).cumsum(0).clamp(max=tokens).int()
    batch = Batch(ids.int(), offsets, masked, target, config.sequence_len, tokens)
    return replace(batch, tokens=int(offsets[-1]))
