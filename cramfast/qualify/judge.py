"""Whether an implementation is right on this device: against the reference in more digits, in guarded memory, twice,
from a captured graph, and a few hundred times.

The rule for errors is that of the tests: at most twice that of eager PyTorch in the same dtype, plus one ulp of the
largest value. Eager's is the largest over all situations, beside the values there, so that where eager was lucky once
nothing that is right is turned down. A wrong row must not hide behind a large tensor: of every row half the digits must
be right, or as many as eager PyTorch has right in its worst.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

import cramfast.kernels
from cramfast.kernels import dispatch, reference
from cramfast.kernels import stock as stock_operators
from cramfast.kernels.cases import CASES, Inputs
from cramfast.qualify.candidates import promises_equal_bits
from cramfast.qualify.guard import Guard
from cramfast.qualify.regime import Situation
from cramfast.session.microbatch import capture_graph

OUTPUTS = {
    "attention": ("out",), "cross_entropy": ("loss",), "glu": ("out",), "layernorm": ("y", "stream"),
    "layernorm_glu": ("h", "stream"), "adamw": ("master", "exp_avg", "exp_avg_sq", "half", "scalars"),
}  # fmt: skip
REPEATS = 200  # of the smallest situation
REPEATED_S = 3.0, 0.3  # at most, of the smallest and of the largest
SYNCHRONIZED = 10  # runs after which the host looks
LOGITS = 1 << 25  # of the truth, held at one time
SMALL_ROW = 1e-3  # of the largest row: below that, a row's own size says nothing
Values = dict[str, Tensor]
Tell = Callable[[str], None]


class CaptureError(Exception):
    """A capture failed (__cause__), after which torch may still be in it: nothing more can be tried in this process."""


def evaluate(op: str, operators, inputs: Inputs, cotangent: float) -> Values:
    """Outputs and gradients of one pass on these inputs, which AdamW changes."""
    if op == "adamw":
        operators.adamw(**inputs)
        return {name: inputs[name] for name in OUTPUTS[op] if inputs[name] is not None}
    case = next(case for case in CASES if case.op == op)
    wanted = [name for name in case.gradients if inputs.get(name) is not None]
    leaves = {name: inputs[name].detach().requires_grad_() for name in wanted}
    outputs = case.run(operators, {**inputs, **leaves})
    behind = [_cotangent(o.shape, o.dtype, o.device, cotangent) for o in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), behind)
    named = zip(OUTPUTS[op], outputs, strict=True), zip((f"d{name}" for name in wanted), gradients, strict=True)
    return {name: value.detach() for pairs in named for name, value in pairs}


@functools.lru_cache(maxsize=16)  # also because nothing can be drawn while a graph is captured
def _cotangent(shape: torch.Size, dtype: torch.dtype, device: torch.device, size: float) -> Tensor:
    """What arrives from behind: drawn in bfloat16, so that every dtype differentiates the same function."""
    if not shape:
        return torch.full(shape, size, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(1)
    drawn = torch.randn(shape, generator=generator, device=device)
    return drawn.mul_(size).bfloat16().to(dtype)


def stock(op: str, inputs: Inputs, cotangent: float, operators=reference) -> Values:
    """evaluate() of the reference; of the loss in pieces of rows, whose logits fit any card."""
    inputs = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    if op != "cross_entropy":
        return evaluate(op, operators, inputs, cotangent)
    rows, total = max(1, LOGITS // inputs["weight"].shape[0]), (inputs["target"] >= 0).sum().clamp(min=1)
    loss, dhidden, dweight = 0.0, [], 0.0
    for hidden, target in zip(inputs["hidden"].split(rows), inputs["target"].split(rows), strict=True):
        share = float((target >= 0).sum() / total)
        piece = evaluate(op, reference, {**inputs, "hidden": hidden, "target": target}, cotangent * share)
        loss, dhidden = loss + share * piece["loss"].double(), [*dhidden, piece["dhidden"]]
        dweight = dweight + piece["dweight"].to(torch.promote_types(piece["dweight"].dtype, torch.float32))
    loss = loss.to(piece["loss"].dtype)
    return {"loss": loss, "dhidden": torch.cat(dhidden), "dweight": dweight.to(inputs["weight"].dtype)}


def widened(value, dtype: torch.dtype = torch.float64):
    """Floating-point tensors in a wider dtype."""
    if isinstance(value, dict):
        return {name: widened(item, dtype) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(widened(item, dtype) for item in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def width_of_truth(op: str, inputs: Inputs) -> torch.dtype:
    """float64; float32 for the loss in half precision. There products over the whole vocabulary are most of all work,
    up to 15 s in float64 where a card multiplies that at a 64th of its rate, and float32 has a thousand times the
    digits that are compared. Everywhere else float64 takes a second or less on any card."""
    half = op == "cross_entropy" and inputs["hidden"].dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half else torch.float64


@contextlib.contextmanager
def whole_float32() -> Iterator[None]:
    """Inside, no product of float32 is rounded to TF32, whatever the environment asks for."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class Errors:
    """Of one tensor: the largest error beside the largest value, and the largest of a row beside that row's size."""

    largest: float
    of_row: float

    def __or__(self, other: "Errors") -> "Errors":
        return Errors(max(self.largest, other.largest), max(self.of_row, other.of_row))


