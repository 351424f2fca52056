"""Inputs as real training has them: the run's own widths, lengths and dtype, its loss scale, and the odd sizes."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cramfast.config import TrainConfig
from cramfast.kernels.cases import Inputs, ragged_lengths, rotary_table

TOKENS = 16384
MASKED = 19661  # 0.3 of 65,536: where p - y over M, unscaled, is below what float16 holds
# Of them in float32, whose truth takes float64: 2.97 TFLOP with all of `base`, up to 15 s where a card multiplies
# float64 at a 64th of its rate. Nothing underflows in float32, which is what so many rows are for.
MASKED_FLOAT32 = 4096
MOST_PARAMETERS = 8 << 20  # enough to be timed beside the bandwidth, and float64 of it fits anywhere
LOSS_SCALE = 65536.0
GRADIENT = 0.1  # size of an activation's gradient, beside that of one logit
SIZES = (1, 0, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 255, 257, 511, 512, 513)  # lengths around tiles
TAIL = 7  # rows of no sequence


@dataclass(frozen=True)
class Regime:
    """What a run hands to its operators; plain values, so that it goes through JSON and into a cache's key.

    Attributes:
        longest: tokens of the longest sequence; `short`: of an earlier phase with shorter ones, or 0.
        window: largest distance attended in local layers.
        tokens, masked, parameters: rows of activations, rows of the loss, entries of AdamW's buffers.
        graph: whether the run may replay a CUDA graph, so that a capture must succeed.
        half_accumulation: whether matmuls of the forward pass and of input gradients add up in half precision.
    """

    device: str
    dtype: str
    width: int
    heads: int
    feedforward: int
    vocabulary: int
    longest: int
    short: int
    window: int
    rotary: bool
    bias: bool
    activation: str
    z_loss: float
    beta1: float
    beta2: float
    adam_eps: float
    max_norm: float
    parameters: int
    loss_scale: float
    graph: bool
    half_accumulation: bool
    tokens: int = TOKENS
    masked: int = MASKED


def regime_of(config: TrainConfig, tokens: int = TOKENS, masked: int = MASKED) -> Regime:
    """The regime of a run."""
    model = config.model
    layer = model.width * (4 * model.width + 3 * model.feedforward)
    masked = min(masked, MASKED_FLOAT32) if config.dtype == "float32" else masked
    return Regime(
        config.device, config.dtype, model.width, model.heads, model.feedforward, model.vocab_size,
        longest=config.sequence_len, short=config.short_sequence_len, window=model.window // 2,
        rotary=model.positions == "rotary", bias=model.norm_bias, activation=model.activation, z_loss=config.z_loss,
        beta1=config.beta1, beta2=config.beta2, adam_eps=config.adam_eps, max_norm=config.max_norm,
        parameters=min(model.vocab_size * model.width + model.layers * layer, MOST_PARAMETERS),
        loss_scale=LOSS_SCALE if config.dtype == "float16" else 1.0,
        graph=config.graph != "off" and config.nvtx != "layers", half_accumulation=config.half_accumulation,
        tokens=tokens, masked=masked,
    )  # fmt: skip


@dataclass(frozen=True)
class Situation:
    """One set of inputs.

    Attributes:
        name: for people.
        make: seed -> inputs on the device; the shapes are the same for every seed, the lengths change places.
        cotangent: size of the gradient that arrives from behind.
    """

    name: str
    make: Callable[[int], Inputs]
    cotangent: float


def situations(op: str, regime: Regime, windowed: bool = False) -> list[Situation]:
    """The smallest first, which is also repeated and captured; the last is timed."""
    behind = GRADIENT * regime.loss_scale / regime.masked
    few, many = 33, regime.tokens + TAIL
    if op == "attention":
        edges = (*(n for n in SIZES if n < regime.longest - 1), regime.longest - 1, regime.longest)
        kinds = {"edges": (edges, regime.longest), "ragged": (ragged(regime.tokens, regime.longest), regime.longest)}
        if regime.short:
            kinds["short"] = (ragged(regime.tokens // 4, regime.short), regime.short)
            kinds = {name: kinds[name] for name in ("edges", "short", "ragged")}
        return [
            Situation(name, _maker(_attention, regime, lengths, longest, windowed), behind)
            for name, (lengths, longest) in kinds.items()
        ]
    if op == "cross_entropy":
        kinds = {"one row": 1, "few rows": 65, "masked rows": regime.masked}
        return [  # each row's share of the scale is that of a whole microbatch
            Situation(name, _maker(_cross_entropy, regime, rows), regime.loss_scale * rows / regime.masked)
            for name, rows in kinds.items()
        ]
    if op == "adamw":
        return [Situation(name, _maker(_adamw, regime, name), 1.0) for name in ("overflow", "first update", "update")]
    make = {"layernorm": _layernorm, "glu": _glu, "layernorm_glu": _layernorm_glu}[op]
    plain = [
        Situation(name, _maker(make, regime, rows), behind)
        for name, rows in (("few rows", few), ("one row", 1), ("all rows", many))
    ]
    if op == "glu":
        return plain
    return [Situation("no residual", _maker(make, regime, few, False), behind), *plain]


def ragged(tokens: int, longest: int) -> tuple[int, ...]:
    """Lengths of real paragraphs, some sequences of one token, some of none, at least one of the longest."""
    lengths = (longest, 1, 0, *ragged_lengths(max(1, tokens - longest - 2), longest), 1)
    return (*lengths, 0, 0, 0)  # a batch's offsets are filled up with empty sequences


def _maker(make: Callable, regime: Regime, *arguments) -> Callable[[int], Inputs]:
    def inputs(seed: int) -> Inputs:
        return make(Draw(regime, seed), regime, *arguments)

    return inputs


class Draw:
    """Random tensors of one seed, drawn on the device."""

    def __init__(self, regime: Regime, seed: int):
        self.device, self.dtype, self.seed = torch.device(regime.device), getattr(torch, regime.dtype), seed
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(*shape, generator=self.generator, device=self.device)
        return drawn.mul_(scale).to(dtype or self.dtype)

    def vector(self, size: int, around: float = 0.0) -> Tensor:
        """Weights of a norm: float32."""
        return self.normal(size, scale=0.3, dtype=torch.float32) + around

    def integers(self, high: int, size: int) -> Tensor:
        return torch.randint(high, (size,), generator=self.generator, device=self.device)


def _attention(draw: Draw, regime: Regime, lengths: tuple[int, ...], longest: int, windowed: bool) -> Inputs:
    ordered = lengths[::-1] if draw.seed % 2 else lengths  # other offsets in the same shapes
    offsets = torch.tensor([0, *ordered]).cumsum(0).to(torch.int32)
    head = regime.width // regime.heads
    tables = tuple(t.to(draw.device) for t in rotary_table(longest, head)) if regime.rotary else None
    return {
        "qkv": draw.normal(sum(lengths) + TAIL, 3, regime.heads, head),
        "cu_seqlens": offsets.to(draw.device),
        "max_seqlen": longest,
        "rotary": tables,
        "window": regime.window if windowed else None,
    }


def _cross_entropy(draw: Draw, regime: Regime, rows: int) -> Inputs:
    """Logits of a trained model: some rows are sure and right, most are spread out, a few have no target."""
    weight = draw.normal(regime.vocabulary, regime.width, scale=2 * regime.width**-0.5)
    hidden, target = draw.normal(rows, regime.width), draw.integers(regime.vocabulary, rows)
    hidden[1::3] += (1.5 * weight[target[1::3]]).to(hidden.dtype)
    if rows > 1:
        target[2::50] = -100
    return {"hidden": hidden, "weight": weight, "target": target, "z_loss": regime.z_loss}


def _layernorm(draw: Draw, regime: Regime, rows: int, residual: bool = True) -> Inputs:
    x = draw.normal(rows, regime.width) + 0.5
    x[:, ::8] *= 5  # some channels outgrow the others, as in real streams
    return {
        "x": x,
        "weight": draw.vector(regime.width, 1.0),
        "bias": draw.vector(regime.width) if regime.bias else None,
        "residual": draw.normal(rows, regime.width) if residual else None,
    }


def _glu(draw: Draw, regime: Regime, rows: int) -> Inputs:
    return {"x": draw.normal(rows, 2 * regime.feedforward, scale=2.0), "activation": regime.activation}


def _layernorm_glu(draw: Draw, regime: Regime, rows: int, residual: bool = True) -> Inputs:
    norm = _layernorm(draw, regime, rows, residual)
    return {
        "x": norm["x"],
        "norm_weight": norm["weight"],
        "norm_bias": norm["bias"],
        "weight_in": draw.normal(2 * regime.feedforward, regime.width, scale=regime.width**-0.5),
        "activation": regime.activation,
        "residual": norm["residual"],
    }


def _adamw(draw: Draw, regime: Regime, kind: str) -> Inputs:
    """Gradients summed over eight microbatches; the first update, a later one, and one that is to be left out."""
    size, sums = regime.parameters, 8 * regime.loss_scale
    half = None if draw.dtype == torch.float32 else torch.zeros(size // 8 * 7, dtype=draw.dtype, device=draw.device)

    def wide(scale: float) -> Tensor:
        return draw.normal(size, scale=scale, dtype=torch.float32)

    def column(*values: float) -> Tensor:
        return torch.tensor(values, device=draw.device)

    grad, later = wide(1e-4 * sums), kind == "update"
    if kind == "overflow":
        grad[size // 2] = math.inf
    return {
        "master": wide(0.02),
        "grad": grad,
        "exp_avg": wide(1e-4) if later else wide(0.0),
        "exp_avg_sq": wide(1e-4).square() if later else wide(0.0),
        "half": half,
        "segment_end": torch.tensor([size // 8 * 7, size], device=draw.device),
        "segment_decay": column(0.01, 0.0),
        "segment_lr": column(1.0, 1.0),
        "scalars": column(1e-3, 7.0 if later else 0.0, 1 / sums, 0.0, 0.0),
        "beta1": regime.beta1,
        "beta2": regime.beta2,
        "eps": regime.adam_eps,
        "max_norm": regime.max_norm,
    }
