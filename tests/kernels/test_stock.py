"""The floor: every operator from stock PyTorch against float64 of the reference, and what it promises besides."""

import math
import types

import pytest
import torch
from test_ops import _assert_as_good_as_eager, _convert_all, _evaluate
from torch.utils._python_dispatch import TorchDispatchMode

from cramfast.kernels import dispatch, linear, reference, stock
from cramfast.kernels.attention import varlen_attention
from cramfast.kernels.cases import CASES, rotary_table
from cramfast.kernels.places import Places

CASE_OF = {case.op: case for case in CASES}
PUBLIC_NAME = {"attention": "varlen_attention", "cross_entropy": "masked_cross_entropy"}


def name_of(op):
    return "padded" if op == "attention" else "stock"


def floor_of(op):
    """Something like cramfast.kernels with one operator, that of the floor."""
    function = dispatch.IMPLEMENTATIONS[op][name_of(op)].function
    return types.SimpleNamespace(**{PUBLIC_NAME.get(op, op): function})


def grid():
    for case in CASES:
        for shape in case.test_shapes:
            for dtype in (torch.float32, torch.bfloat16, torch.float16) if case.op != "adamw" else (torch.float32,):
                if shape == {"N": 1, "D": 1} and dtype == torch.float16:
                    continue  # torch's LayerNorm of one float16 value is 1e-6 on a CPU, where nothing takes float16
                name = "-".join(f"{k}={v}" for k, v in shape.items()).replace(" ", "")
                yield pytest.param(case, shape, dtype, id=f"{case.op}-{name}-{str(dtype)[6:]}")


@pytest.mark.parametrize(("case", "shape", "dtype"), list(grid()))
def test_values_and_gradients_against_float64(case, shape, dtype):
    inputs = case.make(**shape, dtype=dtype, seed=0)
    truth = _evaluate(reference, case, _convert_all(inputs, torch.float64))
    ours = _evaluate(floor_of(case.op), case, inputs)
    if shape.get("nonfinite"):
        assert ours["out3"][3].isnan() and ours["out3"][4] == 1 and ours["out3"][1] == inputs["scalars"][1]
        for i, name in enumerate(("master", "exp_avg", "exp_avg_sq")):
            assert torch.equal(ours[f"out{i}"], inputs[name])
        return
    _assert_as_good_as_eager(ours, _evaluate(reference, case, inputs), truth)
    again = _evaluate(floor_of(case.op), case, inputs)
    assert all(torch.equal(value, again[key]) for key, value in ours.items()), "two runs differ"


READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item", "masked_select", "unique")


