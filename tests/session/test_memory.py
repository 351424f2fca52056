"""A memory that is too small, faked: the largest microbatch that fits is looked for, and the record says so."""

import gc
import weakref

import pytest
import torch
from fake_loader import rows, run, same_bits, small_config, weights

from cramfast import train
from cramfast.batches import feed
from cramfast.errors import UserError
from cramfast.model.encoder import Encoder
from cramfast.runtime import distributed
from cramfast.runtime.distributed import Processes, Team
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
        assert search.fitting(attempt, attempt, 8, 1) == 2
    finally:
        gc.enable()


class Card:
    """Holds `most` tokens; notes what was tried and what was run."""

    def __init__(self, most: int):
        self.most, self.tried, self.ran = most, [], []

    def trial(self, size: int) -> None:
        self.tried.append(size)
        if size > self.most:
            raise torch.OutOfMemoryError

    def run(self, size: int) -> int:
        self.ran.append(size)
        if size > self.most:
            raise torch.OutOfMemoryError
        return size

    def fitting(self, tokens: int, least: int = 128) -> int:
        return search.fitting(self.run, self.trial, tokens, least)


@pytest.mark.parametrize(
    ("most", "found", "tried"),
    [
        (65536, 65536, []),
        (32768, 32768, []),  # nothing lies between a whole and a half
        (30000, 21840, [16384, 21840]),  # a third, not a quarter
        (20000, 16384, [16384, 21840]),
        (12000, 10920, [16384, 8192, 10920, 13104]),  # a sixth: between a quarter and an eighth
        (9000, 8192, [16384, 8192, 10920, 9360]),
    ],
)
def test_the_largest_microbatch_that_fits_is_found(most, found, tried):
    card = Card(most)
    assert card.fitting(65536) == found and card.tried == tried
    assert card.ran == [65536] * (found < 65536) + [32768] * (found < 32768) + [found]


def test_few_trials_and_no_token_of_an_update_lost():
    for most in range(600, 65536, 997):
        card = Card(most)
        size = card.fitting(65536)
        parts = round(65536 / size)
        assert size <= most and 65536 * (1 - 1 / search.LOST) <= parts * size <= 65536
        assert len(card.tried) <= 6 + search.MOST_TRIALS
    for tokens in (256, 1000, 3072):
        for parts in range(1, 17):
            size = search.size_of_part(tokens, parts)
            assert size == 0 or tokens - parts * size <= tokens / search.LOST


def test_a_run_whose_memory_shrinks_again_goes_on_smaller():
    card = Card(30000)

    def run(size):
        if len(card.ran) == 2:
            card.most = 5000
        return card.run(size)

    found = search.fitting(run, card.trial, 65536, 128)
    assert 4000 < found <= 5000 and card.ran == [65536, 32768, 21840, found]


def test_a_third_that_fits_trains_on_all_tokens(memory, tmp_path):
    memory.most = 300
    folder = run(tmp_path / "run", "4steps", microbatch_tokens=768, batch_tokens=1536, ramp_fraction=0.0)
    assert header(folder) == [256] and memory.tried[:4] == [768, 384, 192, 256]
    assert [row["microbatches"] for row in rows(folder)] == [6] * 4


def test_heldout_batches_are_no_larger_and_hold_the_same_sequences(fake_text):
    config = small_config(microbatch_tokens=256, heldout_tokens=1024)
    whole = feed.heldout_batches(config, None, torch.device("cpu"))
    small = feed.heldout_batches(config, None, torch.device("cpu"), 64)
    assert len(small) >= 4 * len(whole) and all(len(batch.ids_N) <= 64 for batch in small)
    assert sum(batch.tokens for batch in small) == sum(batch.tokens for batch in whole)
    assert all(batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == batch.tokens for batch in small)
    torch.manual_seed(0)
    model = Encoder(config.model)
    for one, other in zip(feed.evaluate(model, whole), feed.evaluate(model, small), strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    assert same_batches(whole, feed.heldout_batches(config, None, torch.device("cpu"), 256))


def same_batches(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x.ids_N, y.ids_N) for x, y in zip(a, b, strict=True))


def test_evaluation_fits_where_training_does(memory, tmp_path):
    sizes = []
    plain = Encoder.masked_hidden

    def masked_hidden(model, batch):
        sizes.append(len(batch.ids_N))
        return plain(model, batch)

    memory.most = 256
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoder, "masked_hidden", masked_hidden)
        run(tmp_path / "run", "3steps", microbatch_tokens=512)
    assert max(size for size in sizes if size not in (512,)) <= 256 and sizes[-1] <= 256


def test_the_processes_exchange_before_anything_is_captured(fake_text, monkeypatch, tmp_path):
    order = []

    class Pair(Team):
        def connect(self, device):
            order.append(f"exchange on {device}")

    monkeypatch.setattr(train, "graph_choice", lambda config: (True, "rehearsed"))
    monkeypatch.setattr(train, "capture_graph", lambda work: order.append("capture") or work)
    run(tmp_path / "run", "1steps", team=Pair())
    assert order == ["exchange on cpu", "capture"]


def test_the_exchange_is_a_sum_of_one_number_on_the_runs_device(monkeypatch):
    sums, waited = [], []
    processes = Processes.__new__(Processes)
    processes.wait = lambda work, device: waited.append((work, device))
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda values, async_op: sums.append(values) or "work")
    processes.connect(torch.device("cpu"))
    assert sums[0].shape == (1,) and waited == [("work", torch.device("cpu"))]
