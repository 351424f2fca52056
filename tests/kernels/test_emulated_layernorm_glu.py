"""LayerNorm, matmul and gate as one kernel (csrc/layernorm_glu.h) on the emulator, for the code paths of sm_75 and
sm_86: the rule of tests/kernels/test_ops.py, and what this kernel promises beyond it."""

import pytest
import torch
from test_emulated import _check
from test_ops import _assert_as_good_as_eager

import cramfast.kernels
from bench import peers
from cramfast.kernels import dispatch, emulated, extension, reference
from cramfast.kernels.cases import CASES
from cramfast.kernels.glu import glu_fwd
from cramfast.kernels.layernorm import layernorm_fwd
from cramfast.kernels.layernorm_glu import layernorm_glu_fwd

pytestmark = pytest.mark.skipif(bool(emulated.missing_reason()), reason=emulated.missing_reason() or "can be built")

CASE = next(case for case in CASES if case.op == "layernorm_glu")
SHAPES = (  # a block makes 128 rows by 64 features from tiles of 32 columns of D; a warp has 32 rows and 32 features
    {"N": 131, "D": 80, "F": 144},
    {"N": 37, "D": 208, "F": 48, "residual": False, "bias": True},
    {"N": 129, "D": 64, "F": 72, "bias": True, "activation": "silu"},
    {"N": 1, "D": 16, "F": 16, "residual": False, "activation": "silu"},
    {"N": 3, "D": 8, "F": 8, "bias": True},
    {"N": 0, "D": 64, "F": 32},
    {"N": 1200, "D": 8, "F": 72, "residual": False},  # ten tiles of rows: a whole band of eight and one of two
)
POINTS = [(750, torch.float16), (860, torch.float16), (860, torch.bfloat16)]


def _name(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@pytest.fixture(params=POINTS, ids=lambda point: f"sm{point[0] // 10}-{_name(point[1])}")
def fused(request):
    """(emulated module, dtype) with the fused kernel in force."""
    architecture, dtype = request.param
    with dispatch.using("layernorm_glu", "emulated_fused", architecture=architecture):
        yield emulated.load(architecture), dtype


def _arguments(inputs):
    """Inputs of the Case in the order of the registered operator."""
    names = ("x", "residual", "norm_weight", "norm_bias", "weight_in", "activation")
    return (*(inputs[name] for name in names), 1e-5, "emulated_fused")


def _make(shape, dtype, seed=0):
    return CASE.make(**shape, dtype=dtype, seed=seed)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()))
def test_values_and_gradients_against_float64(fused, shape):
    _check(CASE, shape, fused[1])


