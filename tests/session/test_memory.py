"""A memory that is too small, faked: microbatches are halved until they fit, and the record says so."""

import gc
import weakref

import pytest
import torch
from fake_loader import rows, run, same_bits, weights

from cramfast.errors import UserError
from cramfast.model.encoder import Encoder
from cramfast.session import checkpoint
from cramfast.session import memory as search
from cramfast.session.budget import Progress, read_replay, resized

plain_loss = Encoder.loss


class Memory:
    """Holds microbatches of `most` tokens; notes the sizes that were tried."""

    def __init__(self, monkeypatch, most: int = 10**9):
        self.most, self.tried = most, []

        def loss(model, batch):
            tokens = len(batch.ids_N)
            self.tried.append(tokens)
            if tokens > self.most:
                raise torch.OutOfMemoryError(f"{tokens} tokens")
            return plain_loss(model, batch)

        monkeypatch.setattr(Encoder, "loss", loss)


@pytest.fixture
def memory(monkeypatch, fake_text) -> Memory:
    return Memory(monkeypatch)


def header(folder) -> list[int]:
    return [row["run"]["microbatch_tokens"] for row in rows(folder, "run")]


def test_halved_at_the_start_trains_as_if_asked_for_that_size(memory, tmp_path, capsys):
    asked = run(tmp_path / "asked", "6steps", microbatch_tokens=256, ramp_fraction=0.0)
    memory.most, memory.tried = 300, []
    found = run(tmp_path / "found", "6steps", microbatch_tokens=1024, ramp_fraction=0.0)
    assert memory.tried == [1024, 512] + [256] * (1 + 6 * 4)  # a trial step of each size
    assert same_bits(weights(asked), weights(found))
    assert header(found) == [256]
    assert checkpoint.read_state(checkpoint.newest(found))["progress"]["microbatch_tokens"] == 256
    assert "in microbatches of 256 tokens" in capsys.readouterr().err


def test_an_update_keeps_its_tokens_also_in_the_ramp(memory, tmp_path):
    wide = run(tmp_path / "wide", "20steps", microbatch_tokens=512, batch_tokens=2048)
    memory.most = 256
    narrow = run(tmp_path / "narrow", "20steps", microbatch_tokens=512, batch_tokens=2048)
    assert [2 * row["microbatches"] for row in rows(wide)] == [row["microbatches"] for row in rows(narrow)]


def test_resume_and_replay_start_with_the_size_of_the_record(memory, tmp_path):
    whole = run(tmp_path / "whole", "9steps", microbatch_tokens=256, ramp_fraction=0.0)
    memory.most = 256
    run(tmp_path / "found", "9steps", microbatch_tokens=1024, ramp_fraction=0.0)
    memory.most, memory.tried = 10**9, []
    again = run(
        tmp_path / "again", read_replay(tmp_path / "found" / "metrics.jsonl"), microbatch_tokens=1024, ramp_fraction=0.0
    )
    assert set(memory.tried) == {256} and header(again) == [256]
    assert same_bits(weights(whole), weights(again))
    memory.tried = []
    run(tmp_path / "found", "12steps", microbatch_tokens=1024, ramp_fraction=0.0)
    assert set(memory.tried) == {256} and header(tmp_path / "found") == [256, 256]


def test_memory_that_shrinks_during_the_run_costs_one_checkpoint_interval(memory, tmp_path):
    folder = tmp_path / "run"

    def shrink(model, batch):
        if len(memory.tried) == 14:  # the trial step and 13 steps are done
            memory.most = 256
        return halving_loss(model, batch)

    halving_loss = Encoder.loss
    Encoder.loss = shrink  # the fixture's monkeypatch puts the plain one back
    options = {"microbatch_tokens": 512, "batch_tokens": 512, "checkpoint_interval": 1e-9}
    run(folder, "20steps", **options)
    assert memory.tried[:15] == [512] * 15 and set(memory.tried[15:]) == {256}
    written = rows(folder)
    assert [row["step"] for row in written] == list(range(1, 21))
    assert [row["microbatches"] for row in written] == [1] * 13 + [2] * 7
    assert header(folder) == [512, 256]
    progress = checkpoint.read_state(checkpoint.newest(folder))["progress"]
    # 13 microbatches lead to (1, 6), which is (1, 12) of half the size; 14 of those came after
    assert (progress["epoch"], progress["index"], progress["microbatch_tokens"]) == (3, 6, 256)
    with pytest.raises(UserError, match="--microbatch-tokens 256"):
        read_replay(folder / "metrics.jsonl")


def test_a_place_in_the_data_is_kept_in_tokens():
    assert resized(Progress(epoch=2, index=5, microbatch_tokens=512), 128) == Progress(
        epoch=2, index=20, microbatch_tokens=128
    )
    assert resized(Progress(index=5), 128).index == 5  # a record of before sizes were kept


def test_a_memory_that_holds_nothing_is_named(memory, tmp_path):
    memory.most = 3
    with pytest.raises(UserError, match=r"microbatches of 16 tokens, and fewer than 16 cannot be — .*smaller model"):
        run(tmp_path / "run", "3steps")


def test_a_replay_is_not_made_smaller(memory, tmp_path):
    first = run(tmp_path / "first", "3steps")
    memory.most = 128
    with pytest.raises(UserError, match="fewer than 256 cannot be"):
        run(tmp_path / "again", read_replay(first / "metrics.jsonl"))


def test_nothing_of_a_failed_attempt_is_alive_in_the_next():
    class Model:
        pass

    attempts = []

    def attempt(tokens: int) -> int:
        assert not any(reference() for reference in attempts)
        model = Model()
        model.itself = model  # as hooks and modules refer to each other
        attempts.append(weakref.ref(model))
        if tokens > 2:
            raise torch.OutOfMemoryError
        return tokens

    gc.disable()
    try:
        assert search.halving(attempt, 8, 1) == 2
    finally:
        gc.enable()
