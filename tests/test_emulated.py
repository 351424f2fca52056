"""The CUDA kernels on the emulator: the same rule as tests/test_ops.py at small sizes, for the code paths of sm_75 and
sm_86. Compiled for a GPU elsewhere; what only a GPU can show is listed in csrc/emulator/machine.h."""

import math

import pytest
import torch
from test_ops import _assert_as_good_as_eager, _convert_all, _evaluate

import cramfast.kernels
from cramfast.kernels import dispatch, emulated, extension, reference
from cramfast.kernels.cases import CASES
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
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _grid():
    for case in CASES:
        if case.op == "attention":
            continue
        for shape in (*case.test_shapes, *MORE_SHAPES.get(case.op, ())):
            for dtype in DTYPES if case.op != "adamw" else (torch.float32,):
                name = "-".join(f"{k}={v}" for k, v in shape.items())
                yield pytest.param(case, shape, dtype, id=f"{case.op}-{name}-{str(dtype)[6:]}")


@pytest.fixture(params=emulated.ARCHITECTURES, ids=lambda a: f"sm{a // 10}")
def module(request):
    dispatch.override("all", "emulated", architecture=request.param)
    yield emulated.load(request.param)
    dispatch.override("all", "auto")


def _check(case, shape, dtype):
    """Raise AssertionError for a wrong value, RuntimeError for a fault that the emulator sees."""
    inputs = case.make(**shape, dtype=dtype, seed=0)
    ours = _evaluate(cramfast.kernels, case, inputs)
    if shape.get("nonfinite"):
        assert math.isnan(ours["out3"][3]) and ours["out3"][4] == 1 and ours["out3"][1] == inputs["scalars"][1]
        for i, name in enumerate(("master", "exp_avg", "exp_avg_sq")):
            assert torch.equal(ours[f"out{i}"], inputs[name])
        return
    truth = _evaluate(reference, case, _convert_all(inputs, torch.float64))
    eager = _evaluate(reference, case, inputs)
    _assert_as_good_as_eager(ours, eager, truth)


@pytest.mark.parametrize(("case", "shape", "dtype"), list(_grid()))
def test_values_and_gradients_against_float64(module, case, shape, dtype):
    _check(case, shape, dtype)


@pytest.mark.parametrize("case", [c for c in CASES if c.op != "attention"], ids=lambda c: c.op)
def test_any_order_of_blocks_and_warps_gives_the_same_bits(module, case):
    inputs = case.make(**case.test_shapes[1], dtype=torch.float32, seed=3)
    results = []
    for seed in range(3):
        module.set_seed(seed)
        results.append(_evaluate(cramfast.kernels, case, inputs))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("case", [c for c in CASES if c.op not in ("attention", "adamw")], ids=lambda c: c.op)
def test_fresh_memory_filled_with_nan(module, case, monkeypatch):
    """Every element of every output is written, whatever torch.empty hands out."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poison(tensor):
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    for shape in case.test_shapes:
        inputs = case.make(**shape, dtype=torch.float16, seed=5)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
            patch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
            patch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
            results = _evaluate(cramfast.kernels, case, inputs)
        for name, value in results.items():
            assert torch.isfinite(value).all(), f"{name} has elements that no kernel wrote"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", (8, 1000, 1001, 2056, 4104, 8200, 16392, 32776, 65544))
def test_logits_of_any_width(module, V, dtype):
    """The kernel without the matmuls around it, whose own rounding over so many terms hides its error."""
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(V)).mul(3).to(dtype)
    target, scale = torch.tensor([V - 1, -100, 0]), torch.tensor([0.5])
    wide = logits.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(wide, target, reduction="none")
    loss.sum().mul(0.5).backward()
    eager = torch.log_softmax(logits.float(), 1)
    ours = {"loss": torch.full((3,), torch.nan), "gradient": logits.clone()}
    code = DTYPE_CODES[dtype]
    extension.call("cross_entropy", logits, ours["gradient"], target, ours["loss"], scale, 3, V, True, code)
    picked = -eager.gather(1, target.clamp(min=0)[:, None])[:, 0] * (target >= 0)
    hot = torch.zeros(3, V).scatter_(1, target.clamp(min=0)[:, None], 1.0)
    slope = ((eager.exp() - hot) * 0.5 * (target >= 0)[:, None]).to(dtype)
    truth = {"loss": loss.detach(), "gradient": wide.grad}
    _assert_as_good_as_eager(ours, {"loss": picked, "gradient": slope}, truth)


BARRIERS = {  # shapes that together pass every barrier of an operator, twice where it guards a loop
    "layernorm": ({"N": 70, "D": 256}, {"N": 70, "D": 1030}),
    "cross_entropy": ({"M": 3, "D": 16, "V": 2056},),
    "adamw": ({"P": 5000},),
}


@pytest.mark.parametrize("op", BARRIERS)
def test_no_barrier_can_be_removed(module, op):
    """Each barrier, ignored alone, turns the operator red: none is superfluous and none is untested."""
    case = next(c for c in CASES if c.op == op)

    def everything():
        for shape in BARRIERS[op]:
            _check(case, shape, torch.float32)

    module.sites()
    everything()
    sites = [site.split()[1] for site in module.sites()]
    assert sites
    for site in sites:
        module.ignore_site(site)
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


def test_attention_says_that_it_has_no_kernel_yet():
    with pytest.raises(ValueError, match="attention has no CUDA kernel yet"):
        dispatch.override("attention", "emulated")