class Truth:
    """The reference in a wider dtype for one set of inputs, and how far from it eager PyTorch is.

    Args:
        half_sums: matmuls of this run may add up in half precision, in what is trusted too.
    """

    def __init__(self, op: str, inputs: Inputs, cotangent: float, half_sums: bool = False):
        self.op, self.inputs = op, inputs
        with whole_float32():
            self.true = stock(op, widened(inputs, width_of_truth(op, inputs)), cotangent)
        self.halvings = len(next(value for value in inputs.values() if isinstance(value, Tensor))).bit_length()
        # Of the two trusted forms only the floor's adds up as the run does, and as its rivals do.
        eager = stock(op, inputs, cotangent, stock_operators if half_sums and op == "layernorm_glu" else reference)
        self.dtypes = {name: value.dtype for name, value in eager.items()}
        self.eager = {name: errors(eager[name], true) for name, true in self.true.items()}

    def problem(self, found: Values, eager: dict[str, Errors]) -> str:
        """What is wrong with these values and where, beside eager PyTorch's errors here and elsewhere; "" when nothing
        is."""
        for name, true in self.true.items():
            value, dtype = found.get(name), self.dtypes[name]
            if value is None or (value.shape, value.dtype) != (true.shape, dtype):
                return f"gave no {name} of shape {tuple(true.shape)} in {dtype}"
            if true.numel() == 0:
                continue
            finite = true.isfinite()
            if (missing := ~value.isfinite() & finite).any():
                return f"left NaN in {name}{self.place(name, missing)}"
            if (value.isfinite() & ~finite).any():
                return f"failed {name}{self.place(name, value.isfinite() & ~finite)}: finite, and should not be"
            ulp, ours, its = torch.finfo(dtype).eps, errors(value, true), eager[name] | self.eager[name]
            if true.dim() < 2:  # few sums of many rows, where eager may be lucky: in pairs, so many roundings
                its |= Errors(ulp * self.halvings, 0.0)
            if ours.largest > (allowed := 2 * its.largest + ulp):
                difference, size = _difference(value, true), _largest(true)
                where = self.place(name, difference >= difference.max())
                return f"failed {name}{where} (error {ours.largest * size:.2g}, allowed {allowed * size:.2g})"
            if ours.of_row > (allowed := max(2 * its.of_row, ulp**0.5)):
                where = self.place(name, _of_rows(value, true) >= ours.of_row)
                return f"failed {name}{where} (error {ours.of_row:.2g} of the row, allowed {allowed:.2g})"
        return ""

    def place(self, name: str, hit: Tensor) -> str:
        """Where the first hit lies: " at length 129" of attention, else its row or entry."""
        if hit.dim() == 0:
            return ""
        index = int(hit.flatten(1).any(-1).nonzero()[0] if hit.dim() > 1 else hit.nonzero()[0])
        if self.op != "attention":
            return f" at {'row' if self.true[name].dim() > 1 else 'entry'} {index}"
        offsets = self.inputs["cu_seqlens"].tolist()
        inside = [end - start for start, end in pairwise(offsets) if start <= index < end]
        return f" at length {inside[0]}" if inside else " in rows of no sequence"


