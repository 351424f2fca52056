"""What bounds each operator on three cards, from the bytes and FLOPs of its Case: `python -m bench.roofline`, Markdown.

Predictions from data sheets, not measurements: the least time that traffic or arithmetic alone would take.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cramfast.kernels.cases import CASES, Case, ragged_lengths
from cramfast.model import Encoder
from cramfast.recipes import base

TENSOR_CORE_OPERATORS = ("layernorm_glu", "attention", "cross_entropy")


@dataclass(frozen=True)
class Card:
    """Peaks of a data sheet: bytes/s of its memory, FLOP/s of float16 products summed in float32, of float32."""

    name: str
    bandwidth: float
    tensor_flops: float
    plain_flops: float


CARDS = (
    Card("RTX 2080 Ti", 616e9, 53.8e12, 13.4e12),  # GeForce: half of the tensor rate when the sum is float32
    Card("RTX A6000", 768e9, 154.8e12, 38.7e12),
    Card("H200", 4.8e12, 989e12, 67e12),  # SXM, without sparsity
)


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
    return Bound(arithmetic, "tensor cores" if on_tensor_cores else "float32 units")


def shapes(tokens: int) -> list[tuple[str, Mapping, str]]:
    """(operator, arguments of its Case, text) as the base preset meets them in a microbatch of `tokens`."""
    config = base("cuda")
    model = config.model
    D, F, H = model.width, model.feedforward, model.heads
    heads = {"H": H, "K": D // H}
    masked = round(config.mask_fraction * tokens)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Encoder(model).parameters())
    matrices = {"layernorm": {"N": tokens, "D": D}, "glu": {"N": tokens, "F": F}}
    listed = [(op, shape, " × ".join(f"{v:,}" for v in shape.values())) for op, shape in matrices.items()]
    listed.append(("layernorm_glu", {"N": tokens, "D": D, "F": F}, f"{tokens:,} × {D} → {F:,}"))
    for text, lengths in (
        ("of 128", (128,) * (tokens // 128)),
        ("of 1 to 128", ragged_lengths(tokens, 128)),
        ("of 512", (512,) * (tokens // 512)),
    ):
        listed.append(("attention", {"lengths": lengths, **heads}, f"{len(lengths)} sequences {text}, {H} heads"))
    vocabulary = model.vocab_size
    listed.append(("cross_entropy", {"M": masked, "D": D, "V": vocabulary}, f"{masked:,} × {D} × {vocabulary:,}"))
    listed.append(("adamw", {"P": parameters}, f"{parameters / 1e6:.1f} M parameters"))
    return listed


def markdown(tokens: int = 16384) -> str:
    """The table, float16, forward plus backward (AdamW: one update)."""
    cases: dict[str, Case] = {case.op: case for case in CASES}
    titles = ["operator", "shape", "MB", "GFLOP", "FLOP/B"]
    titles += [title for card in CARDS for title in (f"{card.name}, µs", "bound by")]
    lines = [titles, ["---", "---"] + ["---:"] * 3 + ["---:", "---"] * len(CARDS)]
    for op, shape, text in shapes(tokens):
        moved = cases[op].bytes_moved(**shape, dtype=torch.float16)
        flops = cases[op].flops(**shape, dtype=torch.float16)
        bounds = [bound(card, op, moved, flops) for card in CARDS]
        cells = [op, text, f"{moved / 1e6:,.0f}", f"{flops / 1e9:,.1f}", f"{flops / moved:,.1f}"]
        lines.append(cells + [cell for b in bounds for cell in (f"{1e6 * b.seconds:,.0f}", b.by)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    import tyro

    print(tyro.cli(markdown, description=__doc__))
