"""The scaling law: known constants recovered within their intervals, refusals, the optimum, the shift test."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from cramfast.cost.losslaw import Law
from cramfast.errors import UserError
from cramfast.scaling import law as laws
from cramfast.scaling.fit import Options
from cramfast.scaling.law import Points, interval
from cramfast.scaling.optimum import Cost, optimum, six_nd
from cramfast.scaling.shift import shifts

TRUTH = Law(E=1.7, A=400.0, B=900.0, alpha=0.34, beta=0.37)


def synthetic(noise: float, seed: int = 0) -> Points:
    """Five sizes, five budgets, two runs each; losses off by a normal share."""
    N, D = np.meshgrid(np.geomspace(1e6, 1e8, 5), np.geomspace(1e6, 1e9, 5))
    N, D = np.tile(N.ravel(), 2), np.tile(D.ravel(), 2)
    return Points(N, D, TRUTH.loss(N, D) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(N))))


def test_exact_losses_give_the_exact_constants():
    found = laws.fit(synthetic(0.0))
    for key, value in vars(TRUTH).items():
        assert getattr(found, key) == pytest.approx(value, rel=2e-3), key


def test_recovers_known_constants_within_their_intervals():
    points = synthetic(0.003)
    found = laws.fit(points)
    others = laws.bootstrap(points, found, 50)
    for key, value in vars(TRUTH).items():
        low, high = interval([getattr(other, key) for other in others])
        assert low <= value <= high, f"{key}: {value} outside {low} to {high}"
        assert high / low < 2.5, f"{key}: an interval of {low} to {high} says nothing"


def test_an_outlier_moves_nothing():
    points = synthetic(0.001)
    points.loss[7] *= 1.3
    assert laws.fit(points).loss(3e7, 3e8) == pytest.approx(TRUTH.loss(3e7, 3e8), rel=3e-3)


def test_extrapolates_to_a_run_that_was_left_out():
    points = synthetic(0.002)
    small = points.N * points.D < 2e16
    found = laws.fit(points.take(small))
    assert found.loss(1e8, 1e9) == pytest.approx(TRUTH.loss(1e8, 1e9), rel=0.02)


def test_the_gradient_is_that_of_the_objective():
    points = synthetic(0.05)
    n, d, y = np.log(points.N) - 16, np.log(points.D) - 17, np.log(points.loss)
    x = np.array([0.3, 0.2, 0.5, 0.4, 0.3])
    value, gradient = laws._objective(x, n, d, y)
    assert value == pytest.approx(laws._objectives(x[None], n, d, y)[0], rel=1e-12)
    numeric = approx_fprime(x, lambda x: laws._objective(x, n, d, y)[0], 1e-7)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-3)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (slice(0, 5), {}, "too few"),
        (np.flatnonzero(synthetic(0).N < 5e6), {}, "2 sizes"),
        (np.flatnonzero(synthetic(0).D < 5e6), {}, "1 token budgets"),
        (slice(None), {"loss": 5.0}, "same to within"),
        (slice(None), {"loss": np.nan}, "finite"),
    ],
    ids=["few", "sizes", "budgets", "flat", "nan"],
)
def test_refuses_what_no_law_can_be_fitted_to(index, change, message):
    points = synthetic(0.0).take(index)
    if "loss" in change:
        points.loss[:] = change["loss"]
    with pytest.raises(UserError, match=message) as error:
        laws.fit(points)
    assert "\n" not in str(error.value) and "—" in str(error.value)


@pytest.mark.parametrize(
    "changes", [{"A": 0.0}, {"alpha": 0.0}, {"B": 0.0}, {"A": 1e-300, "alpha": 1e-4, "beta": 1e-3}]
)
def test_a_law_that_knows_no_best_size_has_no_closed_form(changes):
    assert six_nd(replace(TRUTH, **changes), 1e17) is None


def test_the_optimum_at_six_nd_is_the_closed_form():
    N = np.geomspace(1e6, 1e8, 5)
    best = optimum(TRUTH, [TRUTH], Cost(N, 6 * N), 1e17, 1e12)
    n, d = six_nd(TRUTH, 1e17)
    assert pytest.approx(n, rel=0.03) == best.N and pytest.approx(d, rel=0.03) == best.D
    assert best.loss == pytest.approx(TRUTH.loss(n, d), rel=1e-4) and not best.beyond


def test_the_optimum_follows_the_measured_speed():
    """Where small sizes are no faster per token, the machine's best size is larger than FLOPs alone say."""
    N = np.geomspace(1e6, 1e8, 5)
    flat = Cost(N, np.maximum(N, 2e7) * 6)
    assert 1.3 * six_nd(TRUTH, 1e16)[0] < optimum(TRUTH, [TRUTH], flat, 1e16, 1e12).N
    assert flat.at(np.array([2e8]))[0] == pytest.approx(12e8)  # beyond the largest: grows with the size
    assert optimum(TRUTH, [TRUTH], Cost(N, 6 * N), 1e22, 1e9).beyond


def curve(shape: str, factor: float, seed: int, bend: float = 0.0) -> dict:
    tokens = np.geomspace(4e3, 1e6, 48)
    noise = np.random.default_rng(seed).normal(0, 0.01, 48) + np.random.default_rng(len(shape)).normal(0, 0.003, 48)
    loss = 4 + 60 * (tokens / factor) ** -0.25 + noise + bend * np.log(tokens / 1e5) ** 2
    labels = {"size": 0, "shape": shape, "reference": shape == "4x256", "budget_tokens": 10**6, "seed": seed}
    return labels | {"tokens": 1e6, "training": {"tokens": tokens.tolist(), "loss": loss.tolist()}}


def test_the_shift_test_finds_a_known_factor():
    rows = [curve(shape, factor, seed) for shape, factor in (("4x256", 1.0), ("8x192", 1.3)) for seed in range(3)]
    (found,) = shifts(rows)
    assert (found.shape, found.reference, found.seeds) == ("8x192", "4x256", 3)
    assert found.interval[0] <= 1.3 <= found.interval[1] and found.interval[1] / found.interval[0] < 1.2
    assert found.after < 0.4 * found.before and found.after < 1.5 * found.noise


def test_the_shift_test_shows_curves_of_another_form():
    rows = [curve(s, 1.0, seed, bend) for s, bend in (("4x256", 0.0), ("8x192", 0.15)) for seed in range(3)]
    assert shifts(rows)[0].after > 2 * shifts(rows)[0].noise


def test_one_seed_has_no_interval():
    (found,) = shifts([curve("4x256", 1.0, 0), curve("8x192", 1.1, 0)])
    assert found.interval is None and np.isnan(found.noise)


@pytest.mark.parametrize(
    ("flags", "word"),
    [({"samples": 0}, "samples=0"), ({"hold_out": -1}, "hold_out=-1"), ({"hours": (-1.0,)}, "hours"),
     ({"flops": (float("nan"),)}, "flops")],
)  # fmt: skip
def test_a_fit_refuses_what_it_cannot_do(flags, word):
    with pytest.raises(UserError, match=f"{word}.* — use"):
        Options(**flags)
