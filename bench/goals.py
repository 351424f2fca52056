"""What is measured on a GPU and what is aimed at there: shapes beside the Cases, and each goal as a line of data."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cramfast.kernels.cases import ragged_lengths

TOKENS = 65536  # a microbatch of the base recipe
MASKED = round(0.3 * TOKENS)
HEADS = {"H": 12, "K": 64, "rotary": False}  # without positions, which the peers would need another kernel for
MIXTURE = tuple(n for n in ragged_lengths(TOKENS, 128) if n >= 16)
NAMES = {MIXTURE: "real mixture, 16-128", (128,) * 512: "all 128", (512,) * 128: "all 512"}

SHAPES: dict[str, tuple[Mapping, ...]] = {
    "attention": (*({"lengths": lengths, **HEADS} for lengths in NAMES), {"lengths": MIXTURE, **HEADS, "rotary": True}),
    "adamw": ({"P": 120_000_000},),
    "cross_entropy": ({"M": MASKED, "D": 768, "V": 32768},),
    "layernorm": ({"N": TOKENS, "D": 768},),
    "glu": ({"N": TOKENS, "F": 1536},),
    "layernorm_glu": ({"N": TOKENS, "D": 768, "F": 1536},),
}


def label(shape: Mapping) -> str:
    """The name of a shape that has one, else ""."""
    name = NAMES.get(shape.get("lengths"), "")
    return f"{name}, rotary" if name and shape.get("rotary", True) else name


MEASURES = {
    "percent_of_copy": "of the copy bandwidth",
    "mfu": "MFU of the measured matmul peak",
    "launch_gaps": "of the time without a kernel",
}


@dataclass(frozen=True)
class Goal:
    """At least `bound` in `measure` in the rows that `where` picks.

    Attributes:
        what: the operator, or "step".
        measure: a percentage or share of the row, or "speedup": over the fastest of `over` that ran.
        over: names of peers, for a speedup.
        where: (key of the row, values of it that the goal speaks of).
        at_most: the goal is an upper bound.
    """

    what: str
    measure: str
    bound: float
    over: tuple[str, ...] = ()
    where: tuple[tuple[str, tuple[str, ...]], ...] = ()
    at_most: bool = False

    def text(self) -> str:
        """The goal as a person says it."""
        sign = "≤" if self.at_most else "≥"
        if self.measure == "speedup":
            return f"{sign} {self.bound:g}× {' / '.join(self.over)}"
        return f"{sign} {self.bound:g} % {MEASURES[self.measure]}"

    def place(self) -> str:
        """Where the goal speaks."""
        return "; ".join(
            " or ".join(f"bound by {v}" if key == "limit" else v for v in values) for key, values in self.where
        )


SHORT = ("label", ("real mixture, 16-128", "all 128"))
COMPILED_LIBRARIES = ("eager", "torch.compile", "Liger")
GOALS = (
    Goal("adamw", "percent_of_copy", 90),
    Goal("adamw", "speedup", 1.0, ("torch fused + clip", "torch.compile")),
    Goal("layernorm", "percent_of_copy", 85),
    Goal("layernorm", "speedup", 1.0, COMPILED_LIBRARIES),
    Goal("glu", "percent_of_copy", 85),
    Goal("glu", "speedup", 1.0, COMPILED_LIBRARIES),
    Goal("attention", "speedup", 1.5, ("FlashAttention-2 varlen",), (SHORT,)),
    Goal("attention", "speedup", 2.0, ("efficient attention varlen",), (SHORT,)),
    Goal("attention", "speedup", 0.8, ("FlashAttention-2 varlen",), (("label", ("all 512",)),)),
    Goal("attention", "percent_of_copy", 60, where=(("limit", ("memory",)),)),
    Goal("cross_entropy", "speedup", 1.5, ("logits of all tokens",)),
    Goal("cross_entropy", "speedup", 1.0, ("Liger",)),
    Goal("step", "mfu", 45),
    Goal("step", "speedup", 2.5, ("transformers compiled",)),
    Goal("step", "speedup", 1.3, ("packed FlashAttention compiled",)),
    Goal("step", "launch_gaps", 3, at_most=True),
)


@dataclass(frozen=True)
class Verdict:
    """One goal on one measured case; `value` is None where a peer or the row itself is missing."""

    goal: Goal
    case: str
    value: float | None

    @property
    def reached(self) -> bool:
        """Whether the measured value meets the bound."""
        if self.value is None:
            return False
        return self.value <= self.goal.bound if self.goal.at_most else self.value >= self.goal.bound

    def text(self) -> str:
        """reached, or missed by how much."""
        if self.value is None:
            return "not measured"
        unit = "×" if self.goal.measure == "speedup" else " %"
        if self.reached:
            return f"{self.value:.2f}{unit}, reached"
        return f"{self.value:.2f}{unit}, missed by {abs(self.value - self.goal.bound):.2f}"


def _value(goal: Goal, ours: Mapping, peers: Iterable[Mapping]) -> float | None:
    if goal.measure != "speedup":
        return ours.get(goal.measure)
    ratios = [row["ours_speedup"] for row in peers if row["implementation"] in goal.over and row.get("ms") is not None]
    return min(ratios, default=None)


def verdicts(rows: Iterable[Mapping]) -> list[Verdict]:
    """Every goal on every case among the rows that it speaks of; goals of which no row speaks come last, unmeasured.

    Rows need `op`, `shape`, `label`, `dtype`, `implementation`, `ours_speedup` and the measure. Those of a CPU are
    left out: the goals are a GPU's.
    """
    cases: dict[tuple, list[Mapping]] = {}
    for row in rows:
        if "gpu" in row:
            cases.setdefault((row["op"], row["label"], row["shape"], row["dtype"], row["gpu"]), []).append(row)
    found, spoken = [], set()
    for (op, label, shape, dtype, gpu), group in cases.items():
        ours = next((row for row in group if row["implementation"] == "ours"), None)
        for goal in GOALS:
            if goal.what != op or ours is None or any(ours.get(key) not in values for key, values in goal.where):
                continue
            spoken.add(goal)
            found.append(Verdict(goal, f"{label or shape}, {dtype}, {gpu}", _value(goal, ours, group)))
    return found + [Verdict(goal, "", None) for goal in GOALS if goal not in spoken]


def step_rows(rows: Iterable[Mapping]) -> list[dict]:
    """Rows of bench.step as verdicts() reads them; a system that failed has no time."""
    return [
        {
            **row,
            "op": "step",
            "label": f"{row['layers']} × {row['width']}",
            "shape": f"length {row['sequence_len']}",
            "implementation": "ours" if row["system"] == "cramfast" else row["system"],
            "ms": None if "fault" in row else 1e3 / row["tokens_per_s"],
        }
        for row in rows
    ]
