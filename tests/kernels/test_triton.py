"""Triton's kernels: the rule of tests/kernels/test_ops.py at small sizes, compiled on a GPU, else in the interpreter.

The interpreter (TRITON_INTERPRET=1, set in conftest.py) runs one program after another in numpy: it sees wrong indices,
masks and formulas, not what the compiler and a GPU make of them.
"""

import pytest
import torch
from test_ops import _assert_as_good_as_eager, _convert_all, _evaluate, assert_reproduces_reference

import cramfast.kernels
from bench import peers
from cramfast.kernels import arrange, dispatch, extension, reference
from cramfast.kernels.cases import CASES, rotary_table
from cramfast.kernels.layernorm import MAX_WIDTH
from cramfast.kernels.places import Places

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHECKED = [case for case in CASES if "triton" in dispatch.IMPLEMENTATIONS[case.op]]
OBSTACLE = dispatch.obstacle("glu", "triton", DEVICE, torch.float32)
pytestmark = pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE or "can run")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Sizes that take a path of their own in these kernels, beside the shapes of the Cases.
MORE_SHAPES = {
    "layernorm": ({"N": 40, "D": 512}, {"N": 9, "D": 1544, "bias": True}, {"N": 2, "D": 8192}),
    "glu": ({"N": 3, "F": 2056}, {"N": 3, "F": 2056, "activation": "silu"}),
    "layernorm_glu": ({"N": 130, "D": 72, "F": 40, "bias": True}, {"N": 3, "D": 7, "F": 65}, {"N": 3, "D": 7, "F": 1}),
    "cross_entropy": ({"M": 3, "D": 16, "V": 70_001, "ignored": 1},),
    "adamw": ({"P": 70_001, "segments": 7, "step": 2.0}, {"P": 4097, "segments": 1000}, {"P": 9000, "step": 1e5}),
}


def _fewer_rows(shape):
    """What the interpreter gets of a long shape: a program takes it 10 ms, and every loop still takes several turns."""
    return {**shape, "N": 70} if DEVICE == "cpu" and shape.get("N", 0) > 130 else shape


def _grid(dtypes=DTYPES, more=MORE_SHAPES):
    for case in CHECKED:
        for shape in (*map(_fewer_rows, case.test_shapes), *more.get(case.op, ())):
            for dtype in dtypes if case.op != "adamw" else (torch.float32,):
                name = "-".join(f"{k}={v}" for k, v in shape.items())
                yield pytest.param(case, shape, dtype, id=f"{case.op}-{name}-{str(dtype)[6:]}")


@pytest.fixture(autouse=True)
def _on_triton():
    with dispatch.using("all", "triton", device=DEVICE):
        yield


@pytest.fixture(autouse=True)
def _bfloat16_rounds_as_on_a_gpu(monkeypatch):
    """The interpreter cuts float32 off after 16 bits, an error that a sum does not average out; and takes its time."""
    if DEVICE == "cuda":
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.cast_impl

    def cast(self, source, target):
        kinds = (source.dtype.scalar, target.scalar)
        if kinds == (tl.float32, tl.bfloat16):
            rounded = torch.tensor(source.data).bfloat16()
            return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(torch.tensor(source.data).view(torch.bfloat16).float().numpy(), tl.float32)
        return plain(self, source, target)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast)


