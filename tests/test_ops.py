"""Every operator against float64 of its reference: values, gradients, registration, compilation, repeatability."""

import math

import pytest
import torch

import cramfast.kernels
from cramfast.kernels import attention, dispatch, extension, reference
from cramfast.kernels.attention import varlen_attention
from cramfast.kernels.cases import CASES
from cramfast.kernels.cross_entropy import masked_cross_entropy_fwd
from cramfast.kernels.glu import glu_bwd, glu_fwd
from cramfast.kernels.layernorm import layernorm_bwd, layernorm_fwd

DTYPES = (torch.float32, torch.bfloat16)


def _grid():
    for case in CASES:
        for shape in case.test_shapes:
            for dtype in DTYPES if case.op != "adamw" else (torch.float32,):
                name = "-".join(f"{k}={v}" for k, v in shape.items()).replace(" ", "")
                yield pytest.param(case, shape, dtype, id=f"{case.op}-{name}-{str(dtype)[6:]}")


GRID = list(_grid())


def _convert(value, dtype):
    if isinstance(value, tuple):
        return tuple(_convert(v, dtype) for v in value)
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value


def _evaluate(operators, case, inputs, cotangent_seed=1):
    """Outputs and gradients as one dict of detached tensors."""
    inputs = dict(inputs)
    wanted = [n for n in case.gradients if inputs.get(n) is not None]
    for name in wanted:
        inputs[name] = inputs[name].detach().clone().requires_grad_()
    outputs = case.run(operators, inputs)
    result = {f"out{i}": o.detach() for i, o in enumerate(outputs)}
    if wanted:
        generator = torch.Generator().manual_seed(cotangent_seed)
        # Cotangents are drawn in bfloat16 so that every dtype differentiates the same function.
        cotangents = [torch.randn(o.shape, generator=generator).bfloat16().to(o.dtype) for o in outputs]
        if not any(o.requires_grad for o in outputs):  # of empty sequences alone the reference makes a constant
            return result | {f"d{n}": torch.zeros_like(inputs[n]) for n in wanted}
        gradients = torch.autograd.grad(outputs, [inputs[n] for n in wanted], cotangents)
        result |= {f"d{n}": g for n, g in zip(wanted, gradients, strict=True)}
    return result


def _assert_as_good_as_eager(ours, eager, truth):
    """Our largest error is at most twice that of eager PyTorch in the same dtype, plus one ulp."""
    for name, true in truth.items():
        if true.numel() == 0:
            assert ours[name].shape == true.shape
            continue
        ulp = torch.finfo(ours[name].dtype).eps * float(true.abs().max())
        error = float((ours[name].double() - true).abs().max())
        allowed = 2 * float((eager[name].double() - true).abs().max()) + ulp
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.fixture(autouse=True)
def _needs_compiled_module():
    assert extension.module is not None, extension.missing_reason


@pytest.mark.parametrize(("case", "shape", "dtype"), GRID)
def test_values_and_gradients_against_float64(case, shape, dtype):
    inputs = case.make(**shape, dtype=dtype, seed=0)
    truth = _evaluate(reference, case, _convert_all(inputs, torch.float64))
    eager = _evaluate(reference, case, inputs)
    ours = _evaluate(cramfast.kernels, case, inputs)
    if shape.get("nonfinite"):
        assert math.isnan(ours["out3"][3]) and ours["out3"][4] == 1
        for i, name in enumerate(("master", "exp_avg", "exp_avg_sq")):
            assert torch.equal(ours[f"out{i}"], inputs[name])
        return
    _assert_as_good_as_eager(ours, eager, truth)


def _convert_all(inputs, dtype):
    return {k: _convert(v, dtype) for k, v in inputs.items()}


@pytest.mark.parametrize(("case", "shape", "dtype"), GRID)
def test_two_runs_and_any_thread_count_agree_bitwise(case, shape, dtype):
    inputs = case.make(**shape, dtype=dtype, seed=3)
    threads = torch.get_num_threads()
    first = _evaluate(cramfast.kernels, case, inputs)
    second = _evaluate(cramfast.kernels, case, inputs)
    if case.op not in ("layernorm_glu", "cross_entropy"):  # these contain a torch matmul, which may split by threads
        torch.set_num_threads(1)
        try:
            third = _evaluate(cramfast.kernels, case, inputs)
        finally:
            torch.set_num_threads(threads)
    else:
        third = second
    for name, value in first.items():
        assert torch.equal(value.nan_to_num(7.0), second[name].nan_to_num(7.0)), name
        assert torch.equal(value.nan_to_num(7.0), third[name].nan_to_num(7.0)), name


