"""The emulator itself: what it computes is what the PTX manual says, and each planted fault is seen. Where there is a
GPU (--device), the same sound probes run on it, as machine code and as PTX for Turing: emulator and hardware agree."""

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
import torch

from bench import machine, sass
from cramfast.errors import UserError
from cramfast.kernels import emulated

PROBE = Path(__file__).parent / "probe.cu"
HARDWARE = {"native": "-arch=native", "compute_75": "-gencode=arch=compute_75,code=compute_75"}  # by name: nvcc's flag
pytestmark = pytest.mark.skipif(bool(emulated.missing_reason()), reason=emulated.missing_reason() or "can be built")


def pytest_generate_tests(metafunc):
    if "probe" not in metafunc.fixturenames:
        return
    devices = machine.devices(metafunc.config.getoption("--device"))
    targets = [*(emulated.ARCHITECTURES if "cpu" in devices else ()), *(HARDWARE if "cuda" in devices else ())]
    names = [f"sm{target // 10}" if isinstance(target, int) else target for target in targets]
    metafunc.parametrize("probe", targets, ids=names, indirect=True, scope="module")


def compile_for_gpu(flag: str, folder: Path) -> Path:
    """probe.cu as a shared library for the GPU of this machine; skips where there is no nvcc."""
    try:
        compiler = sass.nvcc()
    except UserError as error:
        pytest.skip(str(error))
    library = folder / "probe.so"
    arguments = ["-std=c++17", "-O3", flag, "-shared", "-Xcompiler", "-fPIC", f"-I{emulated.CSRC}"]
    subprocess.run([compiler, *arguments, str(PROBE), "-o", str(library)], check=True)
    return library


@pytest.fixture(scope="module")
def probe(request, tmp_path_factory):
    on_gpu = request.param in HARDWARE
    if on_gpu:
        path = compile_for_gpu(HARDWARE[request.param], tmp_path_factory.mktemp("probe"))
    else:
        path = emulated.build("probe", [PROBE], request.param)
    library = ctypes.CDLL(str(path))
    library.run_probe.restype = ctypes.c_char_p
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.run_probe.argtypes = [
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_uint,
        pointer,
        size,
        pointer,
        size,
        pointer,
        size,
    ]

    def run(name, a, b, out, fault=0, seed=1):
        tensors = [t.cuda() if on_gpu else t for t in (a, b, out)]
        if on_gpu:  # the probes take the default stream
            torch.cuda.synchronize()
        places = [value for t in tensors for value in (t.data_ptr(), t.nbytes)]
        message = library.run_probe(name.encode(), fault, seed, *places).decode()
        out.copy_(tensors[2])
        return message

    run.architecture = 750 if request.param == "compute_75" else request.param
    if request.param == "native":
        major, minor = torch.cuda.get_device_capability()
        run.architecture = 100 * major + 10 * minor
    run.sees_faults = not on_gpu
    return run


def _ok(message):
    assert message == ""


def _factors(k, seed=0):
    g = torch.Generator().manual_seed(seed)
    # Small integers: exact in every format, so that only the layout decides.
    a, b = (torch.randint(-8, 9, shape, generator=g).float() for shape in ((16, k), (k, 8)))
    return a, b, torch.full((16, 8), torch.nan)


@pytest.mark.parametrize(("name", "k"), [("mma_k8", 8), ("mma_k16", 16), ("mma_bf16", 16)])
def test_mma_is_a_matmul_and_a_swapped_register_is_not(probe, name, k):
    if name == "mma_bf16" and probe.architecture < 800:
        pytest.skip("no bfloat16 tensor cores before sm_80")
    a, b, out = _factors(k)
    _ok(probe(name, a, b, out))
    assert torch.equal(out, a @ b)
    _ok(probe(name, a, b, out, fault=1))
    assert not torch.equal(out, a @ b)


def test_ldmatrix_of_each_form(probe):
    a, b, _ = _factors(16)
    out = torch.full((129 + 256,), torch.nan)
    _ok(probe("ldmatrix", a, b, out))
    assert torch.equal(out[:128].view(16, 8), a @ b)
    assert out[128] == 1, "x1, x2 and x2.trans disagree"
    assert torch.equal(out[129:].view(16, 16), a), "x4.trans"
    if probe.sees_faults:  # another lane wrote it just now, or has not yet
        assert "reads what" in probe("ldmatrix", a, b, out, fault=1)
    _ok(probe("ldmatrix", a, b, out, fault=2))
    assert not torch.equal(out[:128].view(16, 8), a @ b)


