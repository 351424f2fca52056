"""The CUDA kernels on the emulator: the rule of tests/kernels/test_ops.py at small sizes, for sm_75 and sm_86.

Compiled for a GPU elsewhere; what only a GPU can show is listed in csrc/emulator/machine.h."""

import pytest
import torch
from test_ops import _assert_as_good_as_eager, _evaluate, assert_reproduces_reference

import cramfast.kernels
from cramfast.kernels import attention, dispatch, emulated, extension
from cramfast.kernels.cases import CASES, rotary_table
from cramfast.kernels.extension import DTYPE_CODES

pytestmark = pytest.mark.skipif(bool(emulated.missing_reason()), reason=emulated.missing_reason() or "can be built")

# Widths and lengths that take a path of their own in the CUDA kernels, beside the shapes of the Cases.
MORE_SHAPES = {
    "layernorm": (
        {"N": 40, "D": 512},
        {"N": 5, "D": 1024, "bias": True},
        {"N": 9, "D": 1544, "bias": True},
        {"N": 6, "D": 1030},
        {"N": 2, "D": 8192},
    ),
    "glu": ({"N": 3, "F": 4104},),
    "adamw": ({"P": 70_001, "segments": 7, "step": 2.0}, {"P": 4097, "segments": 1000}),
    "attention": (
        {"lengths": (128, 0, 77, 15, 16), "H": 2, "K": 32, "tail": 5},
        {"lengths": (65, 127), "H": 2, "K": 64, "tail": 9},
        {"lengths": (31, 17, 32, 1, 16, 33), "H": 9, "K": 64, "rotary": False},  # heads beyond a block's eight
        {"lengths": (128, 64, 3), "H": 1, "K": 128},
        {"lengths": (128, 33), "H": 1, "K": 64, "window": 31},
        {"lengths": (128, 16), "H": 1, "K": 32, "window": 1},
    ),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


SHORT = 128  # tokens: csrc/attention_forms.h


def _shapes(case):
    return (*case.test_shapes, *MORE_SHAPES.get(case.op, ()))


def _is_slow(case, shape):
    """Float32 attention loops over all pairs of tokens: seconds to minutes, with nothing new in a long sequence."""
    return case.op == "attention" and (
        shape not in case.test_shapes or ("window" not in shape and max(shape["lengths"]) > SHORT)
    )


def _grid():
    for case in CASES:
        for shape in _shapes(case):
            for dtype in DTYPES if case.op != "adamw" else (torch.float32,):
                if dtype == torch.float32 and _is_slow(case, shape):
                    continue
                name = "-".join(f"{k}={v}" for k, v in shape.items()).replace(" ", "")
                yield pytest.param(case, shape, dtype, id=f"{case.op}-{name}-{str(dtype)[6:]}")


@pytest.fixture(params=emulated.ARCHITECTURES, ids=lambda a: f"sm{a // 10}")
def module(request):
    dispatch.override("all", "emulated", architecture=request.param)
    module = emulated.load(request.param)
    assert module.architecture == request.param
    yield module
    dispatch.override("all", "auto")


def _refusal(case, shape, dtype, module):
    """What a CUDA operator says that does not take the case, or an empty string."""
    if case.op != "attention" or dtype == torch.float32:
        return ""
    return "bfloat16 needs sm_80" if dtype == torch.bfloat16 and module.architecture < 800 else ""


def _check(case, shape, dtype):
    """Raise AssertionError for a wrong value, RuntimeError for a fault that the emulator sees."""
    assert_reproduces_reference("cpu", case, shape, dtype)


@pytest.mark.parametrize(("case", "shape", "dtype"), list(_grid()))
def test_values_and_gradients_against_float64(module, case, shape, dtype):
    if refusal := _refusal(case, shape, dtype, module):
        with pytest.raises(ValueError, match=refusal):
            _check(case, shape, dtype)
    else:
        _check(case, shape, dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.op)
def test_any_order_of_blocks_and_warps_gives_the_same_bits(module, case):
    dtype = torch.float16 if case.op == "attention" else torch.float32
    inputs = case.make(**case.test_shapes[0 if case.op == "attention" else 1], dtype=dtype, seed=3)
    results = []
    for seed in range(3):
        module.set_seed(seed)
        results.append(_evaluate(cramfast.kernels, case, inputs))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("case", [c for c in CASES if c.op != "adamw"], ids=lambda c: c.op)
def test_fresh_memory_filled_with_nan(module, case, nan_memory):
    """Every element of every output is written, whatever torch.empty hands out."""
    shapes = [shape for shape in _shapes(case) if not _refusal(case, shape, torch.float16, module)]
    all_inputs = [case.make(**shape, dtype=torch.float16, seed=5) for shape in shapes]
    nan_memory()
    for inputs in all_inputs:
        for name, value in _evaluate(cramfast.kernels, case, inputs).items():
            assert torch.isfinite(value).all(), f"{name} has elements that no kernel wrote"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", (8, 1000, 1001, 2056, 4104, 8200, 16392, 32776, 65544))
def test_logits_of_any_width(module, V, dtype):
    """The kernel without the matmuls around it, whose own rounding over so many terms hides its error."""
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(V)).mul(3).to(dtype)
    target = torch.tensor([V - 1, -100, 0])
    wide = logits.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(wide, target, reduction="none")
    loss.sum().mul(0.5).backward()
    eager = torch.log_softmax(logits.float(), 1)
    ours = {"loss": torch.full((3,), torch.nan), "gradient": logits.clone()}
    code = DTYPE_CODES[dtype]
    extension.call("cross_entropy", logits, ours["gradient"], target, ours["loss"], 3, V, 0.0, 0.5, True, code)
    picked = -eager.gather(1, target.clamp(min=0)[:, None])[:, 0] * (target >= 0)
    hot = torch.zeros(3, V).scatter_(1, target.clamp(min=0)[:, None], 1.0)
    slope = ((eager.exp() - hot) * 0.5 * (target >= 0)[:, None]).to(dtype)
    truth = {"loss": loss.detach(), "gradient": wide.grad}
    _assert_as_good_as_eager(ours, {"loss": picked, "gradient": slope}, truth)


