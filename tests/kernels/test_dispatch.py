"""Which implementation runs: the rule, what is asked for, and that other libraries' operators keep our meaning."""

import json
import types

import pytest
import torch
import torch.nn.functional as F
from pretended_gpu import card
from test_ops import _assert_as_good_as_eager, _convert_all, _evaluate

import cramfast.kernels
from cramfast import stages
from cramfast.commandline import parse
from cramfast.config import TrainConfig
from cramfast.errors import UserError
from cramfast.kernels import dispatch, extension, peers, reference
from cramfast.kernels.cases import CASES, rotary_table
from cramfast.qualify.candidates import promises_equal_bits
from cramfast.session import kernelchoice


@pytest.fixture
def on_gpu(monkeypatch, tmp_path):
    """dispatch on a machine with an A6000 and a table of its own; returns what writes the table."""
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_86")
    monkeypatch.setattr(dispatch, "MEASURED", tmp_path / "measured.json")
    monkeypatch.setattr(peers, "installed", lambda module: False)

    def write(*rows):
        origin = {"device": "RTX A6000", "commit": "abc"}
        dispatch.MEASURED.write_text(json.dumps({"rows": [row | origin for row in rows]}))
        dispatch.measured.cache_clear()

    write()
    yield write
    dispatch.measured.cache_clear()
    dispatch.unsettle()


def row(op, relative_time, architecture="sm_86", dtype="bfloat16"):
    return {"op": op, "architecture": architecture, "dtype": dtype, "relative_time": relative_time}


def test_committed_table_names_what_exists():
    for op, _, dtype in dispatch.measured():
        measured = dispatch.measured()[op, _, dtype]
        assert set(measured["relative_time"]) <= set(dispatch.IMPLEMENTATIONS[op])
        assert "reference" in measured["relative_time"] and measured["commit"] and measured["device"]


def test_every_operator_of_the_cases_has_a_reference():
    assert {case.op for case in CASES} == set(dispatch.OPERATORS)
    assert all("reference" in implementations for implementations in dispatch.IMPLEMENTATIONS.values())


def test_on_a_cpu_the_compiled_kernels_run():
    assert {(c.implementation, c.obstacle) for c in dispatch.table("cpu")} == {("cpp", "")}
    choice = dispatch.choose("glu", "cpu", torch.float64)
    assert choice.implementation == "reference" and "not float64" in choice.reason


FLOOR = {
    # (architecture, dtype): attention of all, attention of local layers
    ("sm_75", "float16"): ("torch_efficient", "padded"),
    ("sm_75", "float32"): ("torch_efficient", "padded"),
    ("sm_75", "bfloat16"): ("padded", "padded"),
    ("sm_80", "bfloat16"): ("torch_varlen", "torch_varlen"),
    ("sm_86", "bfloat16"): ("torch_varlen", "torch_varlen"),
    ("sm_86", "float16"): ("torch_varlen", "torch_varlen"),
    ("sm_86", "float32"): ("torch_efficient", "padded"),
    ("sm_120", "bfloat16"): ("torch_varlen", "torch_varlen"),
}


@pytest.mark.parametrize(("place", "expected"), FLOOR.items(), ids=lambda x: "-".join(x))
def test_unasked_every_card_runs_stock_pytorch_and_never_the_loop(on_gpu, monkeypatch, place, expected):
    card(monkeypatch, place[0], packages=())
    dtype = getattr(torch, place[1])
    for windowed, name in zip((False, True), expected, strict=True):
        choice = dispatch.choose("attention", "cuda", dtype, windowed)
        assert choice.implementation == name == dispatch.floor("attention", "cuda", dtype, windowed)
        assert choice.reason.startswith(f"stock PyTorch, needs no measurement on {place[0]}") and not choice.obstacle
    for op in set(dispatch.OPERATORS) - {"attention"}:
        assert dispatch.choose(op, "cuda", dtype).implementation == "stock"


def test_the_floor_of_a_torch_whose_varlen_attention_has_no_window(on_gpu, monkeypatch):
    monkeypatch.setattr(peers, "varlen_attn_has_window", lambda: False)
    assert dispatch.floor("attention", "cuda", torch.bfloat16) == "torch_varlen"
    assert dispatch.floor("attention", "cuda", torch.bfloat16, windowed=True) == "padded"


