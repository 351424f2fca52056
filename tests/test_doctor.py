"""The doctor: it passes on right operators, names a wrong one with exit status 1, and says what runs."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cramfast.kernels
from cramfast import doctor
from cramfast.kernels import cuda_build, dispatch, extension


@pytest.fixture
def arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["doctor", "--device", "cpu"])


@pytest.fixture
def on_reference():
    with dispatch.using("all", "reference"):
        yield


def test_every_operator_is_right_on_this_machine():
    checks = doctor.check_operators("cpu")
    assert {(check.choice.op, check.choice.dtype) for check in checks} == {
        (op, dtype) for op in dispatch.OPERATORS for dtype in ("float32", "bfloat16")
    }
    assert not [check for check in checks if check.problem]


def test_report_and_exit_status(arguments, on_reference, capsys):
    doctor.main()
    said = capsys.readouterr().out
    for part in ("Machine", "Versions", torch.__version__, *dispatch.OPERATORS, extension.cpu_isa, "asked for"):
        assert part in said, part
    for part in ("Could run on cpu if asked for", "Cannot run on cpu", "flash_attn", "it runs on GPUs only"):
        assert part in said, part


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_no_value_is_cut_or_broken_by_the_terminal(arguments, on_reference, capsys, monkeypatch, columns):
    long = "2.14.1+cu130.git" + "0123456789abcdef" * 8
    version, compiler = doctor._version, "/opt/" + "a long folder/" * 9 + "c++, 12.2.0"
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(doctor, "_version", lambda name: long if name == "torch" else version(name))
    monkeypatch.setattr(doctor, "_compiler", lambda name, path: compiler)
    doctor.main()
    said = capsys.readouterr().out
    for line in (f"torch +{re.escape(long)}", rf"C\+\+ compiler +{re.escape(compiler)}"):
        assert re.search(f"^{line}$", said, flags=re.M), line
    for part in (*dispatch.OPERATORS, "flash_attn"):
        assert part in said, part
    assert "…" not in said


def test_what_else_could_run_and_what_cannot(monkeypatch):
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_75")
    rows = doctor.possible(dispatch.table("cuda"))
    others = [(op, dtypes, [name for name in names.split(", ") if name != "cpp"]) for op, dtypes, names in rows]
    assert ("attention", "float32, float16", ["padded", "reference"]) in others, "torch_efficient is what runs"
    reasons = {(name, why): ops for name, ops, why in doctor.impossible("cuda")}
    assert reasons["flash_attn", "it needs sm_80 or later"] == "attention"
    assert reasons["triton", "it needs sm_80 or later"] == "layernorm, glu, layernorm_glu, cross_entropy, adamw"
    assert reasons["cpp_fused", "it needs sm_80 or later"] == "layernorm_glu"  # in bfloat16
    assert reasons["cpp_fused", "it takes float16, bfloat16, not float32"] == "layernorm_glu"


def test_an_implementation_that_lacks_a_dtype_is_shown_not_called_wrong(monkeypatch):
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_86")
    with dispatch.using("attention", "torch_varlen", device="cuda"):
        choice = dispatch.choose("attention", "cuda", torch.float32)
    check = doctor._check(None, choice)
    assert not check.problem and doctor._row(check)[-2:] == ("impossible", "it takes float16, bfloat16, not float32")


def test_kernels_that_are_asked_for_are_checked(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["doctor", "--device", "cpu", "--kernels", "glu=reference"])
    try:
        doctor.main()
    finally:
        dispatch.override("all", "auto")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["glu", "float32", "reference"] in [line[:3] for line in lines]


def test_a_wrong_forward_is_named(arguments, on_reference, capsys, monkeypatch):
    right = cramfast.kernels.glu
    monkeypatch.setattr(cramfast.kernels, "glu", lambda x, activation="gelu": right(x, activation) * 1.001)
    with pytest.raises(SystemExit) as stop:
        doctor.main()
    assert stop.value.code == 1
    said = capsys.readouterr().out
    assert "wrong on this machine: glu —" in said and "output 0: error" in said


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


def test_a_wrong_gradient_is_named(on_reference, monkeypatch):
    right = cramfast.kernels.varlen_attention
    monkeypatch.setattr(
        cramfast.kernels, "varlen_attention", lambda qkv, *a, **k: right(WrongGradient.apply(qkv), *a, **k)
    )
    wrong = {check.choice.op: check.problem for check in doctor.check_operators("cpu") if check.problem}
    assert set(wrong) == {"attention"} and wrong["attention"].startswith("gradient of qkv")


def test_nan_and_exceptions_are_wrong(on_reference, monkeypatch):
    right = cramfast.kernels.glu
    monkeypatch.setattr(cramfast.kernels, "glu", lambda x, activation="gelu": right(x, activation) * float("nan"))

    def broken(*arguments, **keywords):
        raise RuntimeError("no kernel image\nsecond line")

    monkeypatch.setattr(cramfast.kernels, "layernorm", broken)
    problems = {check.choice.op: check.problem for check in doctor.check_operators("cpu") if check.problem}
    assert set(problems) == {"glu", "layernorm"}
    assert problems["layernorm"] == "failed: no kernel image" and "nan" in problems["glu"]


def test_a_missing_module_is_explained(monkeypatch):
    monkeypatch.setattr(extension, "module", None)
    monkeypatch.setattr(extension, "missing_reason", "compiled module not loaded (no such file)")
    assert {choice.implementation for choice in doctor.op_table("cpu")} == {"reference"}
    what, cost, remedy = doctor.missing()[0]
    assert what == "compiled kernels" and "no such file" in cost and remedy == "pip install -e ."


@pytest.mark.parametrize(("present", "expected"), [(True, "CUDA kernels"), (False, None)])
def test_what_only_a_gpu_needs_is_asked_for_only_there(monkeypatch, present, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present)
    monkeypatch.setattr(cuda_build, "nvcc", lambda: None)
    if extension.module is None or extension.module.cuda:
        pytest.skip("needs a module built without CUDA")
    asked = {what: remedy for what, _, remedy in doctor.missing()}
    assert (expected in asked) == present if expected else "CUDA kernels" not in asked
    assert not present or "CUDA toolkit" in asked["CUDA kernels"]


def test_a_lower_instruction_set_is_shown_and_right():
    if extension.module is None or extension.cpu_isa == "baseline":
        pytest.skip("needs a build with more than the baseline")
    command = [sys.executable, "-m", "cramfast.doctor", "--device", "cpu"]
    answer = subprocess.run(command, env=os.environ | {"CRAMFAST_CPU": "baseline"}, capture_output=True, text=True)
    assert "limited by CRAMFAST_CPU=baseline" in " ".join(answer.stdout.split())
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("avx2", "our build in use: avx2, limited by CRAMFAST_CPU=avx2"),
        ("avx512", "our build in use: avx2; CRAMFAST_CPU=avx512 is ignored: more than this processor has"),
        ("avx", f"avx2; CRAMFAST_CPU=avx is ignored: unknown, use one of {', '.join(doctor.BUILDS)}"),
    ],
)
def test_an_instruction_set_that_is_ignored_is_named(monkeypatch, wanted, said):
    monkeypatch.setattr(extension, "module", SimpleNamespace(cuda=False, cuda_missing="no nvcc"))
    monkeypatch.setattr(extension, "cpu_isa", "avx2")
    monkeypatch.setenv("CRAMFAST_CPU", wanted)
    assert dict(doctor.machine())["instruction set"].endswith(said)


def test_the_instruction_sets_are_those_of_the_source():
    source = Path(__file__).parent.parent / "csrc" / "cpu_dispatch.cpp"
    assert f"CRAMFAST_CPU={'|'.join(doctor.BUILDS)} takes" in source.read_text(encoding="utf-8")


def _module_that_launches(error=None):
    def empty_launch(device):
        if error:
            raise RuntimeError(error)

    return SimpleNamespace(cuda=True, Cuda=lambda stream: stream, empty_launch=empty_launch)


def test_an_empty_launch_tells_the_runtimes_own_text(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_driver_loaded", lambda: True)  # the driver is there, torch was built without CUDA
    monkeypatch.setattr(extension, "module", _module_that_launches())
    assert doctor._empty_launch() == "works"
    text = "empty launch: CUDA driver version is insufficient for CUDA runtime version (cudaErrorInsufficientDriver)"
    monkeypatch.setattr(extension, "module", _module_that_launches(text))
    assert doctor._empty_launch() == f"failed: {text}"
    monkeypatch.setattr(doctor, "_driver_loaded", lambda: False)
    assert doctor._empty_launch() == "none to make: no GPU"
    monkeypatch.setattr(extension, "module", SimpleNamespace(cuda=False))
    assert "no CUDA kernels are built" in doctor._empty_launch()