def _make(case, shape, dtype, seed=0):
    inputs = case.make(**shape, dtype=dtype, seed=seed)
    return {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


@pytest.mark.parametrize(("case", "shape", "dtype"), list(_grid()))
def test_values_and_gradients_against_float64(case, shape, dtype):
    assert_reproduces_reference(DEVICE, case, shape, dtype)


@pytest.mark.parametrize(("case", "shape", "dtype"), list(_grid((torch.float16,), more={})))
def test_two_runs_agree_bitwise_and_every_element_is_written(case, shape, dtype, nan_memory):
    """The second run gets memory full of NaN from torch.empty."""
    inputs = _make(case, shape, dtype, seed=3)
    first = _evaluate(cramfast.kernels, case, inputs)
    nan_memory()
    second = _evaluate(cramfast.kernels, case, inputs)
    for name, value in first.items():
        assert shape.get("nonfinite") or torch.isfinite(value).all(), name
        assert torch.equal(value.nan_to_num(7.0), second[name].nan_to_num(7.0)), name


def test_every_partial_sum_is_added(monkeypatch):
    """A tile of one row, so that the four partial sums there are in the interpreter take four turns."""
    from cramfast.kernels import triton_layernorm

    monkeypatch.setattr(triton_layernorm, "SUM_ROWS", 1)
    case = next(case for case in CASES if case.op == "layernorm")
    assert_reproduces_reference(DEVICE, case, {"N": 70, "D": 40, "bias": True}, torch.float32)


def test_tiles_of_the_fused_kernel_in_groups(monkeypatch):
    """More tiles of rows than a group holds, the last group not full."""
    from cramfast.kernels import triton_layernorm_glu

    monkeypatch.setattr(triton_layernorm_glu, "BLOCK_N", 16)
    monkeypatch.setattr(triton_layernorm_glu, "BLOCK_F", 16)
    monkeypatch.setattr(triton_layernorm_glu, "GROUP", 2)
    case = next(case for case in CASES if case.op == "layernorm_glu")
    assert_reproduces_reference(DEVICE, case, {"N": 75, "D": 40, "F": 44}, torch.float32)


def test_large_mean_costs_the_fused_kernel_no_digits():
    """Rows with a mean a thousand times their spread; a one-pass variance would lose every digit."""
    case = next(case for case in CASES if case.op == "layernorm_glu")
    inputs = _make(case, {"N": 20, "D": 200, "F": 16, "residual": False}, torch.float32)
    inputs["x"] = inputs["x"] + 1000
    truth = _evaluate(reference, case, _convert_all(inputs, torch.float64))
    _assert_as_good_as_eager(_evaluate(cramfast.kernels, case, inputs), _evaluate(reference, case, inputs), truth)


def test_rows_longer_than_the_registers_agree_with_whole_rows(monkeypatch):
    from cramfast.kernels import triton_cross_entropy

    case = next(case for case in CASES if case.op == "cross_entropy")
    inputs = _make(case, {"M": 7, "D": 16, "V": 9001, "ignored": 1}, torch.float32)
    whole = _evaluate(cramfast.kernels, case, inputs)
    monkeypatch.setattr(triton_cross_entropy, "LONGEST_ROW", 9000)
    chunked = _evaluate(cramfast.kernels, case, inputs)
    for name, value in whole.items():
        torch.testing.assert_close(chunked[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_copy_is_the_rounded_master(dtype):
    case = next(case for case in CASES if case.op == "adamw")
    inputs = _make(case, {"P": 5000}, torch.float32)
    inputs["half"] = inputs["half"].to(dtype)
    cramfast.kernels.adamw(**inputs, beta1=0.9, beta2=0.98, eps=1e-8)
    assert torch.equal(inputs["half"], inputs["master"][: len(inputs["half"])].to(dtype))


def test_no_momentum_at_all():
    """beta1 = beta2 = 0: the logarithms of the bias corrections are infinite."""
    case = next(case for case in CASES if case.op == "adamw")
    ours, plain = (_make(case, {"P": 100, "half": False}, torch.float32) for _ in range(2))
    options = {"beta1": 0.0, "beta2": 0.0, "eps": 1e-8}
    cramfast.kernels.adamw(**ours, **options)
    reference.adamw(**plain, **options)
    torch.testing.assert_close(ours["master"], plain["master"])


def test_benchmarks_have_the_fused_forms_that_are_not_under_test_as_peers():
    case = next(case for case in CASES if case.op == "layernorm_glu")
    inputs = _make(case, case.test_shapes[1], torch.float16)
    assert "ours, triton" not in peers.fused_forms(case, inputs)
    with dispatch.using("layernorm_glu", "reference", device=DEVICE):
        work = peers.fused_forms(case, inputs)["ours, triton"]
        assert len(work()) == len([name for name in case.gradients if inputs[name] is not None])
        assert dispatch.choose("layernorm_glu", DEVICE, torch.float16).implementation == "reference"


@pytest.mark.parametrize("activation", ("gelu", "silu"))
def test_opcheck_of_the_fused_operator(activation):
    x, weight = torch.randn(5, 16, device=DEVICE), torch.randn(8, 16, device=DEVICE)
    arguments = (x, x.clone(), torch.ones(16, device=DEVICE), None, weight, activation, 1e-5, "triton")
    results = torch.library.opcheck(torch.ops.cramfast.layernorm_glu_fwd.default, arguments)
    assert results and set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_in": torch.randn(7, 16)}, "2 F, D"),
        ({"weight_in": torch.randn(8, 15)}, "expected shape"),
        ({"activation": "relu"}, "gelu, silu"),
        ({"norm_weight": torch.ones(16, dtype=torch.float64)}, "float32"),
        ({"x": torch.randn(5, 16, dtype=torch.float64)}, "takes float32, bfloat16, float16, not float64"),
    ],
)
def test_the_fused_operator_refuses_bad_arguments(change, message):
    good = {"x": torch.randn(5, 16), "norm_weight": torch.ones(16), "norm_bias": None, "weight_in": torch.randn(8, 16)}
    arguments = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in (good | change).items()}
    with pytest.raises(ValueError, match=message):
        cramfast.kernels.layernorm_glu(**arguments)


