"""The step as a GPU would run it: figures read late, nothing read between log points, a microbatch replayed."""

import contextlib
import dataclasses
import math
import random

import pytest
import torch
from fake_loader import FakeSource, rows, run, same_bits, small_config, weights
from test_train import spoil

from cramfast import train
from cramfast.batches import feed
from cramfast.errors import UserError
from cramfast.kernels import dispatch
from cramfast.model.electra import Discriminator
from cramfast.model.encoder import Encoder
from cramfast.optim import adamw
from cramfast.optim.adamw import AdamW, FlatParameters, LossScale
from cramfast.optim.make import OPTIMIZERS
from cramfast.runtime.interrupt import Interrupt
from cramfast.session import checkpoint, ledger, microbatch
from cramfast.session.budget import Budget, Progress, read_replay
from cramfast.session.ledger import Clock, Ledger, Step
from cramfast.session.microbatch import Microbatch, capture_graph, graph_choice

pytestmark = pytest.mark.usefixtures("fake_text")
TIMES = ("seconds", "tokens_per_s", "mfu")


def timeless(folder) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows(folder)]


def lazily(monkeypatch, seconds: float = 1e9) -> None:
    """Log points on the CPU as rare as on a GPU."""
    monkeypatch.setitem(ledger.LOG_INTERVAL_S, "cpu", seconds)


def random_batch(device: str = "cpu"):
    return feed.to_device(
        FakeSource(None, "train", sequence_len=16, batch_tokens=256, seed=0).batch(0, 0, 0.3), torch.device(device)
    )