def test_the_floor_of_a_torch_without_flash_attention(on_gpu, monkeypatch):
    """Some builds have varlen_attn and no kernel behind it: it would raise at the first step."""
    assert not dispatch.obstacle("attention", "torch_varlen", "cuda", torch.bfloat16), "a card counted on a CPU's torch"
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    for available, floors in ((True, ("torch_varlen", "torch_varlen")), (False, ("torch_efficient", "padded"))):
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda there=available: there)
        assert floors == tuple(dispatch.floor("attention", "cuda", torch.bfloat16, local) for local in (False, True))
    found = dispatch.obstacle("attention", "torch_varlen", "cuda", torch.bfloat16)
    assert "was built without flash attention; install" in found


def test_the_floor_says_what_waits(on_gpu, monkeypatch):
    card(monkeypatch, "sm_86", packages=(), built=True)
    assert dispatch.choose("glu", "cuda", torch.bfloat16).reason == (
        "stock PyTorch, needs no measurement on sm_86; cpp waits for --qualify"
    )
    card(monkeypatch, "sm_86", built=True)
    reason = dispatch.choose("layernorm_glu", "cuda", torch.bfloat16).reason
    assert reason.endswith("; cpp, cpp_fused, triton wait for --qualify")
    reason = dispatch.choose("attention", "cuda", torch.bfloat16).reason
    assert reason.endswith("; cpp, torch_varlen_triton wait for --qualify"), "our rotation is tried like any other"
    card(monkeypatch, "sm_75")
    assert "wait" not in dispatch.choose("attention", "cuda", torch.float16).reason


def test_our_rotation_is_tried_before_the_form_that_runs_unasked(on_gpu, monkeypatch):
    card(monkeypatch, "sm_86")
    for dtype, windowed, expected in (
        (torch.bfloat16, False, "torch_varlen"),
        (torch.float32, False, "torch_efficient"),
        (torch.float32, True, "padded"),
    ):
        found = [n for n in dispatch.candidates("attention", "cuda", dtype, windowed) if n.endswith(dispatch.FUSED)]
        assert found == [f"{expected}{dispatch.FUSED}"]
    card(monkeypatch, "sm_86", packages=())
    assert dispatch.obstacle("attention", "torch_varlen_triton", "cuda", torch.bfloat16).startswith("triton is not")
    fused = {f"{name}{dispatch.FUSED}" for name in dispatch.FLOOR["attention"]}
    assert fused <= dispatch.IMPLEMENTATIONS["attention"].keys()
    assert not any(map(promises_equal_bits, fused)), "torch's backward passes add in any order"


def test_a_verdict_goes_before_the_floor_and_what_is_asked_for_before_both(on_gpu, monkeypatch):
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS["glu"], "cpp", dispatch.Implementation(lambda target: ""))
    x = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    assert dispatch.pick("glu", x)[0] == "stock"
    dispatch.settle("glu", "cuda", torch.bfloat16, "cpp", "qualified on this card")
    choice = dispatch.choose("glu", "cuda", torch.bfloat16)
    assert (choice.implementation, choice.reason) == ("cpp", "qualified on this card")
    assert dispatch.pick("glu", x)[0] == "cpp", "what was picked before is picked anew"
    assert dispatch.choose("glu", "cuda", torch.float16).implementation == "stock"
    with dispatch.using("glu", "reference", device="cuda"):
        assert dispatch.choose("glu", "cuda", torch.bfloat16).reason == "asked for"
    dispatch.unsettle()
    assert dispatch.pick("glu", x)[0] == "stock"
    with pytest.raises(ValueError, match="unknown implementation 'fast' of glu"):
        dispatch.settle("glu", "cuda", torch.bfloat16, "fast", "")


def test_verdicts_of_local_attention_and_of_adamw(on_gpu):
    dispatch.settle("attention", "cuda", torch.bfloat16, "padded", "why", windowed=True)
    assert dispatch.choose("attention", "cuda", torch.bfloat16, windowed=True).implementation == "padded"
    assert dispatch.choose("attention", "cuda", torch.bfloat16).implementation == "torch_varlen"
    dispatch.settle("adamw", "cuda", torch.bfloat16, "reference", "its buffers are float32 whatever the weights are")
    assert dispatch.choose("adamw", "cuda", torch.float32).implementation == "reference"


