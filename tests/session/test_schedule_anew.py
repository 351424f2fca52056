"""A schedule that begins anew on resume: its rates, its batches, and that resume and replay follow it bit for bit."""

import dataclasses
import json

import pytest
from fake_loader import rows, run, same_bits, small_config, weights

from cramfast.config import to_json
from cramfast.optim.schedule import SHAPES
from cramfast.session.budget import Budget, Progress, read_replay
from cramfast.train import train

pytestmark = pytest.mark.usefixtures("fake_text")


class Interrupted(Budget):
    """Says that all is spent after so many steps, under the schedule of the whole."""

    def fraction(self, progress):
        return 1.0 if progress.step >= 9 else super().fraction(progress)


def again(folder, budget, steps, here):
    """Go on in the folder with the budget of so many steps."""
    config = small_config(budget=f"{steps}steps")
    (folder / "config.json").write_text(json.dumps(to_json(config)))
    assert train(config, folder, folder, budget, schedule_from_here=here)


def test_rates_rise_and_fall_over_the_new_part(tmp_path):
    folder = run(tmp_path / "run", "6steps", ramp_fraction=0.6)
    again(folder, Budget("steps", 14), 14, True)
    first, second = rows(folder)[:6], rows(folder)[6:]
    shape, lr = SHAPES[small_config().schedule], small_config().lr
    assert [row["lr"] for row in first] == pytest.approx([lr * shape(i / 6) for i in range(6)])
    assert [row["lr"] for row in second] == pytest.approx([lr * shape(i / 8) for i in range(8)])
    assert [row["fraction"] for row in second] == pytest.approx([i / 14 for i in range(6, 14)])
    assert {row["microbatches"] for row in second} == {4}  # at its end; the spent fraction alone would lower it again
    assert "schedule" not in first[0] and [row["schedule"] for row in second] == pytest.approx(
        [i / 8 for i in range(8)]
    )


def test_resume_and_replay_follow_it(tmp_path):
    for name in ("whole", "halves"):
        run(tmp_path / name, "6steps")
    again(tmp_path / "whole", Budget("steps", 14), 14, True)
    again(tmp_path / "halves", Interrupted("steps", 14), 14, True)
    assert len(rows(tmp_path / "halves")) == 9
    again(tmp_path / "halves", Budget("steps", 14), 14, False)
    assert same_bits(weights(tmp_path / "whole"), weights(tmp_path / "halves"))
    replay = read_replay(tmp_path / "whole" / "metrics.jsonl")
    assert same_bits(weights(tmp_path / "whole"), weights(run(tmp_path / "replayed", replay)))


@pytest.mark.parametrize("unit", ["steps", "tokens", "flops", "seconds"])
def test_it_goes_over_what_was_left_in_any_unit(unit):
    spent = {"step": 10, "tokens": 10, "flops": 10.0, "seconds": 10.0}
    begun = Progress(**spent, schedule_from=(10.0, 10.0, 10.0, 10.0))
    budget = Budget(unit, 30)
    assert budget.schedules(begun) == (0.0, 1.0)
    later = dataclasses.replace(begun, **{key: 25 for key in spent})
    assert budget.schedules(later) == (0.75, 1.0) and budget.schedules(Progress(**spent)) == (10 / 30, 10 / 30)