def model_and_optimizer(
    dtype=torch.float32, device="cpu", kind=AdamW, encoder=Encoder, **changes
) -> tuple[Encoder, AdamW]:
    torch.manual_seed(0)
    model = encoder(small_config().model).to(device)
    options = {"beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "weight_decay": 0.01, "max_norm": 0.5}
    return model, kind(FlatParameters(model, dtype), **(options | changes))


# What an update weighs


@pytest.mark.parametrize("encoder", [Encoder, Discriminator])
def test_every_target_of_an_update_weighs_the_same(encoder):
    """The update of a whole microbatch and the short one that ends an epoch is that of all their targets."""
    whole = random_batch()
    short = dataclasses.replace(whole, target_M=whole.target_M.where(torch.arange(len(whole.target_M)) < 3, -100))
    model, optimizer = model_and_optimizer(encoder=encoder)
    passes, counts = Microbatch(model, optimizer, Clock(torch.device("cpu"))), []
    for batch in (whole, short, whole):
        passes.run(batch)
        counts.append(int((batch.target_M >= 0).sum()))
    assert counts[1] == 3 < counts[0] == len(whole.target_M)
    assert passes.weight.item() == pytest.approx(2 + 3 / counts[0])
    alone, plain = model_and_optimizer(encoder=encoder)
    parts = [
        count / sum(counts) * alone.loss(batch) for batch, count in zip((whole, short, whole), counts, strict=True)
    ]
    torch.stack(parts).sum().backward()
    assert (passes.loss_sum / passes.weight).item() == pytest.approx(sum(parts).item(), rel=1e-6)
    torch.testing.assert_close(optimizer.flat.grad / passes.weight, plain.flat.grad, rtol=1e-5, atol=1e-7)
    passes.clear()
    assert passes.weight.item() == passes.loss_sum.item() == 0


# Figures read late


def test_rows_and_weights_do_not_depend_on_when_figures_are_read(monkeypatch, tmp_path):
    eager = run(tmp_path / "eager", "30steps")
    reads, plain = [], Ledger.read
    monkeypatch.setattr(Ledger, "read", lambda self: reads.append(len(self.steps)) or plain(self))
    lazily(monkeypatch)
    late = run(tmp_path / "late", "30steps")
    assert reads == [30, 0], "one log point at the end of the budget, and nothing left for the end of the session"
    assert timeless(late) == timeless(eager) and same_bits(weights(late), weights(eager))
    seconds = [row["seconds"] for row in rows(late)]
    assert seconds == sorted(seconds) and len({round(row["mfu"], 9) for row in rows(late)}) == 1


def test_a_full_ledger_is_a_log_point(monkeypatch, tmp_path):
    eager = run(tmp_path / "eager", "12steps")
    lazily(monkeypatch)
    monkeypatch.setattr(ledger, "CAPACITY", 5)
    assert timeless(run(tmp_path / "late", "12steps")) == timeless(eager)


def test_late_runs_evaluate_save_and_resume_exactly(monkeypatch, tmp_path):
    lazily(monkeypatch, 0.02)
    whole = run(tmp_path / "whole", "40steps")
    often = {"eval_interval": 1e-9, "checkpoint_interval": 1e-9}
    run(tmp_path / "parts", "40steps", **often)
    assert same_bits(weights(whole), weights(tmp_path / "parts"))
    assert len(rows(tmp_path / "parts", "heldout_loss")) > 2
    assert timeless(tmp_path / "parts") == timeless(whole)


def test_a_wall_clock_run_read_late_is_replayed_from_its_record(monkeypatch, tmp_path):
    lazily(monkeypatch, 0.05)
    first = run(tmp_path / "first", "0.4s")
    fractions = [row["fraction"] for row in rows(first)]
    assert fractions == sorted(fractions) and fractions[-1] < 1
    assert rows(first)[-1]["seconds"] >= 0.4
    again = run(tmp_path / "again", read_replay(first / "metrics.jsonl"))
    assert same_bits(weights(first), weights(again))
    assert [row["loss"] for row in rows(first)] == [row["loss"] for row in rows(again)]


@pytest.mark.parametrize("budget", ["0.2s", "0.201s", "0.202s", "0.203s", "0.204s"])
def test_a_budget_that_ends_between_two_log_points_ends_with_one(monkeypatch, tmp_path, budget):
    """However the clock falls: the last log point is inside the loop, which shows it, and an evaluation follows."""
    ticks, reads, plain = iter(range(10**9)), [], Ledger.read
    monkeypatch.setattr(ledger.time, "perf_counter", lambda: next(ticks) / 1000)
    monkeypatch.setattr(Ledger, "read", lambda self: reads.append(len(self.steps)) or plain(self))
    lazily(monkeypatch)
    folder = run(tmp_path / "run", budget, batch_tokens=256)
    assert reads == [len(rows(folder)), 0] and rows(folder)[-1]["seconds"] >= float(budget[:-1])
    assert [row["step"] for row in rows(folder, "heldout_loss")] == [0, len(rows(folder))]


def test_skipped_steps_are_found_late_and_named(monkeypatch, tmp_path):
    lazily(monkeypatch)
    spoil(monkeypatch, lambda call: call in (3, 4))  # call 0 is the trial step
    folder = run(tmp_path / "run", "8steps", batch_tokens=256)
    assert [row["skipped"] for row in rows(folder)] == [0, 0, 1, 1, 0, 0, 0, 0]
    assert checkpoint.read_state(checkpoint.newest(folder))["progress"]["skipped"] == 2


def test_twenty_in_a_row_between_two_log_points_end_the_run(monkeypatch, tmp_path):
    lazily(monkeypatch)
    spoil(monkeypatch, lambda call: 5 < call <= 25)  # steps 6 to 25; those after it are good again
    with pytest.raises(UserError, match=r"step 25: .*20 times in a row"):
        run(tmp_path / "run", "60steps", batch_tokens=256)
    assert len(rows(tmp_path / "run")) == 25


def test_a_signal_between_two_log_points_loses_no_step(monkeypatch, tmp_path):
    whole = run(tmp_path / "whole", "9steps", batch_tokens=256)
    lazily(monkeypatch)
    handlers, enter, plain, calls = [], Interrupt.__enter__, Encoder.loss, iter(range(100))

    def loss(self, batch):
        if next(calls) == 6:
            handlers[0].note(2, None)
        return plain(self, batch)

    monkeypatch.setattr(Interrupt, "__enter__", lambda self: handlers.append(self) or enter(self))
    monkeypatch.setattr(Encoder, "loss", loss)
    config, folder = small_config(batch_tokens=256), tmp_path / "stopped"
    folder.mkdir()
    assert not train.train(config, folder, folder, Budget("steps", 9))
    assert checkpoint.newest(folder).name == "step-00000005" and len(rows(folder)) == 5
    monkeypatch.setattr(Encoder, "loss", plain)
    assert train.train(config, folder, folder, Budget("steps", 9))
    assert same_bits(weights(whole), weights(folder)) and timeless(folder) == timeless(whole)


def test_the_clock_shares_out_the_time_and_leaves_out_what_it_is_told(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(ledger.time, "perf_counter", lambda: now[0])
    clock = Clock(torch.device("cpu"))
    book = Ledger(clock)
    for number, (flops, seconds) in enumerate(((1.0, 2.0), (3.0, 4.0))):
        book.begin()
        now[0] += seconds
        if number == 0:
            with clock.stopped():
                now[0] += 50.0
        book.add(Step((0, number), 10, flops, {}), torch.tensor(1.5), torch.tensor([0.25, number]))
    ahead = book.ahead(Progress(step=7, tokens=5, seconds=1.0))
    assert (ahead.step, ahead.tokens, ahead.seconds, ahead.flops, ahead.index) == (9, 25, 7.0, 4.0, 1)
    first, second = (figures for _, figures in book.read())
    assert first == (1.5, 0.25, False, 1.5) and second == (1.5, 0.25, True, 4.5)
    now[0] += 1000.0  # rows are written, the model is evaluated: no step is being made
    book.begin()
    assert clock.elapsed() == 0.0 and book.ahead(Progress()).seconds == 0.0


# Nothing read in between


def enqueue_steps(steps: int, batch, kind=AdamW, encoder=Encoder) -> None:
    """What session() does between two log points, on tensors without values: reading one raises."""
    model, optimizer = model_and_optimizer(torch.float16, "meta", kind, encoder, ema_decay=0.9)
    book = Ledger(Clock(torch.device("meta")))
    passes = Microbatch(model, optimizer, book.clock, lambda work: work)
    for _ in range(steps):
        book.begin()
        loss_sum = passes.loss_sum.zero_()
        passes.run(batch)
        passes.run(batch)
        optimizer.step(1e-3, loss_sum, 2)
        book.add(Step((0, 0), 256, 1.0, {}), loss_sum, optimizer.verdict)
        assert book.ahead(Progress()).tokens > 0


@pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_step_reads_nothing_on_the_host(monkeypatch, kind):
    for op in dispatch.OPERATORS:
        monkeypatch.setitem(dispatch._overrides, (op, "meta"), "cpp")
    # Tensors without values stand for a GPU's here, where the kernels take float16 too.
    monkeypatch.setattr(dispatch, "_find", lambda op, device, *rest: dispatch._overrides[op, device])
    enqueue_steps(3, random_batch("meta"), kind)
    enqueue_steps(3, random_batch("meta"), kind, Discriminator)
    monkeypatch.setitem(dispatch._overrides, ("attention", "meta"), "reference")
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):  # the test can fail
        enqueue_steps(1, random_batch("meta"), kind)


def test_the_loss_scale_moves_by_the_hosts_rule():
    """adamw.LossScale on the device, train.advance in the record: the same values after every step."""
    scale, progress = LossScale(torch.float16, torch.device("cpu")), Progress(loss_scale=LossScale.START)
    chance = random.Random(0)
    for _ in range(3 * adamw.STEADY_STEPS):
        skipped = chance.random() < 0.0005
        scale.update(torch.tensor(float(skipped)))
        progress = train.advance(progress, (0, 0), 1, 1.0, 1.0, skipped, True)
        assert (scale.value.item(), scale.steady_steps.item()) == (progress.loss_scale, progress.steady_steps)
    assert progress.skipped > 0 and progress.steady_steps != 3 * adamw.STEADY_STEPS


def test_float16_gradients_are_unscaled_and_an_overflow_halves_the_scale():
    model, optimizer = model_and_optimizer()
    optimizer.loss_scale.dynamic = True  # as in float16, which the CPU has no kernels for
    optimizer.loss_scale.set(1024.0, 0)
    passes = Microbatch(model, optimizer, Clock(torch.device("cpu")))
    passes.run(random_batch())
    plain_model, plain = model_and_optimizer()
    plain_passes = Microbatch(plain_model, plain, Clock(torch.device("cpu")))
    plain_passes.run(random_batch())
    torch.testing.assert_close(optimizer.flat.grad, 1024.0 * plain.flat.grad)
    optimizer.step(1e-3, passes.loss_sum, 1)
    plain.step(1e-3, plain_passes.loss_sum, 1)
    assert optimizer.grad_norm == pytest.approx(plain.grad_norm, rel=1e-6)  # the clip would hide a wrong scale
    torch.testing.assert_close(optimizer.flat.master, plain.flat.master)
    passes.run(random_batch())
    optimizer.flat.grad[3] = math.inf
    before = optimizer.flat.master.clone()
    optimizer.step(1e-3, passes.loss_sum.zero_(), 1)
    assert optimizer.skipped and torch.equal(before, optimizer.flat.master)
    assert optimizer.loss_scale.value.item() == 512.0


# A microbatch captured and replayed


def eager_capture(captures: list):
    """Stands in for capture_graph: warms up, and replays by running the same work on the same buffers."""

    def capture(work):
        captures.append(work)
        work()
        work()
        return work

    return capture


@pytest.mark.parametrize("changes", [{}, {"mask_fraction_end": 0.15}], ids=["", "mask schedule"])
def test_a_replayed_microbatch_trains_to_the_same_bits(monkeypatch, tmp_path, changes):
    whole = run(tmp_path / "eager", "24steps", **changes)
    captures = []
    monkeypatch.setattr(train, "graph_choice", lambda config: (True, "rehearsed"))
    monkeypatch.setattr(train, "capture_graph", eager_capture(captures))
    replayed = run(tmp_path / "replayed", "24steps", **changes)
    assert same_bits(weights(whole), weights(replayed)) and timeless(whole) == timeless(replayed)
    assert len(captures) == (1 if not changes else len({round(0.3 - 0.15 * i / 24, 2) for i in range(24)}))


def test_a_replay_reads_its_own_buffers():
    model, optimizer = model_and_optimizer()
    captures = []
    passes = Microbatch(model, optimizer, Clock(torch.device("cpu")), eager_capture(captures))
    source = FakeSource(None, "train", sequence_len=16, batch_tokens=256, seed=0)
    first, second = (source.batch(0, index, 0.3) for index in range(2))
    passes.run(first)
    alone, address = passes.loss_sum.item(), passes.inputs.ids_N.data_ptr()
    assert alone == pytest.approx(model.loss(first).item())
    passes.run(second)
    assert passes.loss_sum.item() == pytest.approx(alone + model.loss(second).item())
    assert len(captures) == 1 and passes.inputs.ids_N.data_ptr() == address != second.ids_N.data_ptr()
    passes.loss_sum.zero_()
    passes.run(dataclasses.replace(second, max_seqlen=32))  # a number baked into the capture
    assert len(captures) == 2


class FakeCuda:
    """torch.cuda as capture_graph uses it, with a diary."""

    def __init__(self, ending: Exception | None = None, free: int = 500):
        self.diary, self.ending, self.current, self.free = [], ending, "main", free

    def Stream(self):
        return self

    def current_stream(self):
        return self

    def wait_stream(self, other):
        self.diary.append("wait")

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, "side"
        try:
            yield
        finally:
            self.current = before

    def synchronize(self):
        pass

    def empty_cache(self):
        pass

    def reset_peak_memory_stats(self):
        pass

    def memory_reserved(self):
        return 1000

    def max_memory_reserved(self):
        return 1500

    def mem_get_info(self):
        return self.free, 10**9

    def CUDAGraph(self):
        return self

    def replay(self):
        self.diary.append("replay")

    @contextlib.contextmanager
    def graph(self, graph, stream):
        """As torch/cuda/graphs.py: the stream is given back only after an ending that does not raise."""
        before, self.current = self.current, "capture"
        try:
            yield
        finally:
            if self.ending:
                raise self.ending
            self.current = before


def test_a_capture_is_warmed_up_on_a_side_stream(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr(microbatch.torch, "cuda", cuda)
    capture_graph(lambda: cuda.diary.append(cuda.current))()
    assert cuda.diary == ["wait", "side", "side", "wait", "capture", "replay"]


@pytest.mark.parametrize("ending", [None, RuntimeError("capture invalidated")])
def test_memory_that_runs_out_in_a_capture_ends_the_run_with_a_remedy(monkeypatch, ending):
    """Torch's allocator stays in the capture, so no smaller batch is tried in this process; the stream comes back."""
    cuda = FakeCuda(ending)
    monkeypatch.setattr(microbatch.torch, "cuda", cuda)

    def work():
        if cuda.current == "capture":
            raise torch.OutOfMemoryError("too large")

    with pytest.raises(UserError, match=r"while the CUDA graph was captured.*--resume.*--microbatch-tokens"):
        capture_graph(work)
    assert cuda.current == "main"


def test_a_capture_without_room_is_not_begun(monkeypatch):
    """The warm-up took 500 bytes, op by op, where running out can be tried again with less."""
    cuda = FakeCuda(free=499)
    monkeypatch.setattr(microbatch.torch, "cuda", cuda)
    with pytest.raises(torch.OutOfMemoryError, match="takes 500 bytes, and 499 are free"):
        capture_graph(lambda: cuda.diary.append(cuda.current))
    assert cuda.diary == ["wait", "side", "side", "wait"] and cuda.current == "main"


def test_memory_that_runs_out_in_the_warm_up_can_be_tried_again(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr(microbatch.torch, "cuda", cuda)

    def work():
        raise torch.OutOfMemoryError("too large")

    with pytest.raises(torch.OutOfMemoryError, match="too large"):
        capture_graph(work)
    assert cuda.current == "main"


def test_what_cannot_be_captured_is_an_error_with_a_remedy(monkeypatch):
    monkeypatch.setattr(microbatch.torch, "cuda", FakeCuda(RuntimeError("operation not permitted\nmore")))
    with pytest.raises(UserError, match=r"\(operation not permitted\) — use --graph off"):
        capture_graph(lambda: None)
    assert torch.cuda.current == "main"


def test_graph_choice_says_why(monkeypatch):
    assert graph_choice(small_config()) == (False, "only a GPU has them")
    assert graph_choice(small_config(graph="off")) == (False, "switched off")
    with pytest.raises(UserError, match="only a GPU"):
        graph_choice(small_config(graph="on"))
    on_gpu = small_config(device="cuda", dtype="float16")
    assert graph_choice(on_gpu)[0], "the floor waits for nothing, on any card"
    monkeypatch.setitem(dispatch._overrides, ("attention", "cuda"), "reference")
    captured, reason = graph_choice(on_gpu)
    assert not captured and "attention" in reason
    with pytest.raises(UserError, match=r"attention .* — use --graph auto"):
        graph_choice(dataclasses.replace(on_gpu, graph="on"))
    monkeypatch.setitem(dispatch._overrides, ("attention", "cuda"), "cpp")
    assert graph_choice(on_gpu)[0] and graph_choice(dataclasses.replace(on_gpu, graph="on"))[0]
    assert graph_choice(dataclasses.replace(on_gpu, nvtx="layers")) == (False, "a replay shows no ranges around layers")