def test_candidates_come_in_the_order_of_what_was_measured_nearest(on_gpu, monkeypatch):
    card(monkeypatch, "sm_86", packages=("triton", "flash_attn"))
    plain = ["flash_attn", "torch_varlen", "torch_varlen_triton", "torch_efficient", "padded"]
    assert dispatch.candidates("attention", "cuda", torch.bfloat16) == plain
    assert dispatch.candidates("attention", "cuda", torch.bfloat16, windowed=True) == [
        name for name in plain if name != "torch_efficient"
    ]
    on_gpu(
        row("attention", {"torch_varlen": 1.0, "flash_attn": 1.2, "reference": 9.0}, architecture="sm_90"),
        row("attention", {"padded": 1.0, "reference": 9.0}, architecture="sm_75"),
        row("adamw", {"triton": 1.0, "stock": 9.0}, dtype="float32"),
    )
    first = dispatch.candidates("attention", "cuda", torch.bfloat16)
    assert first == ["torch_varlen", "flash_attn", "torch_varlen_triton", "torch_efficient", "padded"]
    assert dispatch.choose("attention", "cuda", torch.bfloat16).implementation == "torch_varlen", (
        "a hint decides nothing"
    )
    assert dispatch.candidates("adamw", "cuda", torch.bfloat16) == ["triton", "stock"]


@pytest.mark.parametrize(
    ("op", "implementation", "architecture", "dtype", "words"),
    [
        ("attention", "flash_attn", "sm_75", torch.float16, "sm_80 or later"),
        ("attention", "flash_attn", "sm_86", torch.float32, "not float32"),
        ("attention", "torch_varlen", "sm_75", torch.float16, "sm_80 or later"),
        ("attention", "torch_efficient", "sm_75", torch.bfloat16, "sm_80 or later"),
        ("attention", "torch_efficient", "sm_75", torch.float16, ""),
        ("layernorm", "triton", "sm_75", torch.float16, "sm_80 or later"),
        ("layernorm", "triton", "sm_80", torch.float64, "not float64"),
        ("layernorm", "triton", "sm_80", torch.bfloat16, ""),
        ("layernorm", "apex", "sm_75", torch.float16, ""),
        ("layernorm_glu", "cpp_fused", "sm_70", torch.float16, "sm_75 or later"),
        ("layernorm_glu", "cpp_fused", "sm_75", torch.bfloat16, "sm_80 or later"),
        ("layernorm_glu", "cpp_fused", "sm_86", torch.float32, "float16, bfloat16, not float32"),
        ("adamw", "apex", "sm_86", torch.float32, "overwrites the gradient"),
        ("glu", "emulated", "sm_86", torch.float32, "for tests"),
        ("glu", "reference", "sm_75", torch.float64, ""),
    ],
)
def test_obstacles(on_gpu, monkeypatch, op, implementation, architecture, dtype, words):
    monkeypatch.setattr(peers, "installed", lambda module: True)
    monkeypatch.setattr(dispatch, "architecture", lambda device: architecture)
    found = dispatch.obstacle(op, implementation, "cuda", dtype)
    assert (words in found) if words else found == ""


@pytest.mark.parametrize(
    ("op", "implementation", "remedy"),
    [
        ("attention", "flash_attn", "pip install flash-attn"),
        ("glu", "triton", "pip install triton"),
        ("layernorm", "apex", "github.com/NVIDIA/apex"),
    ],
)
def test_what_is_not_installed_says_how_to_get_it(on_gpu, op, implementation, remedy):
    assert remedy in dispatch.obstacle(op, implementation, "cuda", torch.bfloat16)


def test_override_and_auto():
    x = torch.randn(4, 8)
    with dispatch.using("glu", "reference"):
        assert dispatch.pick("glu", x) == ("reference", reference.glu)
        assert dispatch.pick("layernorm", x) == ("cpp", None)
        assert dispatch.choose("glu", "cpu", torch.float32).reason == "asked for"
        dispatch.override("glu", "auto")
        assert dispatch.pick("glu", x) == ("cpp", None)
    dispatch.override("glu", "reference")
    with dispatch.using("all", "cpp"):
        assert dispatch.pick("glu", x) == ("cpp", None)
    assert dispatch.pick("glu", x)[0] == "reference", "what was in force before is in force again"
    dispatch.override("all", "auto")
    assert dispatch.pick("glu", x.double())[0] == "reference"


@pytest.mark.parametrize(
    ("op", "implementation", "message"),
    [
        ("glue", "cpp", "unknown operator 'glue'; one of layernorm, glu"),
        ("glu", "flash_attn", "unknown implementation 'flash_attn' of glu; one of cpp, triton"),
        ("attention", "flash_attn", "attention=flash_attn is not possible: it runs on GPUs only"),
        ("adamw", "apex", "adamw=apex is not possible: FusedAdam"),
    ],
)
def test_override_refuses(op, implementation, message):
    with pytest.raises(ValueError, match=message):
        dispatch.override(op, implementation, device="cpu")