@pytest.mark.parametrize(("case", "shape", "dtype"), GRID)
def test_fresh_memory_filled_with_nan(case, shape, dtype, monkeypatch):
    """Every element of every output is written: torch.empty hands out NaN here."""
    inputs = case.make(**shape, dtype=dtype, seed=5)
    if shape.get("nonfinite"):
        pytest.skip("the gradient is NaN on purpose")
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poison(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
    for name, value in _evaluate(cramfast.kernels, case, inputs).items():
        assert torch.isfinite(value).all(), f"{name} has elements that no kernel wrote"


def _smallest(op, dtype=torch.float32, **shape):
    case = next(c for c in CASES if c.op == op)
    return case.make(**{**case.test_shapes[0], **shape}, dtype=dtype, seed=0)


def _raw_calls():
    """Arguments for the registered operators themselves, below autograd."""
    norm = _smallest("layernorm")
    statistics = [torch.zeros(33), torch.ones(33)]
    attend = _smallest("attention")
    cos, sin = attend["rotary"]
    where = (attend["cu_seqlens"], attend["max_seqlen"], cos, sin, -1)
    out, lse = attention.attention_fwd(attend["qkv"], *where)
    gate = _smallest("glu")["x"]
    entropy = _smallest("cross_entropy")
    adam = _smallest("adamw")
    max_norm = adam.pop("max_norm")
    return (
        (layernorm_fwd, (norm["x"], norm["residual"], norm["weight"], None, 1e-5)),
        (layernorm_bwd, (norm["x"], norm["residual"], norm["x"], *statistics, norm["weight"])),
        (glu_fwd, (gate, "gelu")),
        (glu_bwd, (gate[:, :512].contiguous(), gate, "gelu")),
        (attention.attention_fwd, (attend["qkv"], *where)),
        (attention.attention_bwd, (out, attend["qkv"], out, lse, *where)),
        (masked_cross_entropy_fwd, (entropy["hidden"], entropy["weight"], entropy["target"], True)),
        (torch.ops.cramfast.adamw.default, (*adam.values(), 0.9, 0.98, 1e-8, max_norm)),
    )


@pytest.mark.parametrize("index", range(8))
def test_opcheck(index):
    operator, arguments = _raw_calls()[index]
    results = torch.library.opcheck(operator, arguments)
    assert results and set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("case", [c for c in CASES if c.gradients], ids=lambda c: c.op)
def test_compiles_as_one_graph(case):
    """fullgraph: no graph break in forward or backward; aot_eager needs no C++ compiler on the user's machine."""
    inputs = case.make(**case.test_shapes[0], dtype=torch.float32, seed=0)
    names = [n for n in case.gradients if inputs.get(n) is not None]

    def total(**tensors):
        return sum(o.square().sum() for o in case.run(cramfast.kernels, {**inputs, **tensors}))

    def gradients(function):
        leaves = {n: inputs[n].clone().requires_grad_() for n in names}
        return torch.autograd.grad(function(**leaves), list(leaves.values()))

    torch._dynamo.reset()
    compiled = gradients(torch.compile(total, fullgraph=True, backend="aot_eager"))
    for ours, plain in zip(compiled, gradients(total), strict=True):
        torch.testing.assert_close(ours, plain)


def test_half_copy_is_the_rounded_master():
    adam = _smallest("adamw", P=20_000)
    cramfast.kernels.adamw(**adam, beta1=0.9, beta2=0.98, eps=1e-8)
    half = adam["half"]
    assert torch.equal(half, adam["master"][: half.numel()].bfloat16())


def test_bfloat16_rounding_and_nan_match_torch():
    special = [float("nan"), float("inf"), -float("inf"), 3.3895e38, 1e-40, 1.00390625, 1.01171875, -0.0]
    values = torch.cat([torch.tensor(special), torch.randn(1000)])
    master = values.clone()
    ends, decay = torch.tensor([len(values)]), torch.zeros(1)
    zero, half = torch.zeros_like(values), torch.zeros(len(values), dtype=torch.bfloat16)
    scalars = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])
    cramfast.kernels.adamw(
        master, zero, zero.clone(), zero.clone(), half, ends, decay, scalars, beta1=0.9, beta2=0.9, eps=1.0, max_norm=0
    )
    expected = values.bfloat16()
    assert torch.equal(half.isnan(), expected.isnan())
    assert torch.equal(half.nan_to_num(0.0), expected.nan_to_num(0.0))


def test_loss_chunks_agree_with_one_chunk(monkeypatch):
    from cramfast.kernels import cross_entropy

    case = next(c for c in CASES if c.op == "cross_entropy")
    inputs = case.make(M=100, D=64, V=640, dtype=torch.float32, seed=0)
    whole = _evaluate(cramfast.kernels, case, inputs)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 7 * 640 * 4)
    pieces = _evaluate(cramfast.kernels, case, inputs)
    for name, value in whole.items():
        torch.testing.assert_close(pieces[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 5, 3], dtype=torch.int32)}, "never decrease"),
        ({"cu_seqlens": torch.tensor([0, 9999], dtype=torch.int32)}, "end at"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int64)}, "int32"),
        ({"max_seqlen": 3}, "exceeds max_seqlen"),
        ({"window": -2}, "negative"),
        ({"qkv": torch.randn(115, 3, 3, 48)}, "K one of"),
    ],
)
def test_attention_refuses_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        varlen_attention(**{**_smallest("attention"), **change})


def test_unaligned_and_strided_tensors_are_refused():
    wide = torch.randn(8, 65)
    with pytest.raises(ValueError, match="contiguous"):
        cramfast.kernels.glu(wide[:, :64])
    with pytest.raises(ValueError, match="16 bytes"):
        cramfast.kernels.glu(torch.randn(129)[1:].view(2, 64))


def test_override_and_table():
    x = torch.randn(4, 8)
    try:
        dispatch.override("glu", "reference")
        assert dispatch.uses_reference("glu", x) and not dispatch.uses_reference("layernorm", x)
        assert dispatch.choose("glu", "cpu", torch.float32).reason == "asked for"
    finally:
        dispatch.override("glu", "auto")
    assert not dispatch.uses_reference("glu", x)
    assert dispatch.uses_reference("glu", x.double())
    assert {c.op for c in dispatch.table("cpu")} == set(dispatch.OPERATORS)
    with pytest.raises(ValueError, match="unknown operator"):
        dispatch.override("glue", "cpp")