@pytest.mark.parametrize("V", (8, 1001))
@pytest.mark.parametrize("target", (0, 2**40))
def test_a_target_outside_the_vocabulary_stops_the_launch_and_is_named(module, V, target):
    """On a GPU Python does not look at the targets. Nothing is read or written then; V itself is the first outside."""
    logits, loss = torch.zeros(600, V).half(), torch.full((600,), 7.0)
    targets = torch.full((600,), -100)
    targets[599] = V + target
    with pytest.raises(RuntimeError, match=f"cross_entropy: target {V + target} is outside the vocabulary of {V}"):
        extension.call("cross_entropy", logits, logits, targets, loss, 600, V, 0.0, 1.0, True, DTYPE_CODES[torch.half])
    assert not logits.any() and (loss == 7).all()


# Shapes that together pass every barrier, wait and mma of an operator, twice where a barrier guards a loop.
FAULTS = {
    "layernorm": (torch.float32, ({"N": 70, "D": 256}, {"N": 70, "D": 1030})),
    "cross_entropy": (torch.float32, ({"M": 3, "D": 16, "V": 2056},)),
    "adamw": (torch.float32, ({"P": 5000},)),
    "attention": (
        torch.float16,
        (
            {"lengths": (40, 17), "H": 2, "K": 64},
            {"lengths": (40,), "H": 1, "K": 128},
            {"lengths": (40,), "H": 1, "K": 128, "rotary": False},
        ),
    ),
}


@pytest.mark.parametrize("op", FAULTS)
def test_no_barrier_can_be_removed_and_no_operand_swapped(module, op):
    """Each barrier and wait, ignored alone, and each mma with two registers in each other's place turns the operator
    red: none is superfluous and none is untested."""
    case = next(c for c in CASES if c.op == op)
    dtype, shapes = FAULTS[op]

    def everything():
        for shape in shapes:
            _check(case, shape, dtype)

    module.sites()
    everything()
    sites = module.sites()
    kinds = {site.split()[0] for site in sites}
    assert "barrier" in kinds
    if op == "attention":
        assert "mma" in kinds and ("cp_async_wait" in kinds) == (module.architecture >= 800)
    for site in sites:
        module.ignore_site(site.split()[1])
        try:
            with pytest.raises((AssertionError, RuntimeError)):
                everything()
                print(f"{op} does not need {site}")  # pytest shows it when nothing was raised
        finally:
            module.ignore_site("")


def test_a_tensor_that_is_too_short_is_noticed(module):
    x, h = torch.randn(4, 2 * 64), torch.zeros(4, 64 - 4)
    module.register_tensor(x.data_ptr(), x.nbytes)
    module.register_tensor(h.data_ptr(), h.nbytes)
    with pytest.raises(RuntimeError, match="out of bounds: global memory"):
        module.glu_fwd(module.Cuda(0), x.data_ptr(), h.data_ptr(), 4, 64, 0, 0)


def test_float16_copy_of_the_weights(module):
    case = next(c for c in CASES if c.op == "adamw")
    inputs = case.make(P=5000, dtype=torch.float32, seed=0)
    inputs["half"] = inputs["half"].to(torch.float16)
    master, half = inputs["master"].clone(), inputs["half"].clone()
    inputs |= {"master": master, "half": half}
    cramfast.kernels.adamw(**inputs, beta1=0.9, beta2=0.98, eps=1e-8)
    assert torch.equal(half, master[: len(half)].half())


