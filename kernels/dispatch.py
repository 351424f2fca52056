"""Which implementation of an operator runs, and why: IMPLEMENTATIONS lists them all, choose() decides.

The rule (docs/decisions/0016): on a CPU the C++ kernels. On a GPU what is asked for; else what has been settled in this
process (settle(): qualified on this very card); else the floor, stock PyTorch's own, which needs no measurement. There
is no silent fallback: every choice has a reason, which `python -m cramfast.doctor` and the first lines of a run show,
and what is asked for and cannot run is an error.
"""

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from cramfast.kernels import emulated, extension, obstacles, peers, reference, stock
from cramfast.kernels.obstacles import NO_GPU, PARTS, Target, name_of

MEASURED = Path(__file__).with_name("measured.json")


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    Attributes:
        obstacle: target -> why it cannot run there, and the remedy if there is one; "" when it can.
        function: takes the public function's arguments and its place, gradients included. None: kernels below
            torch.ops.cramfast, which launcher() finds.
    """

    obstacle: Callable[[Target], str]
    function: Callable | None = None


@dataclass(frozen=True)
class Choice:
    """The implementation of `op` and the reason for it; `obstacle` says why what was asked for cannot run."""

    op: str
    device: str
    dtype: str
    implementation: str
    reason: str
    obstacle: str = ""


_CPP, _TRITON, _EMULATED = map(Implementation, (obstacles.cpp, obstacles.triton, obstacles.emulated))


# The floor of an operator: the first of these that can run. Stock PyTorch, trusted without having been measured.
FLOOR: dict[str, tuple[str, ...]] = {"attention": ("torch_varlen", "torch_efficient", "padded")}
FUSED = "_triton"  # ends the name of a floor's form before which our Triton kernel rotates queries and keys
NEVER_UNASKED = ("reference", "emulated", "emulated_fused")  # definitions and tests


def _plain(function: Callable) -> Implementation:
    return Implementation(obstacles.none, function)


def _fused(obstacle: Callable[[Target], str], function: Callable) -> Implementation:
    return Implementation(
        lambda target: obstacle(target) or obstacles.triton(target), functools.partial(function, fused=True)
    )


# Every implementation of every operator, by the name that --kernels and measured.json give it.
IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {
    "layernorm": {
        "cpp": _CPP,
        "triton": _TRITON,
        "apex": Implementation(obstacles.apex, peers.apex_layernorm),
        "stock": _plain(stock.layernorm),
        "reference": _plain(reference.layernorm),
        "emulated": _EMULATED,
    },
    "glu": {
        "cpp": _CPP,
        "triton": _TRITON,
        "stock": _plain(stock.glu),
        "reference": _plain(reference.glu),
        "emulated": _EMULATED,
    },
    "layernorm_glu": {
        "cpp": _CPP,
        "cpp_fused": Implementation(obstacles.cpp_fused),
        "triton": _TRITON,
        "stock": _plain(stock.layernorm_glu),
        "reference": _plain(reference.layernorm_glu),
        "emulated": _EMULATED,
        "emulated_fused": Implementation(obstacles.emulated_fused),
    },
    "attention": {
        "cpp": _CPP,
        "flash_attn": Implementation(obstacles.flash_attn, peers.flash_attn),
        "torch_varlen": Implementation(obstacles.torch_varlen, peers.torch_varlen),
        "torch_varlen_triton": _fused(obstacles.torch_varlen, peers.torch_varlen),
        "torch_efficient": Implementation(obstacles.torch_efficient, peers.torch_efficient),
        "torch_efficient_triton": _fused(obstacles.torch_efficient, peers.torch_efficient),
        "padded": _plain(stock.padded_attention),
        "padded_triton": _fused(obstacles.none, stock.padded_attention),
        "reference": _plain(reference.varlen_attention),
        "emulated": _EMULATED,
    },
    "cross_entropy": {
        "cpp": _CPP,
        "triton": _TRITON,
        "stock": _plain(stock.masked_cross_entropy),
        "reference": _plain(reference.masked_cross_entropy),
        "emulated": _EMULATED,
    },
    "adamw": {
        "cpp": _CPP,
        "triton": _TRITON,
        "apex": Implementation(obstacles.apex_adamw),
        "stock": _plain(stock.adamw),
        "reference": _plain(reference.adamw),
        "emulated": _EMULATED,
    },
}
OPERATORS = tuple(IMPLEMENTATIONS)

_overrides: dict[tuple[str, str], str] = {}  # (op, device) -> implementation
_settled: dict[tuple[str, str, torch.dtype, bool], tuple[str, str]] = {}  # _place() -> (implementation, reason)
_picked: dict[tuple, str] = {}  # arguments of _find() -> its result
_counted_for = ""  # on_card()'s architecture


def architecture(device: str) -> str:
    """ "sm_90" of the current GPU, NO_GPU where torch sees none, or the instruction set of our build for the CPU."""
    if device != "cuda":
        return extension.cpu_isa
    if _counted_for:
        return _counted_for
    return "sm_{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else NO_GPU


def obstacle(op: str, implementation: str, device: str, dtype: torch.dtype, windowed: bool = False) -> str:
    """Why an implementation cannot run there, with the remedy; "" when it can."""
    target = Target(op, device, dtype, architecture(device), windowed)
    return IMPLEMENTATIONS[op][implementation].obstacle(target)


def choose(op: str, device: str, dtype: torch.dtype, windowed: bool = False) -> Choice:
    """The implementation that `op` takes for tensors of this device and dtype, and why."""

    def choice(implementation: str, reason: str, found: str = "") -> Choice:
        return Choice(op, device, name_of(dtype), implementation, reason, found)

    def blocked(implementation: str) -> str:
        return obstacle(op, implementation, device, dtype, windowed)

    if asked := _overrides.get((op, device)):
        return choice(asked, "asked for", blocked(asked))
    if device == "cpu":
        if found := blocked("cpp"):
            return choice("reference", f"cpp cannot: {found}")
        return choice("cpp", f"C++ for the CPU, {extension.cpu_isa}")
    if device != "cuda":
        return choice("reference", f"no kernel was built for {device}")
    if verdict := _settled.get(_place(op, device, dtype, windowed)):
        return choice(*verdict, blocked(verdict[0]))
    return choice(floor(op, device, dtype, windowed), _floor_reason(op, device, dtype, windowed))


def floor(op: str, device: str, dtype: torch.dtype, windowed: bool = False) -> str:
    """The implementation of stock PyTorch that needs no measurement there; it is never the reference."""
    names = FLOOR.get(op, ("stock",))
    return next(name for name in names if not obstacle(op, name, device, dtype, windowed))


def _floor_reason(op: str, device: str, dtype: torch.dtype, windowed: bool) -> str:
    reason = f"stock PyTorch, needs no measurement on {architecture(device)}"
    known = (*FLOOR.get(op, ("stock",)), "stock")
    waiting = [name for name in candidates(op, device, dtype, windowed) if name not in known]
    wait = "waits" if len(waiting) == 1 else "wait"
    return f"{reason}; {', '.join(waiting)} {wait} for --qualify" if waiting else reason


def candidates(op: str, device: str, dtype: torch.dtype, windowed: bool = False) -> list[str]:
    """Implementations without an obstacle there, the floor's among them, in the order in which they are worth a try.

    A hint from measured.json: as fast as on this architecture or, unmeasured there, on the nearest; then the order of
    the table. Never the reference, never what exists for tests, and of the forms of the floor with our rotation only
    that of the one which runs unasked.
    """
    rotated = {f"{name}{FUSED}" for name in FLOOR.get(op, ())} - {f"{floor(op, device, dtype, windowed)}{FUSED}"}
    names = [name for name in IMPLEMENTATIONS[op] if name not in {*NEVER_UNASKED, *rotated}]
    hint = _nearest_row(op, architecture(device), dtype)
    order = sorted(names, key=lambda name: (hint.get(name, math.inf), names.index(name)))
    return [name for name in order if not obstacle(op, name, device, dtype, windowed)]


def _nearest_row(op: str, chip: str, dtype: torch.dtype) -> dict[str, float]:
    """Relative times measured on the architecture next to this one; nothing where nothing was measured."""

    def capability(name: str) -> int:
        digits = name.removeprefix("sm_")
        return int(digits) if digits.isdigit() else 0

    rows = {
        place[1]: row
        for place, row in measured().items()
        if (place[0], place[2]) == (op, name_of(_place(op, "cuda", dtype, False)[2]))
    }
    if not rows:
        return {}
    return rows[min(rows, key=lambda name: (abs(capability(name) - capability(chip)), name))]["relative_time"]


def _place(op: str, device: str, dtype: torch.dtype, windowed: bool) -> tuple[str, str, torch.dtype, bool]:
    """Key of a verdict. AdamW's buffers are float32, whatever the dtype of the weights that the model multiplies."""
    return op, device, torch.float32 if op == "adamw" else dtype, windowed and op == "attention"