def test_compiled_code_follows_an_override(on_gpu, monkeypatch):
    """The choice is made while torch.compile traces, where no file can be opened, and again after an override."""
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS["glu"], "cpp", dispatch.Implementation(lambda target: ""))  # any build
    torch._dynamo.reset()
    dispatch._picked.clear()
    x = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)

    @torch.compile(fullgraph=True, backend="eager")
    def runs_stock(y):
        return y + (dispatch.pick("glu", x)[0] == "stock")

    try:
        assert runs_stock(torch.zeros(())) == 1, "nothing is settled"
        with dispatch.using("glu", "cpp", device="cuda"):
            assert runs_stock(torch.zeros(())) == 0
        assert runs_stock(torch.zeros(())) == 1
    finally:
        dispatch._picked.clear()


def test_what_is_asked_for_and_cannot_run_is_an_error_not_a_fallback():
    with dispatch.using("glu", "cpp"), pytest.raises(ValueError, match="glu=cpp is not possible: it takes"):
        cramfast.kernels.glu(torch.randn(2, 8, dtype=torch.float64))


def test_a_missing_module_means_the_reference(monkeypatch):
    monkeypatch.setattr(extension, "module", None)
    monkeypatch.setattr(extension, "missing_reason", "compiled module not loaded")
    choice = dispatch.choose("glu", "cpu", torch.float32)
    assert choice.implementation == "reference" and "compiled module not loaded" in choice.reason
    with pytest.raises(ValueError, match="compiled module not loaded"):
        dispatch.override("glu", "cpp")


# Other libraries' operators run on GPUs only: what surrounds them is tested here around stand-ins with their signatures
# and their known fault, NaN where rows belong to no sequence.


def stand_in(q, k, v, cu_seqlens, window):
    for leaf in (q, k, v):
        leaf.register_hook(lambda gradient: gradient.index_fill(0, tail, torch.nan))
    tail = torch.arange(int(cu_seqlens[-1]), len(q))
    out = reference.varlen_attention(torch.stack([q, k, v], 1), cu_seqlens, None, window=window)
    return out.index_fill(0, tail, torch.nan)


def two_sided(window_size):
    left, right = window_size
    assert left == right
    return None if left < 0 else left


def install_flash_attn(monkeypatch):
    def varlen(qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
               alibi_slopes=None, deterministic=False):  # fmt: skip
        assert deterministic and max_seqlen >= int(cu_seqlens.diff().max())
        return stand_in(*qkv.unbind(1), cu_seqlens, two_sided(window_size))

    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_qkvpacked_func = varlen
    monkeypatch.setitem(__import__("sys").modules, "flash_attn", module)


def install_torch_varlen(monkeypatch):
    from torch.nn.attention import varlen

    def attend(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1)):
        assert cu_q is cu_k and max_q == max_k
        return stand_in(q, k, v, cu_q, two_sided(window_size))

    monkeypatch.setattr(varlen, "varlen_attn", attend)


def install_torch_efficient(monkeypatch):
    def forward(q, k, v, bias, cu_q, cu_k, max_q, max_k, dropout, mask_type, lse):
        assert max_q == max_k <= q.shape[1], "its backward pass refuses more"
        assert bias is None and dropout == 0 and mask_type == peers.NO_MASK and lse == q.requires_grad
        return (stand_in(q[0], k[0], v[0], cu_q, None)[None],)

    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_forward", forward)


INSTALL = {
    "flash_attn": install_flash_attn,
    "torch_varlen": install_torch_varlen,
    "torch_efficient": install_torch_efficient,
}
ATTENTION = next(case for case in CASES if case.op == "attention")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", ATTENTION.test_shapes, ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()))
@pytest.mark.parametrize("name", INSTALL)
def test_attention_of_other_libraries_keeps_our_meaning(monkeypatch, name, shape, dtype):
    if name == "torch_efficient" and "window" in shape:
        pytest.skip("it has no window")
    INSTALL[name](monkeypatch)
    inputs = ATTENTION.make(**shape, dtype=dtype, seed=0)
    theirs = types.SimpleNamespace(varlen_attention=dispatch.IMPLEMENTATIONS["attention"][name].function)
    ours = _evaluate(theirs, ATTENTION, inputs)
    truth = _evaluate(reference, ATTENTION, _convert_all(inputs, torch.float64))
    _assert_as_good_as_eager(ours, _evaluate(reference, ATTENTION, inputs), truth)
    used = int(inputs["cu_seqlens"][-1])
    assert not ours["out0"][used:].any() and not ours["dqkv"][used:].any(), "rows of no sequence are zero"


