"""The loss's gradient where float16 and long sums would lose it: about 20,000 masked rows, a loss scale of 65,536."""

import types

import pytest
import torch
from test_ops import _assert_as_good_as_eager

from cramfast.kernels import cross_entropy, dispatch, emulated, reference
from cramfast.kernels.cross_entropy import masked_cross_entropy

LOSS_SCALE = 65536.0
# What underflowed is a probability over the number of rows, 1 / (M V): the interpreter and the emulator get few rows.
SIZES = {"stand-in": (20_000, 600), "triton": (64, 19_000), "emulated": (64, 19_000)}


def eager_kernel(name, on, logits, target, loss, rows, vocabulary, z_loss, gain, write_gradient, _dtype_code):
    """The arithmetic of csrc/cross_entropy.h in PyTorch, for sizes that only it can manage on a CPU."""
    wide, wanted = logits.float(), target.clamp(min=0)[:, None]
    lse = wide.logsumexp(1)
    loss[:rows] = (lse - wide.gather(1, wanted)[:, 0] + z_loss * lse.square()) * (target >= 0)
    if write_gradient:
        slope = (wide - lse[:, None]).exp() * (1 + 2 * z_loss * lse)[:, None]
        slope.scatter_add_(1, wanted, -torch.ones_like(wide[:, :1]))
        logits.copy_(slope * gain * (target >= 0)[:, None])


@pytest.fixture(params=SIZES)
def implementation(request, monkeypatch):
    if request.param == "stand-in":  # on a CPU, cpp takes no float16
        monkeypatch.setattr(dispatch, "pick", lambda op, tensor: ("cpp", None))
        monkeypatch.setattr(dispatch, "launcher", lambda implementation: eager_kernel)
        monkeypatch.setattr(cross_entropy, "check_activations", lambda *arguments: None)
        yield request.param
        return
    why = dispatch.obstacle("cross_entropy", request.param, "cpu", torch.float16)
    if why:
        pytest.skip(why)
    with dispatch.using("cross_entropy", request.param, device="cpu"):
        yield request.param


def _gradients(function, hidden, weight, target, scale=LOSS_SCALE):
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss = function(*leaves, target)
    return dict(zip(("dhidden", "dweight"), torch.autograd.grad(loss * scale, leaves), strict=True))


def _inputs(M, V, dtype=torch.float16, D=24):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(M, D, generator=g), torch.randn(V, D, generator=g) * D**-0.5
    return hidden.to(dtype), weight.to(dtype), torch.randint(V, (M,), generator=g)


def _off(ours, truth):
    return {name: float((ours[name].double() - true).norm() / true.norm()) for name, true in truth.items()}


def test_on_a_gpu_the_decoder_gradient_adds_no_parts_in_half_precision(monkeypatch):
    flags, seen = torch.backends.cuda.matmul, []

    def addmm(total, a, b, *, out_dtype, beta, out):
        both = flags.allow_fp16_reduced_precision_reduction, flags.allow_bf16_reduced_precision_reduction
        seen.append((out_dtype, beta, out is total, *both))

    monkeypatch.setattr(torch, "addmm", addmm)
    logits = types.SimpleNamespace(is_cuda=True, dtype=torch.float16, t=lambda: None)
    for first in (True, False):
        cross_entropy._add_product(torch.zeros(3, 2), logits, None, first)
    assert seen == [(torch.float32, beta, True, False, False) for beta in (0.0, 1.0)]


def test_float16_gradients_of_many_rows_keep_their_digits(implementation):
    """(p - y) / M in float16 is subnormal: the gradients of the hidden states were off by 8 to 64 %."""
    hidden, weight, target = _inputs(*SIZES[implementation])
    truth = _gradients(reference.masked_cross_entropy, hidden.double(), weight.double(), target)
    eager = _gradients(reference.masked_cross_entropy, hidden, weight, target)
    ours = _gradients(masked_cross_entropy, hidden, weight, target)
    assert ours["dhidden"].dtype == ours["dweight"].dtype == torch.float16
    _assert_as_good_as_eager(ours, eager, truth)
    assert max(_off(eager, truth).values()) < 2e-3
    assert max(_off(ours, truth).values()) < 2e-3


def test_a_rare_word_is_still_pushed_away(implementation):
    """A probability of 1e-8 is below the least float16; the update of its embedding is a sum of nothing else."""
    hidden, weight, target = _inputs(*SIZES[implementation])
    hidden[:, 0], weight[:, 0] = 1, 0
    weight[7], target[target == 7] = 0, 8
    weight[7, 0] = -12 if implementation == "stand-in" else -8
    rare = _gradients(reference.masked_cross_entropy, hidden.double(), weight.double(), target)["dweight"][7]
    ours = _gradients(masked_cross_entropy, hidden, weight, target)["dweight"][7]
    assert 0 < rare[0] / LOSS_SCALE < 6e-8
    assert (ours.double() - rare).norm() < 0.02 * rare.norm()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_the_decoders_gradient_is_summed_in_float32(monkeypatch, dtype):
    """A gradient that all rows agree on grows with each of 100 chunks, and may not be rounded to half in between."""
    hidden, weight, target = _inputs(6400, 128, dtype)
    hidden = hidden.abs()
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", 64 * 128 * dtype.itemsize)
    truth = _gradients(reference.masked_cross_entropy, hidden.double(), weight.double(), target, 1.0)
    ours = _gradients(masked_cross_entropy, hidden, weight, target, 1.0)
    allowed = torch.finfo(dtype).eps * (0.5 if dtype == torch.bfloat16 else 2)  # half: as much as one rounding
    assert max(_off(ours, truth).values()) < allowed
    scaled = _gradients(masked_cross_entropy, hidden, weight, target, 4.0)
    assert max(_off(scaled, {name: 4 * true for name, true in truth.items()}).values()) < allowed


def test_a_device_that_must_not_be_waited_for_is_not_asked(monkeypatch):
    """On a GPU neither the number of targets nor the incoming gradient is read; tensors without values stand for it."""
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "meta", 8 * 64 * 2)
    monkeypatch.setattr(dispatch, "launcher", lambda implementation: lambda *arguments: None)
    monkeypatch.setattr(cross_entropy, "check_activations", lambda *arguments: None)
    monkeypatch.setattr(cross_entropy, "check", lambda *arguments: None)
    monkeypatch.setattr(cross_entropy, "_add_product", lambda *arguments, **options: None)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        hidden, weight, target = (t.to("meta") for t in _inputs(20, 64, dtype))
        loss, dhidden, dweight, rest = cross_entropy._forward(hidden, weight, target, 0.0, True)
        factor = rest * torch.empty((), device="meta")
        assert cross_entropy._scaled(dweight, factor, dtype).dtype == dtype == dhidden.dtype
        assert dweight.dtype == rest.dtype == loss.dtype == torch.float32


@pytest.mark.skipif(bool(emulated.missing_reason()), reason=emulated.missing_reason() or "can be built")
def test_no_overflow_from_the_gain():
    """A certain and wrong prediction: the largest gradient of a logit there is, times weights of a hundred."""
    hidden, weight, target = _inputs(4, 64)
    weight *= 100 / weight.abs().max()
    truth = _gradients(reference.masked_cross_entropy, hidden.double(), weight.double(), target, 1.0)
    with dispatch.using("cross_entropy", "emulated", device="cpu"):
        ours = _gradients(masked_cross_entropy, hidden, weight, target, 1.0)
    assert max(_off(ours, truth).values()) < 2e-3
