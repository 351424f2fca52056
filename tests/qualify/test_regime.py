"""The regime's inputs, and that the kernels for a CPU are right in it by the judge's rule."""

from dataclasses import replace

import pytest
import torch
from fake_loader import small_config

from cramfast.kernels import dispatch
from cramfast.qualify.judge import Judge
from cramfast.qualify.regime import LOSS_SCALE, MASKED, ragged, regime_of, situations

MODEL = replace(small_config().model, norm_bias=True)


def small_regime(**changes):
    return regime_of(small_config(**changes), tokens=300, masked=80)


def test_a_run_is_tried_in_its_own_regime():
    config = small_config(dtype="float16", device="cuda", short_sequence_len=8, z_loss=1e-4)
    regime = regime_of(config)
    assert (regime.masked, regime.loss_scale) == (MASKED, LOSS_SCALE) and 19_000 < MASKED < 21_000
    assert (regime.width, regime.heads, regime.vocabulary, regime.longest, regime.short) == (64, 2, 64, 16, 8)
    assert regime_of(small_config()).loss_scale == 1.0
    with_local = situations("attention", regime_of(small_config()), windowed=True)[0].make(0)
    assert with_local["window"] == 64 and situations("attention", regime, False)[1].name == "short"


def test_lengths_are_ragged_empty_single_and_longest():
    inputs = {s.name: s.make(0) for s in situations("attention", small_regime(sequence_len=32))}
    for made in inputs.values():
        lengths = made["cu_seqlens"].diff().tolist()
        assert {0, 1, 32} <= set(lengths) and sum(lengths) < len(made["qkv"])
    first, second = (situations("attention", small_regime())[0].make(seed)["cu_seqlens"] for seed in (0, 1))
    assert first.shape == second.shape and not torch.equal(first, second)
    assert sum(ragged(300, 32)) == 300


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", dispatch.OPERATORS)
def test_the_kernels_of_a_cpu_qualify(one_thread, op, dtype):
    judge = Judge(op, situations(op, small_regime(dtype=dtype, model=MODEL)), "cpu", graph=False, repeats=3)
    assert judge.problem("cpp", lambda stage: None) == ""


def test_local_attention_qualifies(one_thread):
    config = small_config(sequence_len=32)
    cases = situations("attention", regime_of(config, tokens=300, masked=80), windowed=True)
    assert Judge("attention", cases, "cpu", graph=False, repeats=2).problem("cpp", lambda stage: None) == ""


def test_the_loss_underflow_of_half_precision_is_found(monkeypatch, one_thread):
    """(p - y) / M stored in float16 before the loss scale: what this regime is for. The candidate is made up."""
    from cramfast.kernels import reference

    class Early(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, target):
            logits = hidden.float() @ weight.float().t()
            count = (target >= 0).sum()
            loss = torch.nn.functional.cross_entropy(logits, target, reduction="sum") / count
            p = logits.softmax(-1)
            p[torch.arange(len(target))[target >= 0], target[target >= 0]] -= 1
            p[target < 0] = 0
            ctx.save_for_backward((p / (MASKED * count / len(target))).half() * (MASKED / len(target)), hidden, weight)
            return loss

        @staticmethod
        def backward(ctx, behind):
            gradient, hidden, weight = ctx.saved_tensors
            scaled = gradient.float() * behind
            return (scaled @ weight.float()).half(), (scaled.t() @ hidden.float()).half(), None

    table = {**dispatch.IMPLEMENTATIONS["cross_entropy"]}
    for name, function in (
        ("early", lambda hidden, weight, target, z_loss: Early.apply(hidden, weight, target)),
        ("late", reference.masked_cross_entropy),
    ):
        table[name] = dispatch.Implementation(lambda target: "", function)
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "cross_entropy", table)
    regime = regime_of(small_config(dtype="float16"), tokens=300, masked=MASKED)
    cases = situations("cross_entropy", regime)[1:2]  # 65 rows with the scale of 19,661
    assert Judge("cross_entropy", cases, "cpu", False, 2).problem("late", lambda stage: None) == ""
    assert "failed dhidden" in Judge("cross_entropy", cases, "cpu", False, 2).problem("early", lambda stage: None)
