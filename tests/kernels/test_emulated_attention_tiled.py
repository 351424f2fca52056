"""The tiled form of attention on the emulator: sequences of more than 128 tokens, and whatever is packed with them."""

import pytest
import torch
from test_ops import _assert_as_good_as_eager, _convert_all, _evaluate

import cramfast.kernels
from cramfast.kernels import attention, dispatch, emulated, reference
from cramfast.kernels.cases import CASES, rotary_table

pytestmark = pytest.mark.skipif(bool(emulated.missing_reason()), reason=emulated.missing_reason() or "can be built")

CASE = next(c for c in CASES if c.op == "attention")
SHORT = 128  # tokens: csrc/attention_forms.h
LENGTHS = (0, 1, 63, 64, 65, 129, 200, 257)
WINDOWS = (None, 0, 16, 100)
TARGETS = ((750, torch.float16), (860, torch.float16), (860, torch.bfloat16))


@pytest.fixture(params=TARGETS, ids=lambda t: f"sm{t[0] // 10}-{str(t[1])[6:]}")
def target(request):
    """(emulated module, dtype)"""
    architecture, dtype = request.param
    dispatch.override("attention", "emulated", architecture=architecture)
    module = emulated.load(architecture)
    assert module.architecture == architecture
    yield module, dtype
    dispatch.override("attention", "auto")


def _inputs(dtype, lengths=LENGTHS, H=1, K=64, room=None, **options):
    """Inputs for the tiled form: `room` is a max_seqlen beyond the longest sequence."""
    inputs = CASE.make(lengths=lengths, H=H, K=K, dtype=dtype, seed=0, **options)
    if room:
        inputs |= {"max_seqlen": room, "rotary": inputs["rotary"] and rotary_table(room, K)}
    assert inputs["max_seqlen"] > SHORT
    return inputs


def _split(results):
    dq, dk, dv = results.pop("dqkv").unbind(1)
    return results | {"dq": dq, "dk": dk, "dv": dv}


def _check(inputs):
    """The rule of test_ops.py, for dq, dk and dv each."""
    ours = _evaluate(cramfast.kernels, CASE, inputs)
    eager = _evaluate(reference, CASE, inputs)
    truth = _evaluate(reference, CASE, _convert_all(inputs, torch.float64))
    if inputs["window"] != 0:  # a token that sees itself only has dq = dk = 0, which makes no scale for their errors
        ours, eager, truth = map(_split, (ours, eager, truth))
    _assert_as_good_as_eager(ours, eager, truth)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("K", (32, 64, 128))
def test_values_and_gradients_against_float64(target, K, window):
    _check(_inputs(target[1], K=K, window=window, tail=3, rotary=window != 100))


@pytest.mark.parametrize("window", (1, 30, 31))
def test_windows_that_end_where_a_tile_does(target, window):
    """One more or one less decides whether a tile of columns is loaded, and whether it is masked."""
    _check(_inputs(target[1], (150,), window=window))


def test_a_long_sequence(target):
    _check(_inputs(target[1], (600,)))


@pytest.mark.parametrize("window", (None, 7))  # 7: some rows of a tile see nothing of the columns that others see
@pytest.mark.parametrize("K", (32, 64, 128))
def test_short_sequences_take_this_form_too_when_longer_ones_may_come(target, K, window):
    _check(_inputs(target[1], (5, 0, 128, 33), H=3, K=K, room=SHORT + 1, window=window))


@pytest.mark.parametrize("K", (64, 128))
def test_any_order_of_blocks_and_warps_and_any_capacity_gives_the_same_bits(target, K):
    module, dtype = target
    inputs = _inputs(dtype, (150, 7), H=2, K=K)
    results = []
    for seed in range(3):
        module.set_seed(seed)
        results.append(_evaluate(cramfast.kernels, CASE, inputs))
    offsets = inputs["cu_seqlens"]
    inputs = _inputs(dtype, (150, 7), H=2, K=K, room=400) | {"cu_seqlens": torch.cat([offsets, offsets[-1:].expand(3)])}
    results.append(_evaluate(cramfast.kernels, CASE, inputs))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


def test_fresh_memory_filled_with_nan(target, nan_memory):
    """Every element of every output is written, whatever torch.empty hands out."""
    inputs = _inputs(target[1], (0, 130, 0, 20), H=2, tail=5)
    nan_memory()
    for name, value in _evaluate(cramfast.kernels, CASE, inputs).items():
        assert torch.isfinite(value).all(), f"{name} has elements that no kernel wrote"


@pytest.mark.parametrize("K", (32, 64, 128))
def test_log_sum_exp(target, K):
    inputs = _inputs(target[1], (140, 3), H=2, K=K, window=50, tail=4)
    where = (inputs["cu_seqlens"], inputs["max_seqlen"], *inputs["rotary"], inputs["window"])
    _, lse = attention.attention_fwd(inputs["qkv"], *where)
    dispatch.override("attention", "auto")
    _, plain = attention.attention_fwd(inputs["qkv"].float(), *where)
    torch.testing.assert_close(lse, plain, rtol=0, atol=8 * torch.finfo(target[1]).eps)


def test_tiles_outside_the_window_are_not_touched(target):
    """A NaN in the last token stays in the blocks that the window reaches from there."""
    inputs = _inputs(target[1], (450,), window=16)
    inputs["qkv"][-1] = torch.nan
    for name, value in _evaluate(cramfast.kernels, CASE, inputs).items():
        assert value[-1].isnan().any(), name
        assert torch.isfinite(value[: 450 - 128 - 64 - 16]).all(), name


def _run_with_fault(module, site, run):
    module.ignore_site(site)
    try:
        return run()
    finally:
        module.ignore_site("")


@pytest.mark.parametrize("K", (64, 128))
def test_no_barrier_or_wait_can_be_removed_and_no_operand_swapped(target, K):
    """Forward and backward each: every barrier and wait ignored alone, and every mma with two registers swapped, is a
    fault of the emulator or changes the result beyond what rounding may."""
    module, dtype = target
    inputs = _inputs(dtype, (160,), K=K)
    where = (inputs["cu_seqlens"], inputs["max_seqlen"], *inputs["rotary"], -1)
    qkv, dout = inputs["qkv"], torch.randn(160, 1, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    out, lse = attention.attention_fwd(qkv, *where)
    for run in (
        lambda: attention.attention_fwd(qkv, *where)[0],
        lambda: attention.attention_bwd(dout, qkv, out, lse, *where),
    ):
        module.sites()
        right = run()
        sites = module.sites()
        kinds = [site.split()[0] for site in sites]
        assert "barrier" in kinds and "mma" in kinds and ("cp_async_wait" in kinds) == (module.architecture >= 800)
        for site in sites:
            try:
                wrong = _run_with_fault(module, site.split()[1], run)
            except RuntimeError:
                continue
            error = (wrong - right).abs().max() / right.abs().max()
            assert not error < 0.05, f"{site} is not needed"