def settle(op: str, device: str, dtype: torch.dtype, implementation: str, reason: str, windowed: bool = False) -> None:
    """Take an implementation in this process wherever none is asked for; `reason` is the line that is shown for it.

    Raises:
        ValueError: no such implementation.
    """
    if implementation not in IMPLEMENTATIONS[op]:
        raise ValueError(f"kernels: unknown implementation {implementation!r} of {op}")
    _settled[_place(op, device, dtype, windowed)] = implementation, reason


def unsettle() -> None:
    """Forget every verdict."""
    _settled.clear()


@functools.cache
def measured() -> dict[tuple[str, str, str], dict]:
    """(op, architecture, dtype) -> row of measured.json, which `python -m bench.choose` writes."""
    rows = json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]
    return {(row["op"], row["architecture"], row["dtype"]): row for row in rows}


def pick(op: str, tensor: torch.Tensor, windowed: bool = False) -> tuple[str, Callable | None]:
    """Name of the implementation for a call on this tensor, and the function that takes the call's place, if any.

    Raises:
        ValueError: the implementation that was asked for cannot run on it.
    """
    device = "cuda" if _counted_for and tensor.device.type == "meta" else tensor.device.type
    key = (
        op,
        device,
        tensor.dtype,
        windowed,
        _overrides.get((op, device)),
        _settled.get(_place(op, device, tensor.dtype, windowed)),
    )
    if key not in _picked:
        _picked[key] = _find(*key)
    return _picked[key], IMPLEMENTATIONS[op][_picked[key]].function