def _difference(value: Tensor, true: Tensor) -> Tensor:
    """Absolute error, 0 where the truth is not finite."""
    return (value.double() - true).abs().nan_to_num(0.0, 0.0, 0.0)


def _largest(true: Tensor) -> float:
    return float(true.abs().nan_to_num(0.0, 0.0, 0.0).max())


def _of_rows(value: Tensor, true: Tensor) -> Tensor:
    """(rows,) error of each row beside its size."""
    sizes = true.flatten(1).norm(dim=1)
    least = SMALL_ROW * sizes.max().clamp(min=torch.finfo(torch.float32).tiny)
    return _difference(value, true).flatten(1).norm(dim=1) / sizes.clamp(min=least)


def errors(value: Tensor, true: Tensor) -> Errors:
    """Of a tensor and its truth; where all of the truth is zero, beside one."""
    if true.numel() == 0:
        return Errors(0.0, 0.0)
    of_row = float(_of_rows(value, true).max()) if true.dim() > 1 else 0.0
    return Errors(float(_difference(value, true).max()) / (_largest(true) or 1.0), of_row)


class Judge:
    """Tries implementations of one operator; keeps the truth of its situations, which all of them share.

    Args:
        situations: the first is also captured and repeated.
        graph: whether the run replays a CUDA graph, so that a capture must succeed.
        repeats: of the first situation.
        half_sums: as in Truth.
    """

    def __init__(
        self, op: str, situations: list[Situation], device: str, graph: bool, repeats: int = REPEATS,
        half_sums: bool = False,
    ):  # fmt: skip
        self.op, self.situations, self.device = op, situations, torch.device(device)
        self.graph, self.repeats, self.half_sums = graph, repeats, half_sums
        self.truths: dict[tuple[str, int], Truth] = {}

    def prepare(self) -> None:
        """Compute all that candidates are compared with, so that none of them pays for it or is blamed for it."""
        _ = self.eager
        self.truth(self.situations[0], seed=1)

    def load(self, implementation: str) -> None:
        """One pass on the smallest inputs, whose result nobody looks at: the driver compiles what is PTX."""
        first = self.situations[0]
        with dispatch.using(self.op, implementation, device=self.device.type):
            evaluate(self.op, cramfast.kernels, first.make(0), first.cotangent)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @functools.cached_property
    def eager(self) -> dict[str, Errors]:
        """Errors of eager PyTorch over all situations, by tensor."""
        found: dict[str, Errors] = {}
        for situation in self.situations:
            for name, its in self.truth(situation).eager.items():
                found[name] = found.get(name, its) | its
        return found

    def truth(self, situation: Situation, seed: int = 0) -> Truth:
        key = (situation.name, seed)
        if key not in self.truths:
            self.truths[key] = Truth(self.op, situation.make(seed), situation.cotangent, self.half_sums)
        return self.truths[key]

    def problem(self, implementation: str, tell: Tell) -> str:
        """What is wrong with an implementation, "" when it qualifies; `tell` is called before every step."""
        with dispatch.using(self.op, implementation, device=self.device.type):
            for situation in self.situations:
                tell(situation.name)
                if found := self.guarded(implementation, situation):
                    return found
            first, last = self.situations[0], self.situations[-1]
            tell("capture and replay")
            if found := self.replayed(implementation, first):
                return found
            if promises_equal_bits(implementation):
                tell(f"{self.repeats} repeats")
                small_s, large_s = REPEATED_S
                return self.repeated(first, self.repeats, small_s) or self.repeated(last, self.repeats, large_s)
        return ""

    def guarded(self, implementation: str, situation: Situation) -> str:
        """Two runs in memory full of NaN between bands: right, equal, and nothing written beside or into the inputs."""
        truth, before = self.truth(situation), None
        for _ in range(2):
            guard = Guard(self.device)
            inputs = {name: guard.copy(value) for name, value in truth.inputs.items()}
            with guard.around_new_tensors():
                found = evaluate(self.op, cramfast.kernels, inputs, situation.cotangent)
            if (beside := guard.touched()) is not None:
                return f"wrote outside {name_of(beside, {**inputs, **found})}"
            if problem := self.changed(inputs, truth.inputs) or truth.problem(found, self.eager):
                return problem
            if before and promises_equal_bits(implementation) and (name := first_difference(before, found)):
                return f"gave two results of {name} in two runs"
            before = found
        return ""

    def changed(self, inputs: Inputs, original: Inputs) -> str:
        """Which input was written to, of those that are to be read only."""
        kept = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and k not in OUTPUTS[self.op]}
        name = first_difference({name: original[name] for name in kept}, kept)
        return f"wrote into its input {name}" if name else ""

    def replayed(self, implementation: str, situation: Situation) -> str:
        """The pass captured on one set of inputs, replayed on another that is copied into the same places.

        Raises:
            CaptureError: it cannot be captured.
        """
        buffers = {k: v.clone() if isinstance(v, Tensor) else v for k, v in situation.make(0).items()}
        found: Values = {}

        def work():
            found.update(evaluate(self.op, cramfast.kernels, buffers, situation.cotangent))

        work()
        replay = work
        if self.device.type == "cuda" and self.graph:
            try:
                replay = capture_graph(work)
            except Exception as error:
                raise CaptureError from error
        truth = self.truth(situation, seed=1)
        for name, value in truth.inputs.items():
            if isinstance(value, Tensor):
                buffers[name].copy_(value)
        replay()
        problem = truth.problem(found, self.eager)
        return f"{problem} when replayed on new inputs" if problem else ""

    def repeated(self, situation: Situation, times: int, seconds: float) -> str:
        """Whether many runs give the bits of the first; few wait for the one before."""
        inputs, different, expected = situation.make(0), None, None
        done, end = 0, time.monotonic() + seconds
        while done < times:
            done += 1
            again = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
            found = evaluate(self.op, cramfast.kernels, again, situation.cotangent)
            if expected is None:
                expected, different = found, torch.zeros(len(found), dtype=torch.bool, device=self.device)
                continue
            different |= torch.stack([unequal(expected[name], value) for name, value in found.items()])
            if (done % SYNCHRONIZED == 0 and bool(different.any())) or time.monotonic() > end:
                break
        hits = different.tolist()
        if not any(hits):
            return ""
        return f"gave two results of {list(expected)[hits.index(True)]} within {done} runs"


def unequal(a: Tensor, b: Tensor) -> Tensor:
    """0-d bool: whether two tensors differ in any bit but the kind of NaN."""
    return ((a != b) & ~(a.isnan() & b.isnan())).any()


def first_difference(before: Values, after: Values) -> str:
    """Name of the first tensor that differs, or "" """
    return next((name for name, value in before.items() if unequal(value, after[name])), "")


def name_of(tensor: Tensor, named: Values) -> str:
    """What a tensor is called, or what it looks like."""
    for name, value in named.items():
        if isinstance(value, Tensor) and value.data_ptr() == tensor.data_ptr():
            return name
    return f"its scratch of shape {tuple(tensor.shape)}"
