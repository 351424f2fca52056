"""The roofline: what a card can do at most, what every operator of a training step costs, and the least time for it.

Costs come from the Cases (kernels/cases.py); what has no Case (plain linear layers, copies) is counted here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cramfast.config import ModelConfig, TrainConfig
from cramfast.cost.cards import Card
from cramfast.kernels.cases import CASES, ragged_lengths
from cramfast.model.encoder import Encoder
from cramfast.optim.muon import NEWTON_SCHULZ_STEPS, product_dtype

TENSOR_CORE_OPERATORS = ("linear", "layernorm_glu", "attention", "cross_entropy", "orthogonalise")
LONGEST_WHOLE_SEQUENCE = 128  # attention_short_max of csrc/attention_forms.h: beyond it a GPU takes the tiled form
ORTHOGONALISE = {torch.bfloat16: "orthogonalise", torch.float32: "orthogonalise, float32"}  # by muon.product_dtype
CASE_OF = {case.op: case for case in CASES}


@dataclass(frozen=True)
class Bound:
    """The least time of one operator on one card, in seconds, and what sets it."""

    seconds: float
    by: str


def bound(card: Card, op: str, moved_bytes: float, flops: float) -> Bound:
    """The roofline: the later of memory and arithmetic."""
    on_tensor_cores = op in TENSOR_CORE_OPERATORS
    arithmetic = flops / (card.tensor_flops if on_tensor_cores else card.plain_flops)
    memory = moved_bytes / card.bandwidth
    if memory >= arithmetic:
        return Bound(memory, "memory")
    if card.capability is None:
        return Bound(arithmetic, "arithmetic")
    return Bound(arithmetic, "tensor cores" if on_tensor_cores else "float32 units")


def cost(op: str, shape: Mapping, dtype: torch.dtype, on_gpu: bool) -> tuple[int, int]:
    """(bytes, FLOPs) of an operator forward and backward, as our implementation does it.

    Besides those that have a Case: "linear" {N, D, E}, three products of x (N, D) and a weight (E, D), "orthogonalise"
    {B, R, C}, Muon's five Newton-Schulz steps on B matrices (R, C) in bfloat16, the same in float32 under another name,
    and "copy" {bytes}.
    """
    size = torch.empty(0, dtype=dtype).element_size()
    if op == "copy":
        return shape["bytes"], 0
    if op == "linear":
        N, D, E = shape["N"], shape["D"], shape["E"]
        return 3 * (N * D + D * E + N * E) * size, 6 * N * D * E
    if op in ORTHOGONALISE.values():
        size = 2 if op == ORTHOGONALISE[torch.bfloat16] else 4
        short, long = sorted((shape["R"], shape["C"]))
        # A step: the Gram matrix, its square, and that times the matrix; the last two add to what they read.
        moved = NEWTON_SCHULZ_STEPS * shape["B"] * (3 * short * long + 4 * short**2) * size
        return moved, NEWTON_SCHULZ_STEPS * shape["B"] * (4 * short**2 * long + 2 * short**3)
    moved, flops = (count(**shape, dtype=dtype) for count in (CASE_OF[op].bytes_moved, CASE_OF[op].flops))
    if op == "attention" and on_gpu and max(shape["lengths"], default=0) > LONGEST_WHOLE_SEQUENCE:
        # Two kernels backward, which both make the scores and their gradient and read q, k, v and dout: seven products.
        moved = 16 * sum(shape["lengths"]) * shape["H"] * shape["K"] * size
        flops = flops * 9 // 7
    return moved, flops


@dataclass(frozen=True)
class Part:
    """One operator at one shape, `count` times in a microbatch or an update; `name` is its place in the model."""

    name: str
    op: str
    shape: Mapping
    count: int = 1


def parameter_count(model: ModelConfig) -> int:
    """Parameters of the model, embedding included; nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in Encoder(model).parameters())


def matrix_parameters(model: ModelConfig) -> int:
    """Those in matrices, of which a run in half precision has a copy."""
    with torch.device("meta"):
        return sum(p.numel() for p in Encoder(model).parameters() if p.dim() >= 2)


def masked_tokens(config: TrainConfig, tokens: int) -> int:
    """Tokens predicted in a microbatch, in the middle of a run."""
    return round((config.mask_fraction + config.mask_fraction_end) / 2 * tokens)


