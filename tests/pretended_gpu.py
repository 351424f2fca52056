"""A pytest plugin (-p pretended_gpu) that lets the benchmarks' GPU path run on a CPU: what asks for "cuda" gets the
CPU, events read the wall clock, sizes are toys. It shows that the path runs from end to end, not that a GPU would
agree. With PRETENDED_FAULT=1 the gate is wrong; PRETENDED_CAPABILITY=8.6 makes it another card than an sm_90.

card() alone pretends within a test: dispatch chooses as on that card, and nothing runs there."""

import os
import time
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

SHAPES = {
    "attention": ({"lengths": (16, 9), "H": 1, "K": 64, "rotary": False},),
    "adamw": ({"P": 4096},),
    "cross_entropy": ({"M": 8, "D": 16, "V": 64},),
    "layernorm": ({"N": 16, "D": 64},),
    "glu": ({"N": 16, "F": 64},),
    "layernorm_glu": ({"N": 16, "D": 32, "F": 16},),
}
CAPABILITY = tuple(map(int, os.environ.get("PRETENDED_CAPABILITY", "9.0").split(".")))
PROPERTIES = SimpleNamespace(
    name="pretended",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    multi_processor_count=1,
    total_memory=1,
    uuid="00000000-0000",
)


def card(monkeypatch, architecture: str, packages: tuple[str, ...] = ("triton",), built: bool = False) -> None:
    """dispatch on a machine with a card of this architecture, as "sm_86", only these packages, and our module with its
    CUDA part or without."""
    from cramfast.kernels import cuda_build, dispatch, extension, peers

    module = SimpleNamespace(
        cuda=built, cuda_operators=dispatch.OPERATORS, cuda_missing="no nvcc", cuda_architectures=[architecture],
        cuda_versions=lambda: (13000, 13000),
    )  # fmt: skip
    cuda_build._asked.cache_clear()
    monkeypatch.setattr(extension, "module", module)
    monkeypatch.setattr(dispatch, "architecture", lambda device: architecture)
    monkeypatch.setattr(peers, "installed", lambda module: module in packages)
    monkeypatch.setattr(dispatch, "_picked", {})  # what is picked meanwhile goes with it


class Redirected(TorchFunctionMode):
    """ "cuda" becomes "cpu" in every call of torch."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def there(value):
            return "cpu" if isinstance(value, str) and value == "cuda" else value

        return function(*map(there, args), **{name: there(value) for name, value in (kwargs or {}).items()})


class Event:
    """The wall clock; the work between two of them has always ended by the time the second is recorded."""

    def __init__(self, enable_timing):
        self.at = 0.0

    def record(self):
        self.at = time.perf_counter()

    def query(self):
        return True

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


redirected = Redirected()


@pytest.hookimpl(tryfirst=True)  # conftest.py asks for a GPU in the same hook
def pytest_configure():
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda *_: CAPABILITY
    torch.cuda.get_device_properties = lambda *_: PROPERTIES
    torch.cuda.Event = Event
    from bench import goals, machine
    from cramfast.runtime import stopwatch
    from cramfast.session import metrics

    goals.SHAPES = SHAPES
    machine.CUDA_MATMULS, metrics.COPY_BYTES = ((32, 32, 32),), {"cuda": 1 << 20}
    stopwatch.COLD_BYTES, stopwatch.HEAD_START_S = 1 << 16, 1e-6
    machine.take_kernels = lambda implementation: {}
    redirected.__enter__()
    if os.environ.get("PRETENDED_FAULT"):
        import cramfast.kernels

        right = cramfast.kernels.glu
        cramfast.kernels.glu = lambda *a, **k: right(*a, **k) * 1.1


def pytest_unconfigure():
    redirected.__exit__(None, None, None)