def test_widths_are_limited_as_in_the_compiled_kernels():
    assert extension.module.layernorm_max_width == MAX_WIDTH


@pytest.mark.parametrize("V", (1000, 70_001))  # a row held whole, and one in chunks
def test_a_target_outside_the_vocabulary_makes_its_row_nan(V):
    """Triton cannot stop a launch; a loss that looks like one would be worse."""
    from cramfast.kernels import triton_kernels

    logits, loss = (t.to(DEVICE) for t in (torch.randn(4, V), torch.zeros(4)))
    target = torch.tensor([3, V, 2**40, -100], device=DEVICE)
    triton_kernels.call("cross_entropy", logits, logits, target, loss, 4, V, 1e-4, 1.0, True, 0)
    assert loss.isnan().tolist() == logits.isnan().all(1).tolist() == [False, True, True, False]
    assert logits[0].isfinite().all() and not logits[3].any() and loss[3] == 0


# arrange.py: the rotation before stock attention, as the implementations whose names end in _triton take it.

ATTENTION = next(case for case in CASES if case.op == "attention")


@pytest.mark.parametrize("rotary", (True, False))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation_before_stock_attention(dtype, rotary):
    """Into a longer tensor and its gradient back, rows of no sequence full of NaN: as torch's operators do it."""
    places = Places(torch.tensor([0, 3, 3, 5, 5], dtype=torch.int32, device=DEVICE), 7, 3)
    x = torch.randn(7, 3, 3, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    x[5:] = torch.nan
    table = tuple(t.to(DEVICE) for t in rotary_table(3, 32)) if rotary else None

    def both(fused, x):
        leaf = x.clone().requires_grad_()
        out = arrange.arrange(leaf, places, table, 2, 1, fused)
        cotangent = torch.arange(out.numel(), device=DEVICE).view(out.shape) % 7 - 3.0
        return out.detach(), *torch.autograd.grad(out, leaf, cotangent.to(x.dtype))

    eps = torch.finfo(dtype).eps
    for ours, true in zip(both(True, x), both(False, x.double()), strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=eps, atol=eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    (
        {"lengths": (40, 0, 17), "H": 3, "K": 32, "tail": 5},
        {"lengths": (40, 17), "H": 1, "K": 64, "window": 5},
        {"lengths": (9, 1), "H": 2, "K": 128, "rotary": False},
    ),
    ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()),
)
def test_attention_after_it_against_float64(shape, dtype):
    """The padded form, whose backward pass reads the gradient where its halo had shifted the rows to."""
    with dispatch.using("attention", "padded_triton", device=DEVICE):
        assert_reproduces_reference(DEVICE, ATTENTION, shape, dtype)


def test_only_what_is_named_so_rotates_by_it(monkeypatch):
    from cramfast.kernels import triton_kernels

    launched = []
    right = triton_kernels._KERNELS["arrange"]
    monkeypatch.setitem(triton_kernels._KERNELS, "arrange", lambda *a: launched.append(a[-1]) or right(*a))
    inputs = _make(ATTENTION, {"lengths": (5, 3), "H": 1, "K": 32, "tail": 2}, torch.float32)
    for name, expected in (("padded", []), ("padded_triton", [1, -1])):
        with dispatch.using("attention", name, device=DEVICE):
            _evaluate(cramfast.kernels, ATTENTION, inputs)
        assert launched == expected
