"""One Case per operator: its inputs, shapes, bytes and FLOPs. Tests and benchmarks walk this list, so a new operator
is tested and measured by adding a Case."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Inputs = dict[str, object]


@dataclass(frozen=True)
class Case:
    """An operator as tests and benchmarks see it.

    Attributes:
        op: name in kernels/dispatch.py.
        make: shape, dtype, seed -> inputs; float tensors are the points of evaluation.
        run: module with the operators (cramfast.kernels or reference), inputs -> tuple of output tensors.
        gradients: names of the inputs to differentiate.
        test_shapes, bench_shapes: keyword sets for `make`.
        bytes_moved, flops: shape, dtype -> least traffic and arithmetic of forward plus backward.
    """

    op: str
    make: Callable[..., Inputs]
    run: Callable[[object, Inputs], tuple[torch.Tensor, ...]]
    gradients: tuple[str, ...]
    test_shapes: tuple[Mapping, ...]
    bench_shapes: tuple[Mapping, ...]
    bytes_moved: Callable[..., int]
    flops: Callable[..., int]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(*shape: int, dtype: torch.dtype, generator: torch.Generator, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def _size(dtype: torch.dtype) -> int:
    return torch.empty(0, dtype=dtype).element_size()


def _make_layernorm(N, D, dtype, seed, residual=True, bias=False) -> Inputs:
    g = _generator(seed)
    return {
        "x": _normal(N, D, dtype=dtype, generator=g) + 0.5,
        "weight": 1 + 0.3 * _normal(D, dtype=torch.float32, generator=g),
        "bias": _normal(D, dtype=torch.float32, generator=g) if bias else None,
        "residual": _normal(N, D, dtype=dtype, generator=g) if residual else None,
    }


def _run_layernorm(operators, inputs):
    return operators.layernorm(**inputs)


def _make_glu(N, F, dtype, seed, activation="gelu") -> Inputs:
    return {"x": _normal(N, 2 * F, dtype=dtype, generator=_generator(seed), scale=2.0), "activation": activation}


def _run_glu(operators, inputs):
    return (operators.glu(**inputs),)


def _make_layernorm_glu(N, D, F, dtype, seed, residual=True, bias=False, activation="gelu") -> Inputs:
    inputs = _make_layernorm(N, D, dtype, seed, residual, bias)
    weight = _normal(2 * F, D, dtype=dtype, generator=_generator(seed + 1), scale=D**-0.5)
    return {
        "x": inputs["x"],
        "norm_weight": inputs["weight"],
        "norm_bias": inputs["bias"],
        "weight_in": weight,
        "activation": activation,
        "residual": inputs["residual"],
    }


def _run_layernorm_glu(operators, inputs):
    return operators.layernorm_glu(**inputs)


def rotary_table(length: int, head_width: int, theta: float = 10000.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) of position * theta^(-2 j / K), each (length, K / 2) float32. Source: Su et al., arXiv:2104.09864."""
    frequency = theta ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def ragged_lengths(tokens: int, longest: int, seed: int = 0, mean: float = 70.0) -> tuple[int, ...]:
    """Log-normal lengths from 1 to `longest` that add up to `tokens`: the mixture of paragraphs of real text."""
    g = _generator(seed)
    lengths: list[int] = []
    left = tokens
    while left > 0:
        length = int(math.exp(float(torch.randn((), generator=g)) * 0.7 + math.log(mean)))
        length = min(max(length, 1), longest, left)
        lengths.append(length)
        left -= length
    return tuple(lengths)


def _make_attention(lengths, H, K, dtype, seed, rotary=True, window=None, tail=0) -> Inputs:
    N = sum(lengths) + tail
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    longest = max(lengths, default=0)
    return {
        "qkv": _normal(N, 3, H, K, dtype=dtype, generator=_generator(seed)),
        "cu_seqlens": offsets,
        "max_seqlen": longest,
        "rotary": rotary_table(longest, K) if rotary else None,
        "window": window,
    }


def _run_attention(operators, inputs):
    return (operators.varlen_attention(**inputs),)


def _make_cross_entropy(M, D, V, dtype, seed, ignored=0, z_loss=0.0) -> Inputs:
    g = _generator(seed)
    target = torch.randint(V, (M,), generator=g)
    target[:ignored] = -100
    return {
        "hidden": _normal(M, D, dtype=dtype, generator=g),
        "weight": _normal(V, D, dtype=dtype, generator=g, scale=D**-0.5),
        "target": target,
        "z_loss": z_loss,
    }