def test_async_copies_are_invisible_until_waited_for(probe):
    a, out = torch.arange(512.0), torch.zeros(512)
    _ok(probe("copy", a, a, out))
    assert torch.equal(out, a.view(2, 2, 128).flip(1).reshape(-1))
    if not probe.sees_faults:
        return
    for fault in (1, 3):  # no wait at all; no wait in the first stage
        message = probe("copy", a, a, out, fault=fault)
        assert ("reads before cp.async was waited for" in message) == (probe.architecture >= 800)
    assert re.search("race|reads", probe("copy", a, a, out, fault=2))  # waited for, but no barrier


def test_shuffles_and_votes(probe):
    v, out = torch.randn(32, generator=torch.Generator().manual_seed(0)), torch.zeros(320)
    _ok(probe("shuffle", v, v, out))
    lane = torch.arange(32)
    group = lane // 8 * 8
    expected = [
        v[lane ^ 5],
        v[torch.where(lane + 3 < 32, lane + 3, lane)],
        v[torch.where(lane >= 3, lane - 3, lane)],
        v[torch.full((32,), 7)],
        v[lane ^ 4],
        v[torch.where(lane % 8 + 3 < 8, lane + 3, lane)],
        v[group + 1],
    ]
    assert torch.equal(out[:224], torch.cat(expected))
    assert (out[224:256] == sum(2**i for i in range(16) if v[i] > 0)).all()
    assert (out[256:288] == 2).all()
    assert torch.equal(out[288:], torch.where(lane < 16, v[lane ^ 1], v[lane ^ 2]))


# Which half of a race comes first depends on the order of warps.
FAULTS = {
    1: "out of bounds: shared array partial",
    2: "out of bounds: global memory, byte 256 of a tensor of 256",
    3: "out of bounds: global memory, byte 256 of a tensor of 256",
    4: "divergent barrier",
    5: "collective",
    6: "reads what nobody wrote",
    7: "race: reads what thread|reads what nobody wrote|race: overwrites",
    8: "race: ",
    9: "no __syncwarp|reads what nobody wrote",
    10: "misaligned access of 16 bytes",
    11: "out of bounds: shared array \\(dynamic\\)",
    12: "misaligned load",
    13: "far from every tensor",
    14: "bytes beside a tensor",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("seed", (1, 2, 3))
def test_each_planted_fault_is_seen(probe, fault, seed):
    if not probe.sees_faults:
        pytest.skip("a GPU would be left in an undefined state")
    a, out = torch.randn(64), torch.zeros(64)
    message = probe("fault", a, a, out, fault=fault, seed=seed)
    assert re.search(FAULTS[fault], message), message or "nothing was seen"


@pytest.mark.parametrize("seed", range(5))
def test_a_sound_kernel_passes_in_any_order(probe, seed):
    a, out = torch.randn(64), torch.zeros(64)
    _ok(probe("fault", a, a, out, seed=seed))
    torch.testing.assert_close(out, a.sum().expand(64))


def test_conversions_round_as_torch_does(probe):
    special = [
        0.0,
        -0.0,
        1.0,
        65504.0,
        65519.9,
        65520.0,
        1e-8,
        2.0**-25,
        6.1e-5,
        6.0e-8,
        float("inf"),
        3.4e38,
        1.00390625,
    ]
    a = torch.cat([torch.tensor(special), torch.randn(500) * 100, torch.randn(400) * 1e-6])
    a = torch.cat([a, torch.randn(1024 - len(a)) * 1e4])
    out = torch.zeros(1024, 2)
    _ok(probe("convert", a, a, out))
    assert torch.equal(out[:, 0], a.half().float()) and torch.equal(out[:, 1], a.bfloat16().float())
    a.fill_(float("nan"))
    _ok(probe("convert", a, a, out))
    assert out.isnan().all()


def test_every_thread_of_every_block_runs_once(probe):
    a, out = torch.zeros(4), torch.zeros(1)
    _ok(probe("count", a, a, out))
    assert out.item() == 3 * 2 * 64
