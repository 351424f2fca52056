"""L(N, D) = E + A / N^alpha + B / D^beta: loss from parameters and tokens, fitted to runs.

Source: Hoffmann et al., arXiv:2203.15556, approach 3: a Huber loss on the logarithms, from many starts, because the
surface has valleys; the intervals come from resampled runs. Losses are nats per masked token.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.optimize import minimize

from cramfast.cost.losslaw import Law
from cramfast.errors import UserError

HUBER = 1e-3  # Hoffmann et al.'s, on log loss
STARTS = tuple(product((0.1, 0.3, 0.5, 0.8, 1.2), (0.1, 0.3, 0.5, 0.8, 1.2), (0.1, 0.4, 0.7, 0.95), (0.2, 0.5, 0.8)))
REFINED = 24  # best starts that L-BFGS goes on from; the rest are ranked by their objective alone
BOUNDS = ((-30, 10), (-30, 10), (-10, 10), (0.01, 3), (0.01, 3))
LEAST_RUNS, LEAST_VALUES, LEAST_RANGE = 6, 3, 1.5


@dataclass(frozen=True)
class Points:
    """Runs as arrays of equal length: parameters, tokens, final loss."""

    N: np.ndarray
    D: np.ndarray
    loss: np.ndarray

    def take(self, index) -> "Points":
        return Points(self.N[index], self.D[index], self.loss[index])


def check(points: Points) -> None:
    """Raise UserError where the points cannot tell the five constants apart."""
    if not (np.isfinite(points.loss) & (points.loss > 0) & (points.N > 0) & (points.D > 0)).all():
        raise UserError("a run has no positive, finite loss, size or tokens — remove its row, or train it again")
    if len(points.loss) < LEAST_RUNS:
        raise UserError(f"{len(points.loss)} runs are too few for five constants — {LEAST_RUNS} or more are needed")
    for values, what in ((points.N, "sizes"), (points.D, "token budgets")):
        distinct = _distinct(values)
        if distinct < LEAST_VALUES:
            raise UserError(f"the runs have {distinct} {what} — {LEAST_VALUES} or more are needed to see a curve")
        if (ratio := values.max() / values.min()) < LEAST_RANGE:
            raise UserError(f"the {what} differ by a factor of {ratio:.2f} — use at least {LEAST_RANGE}, better 8")
    if np.ptp(np.log(points.loss)) < 10 * HUBER:
        raise UserError("all losses are the same to within 1 % — there is no curve to fit; use longer runs")


def _distinct(values: np.ndarray) -> int:
    """How many values there are that differ by more than 2 %: the last microbatch of a budget may be fuller or not."""
    return 1 + int((np.diff(np.sort(np.log(values))) > 0.02).sum())


def fit(points: Points, starts: list[np.ndarray] | None = None) -> Law:
    """The law closest to the points; from `starts`, as parameters() gives them, or from many of our own.

    Raises:
        UserError: too few or degenerate points.
    """
    check(points)
    centre = np.log(points.N).mean(), np.log(points.D).mean()
    n, d, y = np.log(points.N) - centre[0], np.log(points.D) - centre[1], np.log(points.loss)
    if starts is None:
        grid = _grid(y)
        starts = grid[np.argsort(_objectives(grid, n, d, y))[:REFINED]]
    else:
        starts = [_centred(start, centre) for start in starts]
    found = [minimize(_objective, x, (n, d, y), "L-BFGS-B", jac=True, bounds=BOUNDS) for x in starts]
    a, b, e, alpha, beta = min(found, key=lambda result: result.fun).x
    A, B = np.exp(a + alpha * centre[0]), np.exp(b + beta * centre[1])
    return Law(float(np.exp(e)), float(A), float(B), float(alpha), float(beta))


def _grid(y: np.ndarray) -> np.ndarray:
    """(starts, 5): for each pair of exponents, shares of the lowest loss that are E, and of the rest that is A's."""
    lowest, middle = np.exp(y.min()), np.exp(np.median(y))
    rows = []
    for alpha, beta, floor, share in STARTS:
        rest = middle - floor * lowest
        rows.append((np.log(share * rest), np.log((1 - share) * rest), np.log(floor * lowest), alpha, beta))
    return np.array(rows)


def _terms(x: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """(3, ..., runs) the three terms for (..., 5) parameters; BOUNDS keep them finite."""
    a, b, e, alpha, beta = (x[..., i, None] for i in range(5))
    return np.exp(np.stack(np.broadcast_arrays(a - alpha * n, b - beta * d, e + 0 * n)))


def _huber(r: np.ndarray) -> np.ndarray:
    size = np.abs(r)
    return np.where(size <= HUBER, 0.5 * r**2, HUBER * (size - 0.5 * HUBER)).sum(-1) / HUBER**2


def _objectives(x: np.ndarray, n: np.ndarray, d: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Sums of Huber losses for many starts at once."""
    return _huber(np.log(_terms(x, n, d).sum(0)) - y)


def _objective(x: np.ndarray, n: np.ndarray, d: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """Sum of Huber losses and its gradient."""
    terms = _terms(x, n, d)
    loss = terms.sum(0)
    r = np.log(loss) - y
    shares = terms * (np.clip(r, -HUBER, HUBER) / loss)
    gradient = np.array([*shares.sum(1), -(shares[0] * n).sum(), -(shares[1] * d).sum()])
    return _huber(r), gradient / HUBER**2


def _centred(law: Law, centre: tuple[float, float]) -> np.ndarray:
    """The optimiser's parameters of a law."""
    a, b = np.log(law.A) - law.alpha * centre[0], np.log(law.B) - law.beta * centre[1]
    x = np.array([a, b, np.log(law.E), law.alpha, law.beta])
    return np.clip(x, *np.array(BOUNDS).T)


def bootstrap(points: Points, law: Law, samples: int, seed: int = 0) -> list[Law]:
    """Laws of as many resamplings of the runs, each with replacement; those that check() refuses are drawn again.

    Every fit starts from the law of all runs and from two others, so that it may end in another valley.
    """
    random = np.random.default_rng(seed)
    flatter, steeper = (
        Law(f * law.E, law.A**g, law.B**g, g * law.alpha, g * law.beta) for f, g in ((0.7, 0.7), (1.0, 1.3))
    )
    starts = [law, flatter, steeper]
    laws, drawn = [], 0
    while len(laws) < samples:
        drawn += 1
        if drawn > 20 * samples:
            raise UserError("resampled runs rarely hold three sizes and three budgets — train more of them")
        try:
            laws.append(fit(points.take(random.integers(0, len(points.loss), len(points.loss))), starts))
        except UserError:
            continue
    return laws


def interval(values, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrapped values."""
    low, high = np.quantile(np.asarray(values, float), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def residuals(law: Law, points: Points) -> np.ndarray:
    """Measured loss over predicted, minus one."""
    return points.loss / law.loss(points.N, points.D) - 1