@pytest.mark.parametrize("shape", SHAPES[:2], ids=("residual", "plain"))
def test_it_keeps_what_its_parts_would_have_kept(fused, shape):
    """Stream and statistics are those of layernorm, and h is the gate of the pre-activations as stored, bit for bit."""
    inputs = _make(shape, fused[1])
    h, stream, mean, rstd, gates = layernorm_glu_fwd(*_arguments(inputs))
    norm = [inputs[name] for name in ("x", "residual", "norm_weight", "norm_bias")]
    for ours, theirs in zip((stream, mean, rstd), layernorm_fwd(*norm, 1e-5)[1:], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(h, glu_fwd(gates, inputs["activation"]))


@pytest.mark.parametrize("spread", (1.0, 0.1, 0.01), ids=lambda s: f"mean={1 / s:.0f}std")
def test_a_mean_far_from_zero(fused, spread):
    """The product of a raw row is mostly its mean, which the epilogue takes off: gates and h keep the rule."""
    dtype = fused[1]
    inputs = _make({"N": 40, "D": 768, "F": 32, "residual": False, "bias": True}, dtype)
    inputs["x"] = (1 + spread * (inputs["x"].float() - 0.5)).to(dtype)
    h, _, _, _, gates = layernorm_glu_fwd(*_arguments(inputs))

    def plain(dtype):
        x, weight, bias, weight_in = (inputs[k].to(dtype) for k in ("x", "norm_weight", "norm_bias", "weight_in"))
        weight, bias = (weight, bias) if dtype == torch.float64 else (inputs["norm_weight"], inputs["norm_bias"])
        gates = torch.nn.functional.linear(reference.layernorm(x, weight, bias)[0], weight_in)
        return {"gates": gates, "h": reference.glu(gates, inputs["activation"])}

    _assert_as_good_as_eager({"gates": gates, "h": h}, plain(dtype), plain(torch.float64))


def _truncated(value, bits=24):
    """Towards zero, to the precision of float32: how tensor cores add (Fasi et al., PeerJ Computer Science 7:e330)."""
    mantissa, exponent = torch.frexp(value)
    return torch.ldexp(torch.trunc(torch.ldexp(mantissa, torch.tensor(bits))), exponent - bits)


@pytest.mark.parametrize(("dtype", "depth"), [(torch.float16, 8), (torch.float16, 16), (torch.bfloat16, 16)], ids=str)
def test_sums_that_truncate_lose_little(dtype, depth):
    """The emulator rounds to nearest where hardware truncates, so here the formula runs with sums cut off after every
    `depth` products: at mean = 10 std that costs less than a quarter of what rounding the normalised rows costs."""
    inputs = _make({"N": 64, "D": 768, "F": 64, "residual": False}, dtype)
    x = (10 + inputs["x"].float() - 0.5).to(dtype).double()
    weight, gamma = inputs["weight_in"].double(), inputs["norm_weight"].double()
    mean, rstd = x.mean(1, keepdim=True), (x.var(1, correction=0, keepdim=True) + 1e-5).rsqrt()
    folded = (weight * gamma).to(dtype).double()
    total = torch.zeros(len(x), len(weight), dtype=torch.float64)
    for begin in range(0, x.shape[1], depth):
        total = _truncated(total + x[:, begin : begin + depth] @ folded[:, begin : begin + depth].T)
    lost = rstd * (total - x @ folded.T)
    normalised = (x - mean) * rstd * gamma
    rounding = (normalised.to(dtype).double() - normalised) @ weight.T
    assert lost.abs().max() <= rounding.abs().max() / 4


def test_any_order_of_blocks_and_warps_gives_the_same_bits(fused):
    module, dtype = fused
    arguments = _arguments(_make(SHAPES[0], dtype, seed=3))
    results = []
    for seed in range(3):
        module.set_seed(seed)
        results.append(layernorm_glu_fwd(*arguments))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("shape", SHAPES[:3], ids=("gelu", "plain", "silu"))
def test_fresh_memory_filled_with_nan(fused, shape, nan_memory, monkeypatch):
    """Every element of every output is written, and of scratch: initcheck shall have nothing to say on a GPU."""
    written, call = [], extension.call

    def noting_tensors(name, on, *arguments):
        result = call(name, on, *arguments)
        written.extend(a for a in arguments if isinstance(a, torch.Tensor))
        return result

    arguments = _arguments(_make(shape, fused[1], seed=5))
    monkeypatch.setattr(extension, "call", noting_tensors)
    nan_memory()
    results = layernorm_glu_fwd(*arguments)
    assert len(written) > len(results)
    for value in (*written, *results):
        assert torch.isfinite(value).all()


def test_no_barrier_can_be_removed_and_no_fragment_swapped(fused):
    """Each barrier and each wait for copies ignored, two registers of each mma swapped: alone, each turns the operator
    red. D takes every stage twice."""
    module, dtype = fused
    shape = {"N": 33, "D": 208, "F": 48}
    module.sites()
    _check(CASE, shape, dtype)
    sites = [site.split() for site in module.sites() if "layernorm_glu_cuda.cu" in site]
    copies = {"cp_async_wait"} if module.architecture >= 800 else set()
    assert {kind for kind, _ in sites} == {"barrier", "mma"} | copies
    for _, site in sites:
        module.ignore_site(site)
        try:
            with pytest.raises((AssertionError, RuntimeError)):
                _check(CASE, shape, dtype)
                print(f"layernorm_glu does not need {site}")  # pytest shows it when nothing was raised
        finally:
            module.ignore_site("")


def test_opcheck(fused):
    checks = ("test_schema", "test_faketensor")  # the rest differentiates; the autograd.Function stands outside
    results = torch.library.opcheck(layernorm_glu_fwd, _arguments(_make(SHAPES[4], fused[1])), test_utils=checks)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ({"D": 64, "F": 32}, torch.float32, "takes float16, bfloat16, not float32"),
        ({"D": 64, "F": 32}, torch.bfloat16, "layernorm_glu: bfloat16 needs sm_80"),
        ({"D": 12, "F": 32}, torch.float16, "multiples of 8, not 12 and 32"),
        ({"D": 64, "F": 20}, torch.float16, "multiples of 8, not 64 and 20"),
    ],
)
def test_what_it_does_not_take_is_refused(shape, dtype, message):
    with dispatch.using("layernorm_glu", "emulated_fused", architecture=750):
        with pytest.raises(ValueError, match=message):
            CASE.run(cramfast.kernels, _make({"N": 4, **shape}, dtype))


def test_the_benchmark_runs_its_tests_first_and_leaves_the_choice_as_it_was(monkeypatch):
    inputs = _make(SHAPES[4], torch.float16)
    before = dispatch.choose("layernorm_glu", "cpu", torch.float16)
    work = peers.ours_by("emulated_fused", CASE, inputs)
    assert [g.shape for g in work()] == [inputs[n].shape for n in CASE.gradients if inputs[n] is not None]
    assert dispatch.choose("layernorm_glu", "cpu", torch.float16) == before and not extension.emulated
    monkeypatch.setattr(reference, "glu", lambda x, activation: x.chunk(2, dim=-1)[0])
    with pytest.raises(RuntimeError, match="no number for an operator that is wrong"):
        peers.ours_by("emulated_fused", CASE, inputs)()
