"""Which size to train for how many tokens on this machine, from the law and the speed that was measured per size."""

import math
from dataclasses import dataclass

import numpy as np

from cramfast.cost.losslaw import Law
from cramfast.scaling.law import interval

SIZES = 400  # sizes compared
BEYOND = 8.0  # how far past the largest measured size the search goes


@dataclass(frozen=True)
class Cost:
    """Of one token in one resource, seconds or FLOPs, by size: lines between measured sizes on logarithmic axes.

    Above the largest size the cost grows with the size, which is what a machine that only multiplies does; below the
    smallest it stays.
    """

    N: np.ndarray
    per_token: np.ndarray

    @classmethod
    def measured(cls, N: np.ndarray, per_token: np.ndarray) -> "Cost":
        """From one value a run; runs of a size count by their median."""
        sizes = np.unique(N)
        return cls(sizes, np.array([np.median(per_token[size == N]) for size in sizes]))

    def at(self, N: np.ndarray) -> np.ndarray:
        inside = np.exp(np.interp(np.log(N), np.log(self.N), np.log(self.per_token)))
        return inside * np.maximum(1.0, N / self.N[-1])


@dataclass(frozen=True)
class Optimum:
    """What to train for a budget; intervals are those of the bootstrap.

    Attributes:
        beyond: the size is larger than any that was trained, or the budget in tokens is.
    """

    N: float
    D: float
    loss: float
    N_interval: tuple[float, float]
    loss_interval: tuple[float, float]
    beyond: bool


def optimum(law: Law, laws: list[Law], cost: Cost, budget: float, most_tokens: float) -> Optimum:
    """The size with the lowest predicted loss when the whole budget (of cost's unit) is spent on it.

    Args:
        laws: of the bootstrap.
        most_tokens: of any run that the law was fitted to.
    """
    N = np.geomspace(cost.N[0], BEYOND * cost.N[-1], SIZES)
    D = budget / cost.at(N)
    best = int(np.argmin(law.loss(N, D)))
    chosen = [int(np.argmin(other.loss(N, D))) for other in laws]
    return Optimum(
        float(N[best]), float(D[best]), float(law.loss(N[best], D[best])),
        interval([N[i] for i in chosen]), interval([other.loss(N[best], D[best]) for other in laws]),
        bool(N[best] > 1.001 * cost.N[-1] or D[best] > 1.001 * most_tokens),
    )  # fmt: skip


def six_nd(law: Law, flops: float) -> tuple[float, float] | None:
    """(N, D) of the closed form, for a budget of 6 N D FLOPs (Hoffmann et al., equation 4).

    None for a law that knows no best size: its loss hardly depends on N, or on D, as of runs that learned nothing.
    """
    if min(law.alpha * law.A, law.beta * law.B) <= 0:
        return None
    try:
        G = (law.alpha * law.A / (law.beta * law.B)) ** (1 / (law.alpha + law.beta))
    except OverflowError:
        return None
    N = G * (flops / 6) ** (law.beta / (law.alpha + law.beta))
    return (N, flops / 6 / N) if 1 < N < flops / 6 else None


def budget_name(hours: float) -> str:
    """20 minutes, 1 hour, 24 hours."""
    amount, unit = (hours * 60, "minute") if hours < 1 else (hours, "hour")
    return f"{amount:g} {unit}{'' if math.isclose(amount, 1) else 's'}"