def _find(op: str, device: str, dtype: torch.dtype, windowed: bool, *_asked_and_settled) -> str:
    choice = choose(op, device, dtype, windowed)
    if choice.obstacle:
        raise ValueError(f"kernels: {op}={choice.implementation} is not possible: {choice.obstacle}")
    return choice.implementation


# torch.compile cannot trace through files and imports; it may take the result as constant: its arguments guard it. This
# is all that torch.compiler.assume_constant_result does, but for importing dynamo and Triton, 1.6 s at every start.
_find._dynamo_marked_constant = True


def launcher(implementation: str) -> Callable:
    """What torch.ops.cramfast hands tensors to: called with a kernel's name, a tensor that says where, arguments."""
    if implementation == "triton":
        from cramfast.kernels import triton_kernels

        return triton_kernels.call
    return extension.call


def override(op: str, implementation: str, architecture: int = 860, device: str | None = None) -> None:
    """Take an implementation of one operator, or of "all" that can, on one device or on any; "auto" takes that back.

    "emulated" and "emulated_fused" run the CUDA kernels of `architecture` (750 or 860) on the CPU, thousands of times
    slower, to test them; nothing ever chooses them by itself.

    Raises:
        ValueError: an unknown operator or implementation, or one that can run nowhere, in no dtype; with the reason.
    """
    if op not in (*OPERATORS, "all"):
        raise ValueError(f"kernels: unknown operator {op!r}; one of {', '.join(OPERATORS)}, all")
    ops = OPERATORS if op == "all" else (op,)
    known = dict.fromkeys(name for one in ops for name in IMPLEMENTATIONS[one])
    if implementation not in (*known, "auto"):
        raise ValueError(f"kernels: unknown implementation {implementation!r} of {op}; one of {', '.join(known)}, auto")
    gpu = ("cuda",) if torch.cuda.is_available() else ()
    found = {
        (one, where): _obstacle_in_every_dtype(one, implementation, where)
        for one in ops
        for where in ((device,) if device else ("cpu", *gpu))
    }
    if all(found.values()):
        raise ValueError(f"kernels: {op}={implementation} is not possible: {next(iter(found.values()))}")
    for (one, where), why in found.items():
        if why:
            continue
        if implementation == "auto":
            _overrides.pop((one, where), None)
        else:
            _overrides[one, where] = implementation
        if where == "cpu":
            for part in PARTS.get(one, (one,)):
                extension.emulated.pop(part, None)
                if implementation.startswith("emulated"):
                    extension.emulated[part] = emulated.load(architecture)


def _obstacle_in_every_dtype(op: str, implementation: str, device: str) -> str:
    """Why an implementation can run on a device in no dtype at all; "" when it can."""
    if implementation == "auto":
        return ""
    if implementation not in IMPLEMENTATIONS[op]:
        return "there is none"
    found = [obstacle(op, implementation, device, dtype) for dtype in extension.storage_dtypes(device)]
    return found[0] if all(found) else ""


@contextlib.contextmanager
def using(op: str, implementation: str, **options) -> Iterator[None]:
    """override() for the length of a with block, whatever was in force before."""
    before, calls_before = dict(_overrides), dict(extension.emulated)
    try:
        override(op, implementation, **options)
        yield
    finally:
        for table, saved in ((_overrides, before), (extension.emulated, calls_before)):
            table.clear()
            table.update(saved)


@contextlib.contextmanager
def on_card(chip: str) -> Iterator[None]:
    """To count calls: tensors on "meta", without memory, take the floor of a GPU of this architecture, as "sm_86"."""
    global _counted_for
    before = (_counted_for, dict(_overrides), dict(_settled), dict(_picked))
    try:
        _counted_for = chip
        for known in (_overrides, _settled, _picked):
            known.clear()
        yield
    finally:
        _counted_for = before[0]
        for known, saved in zip((_overrides, _settled, _picked), before[1:], strict=True):
            known.clear()
            known.update(saved)


def table(device: str) -> list[Choice]:
    """The choice for every operator and storage dtype on a device."""
    return [choose(op, device, dtype) for op in OPERATORS for dtype in extension.storage_dtypes(device)]
