"""How fast the matmul of the fused layernorm_glu must run to win: python -m bench.fusion prints it, as Markdown.

The forward pass alone; backward is the same either way. Predictions from data sheets, not measurements:

  parts   LayerNorm (x, r -> s, y), a library's matmul (y, W -> p), gate (p -> h)
  fused   statistics (x, r -> s), folded weight (W -> W'), our matmul (s, W' -> p, h)

p are the pre-activations, which backward needs. A matmul takes the longer of its arithmetic and its traffic.
docs/decisions/0012 holds the table and what decides the matter.
"""

from dataclasses import dataclass

from cramfast.cost.cards import Card, find_card
from cramfast.recipes import base, mini, small

# Of the data sheet's peaks: what a library's matmul and a memory-bound kernel are taken to reach.
LIBRARY_SHARE, BANDWIDTH_SHARE = 0.80, 0.85
PLACES = tuple(find_card(name) for name in ("RTX 2080 Ti", "RTX A6000", "H100"))


@dataclass(frozen=True)
class Forward:
    """The forward pass of layernorm_glu with a residual in half precision: N rows, widths D and F."""

    N: int
    D: int
    F: int

    @property
    def flops(self) -> int:
        """Of the matmul."""
        return 4 * self.N * self.D * self.F

    def parts_s(self, card: Card) -> float:
        """Seconds of LayerNorm, a library's matmul and the gate."""
        N, D, F = self.N, self.D, self.F
        arithmetic = self.flops / (LIBRARY_SHARE * card.tensor_flops)
        matmul = max(arithmetic, moved_s(card, 2 * N * D + 4 * F * D + 4 * N * F))
        return moved_s(card, 8 * N * D) + matmul + moved_s(card, 6 * N * F)

    def needed(self, card: Card) -> float | None:
        """The rate at which our matmul breaks even, as a share of the library's; None where its traffic alone takes
        too long."""
        N, D, F = self.N, self.D, self.F
        before = moved_s(card, 6 * N * D + 8 * F * D)  # statistics, folded weight
        left = self.parts_s(card) - before
        if left <= moved_s(card, 2 * N * D + 4 * F * D + 6 * N * F):
            return None
        return self.flops / left / (LIBRARY_SHARE * card.tensor_flops)


def moved_s(card: Card, moved_bytes: int) -> float:
    """Seconds that the traffic takes."""
    return moved_bytes / (BANDWIDTH_SHARE * card.bandwidth)


def widths() -> list[tuple[int, int]]:
    """(D, F) of three presets and of a wide model."""
    models = [preset("cuda").model for preset in (mini, small, base)]
    return [*((model.width, model.feedforward) for model in models), (1024, 4096)]


def markdown(tokens: int = 16384) -> str:
    """One line for each pair of widths."""
    titles = ["D → F"] + [title for card in PLACES for title in (f"{card.name}: parts, µs", "needed")]
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    for D, F in widths():
        forward, cells = Forward(tokens, D, F), [f"{D:,} → {F:,}"]
        for card in PLACES:
            needed = forward.needed(card)
            cells += [f"{1e6 * forward.parts_s(card):,.0f}", "never" if needed is None else f"{100 * needed:.0f} %"]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    import tyro

    print(tyro.cli(markdown, description=__doc__))
