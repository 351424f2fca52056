"""Every operator against float64 of its reference: values, gradients, registration, compilation, repeatability; on
every device there is, or on that of --device. On a GPU the implementation is the one that --kernels names."""

import importlib
import math
import re
from pathlib import Path

import pytest
import torch

import cramfast.kernels
from bench import machine
from cramfast.kernels import attention, dispatch, extension, reference
from cramfast.kernels.attention import varlen_attention
from cramfast.kernels.cases import CASES
from cramfast.kernels.cross_entropy import masked_cross_entropy_fwd
from cramfast.kernels.glu import glu_bwd, glu_fwd
from cramfast.kernels.layernorm import layernorm_bwd, layernorm_fwd


def _grid(device):
    for case in CASES:
        for shape in case.test_shapes:
            for dtype in extension.storage_dtypes(device) if case.op != "adamw" else (torch.float32,):
                name = "-".join(f"{k}={v}" for k, v in shape.items()).replace(" ", "")
                yield pytest.param(device, case, shape, dtype, id=f"{device}-{case.op}-{name}-{str(dtype)[6:]}")


def pytest_generate_tests(metafunc):
    devices = machine.devices(metafunc.config.getoption("--device"))
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize(("device", "case", "shape", "dtype"), [p for d in devices for p in _grid(d)])
    elif "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices)


def _convert(value, dtype, device):
    if isinstance(value, tuple):
        return tuple(_convert(v, dtype, device) for v in value)
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    return value


def _convert_all(inputs, dtype=None, device="cpu"):
    """Inputs on a device; floating-point tensors in `dtype`, or as they are."""
    return {k: _convert(v, dtype, device) for k, v in inputs.items()}


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
        cotangents = [torch.randn(o.shape, generator=generator).bfloat16().to(o) for o in outputs]
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
        error = float((ours[name].double().cpu() - true).abs().max())
        allowed = 2 * float((eager[name].double().cpu() - true).abs().max()) + ulp
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.fixture(autouse=True)
def _kernels_under_test(request):
    assert extension.module is not None, extension.missing_reason
    if "device" not in request.fixturenames or request.getfixturevalue("device") == "cpu":
        yield
        return
    missing = machine.take_kernels(request.config.getoption("--kernels"))
    try:
        if "case" in request.fixturenames:
            op = request.getfixturevalue("case").op
            dtype = request.getfixturevalue("dtype") if "dtype" in request.fixturenames else None
            if why := missing.get(op) or (dtype and dispatch.choose(op, "cuda", dtype).obstacle):
                pytest.skip(f"{op}: {why}")
        yield
    finally:
        dispatch.override("all", "auto")


def assert_reproduces_reference(device, case, shape, dtype):
    """Raise AssertionError where the operator that runs on this device now is worse than the rule allows."""
    inputs = case.make(**shape, dtype=dtype, seed=0)
    truth = _evaluate(reference, case, _convert_all(inputs, torch.float64))
    inputs = _convert_all(inputs, device=device)
    ours = _evaluate(cramfast.kernels, case, inputs)
    if shape.get("nonfinite"):
        assert math.isnan(ours["out3"][3]) and ours["out3"][4] == 1 and ours["out3"][1] == inputs["scalars"][1]
        for i, name in enumerate(("master", "exp_avg", "exp_avg_sq")):
            assert torch.equal(ours[f"out{i}"], inputs[name])
        return
    _assert_as_good_as_eager(ours, _evaluate(reference, case, inputs), truth)


def test_values_and_gradients_against_float64(device, case, shape, dtype):
    assert_reproduces_reference(device, case, shape, dtype)


def test_no_float_sum_is_left_to_the_vectoriser():
    """Where a compiler does not vectorise it, `reduction(+ : x)` is one running sum, off by more than is allowed."""
    left = {
        (path.name, name)
        for path in (Path(__file__).parents[2] / "csrc").glob("*")
        if path.suffix in (".h", ".cpp")
        for name in re.findall(r"reduction\(\+ *: *([^)]*)\)", path.read_text(encoding="utf-8"))
    }
    assert left == {("adamw_cpu.cpp", "sum")}  # of doubles