def microbatch_parts(config: TrainConfig, tokens: int) -> list[Part]:
    """What one microbatch of `tokens` takes, forward and backward, in the order of model/encoder.py.

    The sequences are a mixture of paragraphs (kernels.cases.ragged_lengths) up to sequence_len.
    """
    model, M = config.model, masked_tokens(config, tokens)
    N, D, F, V, L = tokens, model.width, model.feedforward, model.vocab_size, model.layers
    norms = L - 1 + (2 if model.first_norm else 1)  # before each attention, after the embedding
    attention = {"lengths": ragged_lengths(N, config.sequence_len), "H": model.heads, "K": D // model.heads}
    everywhere = sum(index % model.global_every == 0 for index in range(L))
    parts = [
        Part("embedding", "copy", {"bytes": embedding_bytes(config, N, M)}),
        Part("norms", "layernorm", {"N": N, "D": D}, norms),
        Part("qkv matrix", "linear", {"N": N, "D": D, "E": 3 * D}, L),
        Part("attention", "attention", attention, everywhere),
        Part("local attention", "attention", attention | {"window": model.window // 2}, L - everywhere),
        Part("output matrix", "linear", {"N": N, "D": D, "E": D}, L - 1),
        Part("norm, matrix, gate", "layernorm_glu", {"N": N, "D": D, "F": F}, L - 1),
        Part("second matrix", "linear", {"N": N, "D": F, "E": D}, L - 1),
        # From here on masked rows alone: the last layer's output matrix and feed-forward block, and the head.
        Part("output matrix, masked", "linear", {"N": M, "D": D, "E": D}, 2 if model.head else 1),
        Part("norm, matrix, gate, masked", "layernorm_glu", {"N": M, "D": D, "F": F}),
        Part("second matrix, masked", "linear", {"N": M, "D": F, "E": D}),
        Part("norms, masked", "layernorm", {"N": M, "D": D}, 2 if model.head else 1),
        Part("loss", "cross_entropy", {"M": M, "D": D, "V": V}),
        Part("gradients", "copy", {"bytes": parameter_count(model) * (8 + element_size(config))}),
    ]
    return [part for part in parts if part.count]


def update_parts(config: TrainConfig) -> list[Part]:
    """What one update takes: AdamW, Muon's part of it, the gradient set to zero, and the moving average if any."""
    parameters, hidden = parameter_count(config.model), muon_parameters(config)
    parts = [
        Part("AdamW", "adamw", {"P": parameters - hidden}),
        Part("zero gradient", "copy", {"bytes": 4 * parameters}),
    ]
    if hidden:
        # muon.py: unscale and clip 16 bytes a parameter, momentum 24, into and out of Newton-Schulz 16, the step 36
        parts += [*muon_parts(config), Part("momentum, weights", "copy", {"bytes": 92 * hidden})]
    return parts + [Part("moving average", "copy", {"bytes": 12 * parameters})] * (config.ema_decay > 0)


def muon_parts(config: TrainConfig) -> list[Part]:
    """The hidden matrices, as Muon orthogonalises them: those that lie in one tensor together."""
    model, op = config.model, ORTHOGONALISE[product_dtype(getattr(torch, config.dtype))]
    D, F, L = model.width, model.feedforward, model.layers
    return [
        Part("orthogonal qkv", op, {"B": 3, "R": D, "C": D}, L),
        Part("orthogonal output", op, {"B": 1, "R": D, "C": D}, L + bool(model.head)),
        Part("orthogonal gate", op, {"B": 2, "R": F, "C": D}, L),
        Part("orthogonal second", op, {"B": 1, "R": D, "C": F}, L),
    ]


def muon_parameters(config: TrainConfig) -> int:
    """How many parameters Muon updates."""
    if config.optimizer != "muon":
        return 0
    return sum(part.count * math.prod(part.shape.values()) for part in muon_parts(config))


def element_size(config: TrainConfig) -> int:
    """Bytes of a matrix element or an activation."""
    return getattr(torch, config.dtype).itemsize


def embedding_bytes(config: TrainConfig, N: int, M: int) -> int:
    """Traffic of token lookup and row selection, both ways.

    The lookup's gradient is summed in float32 over the vocabulary, rounded and added to the decoder's; the selection
    takes rows of two tensors and gives back zeros with those rows in them.
    """
    size, D, V = element_size(config), config.model.width, config.model.vocab_size
    lookup = N * D * (3 * size + 8) + V * D * (8 + 4 * size)
    return lookup + 2 * D * size * (4 * M + N)
