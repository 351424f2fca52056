"""The paper's test: are the loss curves of equal-size shapes the same up to a factor on their tokens?

Geiping and Goldstein (arXiv:2212.14034, section 4) find that after the first billion tokens the shape of a transformer
only stretches its loss curve along the axis of tokens. Here the curves are those of training loss between the warm-up
and the decay, where the learning rate of every run is the same share of its peak; runs of one seed are compared, which
see the same tokens under the same masks.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import stdtrit

STABLE = (0.05, 0.6)  # shares of the budget: after the warm-up, before the decay of wsd (cramfast/optim/schedule.py)
LARGEST = np.log(16.0)  # factor looked for
LEAST_POINTS = 4


@dataclass(frozen=True)
class Shift:
    """How one shape's curve maps onto the reference's of the same size.

    Attributes:
        factor: the shape needs so many times the reference's tokens for the same loss; 1.2 is slower learning.
        interval: of the factor, from the spread between seeds; None with fewer than two.
        before, after: root mean square distance of the curves, nats, as they are and with the factor.
        noise: the same distance between seeds of the reference, its own factor taken out; NaN with fewer than two.
        seeds: how many pairs of curves.
    """

    shape: str
    reference: str
    factor: float
    interval: tuple[float, float] | None
    before: float
    after: float
    noise: float
    seeds: int


def stable_part(row: dict) -> tuple[np.ndarray, np.ndarray]:
    """(log tokens, loss) of a run's training curve in the plateau of its schedule."""
    tokens, loss = (np.array(row["training"][key], float) for key in ("tokens", "loss"))
    kept = (tokens > STABLE[0] * row["tokens"]) & (tokens <= STABLE[1] * row["tokens"]) & np.isfinite(loss)
    return np.log(tokens[kept]), loss[kept]


def best_factor(curve: tuple[np.ndarray, np.ndarray], reference: tuple[np.ndarray, np.ndarray]) -> tuple[float, ...]:
    """(log factor, distance without it, distance with it) between a curve and a reference that it is mapped onto.

    The distance is over the points that fall onto the reference; half of them must.
    """
    x, y = curve
    smooth = np.polynomial.Polynomial.fit(*reference, deg=min(3, len(reference[0]) - 2))

    def distance(shift: float) -> float:
        moved = x - shift
        on = (moved >= reference[0][0] - 0.05) & (moved <= reference[0][-1] + 0.05)
        return float(np.sqrt(np.mean((smooth(moved[on]) - y[on]) ** 2))) if on.sum() * 2 >= len(x) else np.inf

    grid = np.linspace(-LARGEST, LARGEST, 401)
    start = grid[int(np.argmin([distance(s) for s in grid]))]
    step = grid[1] - grid[0]
    found = minimize_scalar(distance, bounds=(start - step, start + step), method="bounded")
    return (float(found.x), distance(0.0), float(found.fun)) if found.fun < distance(start) else (
        float(start), distance(0.0), distance(start))  # fmt: skip


def shifts(rows: list[dict]) -> list[Shift]:
    """One for each shape beside the reference of its size, by the longest budget that both have."""
    found = []
    for size in sorted({row["size"] for row in rows}):
        mine = [row for row in rows if row["size"] == size]
        reference = next((row["shape"] for row in mine if row["reference"]), None)
        for shape in dict.fromkeys(row["shape"] for row in mine if not row["reference"]):
            if pairs := paired(mine, shape, reference):
                found.append(shift_of(shape, reference, pairs))
    return found


def paired(rows: list[dict], shape: str, reference: str | None) -> list[tuple[dict, dict]]:
    """(run of the shape, run of the reference) with the same seed, at the longest budget with such pairs.

    Runs with fewer than four points in the plateau have no curve to speak of and are left out.
    """
    rows = [row for row in rows if len(stable_part(row)[0]) >= LEAST_POINTS]
    of = {(row["shape"], row["budget_tokens"], row["seed"]): row for row in rows}
    for budget in sorted({row["budget_tokens"] for row in rows}, reverse=True):
        seeds = sorted({row["seed"] for row in rows})
        both = [(of.get((shape, budget, s)), of.get((reference, budget, s))) for s in seeds]
        if pairs := [(one, other) for one, other in both if one and other]:
            return pairs
    return []


def shift_of(shape: str, reference: str, pairs: list[tuple[dict, dict]]) -> Shift:
    """Factor and residual from pairs of runs."""
    curves = [(stable_part(one), stable_part(other)) for one, other in pairs]
    results = np.array([best_factor(one, other) for one, other in curves])
    logs, before, after = results[:, 0], results[:, 1], results[:, 2]
    others = [best_factor(curves[i][1], curves[i - 1][1])[2] for i in range(len(curves) if len(curves) > 1 else 0)]
    between = confidence(logs)
    return Shift(
        shape, reference, float(np.exp(logs.mean())), tuple(np.exp(between)) if between else None,
        float(np.sqrt(np.mean(before**2))), float(np.sqrt(np.mean(after**2))),
        float(np.sqrt(np.mean(np.square(others)))) if others else float("nan"), len(pairs),
    )  # fmt: skip


def confidence(values: np.ndarray, level: float = 0.95) -> tuple[float, float] | None:
    """Student's interval of the mean; None with fewer than two values."""
    if len(values) < 2:
        return None
    half = stdtrit(len(values) - 1, (1 + level) / 2) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)