def test_two_runs_and_any_thread_count_agree_bitwise(device, case, shape, dtype):
    inputs = _convert_all(case.make(**shape, dtype=dtype, seed=3), device=device)
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


def test_fresh_memory_filled_with_nan(device, case, shape, dtype, nan_memory):
    """Every element of every output is written."""
    inputs = _convert_all(case.make(**shape, dtype=dtype, seed=5), device=device)
    if shape.get("nonfinite"):
        pytest.skip("the gradient is NaN on purpose")
    nan_memory()
    for name, value in _evaluate(cramfast.kernels, case, inputs).items():
        assert torch.isfinite(value).all(), f"{name} has elements that no kernel wrote"


def _smallest(op, device="cpu", dtype=torch.float32, **shape):
    case = next(c for c in CASES if c.op == op)
    return _convert_all(case.make(**{**case.test_shapes[0], **shape}, dtype=dtype, seed=0), device=device)


def _raw_calls(op, device):
    """(operator, arguments) of the registered operators themselves, below autograd."""
    inputs = _smallest(op, device)
    if op == "layernorm":
        x, residual, weight = inputs["x"], inputs["residual"], inputs["weight"]
        statistics = [torch.zeros(33, device=device), torch.ones(33, device=device)]
        return (
            (layernorm_fwd, (x, residual, weight, None, 1e-5)),
            (layernorm_bwd, (x, residual, x, *statistics, weight)),
        )
    if op == "glu":
        x = inputs["x"]
        return (glu_fwd, (x, "gelu")), (glu_bwd, (x[:, :512].contiguous(), x, "gelu"))
    if op == "attention":
        where = (inputs["cu_seqlens"], inputs["max_seqlen"], *inputs["rotary"], -1)
        out, lse = attention.attention_fwd(inputs["qkv"], *where)
        return (
            (attention.attention_fwd, (inputs["qkv"], *where)),
            (attention.attention_bwd, (out, inputs["qkv"], out, lse, *where)),
        )
    if op == "cross_entropy":
        return ((masked_cross_entropy_fwd, (*inputs.values(), True)),)
    max_norm = inputs.pop("max_norm")
    return ((torch.ops.cramfast.adamw.default, (*inputs.values(), 0.9, 0.98, 1e-8, max_norm)),)


@pytest.mark.parametrize("op", [op for op in dispatch.OPERATORS if op != "layernorm_glu"])  # made of two others
def test_opcheck(device, op):
    for operator, arguments in _raw_calls(op, device):
        results = torch.library.opcheck(operator, arguments)
        assert results and set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("case", [c for c in CASES if c.gradients], ids=lambda c: c.op)
def test_compiles_as_one_graph(device, case):
    """fullgraph: no graph break in forward or backward; aot_eager needs no C++ compiler on the user's machine."""
    inputs = _convert_all(case.make(**case.test_shapes[0], dtype=torch.float32, seed=0), device=device)
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


