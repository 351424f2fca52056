"""What bounds each operator on three cards, from the bytes and FLOPs of its Case: `python -m bench.roofline`, Markdown.

Predictions from data sheets, not measurements: the least time that traffic or arithmetic alone would take.
"""

from collections.abc import Mapping

import torch

from cramfast.cost.cards import find_card
from cramfast.cost.roofline import bound, cost, parameter_count
from cramfast.kernels.cases import ragged_lengths
from cramfast.recipes import base

CARDS = tuple(find_card(name) for name in ("RTX 2080 Ti", "RTX A6000", "H200"))


def shapes(tokens: int) -> list[tuple[str, Mapping, str]]:
    """(operator, arguments of its Case, text) as the base preset meets them in a microbatch of `tokens`."""
    config = base("cuda")
    model = config.model
    D, F, H = model.width, model.feedforward, model.heads
    heads = {"H": H, "K": D // H}
    masked = round(config.mask_fraction * tokens)
    parameters = parameter_count(model)
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
    titles = ["operator", "shape", "MB", "GFLOP", "FLOP/B"]
    titles += [title for card in CARDS for title in (f"{card.name}, µs", "bound by")]
    lines = [titles, ["---", "---"] + ["---:"] * 3 + ["---:", "---"] * len(CARDS)]
    for op, shape, text in shapes(tokens):
        moved, flops = cost(op, shape, torch.float16, on_gpu=True)
        bounds = [bound(card, op, moved, flops) for card in CARDS]
        cells = [op, text, f"{moved / 1e6:,.0f}", f"{flops / 1e9:,.1f}", f"{flops / moved:,.1f}"]
        lines.append(cells + [cell for b in bounds for cell in (f"{1e6 * b.seconds:,.0f}", b.by)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    import tyro

    print(tyro.cli(markdown, description=__doc__))