class Names(TorchDispatchMode):
    """Every operator that runs, by its name."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function._schema.name.removeprefix("aten::"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_nothing_is_read_on_the_host_and_shapes_are_static(case):
    """On tensors without values: what needs a value, or a shape that depends on one, raises."""
    inputs = _convert_all(case.make(**case.test_shapes[0], dtype=torch.float32, seed=0), device="meta")
    leaves = [inputs[name].requires_grad_() for name in case.gradients if inputs.get(name) is not None]
    with Names() as names:
        outputs = case.run(floor_of(case.op), inputs)
        if leaves:
            torch.autograd.grad(outputs, leaves, [torch.empty_like(o) for o in outputs])
    assert names.seen and not set(names.seen) & set(READS)
    for real in ("float32", "bfloat16"):
        inputs = case.make(**case.test_shapes[0], dtype=getattr(torch, real) if leaves else torch.float32, seed=0)
        with Names() as names:
            _evaluate(floor_of(case.op), case, inputs)
        assert not set(names.seen) & set(READS)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):  # the test can fail
        reference.adamw(**_convert_all(CASE_OF["adamw"].make(P=9, dtype=torch.float32, seed=0), device="meta"),
                        beta1=0.9, beta2=0.9, eps=1e-8)  # fmt: skip


@pytest.mark.parametrize("op", ("layernorm", "glu", "layernorm_glu", "attention"))
def test_no_float32_copy_of_an_activation_is_kept(op):
    case = CASE_OF[op]
    inputs = case.make(**case.test_shapes[0], dtype=torch.bfloat16, seed=0)
    rows = len(inputs["qkv"] if op == "attention" else inputs["x"])
    for name in case.gradients:
        if inputs.get(name) is not None:
            inputs[name].requires_grad_()

    def kept_by(operators):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            case.run(operators, inputs)
        return [t for t in kept if t.dtype == torch.float32 and t.dim() > 1 and len(t) >= rows and t.shape[-1] > 1]

    assert not kept_by(floor_of(op))
    if op == "layernorm":
        assert kept_by(reference), "the test can fail"


@pytest.mark.parametrize("chunk_rows", (20_000, 300))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_loss_gradients_in_the_regime_of_training(monkeypatch, dtype, chunk_rows):
    """20,000 masked tokens, float16's first loss scale: a row's gradient of the mean is below its least number."""
    M, D, V, scale = 20_000, 16, 512, 65536.0
    monkeypatch.setitem(stock.CHUNK_BYTES, "cpu", chunk_rows * V * 4)
    inputs = CASE_OF["cross_entropy"].make(M=M, D=D, V=V, dtype=dtype, seed=0, ignored=37, z_loss=1e-4)

    def gradients(operators, inputs):
        hidden, weight = (inputs[name].detach().clone().requires_grad_() for name in ("hidden", "weight"))
        loss = operators(hidden, weight, inputs["target"], inputs["z_loss"])
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight), torch.tensor(scale).to(loss))

    loss, dhidden, dweight = gradients(stock.masked_cross_entropy, inputs)
    wide = _convert_all(inputs, torch.float64)
    true_loss, true_dhidden, true_dweight = gradients(reference.masked_cross_entropy, wide)
    assert loss.dtype == torch.float32 and abs(loss - true_loss) < 1e-3 * true_loss
    eps = torch.finfo(dtype).eps
    # The weight gradient's rounding errors of 20,000 rows average out; what is stored is rounded once.
    for ours, true, allowed in ((dhidden, true_dhidden, 4 * eps), (dweight, true_dweight, 2 * eps)):
        assert ours.dtype == dtype
        assert (ours.double() - true).norm() <= allowed * true.norm()


def test_the_whole_softmax_is_in_the_gradient_of_a_float16_loss():
    """In base's vocabulary every probability is 3e-5; divided by M in float16 they would all be zero."""
    M, V = 20_000, 32_768
    hidden = torch.zeros(4, 8, dtype=torch.float16, requires_grad=True)
    weight = torch.ones(V, 8, dtype=torch.float16, requires_grad=True)
    target = torch.zeros(4, dtype=torch.int64)
    loss = stock.masked_cross_entropy(hidden, weight, target)
    (dhidden,) = torch.autograd.grad(loss, hidden, torch.tensor(65536.0 * 4 / M))
    assert (dhidden.float() * M / 65536).abs().max() < 1e-2, "target and softmax cancel, since all rows are equal"


def test_logits_are_never_all_there(monkeypatch):
    assert stock.chunk_rows("cpu", 32768) == 256 and stock.chunk_rows("cuda", 32768) == 2048
    M, D, V = 64, 8, 128
    monkeypatch.setitem(stock.CHUNK_BYTES, "cpu", 10 * V * 4)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (V,) and out.dtype == torch.float32:
                largest = max(largest, out.numel())
            return out

    case = CASE_OF["cross_entropy"]
    inputs = case.make(M=M, D=D, V=V, dtype=torch.bfloat16, seed=0)
    with Sizes():
        _evaluate(floor_of("cross_entropy"), case, inputs)
    assert 0 < largest <= 10 * V


def test_adamw_in_pieces_is_adamw_in_one(monkeypatch):
    case = CASE_OF["adamw"]
    inputs = case.make(P=20_001, segments=40, step=1.0, one_lr=False, dtype=torch.float32, seed=0)
    whole = _evaluate(floor_of("adamw"), case, inputs)
    monkeypatch.setattr(stock, "ADAMW_CHUNK", 1000)
    pieces = _evaluate(floor_of("adamw"), case, inputs)
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