def _attention(lengths, K, dtype, H=2, seed=0):
    case = next(c for c in CASES if c.op == "attention")
    inputs = case.make(lengths=lengths, H=H, K=K, dtype=dtype, seed=seed, tail=4)
    cos, sin = inputs["rotary"]
    return inputs["qkv"], inputs["cu_seqlens"], inputs["max_seqlen"], cos, sin


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("K", (32, 64, 128))
def test_log_sum_exp_of_attention(module, K, dtype):
    qkv, offsets, longest, cos, sin = _attention((50, 0, 3), K, dtype)
    _, lse = attention.attention_fwd(qkv, offsets, longest, cos, sin, -1)
    dispatch.override("attention", "auto")
    _, plain = attention.attention_fwd(qkv.float(), offsets, longest, cos, sin, -1)
    torch.testing.assert_close(lse, plain, rtol=0, atol=5e-3 if dtype == torch.float16 else 1e-5)
    assert (lse[:, 53:] == 0).all()


def test_attention_does_not_depend_on_the_capacity(module):
    """Room for more and longer sequences than there are, as in a CUDA graph, changes the grid but no bit."""
    qkv, offsets, longest, _, _ = _attention((20, 1, 16, 40), 64, torch.float16, H=3)
    cos, sin = rotary_table(128, 64)
    room = torch.cat([offsets, offsets[-1:].expand(5)])
    dout = torch.randn(qkv[:, 0].shape, generator=torch.Generator().manual_seed(1)).half()
    results = []
    for offsets_of, most in ((offsets, longest), (room, 128)):
        where = (offsets_of, most, cos, sin, -1)
        out, lse = attention.attention_fwd(qkv, *where)
        results.append((out, lse, attention.attention_bwd(dout, qkv, out, lse, *where)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


BAD_OFFSETS = {
    "too long": ([0, 20, 53], 32, "sequence 1 has 33 tokens, more than max_seqlen 32"),
    "decreasing": ([0, 20, 15], 33, "cu_seqlens decreases from 20 to 15 after sequence 1 of 2"),
    "beyond the end": ([0, 33, 58], 33, "cu_seqlens reaches 58 after sequence [12], of 57 tokens"),
    "negative": ([0, -3, 20], 33, "cu_seqlens decreases from 0 to -3 after sequence 0 of 2"),
    "negative at the end": ([0, 20, -(2**31)], 33, "cu_seqlens decreases from 20 to -2147483648 after sequence 1 of 2"),
    "not from 0": ([4, 20, 53], 33, "cu_seqlens must start at 0, not at 4"),
    "far away": ([2**30, 2**30 + 5, 2**30 + 9], 33, "cu_seqlens (must start at 0|reaches 1)"),
    "no sequence": ([7], 33, "cu_seqlens must start at 0, not at 7"),
}


@pytest.mark.parametrize("form", ("plain", "short", "tiled"))
@pytest.mark.parametrize("fault", BAD_OFFSETS)
def test_bad_offsets_stop_the_launch_and_are_named(module, fault, form):
    """On a GPU Python does not look at the offsets: it would have to wait for them. Nothing is read or written then."""
    bad, most, message = BAD_OFFSETS[fault]
    dtype = torch.float32 if form == "plain" else torch.float16
    qkv, _, _, _, _ = _attention((20, 33), 64, dtype)
    offsets = torch.tensor(bad, dtype=torch.int32)
    if form == "tiled":
        most, message = most + 128, message.replace("33 tokens, more than max_seqlen 32", "200 tokens, more than")
        if fault == "too long":
            qkv, _, _, _, _ = _attention((20, 200), 64, dtype)
            offsets[2] = 220
    cos, sin = rotary_table(most, 64)
    sizes = (len(qkv), len(bad) - 1, 2, 64, most, -1, DTYPE_CODES[dtype])
    out, lse, dqkv = (torch.full_like(t, 7) for t in (qkv[:, 0].contiguous(), torch.zeros(2, len(qkv)), qkv))
    with pytest.raises(RuntimeError, match=f"attention: {message}"):
        extension.call("attention_fwd", qkv, qkv, offsets, cos, sin, out, lse, *sizes)
    places = (out, qkv, out, lse, offsets, cos, sin, torch.zeros_like(lse), dqkv)
    with pytest.raises(RuntimeError, match=f"attention: {message}"):
        extension.call("attention_bwd", qkv, *places, *sizes)
    assert (out == 7).all() and (lse == 7).all() and (dqkv == 7).all()


def test_attention_keeps_its_heads_and_sequences_apart(module):
    """A NaN in one sequence of one head stays there, though other heads share the block."""
    qkv, offsets, longest, cos, sin = _attention((9, 12), 64, torch.float16, H=3)
    qkv[4, :, 1] = torch.nan
    where = (offsets, longest, cos, sin, -1)
    out, lse = attention.attention_fwd(qkv, *where)
    dqkv = attention.attention_bwd(torch.ones_like(out), qkv, out, lse, *where)
    for result in (out, dqkv):
        assert result.movedim(-2, 1)[:9, 1].isnan().any() and not result.movedim(-2, 1)[:, (0, 2)].isnan().any()
        assert not result[9:].isnan().any()