def _run_cross_entropy(operators, inputs):
    return (operators.masked_cross_entropy(**inputs),)


def _make_adamw(
    P, dtype, seed, half=True, segments=3, step=0.0, scale=1.0, max_norm=0.5, nonfinite=False, one_lr=True
) -> Inputs:
    g = _generator(seed)
    ends = torch.tensor([P * (i + 1) // segments for i in range(segments)])
    grad = _normal(P, dtype=torch.float32, generator=g)
    if nonfinite:
        grad[P // 2] = float("nan")
    return {
        "master": _normal(P, dtype=torch.float32, generator=g),
        "grad": grad,
        "exp_avg": _normal(P, dtype=torch.float32, generator=g, scale=0.1 if step else 0.0),
        "exp_avg_sq": _normal(P, dtype=torch.float32, generator=g, scale=0.1 if step else 0.0).square(),
        "half": torch.zeros(P // 2, dtype=torch.bfloat16) if half else None,
        "segment_end": ends,
        "segment_decay": torch.tensor([0.1, 0.0, 0.01, 0.0]).repeat(-(-segments // 4))[:segments],
        "segment_lr": torch.ones(segments) if one_lr else torch.rand(segments, generator=g),
        "scalars": torch.tensor([1e-2, step, scale, 0.0, 0.0]),
        "max_norm": max_norm,
    }


def _run_adamw(operators, inputs):
    """AdamW works in place: copy first, return what it wrote."""
    arguments = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    operators.adamw(**arguments, beta1=0.9, beta2=0.98, eps=1e-8)
    return tuple(arguments[k] for k in ("master", "exp_avg", "exp_avg_sq", "scalars"))


def _attention_bytes(lengths, H, K, dtype, **_):
    """qkv, out; qkv, dout, dqkv; and out once more where no kernel keeps whole rows of scores, beyond 128 tokens."""
    tensors = sum(n * (3 + 1 + 3 + 1 + 3 + (n > 128)) for n in lengths)
    return tensors * H * K * _size(dtype)


def _attention_flops(lengths, H, K, dtype, window=None, **_):
    """2 matmuls forward and 5 backward, 2 S^2 K each; a window of w leaves about 2 w + 1 of S keys a row."""
    pairs = sum(n * n if window is None else n * min(n, 2 * window + 1) for n in lengths)
    return 7 * 2 * pairs * K * H


def on_device(value, device: str):
    """Inputs of a Case, or a part of them, on a device."""
    if isinstance(value, dict):
        return {key: on_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(on_device(item, device) for item in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def training_pass(case: Case, operators, inputs: Inputs, compiled: bool = False) -> Callable[[], object]:
    """Work that a benchmark repeats: forward and backward with a module's operators, optionally compiled; or one
    update in place (the gradient stays the same, which changes no timing)."""
    if not case.gradients:
        buffers = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        return lambda: operators.adamw(**buffers, beta1=0.9, beta2=0.98, eps=1e-8)
    leaves = {n: inputs[n].detach().clone().requires_grad_() for n in case.gradients if inputs.get(n) is not None}
    arguments = {**inputs, **leaves}

    def forward():
        return case.run(operators, arguments)

    run = torch.compile(forward, dynamic=False) if compiled else forward
    cotangents = [torch.randn_like(o) if o.dim() else torch.ones_like(o) for o in forward()]

    def work():
        return torch.autograd.grad(run(), list(leaves.values()), cotangents)

    return work


CASES = (
    Case(
        op="layernorm",
        make=_make_layernorm,
        run=_run_layernorm,
        gradients=("x", "weight", "bias", "residual"),
        test_shapes=(
            {"N": 33, "D": 256},
            {"N": 300, "D": 768, "bias": True},
            {"N": 7, "D": 33, "residual": False, "bias": True},
            {"N": 1, "D": 1},
            {"N": 0, "D": 64},
        ),
        bench_shapes=({"N": 8192, "D": 256}, {"N": 8192, "D": 768}),
        bytes_moved=lambda N, D, dtype, **_: 8 * N * D * _size(dtype),
        flops=lambda N, D, dtype, **_: 20 * N * D,
    ),
    Case(
        op="glu",
        make=_make_glu,
        run=_run_glu,
        gradients=("x",),
        test_shapes=(
            {"N": 65, "F": 512},
            {"N": 65, "F": 512, "activation": "silu"},
            {"N": 3, "F": 17},
            {"N": 1, "F": 1},
            {"N": 0, "F": 8},
        ),
        bench_shapes=({"N": 8192, "F": 512}, {"N": 8192, "F": 1536}),
        bytes_moved=lambda N, F, dtype, **_: 8 * N * F * _size(dtype),
        flops=lambda N, F, dtype, **_: 100 * N * F,
    ),
    Case(
        op="layernorm_glu",
        make=_make_layernorm_glu,
        run=_run_layernorm_glu,
        gradients=("x", "norm_weight", "norm_bias", "weight_in", "residual"),
        test_shapes=(
            {"N": 64, "D": 128, "F": 96},
            {"N": 31, "D": 64, "F": 32, "bias": True, "activation": "silu"},
            {"N": 31, "D": 64, "F": 32, "residual": False},
            {"N": 0, "D": 64, "F": 32},
        ),
        bench_shapes=({"N": 8192, "D": 256, "F": 512}, {"N": 8192, "D": 768, "F": 1536}),
        bytes_moved=lambda N, D, F, dtype, **_: (9 * N * D + 12 * N * F) * _size(dtype),
        flops=lambda N, D, F, dtype, **_: 12 * N * D * F,
    ),
    Case(
        op="attention",
        make=_make_attention,
        run=_run_attention,
        gradients=("qkv",),
        test_shapes=(
            {"lengths": (17, 0, 1, 64, 33), "H": 3, "K": 64},
            {"lengths": (128, 77, 15, 16, 129), "H": 2, "K": 32, "tail": 5},
            {"lengths": (40, 7), "H": 2, "K": 128, "rotary": False},
            {"lengths": (200, 90, 3), "H": 2, "K": 64, "window": 16},
            {"lengths": (9, 1), "H": 1, "K": 32, "window": 0},
            {"lengths": (513,), "H": 1, "K": 64},
            {"lengths": (1,), "H": 1, "K": 64},
            {"lengths": (0,), "H": 2, "K": 64, "tail": 3},
        ),
        bench_shapes=(
            {"lengths": ragged_lengths(8192, 128), "H": 4, "K": 64},
            {"lengths": (128,) * 64, "H": 4, "K": 64},
            {"lengths": (512,) * 16, "H": 4, "K": 64},
            {"lengths": ragged_lengths(8192, 128), "H": 12, "K": 64},
        ),
        bytes_moved=_attention_bytes,
        flops=_attention_flops,
    ),
    Case(
        op="cross_entropy",
        make=_make_cross_entropy,
        run=_run_cross_entropy,
        gradients=("hidden", "weight"),
        test_shapes=(
            {"M": 50, "D": 64, "V": 1000},
            {"M": 50, "D": 64, "V": 129, "ignored": 7},
            {"M": 50, "D": 64, "V": 1000, "ignored": 7, "z_loss": 0.1},
            {"M": 3, "D": 32, "V": 64, "ignored": 3},
            {"M": 1, "D": 32, "V": 64},
            {"M": 0, "D": 32, "V": 64},
        ),
        bench_shapes=({"M": 2458, "D": 256, "V": 16384}, {"M": 2458, "D": 768, "V": 32768}),
        bytes_moved=lambda M, D, V, dtype, **_: (2 * M * V + 3 * V * D + 2 * M * D) * _size(dtype),
        flops=lambda M, D, V, dtype, **_: 6 * M * D * V,
    ),
    Case(
        op="adamw",
        make=_make_adamw,
        run=_run_adamw,
        gradients=(),
        test_shapes=(
            {"P": 4096},
            {"P": 50_000, "step": 7.0, "scale": 1 / 512},
            {"P": 33, "half": False, "max_norm": 0.0},
            {"P": 20_001, "segments": 4, "step": 1.0},
            {"P": 20_001, "segments": 40, "step": 1.0, "one_lr": False},
            {"P": 100, "nonfinite": True},
            {"P": 1, "segments": 1},
        ),
        bench_shapes=({"P": 8_000_000}, {"P": 100_000_000}),
        bytes_moved=lambda P, dtype, **_: 33 * P,
        flops=lambda P, dtype, **_: 16 * P,
    ),
)
