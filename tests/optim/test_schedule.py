"""Schedules and budgets are plain functions: their values at the places that matter."""

import pytest

from cramfast.config import TrainConfig
from cramfast.errors import UserError
from cramfast.optim import schedule
from cramfast.session.budget import Budget, Progress, parse_budget, read_replay


@pytest.mark.parametrize(("f", "share"), [(0, 0.25), (0.25, 0.5), (0.75, 1.0), (0.9, 0.4), (1, 0.0)])
def test_triangle_is_that_of_the_paper(f, share):
    assert schedule.triangle(f) == pytest.approx(share)


@pytest.mark.parametrize("shape", schedule.SHAPES.values(), ids=schedule.SHAPES)
def test_shapes_start_above_zero_peak_at_one_and_end_at_zero(shape):
    values = [shape(f / 1000) for f in range(1001)]
    assert values[0] >= 0.1 and max(values) == pytest.approx(1.0, abs=1e-6) and min(values) >= 0
    assert values[-1] == pytest.approx(0.0, abs=1e-9) and shape(1.5) == pytest.approx(0.0, abs=1e-9)
    top = values.index(max(values))
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)


def test_wsd_is_stable_then_falls_by_one_minus_the_root():
    assert [schedule.wsd(f) for f in (0.05, 0.3, 0.6)] == [1.0, 1.0, 1.0]
    assert [schedule.wsd(f) for f in (0.7, 0.825)] == pytest.approx([0.5, 0.25])
    assert schedule.SHAPES["trapezoid"] is schedule.wsd


def test_batch_ramp_ends_at_sixty_percent():
    counts = [schedule.microbatches(f / 100, 128, 64 * 128, 0.6) for f in range(101)]
    assert counts[0] == 1 and counts[30] == round(1 + 63 / 2) and set(counts[60:]) == {64}
    assert counts == sorted(counts)
    assert schedule.microbatches(0.0, 128, 512, 0.0) == 4
    assert schedule.microbatches(0.0, 128, 128, 0.6) == 1


def test_mask_share_moves_in_hundredths():
    assert [schedule.mask_fraction(f, 0.3, 0.15) for f in (0, 0.5, 1)] == [0.3, 0.22, 0.15]
    assert schedule.mask_fraction(0.5, 0.255, 0.255) == 0.255
    assert [schedule.mask_fraction(f, 0.01, 0.004) for f in (0, 0.8, 0.9, 1)] == [0.01, 0.01, 0.004, 0.004]


@pytest.mark.parametrize(
    ("text", "unit", "amount"),
    [
        ("24h", "seconds", 86400),
        ("90m", "seconds", 5400),
        ("300s", "seconds", 300),
        ("1.5d", "seconds", 129600),
        ("2e9tokens", "tokens", 2e9),
        ("1e15flops", "flops", 1e15),
        ("500 steps", "steps", 500),
    ],
)
def test_budgets(text, unit, amount):
    assert parse_budget(text) == Budget(unit, amount)


@pytest.mark.parametrize("text", ["", "24", "h", "24x", "-3h", "0s", "1e9e9tokens", "1..5h"])
def test_bad_budgets_are_named(text):
    with pytest.raises(UserError, match=r"budget=.*—"):
        parse_budget(text)


def test_fraction_counts_its_own_quantity():
    progress = Progress(step=5, tokens=50, flops=500.0, seconds=5000.0)
    fractions = [Budget(unit, 10_000).fraction(progress) for unit in ("steps", "tokens", "flops", "seconds")]
    assert fractions == [0.0005, 0.005, 0.05, 0.5]


def test_replay_needs_every_step(tmp_path):
    with pytest.raises(UserError, match="not found"):
        read_replay(tmp_path / "metrics.jsonl")
    row = '{{"step": {}, "fraction": 0.5, "microbatches": 1}}\n'
    (tmp_path / "metrics.jsonl").write_text(row.format(1) + row.format(3))
    with pytest.raises(UserError, match="steps are missing"):
        read_replay(tmp_path / "metrics.jsonl")


def test_short_sequences_end_at_their_share_of_the_budget():
    assert [schedule.lengthened(f, 64, 0.25) for f in (0, 0.2499, 0.25, 1)] == [False, False, True, True]
    assert not schedule.lengthened(1, 0, 0.25)


@pytest.mark.parametrize("values", [{"short_sequence_len": 7}, {"short_sequence_len": 128}, {"short_fraction": 1.0}])
def test_impossible_short_sequences_are_named_with_the_remedy(values):
    with pytest.raises(UserError, match=f"{next(iter(values))}=.* is not possible — use"):
        TrainConfig(**values)
