"""A whole microbatch by the floor and by what was chosen; and the same look again during training."""

import math
from pathlib import Path

import made_up
import pytest
import torch
from fake_loader import rows, run, small_config, weights

from cramfast.batches.loader import Batch
from cramfast.errors import UserError
from cramfast.kernels import dispatch, reference
from cramfast.model.encoder import Encoder
from cramfast.optim.make import make_optimizer
from cramfast.qualify import agreement, watch
from cramfast.qualify.agreement import Comparison
from cramfast.qualify.verdict import Verdict, in_force, settle
from cramfast.session import checkpoint
from cramfast.session.budget import Progress

ATTENTION = Verdict("attention", False, "reference", "right", "qualified")
GLU = Verdict("layernorm_glu", False, "reference", "off", "qualified")


@pytest.fixture(autouse=True)
def card(monkeypatch, fake_text):
    """The CPU as a card, on which layernorm_glu=off is a little off, and right as long as `off` says so."""
    made_up.install(monkeypatch.setattr)
    glu = {**dispatch.IMPLEMENTATIONS["layernorm_glu"], "off": dispatch.Implementation(lambda target: "", off)}
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "layernorm_glu", glu)
    off.factor = 1.02
    yield
    settle([], "cpu", torch.float32)


def off(*arguments):
    h, stream = reference.layernorm_glu(*arguments)
    return h * off.factor, stream


def comparison(verdicts, dtype="float32", scale=1.0, **changes) -> Comparison:
    config = small_config(dtype=dtype, **changes)
    torch.manual_seed(0)
    model = Encoder(config.model)
    optimizer = make_optimizer(config, model)
    batch = agreement.first_batch(config, Path("."), 256)
    settle(verdicts, "cpu", getattr(torch, dtype))
    return Comparison(model, optimizer, batch, scale, verdicts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_right_agrees_and_leaves_no_trace(dtype):
    found = comparison([ATTENTION], dtype)
    before = {name: p.detach().clone() for name, p in found.model.named_parameters()}
    assert found.departed() == {} == found.departed(one_by_one=True)
    for name, parameter in found.model.named_parameters():
        assert parameter.dtype == before[name].dtype and torch.equal(parameter, before[name])
    assert not found.optimizer.flat.grad.any() and in_force() == [ATTENTION]
    if dtype == "bfloat16":
        assert found.true.loss != found.floor.loss, "the truth is a pass in float32"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_operator_that_departs_is_named(dtype):
    found = comparison([ATTENTION, GLU], dtype, scale=1024.0).departed()
    assert set(found) == {"layernorm_glu"} and "of its length" in found["layernorm_glu"]


def test_one_wrong_row_among_the_gradients_of_a_layer_shows():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):
            return h.clone()

        @staticmethod
        def backward(ctx, dh):
            dh = dh.clone()
            dh[3:6] *= -1
            return dh

    off.factor = 1.0
    table = dispatch.IMPLEMENTATIONS["layernorm_glu"]

    def wrong(*arguments):
        h, stream = reference.layernorm_glu(*arguments)
        return Once.apply(h), stream

    table["off"] = dispatch.Implementation(lambda target: "", wrong)
    assert "of its length" in comparison([GLU]).departed()["layernorm_glu"]


def test_a_gradient_that_alone_overflows_is_told(monkeypatch):
    off.factor = math.inf
    assert "which the floor keeps finite" in comparison([GLU]).departed()["layernorm_glu"]


def test_without_text_words_are_drawn():
    batch = agreement.random_batch(small_config(sequence_len=16), 256)
    assert isinstance(batch, Batch) and batch.cu_seqlens[-1] == 256 and batch.cu_seqlens.diff().max() <= 16
    assert (batch.ids_N[batch.masked_index_M] == 4).all() and len(batch.target_M) == round(0.3 * 256)


# In training


def training(monkeypatch, folder, verdicts, budget="6steps", steps=(4,), **changes):
    monkeypatch.setattr(watch, "STEPS", steps)
    settle(verdicts, "cpu", torch.float32)
    return run(folder, budget, batch_tokens=256, **changes)


def test_a_look_changes_no_bit_and_happens_at_its_steps_only(monkeypatch, tmp_path):
    looks, plain = [], Comparison.departed
    monkeypatch.setattr(Comparison, "departed", lambda self, *rest: looks.append(self.scale) or plain(self, *rest))
    whole = training(monkeypatch, tmp_path / "never", [ATTENTION], steps=())
    looked = training(monkeypatch, tmp_path / "looked", [ATTENTION], steps=(2, 5))
    assert looks == [1.0, 1.0]
    a, b = weights(whole), weights(looked)
    assert all(torch.equal(a[name], b[name]) for name in a)
    training(monkeypatch, tmp_path / "floor", [ATTENTION.on_floor("")], steps=(2, 5))
    assert len(looks) == 2, "where the floor is all that runs there is nothing to compare"


def test_a_departure_stops_at_the_last_checkpoint_with_the_line_to_go_on(monkeypatch, tmp_path):
    off.factor, plain = 1.0, watch.Watch.look

    def look(self, progress, previous):
        off.factor = 1.0 if progress.step < 4 else 1.05
        plain(self, progress, previous)

    monkeypatch.setattr(watch.Watch, "look", look)
    remembered = []
    monkeypatch.setattr(watch, "remember", lambda config, run_dir, departed: remembered.append((run_dir, departed)))
    with pytest.raises(UserError) as error:
        training(
            monkeypatch, tmp_path / "run", [ATTENTION, GLU], checkpoint_interval=1e-9, kernels=("adamw=reference",)
        )
    folder = tmp_path / "run"
    assert checkpoint.newest(folder).name == "step-00000003"
    assert str(error.value).startswith("step 4: layernorm_glu off departs from reference: ")
    ((where, ((verdict, why),)),) = remembered
    assert (where, verdict) == (folder, GLU) and why.startswith("departed from reference at step 4: ")
    flags = "--kernels adamw=reference layernorm_glu=reference"
    assert str(error.value).endswith(f"step-00000003 is kept — go on with --resume {folder} {flags}")
    with pytest.raises(UserError, match=r"no checkpoint was written yet — start anew with --kernels layernorm_glu=ref"):
        training(monkeypatch, tmp_path / "other", [GLU])


def test_three_skipped_updates_in_a_row_are_looked_into():
    looked = watch.Watch(small_config(), Path(), Path(), None, None, 256)
    looked.verdicts = [ATTENTION]
    for skipped, due in ((1, False), (2, False), (3, True)):
        looked.note(Progress(step=7 + skipped, skipped_in_row=skipped))
        assert looked.due is due
    looked.due = False
    looked.note(Progress(step=11, skipped_in_row=4))
    assert not looked.due


def test_memory_that_is_too_small_for_a_look_is_told_and_training_goes_on(monkeypatch, tmp_path, capsys):
    class Full(Comparison):
        def __init__(self, *arguments):
            raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(watch, "Comparison", Full)
    training(monkeypatch, tmp_path / "run", [ATTENTION])
    assert "no memory is left to compare" in capsys.readouterr().out


def test_a_cpu_never_looks(monkeypatch, tmp_path):
    looked = []
    monkeypatch.setattr(Comparison, "__init__", lambda *arguments: looked.append(arguments))
    folder = training(monkeypatch, tmp_path / "run", [], steps=(2, 4))  # nothing was tried, so nothing replaces a floor
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4, 5, 6]
    assert not looked and not in_force()
