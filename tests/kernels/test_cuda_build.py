"""What the module has for a card, asked of a stand-in of the module: no GPU needed."""

from types import SimpleNamespace

import pytest
import torch

from cramfast import doctor
from cramfast.kernels import cuda_build, dispatch, extension

ALL = ["sm_75", "sm_80", "sm_86", "sm_90", "compute_90"]


@pytest.fixture
def module(monkeypatch):
    """A module with CUDA operators in place of ours; set its attributes, and `card` for what torch sees."""

    def versions():
        return stand_in.driver, stand_in.runtime

    def code_path():
        if isinstance(stand_in.answer, Exception):
            raise stand_in.answer
        return stand_in.answer

    stand_in = SimpleNamespace(
        cuda=True, cuda_operators=("attention", "glu", "layernorm_glu"), cuda_architectures=ALL, cuda_toolkit="13.0.88",
        cuda_missing="", Cuda=int,
        empty_launch=lambda device: None, cuda_versions=versions,
        cuda_code_path=code_path, driver=13000, runtime=13000, answer=860,
    )  # fmt: skip
    monkeypatch.setattr(extension, "module", stand_in)
    monkeypatch.setattr(dispatch, "architecture", lambda device: stand_in.card)
    stand_in.card = "sm_86"
    cuda_build._asked.cache_clear()
    yield stand_in
    cuda_build._asked.cache_clear()


def obstacle(implementation, dtype, op="attention"):
    return dispatch.obstacle(op, implementation, "cuda", dtype)


@pytest.mark.parametrize(
    ("card", "built", "path"),
    [
        ("sm_86", ALL, 860),
        ("sm_80", ALL, 800),
        ("sm_89", ALL, 860),  # machine code of the same major version
        ("sm_80", ["sm_75", "sm_86", "compute_75"], 750),  # not that of a higher minor version
        ("sm_120", ALL, 900),  # PTX
        ("sm_90", ["sm_90a", "compute_80"], 900),
        ("sm_100", ["sm_90a", "compute_80"], 800),  # not sm_90a: it is for sm_90 alone
        ("sm_70", ALL, 0),
        ("sm_120", ["sm_75", "sm_86"], 0),  # no PTX
    ],
)
def test_whose_code_a_card_runs(card, built, path):
    found, why = cuda_build.predicted(card, built)
    assert found == path and bool(why) == (path == 0)
    assert path or f"CUDAARCHS={card[3:]} pip install" in why


def test_bfloat16_needs_the_code_of_sm_80(module):
    assert not obstacle("cpp", torch.bfloat16) and not obstacle("cpp", torch.float16)
    module.card = "sm_75"
    assert obstacle("cpp", torch.bfloat16) == "bfloat16 needs sm_80 or later; float16 runs here"
    assert not obstacle("cpp", torch.float16) and not obstacle("cpp", torch.float32)
    assert not obstacle("cpp", torch.bfloat16, "glu"), "no tensor cores there"
    assert not obstacle("cpp", torch.bfloat16, "layernorm_glu") and obstacle(
        "cpp_fused", torch.bfloat16, "layernorm_glu"
    )
    module.card, module.cuda_architectures = "sm_80", ["sm_75", "compute_75", "sm_86"]  # as was built before
    for op, name in (("attention", "cpp"), ("layernorm_glu", "cpp_fused")):
        assert "runs the code of sm_75 here" in obstacle(name, torch.bfloat16, op)
        assert "CUDAARCHS=80 pip install" in obstacle(name, torch.bfloat16, op)
        assert not obstacle(name, torch.float16, op)


def test_a_card_that_is_newer_than_the_module(module):
    module.card, module.cuda_architectures = "sm_120", ["sm_75", "sm_86"]
    for op in ("attention", "glu"):
        said = obstacle("cpp", torch.float16, op)
        assert said == "the module has code for sm_75, sm_86, not for sm_120; CUDAARCHS=120 pip install -e ."
    assert "not for sm_120" in obstacle("cpp_fused", torch.float16, "layernorm_glu")


def test_the_card_that_is_here_is_asked_once(module, monkeypatch):
    asked = []
    ask = module.cuda_code_path
    module.cuda_code_path = lambda: asked.append(0) or ask()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    module.answer = 750  # whatever the list says
    for _ in range(3):
        assert "runs the code of sm_75 here" in obstacle("cpp", torch.bfloat16)
    assert len(asked) == 1


def test_the_runtimes_own_words_are_shown(module, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    module.answer = RuntimeError("cudaFuncGetAttributes: the provided PTX was compiled with an unsupported toolchain.")
    for op in ("attention", "glu"):
        said = obstacle("cpp", torch.float16, op)
        assert "unsupported toolchain" in said and "CUDAARCHS=86 pip install" in said


def test_a_driver_that_is_too_old_for_the_toolkit(module, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    module.driver = 12040
    module.answer = RuntimeError("cudaFuncGetAttributes: CUDA driver version is insufficient for CUDA runtime version")
    said = obstacle("cpp", torch.float16)
    assert "the NVIDIA driver takes CUDA 12.4, the module was built with 13.0" in said
    assert "580.65.06 or later" in said and "CUDA_HOME=(that of CUDA 12)" in said
    rows = {what: remedy for what, _, remedy in doctor.missing()}
    assert rows["a newer driver"] == said
    module.runtime = 12080  # the same major version: minor versions agree with each other
    assert not cuda_build.driver_problem()
    module.runtime, module.driver = 13000, 0
    assert not cuda_build.driver_problem(), "no driver at all is another matter"


def test_the_doctor_shows_what_was_built(module, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "version")
    doctor.DRIVER.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 10:11:16 UTC 2025\n"
    )
    rows = dict(doctor.machine())
    assert rows["NVIDIA driver"] == "580.95.05, takes CUDA 13.0"
    built = "for sm_75, sm_80, sm_86, sm_90 and PTX of compute_90, by toolkit 13.0.88, runtime 13.0"
    assert rows["CUDA kernels"] == built
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert doctor._cuda_kernels() == f"{built}; this card runs the code of sm_86"
    module.cuda, module.cuda_missing = False, "no CUDA compiler (nvcc) was found when it was built"
    assert doctor._cuda_kernels() == "not built: no CUDA compiler (nvcc) was found when it was built"
    assert "no CUDA compiler" in obstacle("cpp", torch.float16)


def test_the_real_module_says_how_it_was_built():
    if extension.module is None:
        pytest.skip(extension.missing_reason)
    built = extension.module.cuda_architectures
    assert bool(built) == extension.module.cuda == (not extension.module.cuda_missing)
    if extension.module.cuda:
        assert all(name.startswith(("sm_", "compute_")) for name in built) and extension.module.cuda_toolkit
        driver, runtime = cuda_build.versions()
        assert extension.module.cuda_toolkit.startswith(cuda_build.written(runtime)) and driver >= 0
