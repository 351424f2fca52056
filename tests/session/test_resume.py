"""N steps, a new process's worth of fresh state, N more: the same bits as 2N in one go."""

import dataclasses
import json

import pytest
import torch
from fake_loader import rows, run, same_bits, small_config, weights

from cramfast.runtime.interrupt import Interrupt
from cramfast.session import checkpoint
from cramfast.session.budget import Budget, Progress, read_replay
from cramfast.session.record import read_record
from cramfast.train import train

pytestmark = pytest.mark.usefixtures("fake_text")


class HalfWay(Budget):
    """The same schedule as the whole budget, but it says that all is spent at half of it."""

    def fraction(self, progress: Progress) -> float:
        spent = super().fraction(progress)
        return spent if spent < 0.5 else 1.0


OPTIONS = {
    "defaults": {},
    "mask schedule": {"mask_fraction_end": 0.15},
    "long before": {"short_sequence_len": 8, "short_fraction": 0.3},
    "long at once": {"short_sequence_len": 8, "short_fraction": 0.5},  # the second half begins with the first long ones
    "long later": {"short_sequence_len": 8, "short_fraction": 0.7},
    "StableAdamW": {"optimizer": "stable_adamw", "max_norm": 0.0},
    "Muon": {"optimizer": "muon"},
    "average": {"ema_decay": 0.9},
    "z-loss": {"z_loss": 1e-2},
    "replaced tokens": {"objective": "rtd"},
    "all at once": {"optimizer": "muon", "ema_decay": 0.9, "z_loss": 1e-2, "schedule": "cosine", "objective": "rtd"},
}


CASES = [(changes, "float32") for changes in OPTIONS.values()]
CASES += [(OPTIONS[name], "bfloat16") for name in ("defaults", "all at once")]


@pytest.mark.parametrize(("changes", "dtype"), CASES, ids=[*OPTIONS, "bfloat16", "all at once, bfloat16"])
def test_two_halves_equal_the_whole(tmp_path, changes, dtype):
    whole = run(tmp_path / "whole", "12000tokens", dtype=dtype, **changes)
    halves = tmp_path / "halves"
    run(halves, HalfWay("tokens", 12000), dtype=dtype, **changes)
    middle = int(checkpoint.newest(halves).name[-8:])
    torch.manual_seed(99)  # nothing may hang on the process's generator
    run(halves, "12000tokens", dtype=dtype, **changes)
    assert 0 < middle < len(rows(whole))
    assert same_bits(weights(whole), weights(halves))
    assert [row["loss"] for row in rows(whole)] == [row["loss"] for row in rows(halves)]
    assert rows(whole, "heldout_loss")[-1]["heldout_loss"] == rows(halves, "heldout_loss")[-1]["heldout_loss"]
    assert [row["step"] for row in rows(halves)] == list(range(1, len(rows(whole)) + 1))


def test_rows_beyond_the_checkpoint_are_dropped(tmp_path):
    folder = run(tmp_path / "run", "6steps")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "fraction": 0.9, "microbatches": 1}\n{"step": 8, "frac')
    run(folder, "8steps")
    assert [row["step"] for row in rows(folder)] == list(range(1, 9))


@pytest.mark.parametrize("line", ["[1]", '{"step": "a"}', '{"run": 1}', "17", "null"])
def test_a_row_that_no_run_wrote_ends_the_record(tmp_path, line):
    folder = run(tmp_path / "run", "4steps")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    assert len(read_replay(folder / "metrics.jsonl").fractions) == 4
    assert read_record(folder).unreadable_lines == 1
    run(folder, "6steps")
    assert [row["step"] for row in rows(folder)] == list(range(1, 7))


def test_the_last_evaluation_is_made_up_for(tmp_path):
    """A kill between the checkpoint of the last step and the evaluation after it."""
    folder = run(tmp_path / "run", "4steps")
    log = folder / "metrics.jsonl"
    *kept, last = log.read_text().splitlines(keepends=True)
    assert "heldout_loss" in last
    log.write_text("".join(kept))
    for _ in range(2):
        run(folder, "4steps")
        assert [(row["step"], row["heldout_loss"]) for row in rows(folder, "heldout_loss")][1:] == [
            (4, json.loads(last)["heldout_loss"])
        ]


def test_a_spent_budget_is_left_alone_and_a_raised_one_goes_on(tmp_path):
    folder = run(tmp_path / "run", "5steps")
    before = weights(folder)
    run(folder, "5steps")
    assert same_bits(before, weights(folder)) and len(rows(folder)) == 5
    run(folder, "9steps")
    assert len(rows(folder)) == 9 and not same_bits(before, weights(folder))


def test_an_interrupted_update_is_made_again(tmp_path, monkeypatch):
    """The stop comes in the middle of an accumulated update."""
    whole = run(tmp_path / "whole", "6steps", ramp_fraction=0.0)
    plain, calls = torch.Tensor.backward, iter(range(10**6))

    def backward(self, *args):
        plain(self, *args)
        if next(calls) == 4 * 3 + 2:  # the warm-up, three updates of four microbatches, and two microbatches
            handlers[0].note(2, None)

    handlers = []
    enter = Interrupt.__enter__
    monkeypatch.setattr(Interrupt, "__enter__", lambda self: handlers.append(self) or enter(self))
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    folder = tmp_path / "stopped"
    folder.mkdir()
    config = small_config(ramp_fraction=0.0)
    assert not train(config, folder, folder, Budget("steps", 6))
    assert checkpoint.newest(folder).name == "step-00000003"
    assert train(dataclasses.replace(config, budget="6steps"), folder, folder, Budget("steps", 6))
    assert same_bits(weights(whole), weights(folder))