class Made(TorchDispatchMode):
    """Bytes of the largest tensor that a call makes: of its results, and of the copy that a norm in another dtype takes
    on a GPU, which no call shows."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.linalg_vector_norm.default and kwargs and kwargs.get("dtype"):
            self.largest = max(self.largest, args[0].numel() * kwargs["dtype"].itemsize)
        if isinstance(out, torch.Tensor) and not function.is_view:
            given = {a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)}
            if out.untyped_storage()._cdata not in given:
                self.largest = max(self.largest, out.nbytes)
        return out


def test_adamw_makes_nothing_as_long_as_the_parameters(monkeypatch):
    monkeypatch.setattr(stock, "ADAMW_CHUNK", 1000)
    inputs = CASE_OF["adamw"].make(P=200_001, segments=4, dtype=torch.float32, seed=0)
    with Made() as made:
        stock.adamw(**inputs, beta1=0.9, beta2=0.98, eps=1e-8)
    assert 8 * 1000 <= made.largest <= 8 * 1000 + 8


@pytest.mark.parametrize(
    ("entries", "finite"),
    [({}, True), ({7: 1e30, 2500: -3e38}, True), ({2500: math.inf}, False), ({0: math.nan, 1: math.inf}, False)],
)
def test_the_norm_of_a_gradient_in_pieces(monkeypatch, entries, finite):
    """Squares that float32 does not hold, and what is no number in any piece."""
    monkeypatch.setattr(stock, "ADAMW_CHUNK", 1000)
    grad = torch.randn(3001, generator=torch.Generator().manual_seed(0))
    for place, value in entries.items():
        grad[place] = value
    norm = stock._norm(grad)
    assert bool(norm < math.inf) == finite and norm.dtype == torch.float64
    if finite:
        assert abs(norm / grad.double().norm() - 1) < 1e-12


# Attention.

WINDOWS = (None, 5)


@pytest.mark.parametrize("window", WINDOWS)
def test_padded_attention_takes_rows_of_nobody_with_anything_in_them(window):
    """NaN in rows of no sequence reaches nothing; neither do neighbours of other sequences."""
    cu_seqlens = torch.tensor([0, 30, 30, 100, 131, 131, 131], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(150, 3, 2, 32, generator=generator)
    rotary = rotary_table(80, 32)
    clean = stock.padded_attention(qkv, cu_seqlens, 80, rotary, window)
    qkv[131:] = torch.nan
    leaf = qkv.requires_grad_()
    out = stock.padded_attention(leaf, cu_seqlens, 80, rotary, window)
    (gradient,) = torch.autograd.grad(out, leaf, torch.full_like(out, torch.nan).index_fill(0, torch.arange(131), 1.0))
    assert torch.equal(out, clean) and not out[131:].any()
    assert gradient[:131].isfinite().all() and gradient[:131].any() and not gradient[131:].any()


def test_padded_attention_costs_the_same_however_many_sequences_there_are():
    def calls(count):
        qkv = torch.randn(600, 3, 2, 32, requires_grad=True)
        offsets = torch.arange(count + 1, dtype=torch.int32) * (600 // count)
        with Names() as names:
            stock.padded_attention(qkv, offsets, 600 // 5, rotary_table(120, 32)).sum().backward()
        return names.seen

    assert calls(5) == calls(300)


def test_places_are_made_once_a_batch(monkeypatch):
    cu_seqlens = torch.tensor([0, 9, 20], dtype=torch.int32)
    qkv, rotary, places = torch.randn(24, 3, 2, 32), rotary_table(16, 32), Places(cu_seqlens, 24, 16)
    with dispatch.using("attention", "padded"):
        with Names() as first:
            with_places = varlen_attention(qkv, cu_seqlens, 16, rotary, None, places)
        with Names() as second:
            varlen_attention(qkv, cu_seqlens, 16, rotary, None, places)
        assert "searchsorted" in first.seen and "searchsorted" not in second.seen and "index" not in second.seen
        assert torch.equal(varlen_attention(qkv, cu_seqlens, 16, rotary), with_places)
    assert places.position_N[:20].tolist() == [*range(9), *range(11)]
    other = rotary_table(16, 32, theta=10.0)
    assert not torch.equal(places.rotary(other, torch.float32)[0], places.rotary(rotary, torch.float32)[0])


def test_padded_attention_looks_only_as_far_as_it_must():
    places = Places(torch.tensor([0, 65536], dtype=torch.int32, device="meta"), 65536, 512)
    assert places.blocks(None) == (512, 512) and places.blocks(64) == (64, 64) and places.blocks(0) == (64, 0)
    assert Places(torch.tensor([0, 1]), 1, 1).blocks(None) == (64, 0)
    assert Places(torch.tensor([0, 20]), 24, 512).blocks(None) == (64, 32), "no sequence is longer than the batch"
    assert places.bias(None, torch.float16).shape == (128, 1, 512, 1536)


# Sums of the weight gradient.


def test_weight_gradients_never_add_parts_in_half_precision():
    flags, seen = torch.backends.cuda.matmul, []

    class Flags(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function._schema.name == "aten::mm":
                both = flags.allow_fp16_reduced_precision_reduction, flags.allow_bf16_reduced_precision_reduction
                seen.append((args[0].shape[0], both))
            return function(*args, **(kwargs or {}))

    x, weight = (torch.empty(shape, device="meta", requires_grad=True) for shape in ((24, 16), (40, 16)))
    h = stock.layernorm_glu(x, torch.ones(16, device="meta"), None, weight, residual=x)[0]
    with Flags():
        linear.linear(x, weight).sum().backward()
        h.sum().backward()
    of_weights = [both for rows, both in seen if rows == 40]
    assert of_weights == [(False, False)] * 2 and (24, (True, True)) in seen
    assert flags.allow_fp16_reduced_precision_reduction and flags.allow_bf16_reduced_precision_reduction