@pytest.mark.parametrize("name", (*INSTALL, "padded"))
def test_a_longest_sequence_beyond_the_batch(monkeypatch, name):
    """The limit is the run's, and a small batch has fewer tokens."""
    INSTALL.get(name, lambda monkeypatch: None)(monkeypatch)
    inputs = ATTENTION.make(lengths=(9, 11), H=2, K=32, dtype=torch.float32, seed=0, tail=3)
    attend = dispatch.IMPLEMENTATIONS["attention"][name].function
    inputs["qkv"].requires_grad_()
    tight = attend(**inputs)
    wide = attend(**inputs | {"max_seqlen": 512, "rotary": rotary_table(512, 32)})
    assert torch.equal(tight, wide)


def test_efficient_attention_refuses_a_window():
    with pytest.raises(ValueError, match="no two-sided window"):
        peers.torch_efficient(torch.randn(4, 3, 1, 32), torch.tensor([0, 4], dtype=torch.int32), 4, None, 2)


def test_varlen_attn_of_this_torch_has_the_arguments_we_pass():
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    inspect.signature(varlen_attn).bind(*range(7), window_size=(-1, -1))
    assert peers.varlen_attn_has_window()
    schema = str(torch.ops.aten._efficient_attention_forward.default._schema)
    names = [part.split(" ")[-1].split("=")[0] for part in schema.split("(", 1)[1].split(", ")[:11]]
    assert names == ["query", "key", "value", "bias", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k",
                     "dropout_p", "custom_mask_type", "compute_log_sumexp"]  # fmt: skip


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_layernorm_of_apex_keeps_our_meaning(monkeypatch, dtype):
    def mixed(x, weight, bias, shape, eps):
        return F.layer_norm(x.to(weight.dtype), shape, weight, bias, eps)

    module = types.ModuleType("apex.normalization.fused_layer_norm")
    module.mixed_dtype_fused_layer_norm_affine = mixed
    for name in ("apex", "apex.normalization"):
        monkeypatch.setitem(__import__("sys").modules, name, types.ModuleType(name))
    monkeypatch.setitem(__import__("sys").modules, module.__name__, module)
    case = next(case for case in CASES if case.op == "layernorm")
    theirs = types.SimpleNamespace(layernorm=peers.apex_layernorm)
    for shape in case.test_shapes:
        inputs = case.make(**shape, dtype=dtype, seed=0)
        truth = _evaluate(reference, case, _convert_all(inputs, torch.float64))
        _assert_as_good_as_eager(_evaluate(theirs, case, inputs), _evaluate(reference, case, inputs), truth)


# The command line.


@pytest.fixture
def auto():
    yield
    dispatch.override("all", "auto")


def test_kernels_of_the_command_line_are_taken_and_printed(auto, capsys):
    asked = ["--preset", "tiny", "--device", "cpu", "--kernels", "attention=reference", "glu=cpp"]
    config = parse(asked).config
    assert config.kernels == ("attention=reference", "glu=cpp")
    stages.choose_kernels(config)
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert "reference" in lines["attention"] and "asked for" in lines["attention"]
    assert "asked for" not in lines["layernorm"]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("attention", "--kernels attention: no pair"),
        ("atention=cpp", "--kernels: unknown operator 'atention'; one of layernorm"),
        ("attention=fast", "unknown implementation 'fast' of attention; one of cpp, flash_attn"),
        ("attention=flash_attn", "attention=flash_attn is not possible: it runs on GPUs only — "),
    ],
)
def test_kernels_that_cannot_be_end_with_one_line(auto, pair, message):
    with pytest.raises(UserError, match=message) as error:
        stages.choose_kernels(TrainConfig(device="cpu", dtype="float32", kernels=(pair,)))
    assert "\n" not in str(error.value)


def test_a_dtype_that_the_asked_kernel_lacks_ends_with_one_line(auto, monkeypatch):
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_86")
    config = TrainConfig(device="cuda", dtype="float32", kernels=("attention=torch_varlen",))
    with pytest.raises(UserError, match="--kernels attention=torch_varlen is not possible: it takes float16, bfloat16"):
        stages.choose_kernels(config)
    dispatch.override("all", "auto", device="cuda")


def test_a_followed_run_with_other_kernels_is_named(auto, tmp_path, capsys):
    config = TrainConfig(device="cpu", dtype="float32")
    recorded = [vars(choice) for choice in kernelchoice.choices(config)]
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"run": {"kernels": recorded}}) + "\n")
    stages.choose_kernels(config, tmp_path)
    assert "note:" not in capsys.readouterr().out
    with dispatch.using("glu", "reference"):
        stages.choose_kernels(config, tmp_path)
    assert "glu on cpp: what follows is close to it, not equal bit for bit" in capsys.readouterr().out
    stages.choose_kernels(config, tmp_path / "no run yet")