def _capture(function):
    """The function's result as a CUDA graph writes it, and the graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()  # libraries allocate their workspaces outside the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return result, graph


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.op)
def test_a_captured_graph_replays_on_new_numbers(device, case):
    """Capture succeeds, so nothing waits for the device; the kernels run on the capturing stream, not on stream 0."""
    if device == "cpu":
        pytest.skip("a graph needs a GPU")
    dtype = torch.float32 if case.op == "adamw" else torch.float16
    first, second = (_convert_all(case.make(**case.test_shapes[0], dtype=dtype, seed=s), device=device) for s in (0, 1))
    leaves = [first[n].requires_grad_() for n in case.gradients if first.get(n) is not None]

    def work():
        outputs = case.run(cramfast.kernels, first)
        if not leaves:
            return outputs
        return *outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])

    captured, graph = _capture(work)
    with torch.no_grad():
        for name, value in second.items():
            if isinstance(value, torch.Tensor):
                first[name].copy_(value)
    expected = [t.clone() for t in work()]
    graph.replay()
    for ours, plain in zip(captured, expected, strict=True):
        torch.testing.assert_close(ours, plain)


def test_half_copy_is_the_rounded_master(device):
    for half_dtype in extension.storage_dtypes(device)[1:]:
        adam = _smallest("adamw", device, P=20_000)
        adam["half"] = half = adam["half"].to(half_dtype)
        cramfast.kernels.adamw(**adam, beta1=0.9, beta2=0.98, eps=1e-8)
        assert torch.equal(half, adam["master"][: half.numel()].to(half_dtype))


def test_bfloat16_rounding_and_nan_match_torch(device):
    special = [float("nan"), float("inf"), -float("inf"), 3.3895e38, 1e-40, 1.00390625, 1.01171875, -0.0]
    values = torch.cat([torch.tensor(special), torch.randn(1000)]).to(device)
    master = values.clone()
    ends, decay = torch.tensor([len(values)], device=device), torch.zeros(1, device=device)
    share, zero, half = torch.ones_like(decay), torch.zeros_like(values), torch.zeros_like(values, dtype=torch.bfloat16)
    scalars = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0], device=device)
    cramfast.kernels.adamw(
        master, zero, zero.clone(), zero.clone(), half, ends, decay, share, scalars,
        beta1=0.9, beta2=0.9, eps=1.0, max_norm=0,
    )  # fmt: skip
    expected = values.bfloat16()
    assert torch.equal(half.isnan(), expected.isnan())
    assert torch.equal(half.nan_to_num(0.0), expected.nan_to_num(0.0))


def test_loss_chunks_agree_with_one_chunk(device, monkeypatch):
    from cramfast.kernels import cross_entropy

    case = next(c for c in CASES if c.op == "cross_entropy")
    inputs = _smallest("cross_entropy", device, M=100, D=64, V=640)
    whole = _evaluate(cramfast.kernels, case, inputs)
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, device, 7 * 640 * 4)
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


def _implementations(op):
    """What the registered operators call on a CPU and a GPU alike, and arguments."""
    module = importlib.import_module(f"cramfast.kernels.{op}")
    if op == "layernorm_glu":
        inputs = _smallest(op)
        names = ("x", "residual", "norm_weight", "norm_bias", "weight_in", "activation")
        return [(module._forward, (*(inputs[name] for name in names), 1e-5, "cpp_fused"))]
    names = ("_adamw",) if op == "adamw" else ("_forward", "_backward")
    return [(getattr(module, name), call[1]) for name, call in zip(names, _raw_calls(op, "cpu"), strict=False)]


@pytest.mark.parametrize("op", dispatch.OPERATORS)
def test_a_tensor_on_another_device_is_refused_by_name(op):
    """Its address would mean something else there. Tensors without storage stand for those of another device."""
    for implementation, arguments in _implementations(op):
        tensors = [place for place, value in enumerate(arguments) if isinstance(value, torch.Tensor)]
        for place in tensors if len(tensors) > 1 else ():
            moved = [*arguments[:place], arguments[place].to("meta"), *arguments[place + 1 :]]
            with pytest.raises(ValueError, match=r"^[a-z_ ]+: on \w+, but the operator's first tensor is on \w+;"):
                implementation(*moved)


def test_unaligned_and_strided_tensors_are_refused():
    wide = torch.randn(8, 65)
    with pytest.raises(ValueError, match="contiguous"):
        cramfast.kernels.glu(wide[:, :64])
    with pytest.raises(ValueError, match="16 bytes"):
        cramfast.kernels.glu(torch.randn(129)[1:].view(2, 64))
