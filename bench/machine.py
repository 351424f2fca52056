"""What this machine can do at most, measured in the same run as everything that is compared with it."""

import functools
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch


def seconds(function: Callable[[], object], rounds: int) -> list[float]:
    """Wall-clock seconds of each round, after one round to warm up."""
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return times


@functools.cache
def copy_bytes_per_s() -> float:
    """Bytes read plus bytes written a second by torch's copy of 256 MiB, far beyond any cache."""
    source = torch.randn(64 << 20)
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(seconds(lambda: target.copy_(source), 7))


@functools.cache
def matmul_flops(dtype: torch.dtype) -> float:
    """FLOP a second of the best of three large matmuls, medians of five."""
    rates = []
    for n, k, m in ((4096, 768, 3072), (2048, 2048, 2048), (8192, 512, 512)):
        a, b = torch.randn(n, k).to(dtype), torch.randn(k, m).to(dtype)
        rates.append(2 * n * k * m / statistics.median(seconds(lambda a=a, b=b: a @ b, 5)))
    return max(rates)


def processor() -> str:
    """The processor's name as the system states it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The checkout's commit, with a plus sign if files differ from it."""
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=root, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


@functools.cache
def description() -> dict[str, object]:
    """Device, threads, instruction set, versions and commit: what every number needs beside it."""
    from cramfast.kernels import extension

    return {
        "device": processor(),
        "threads": torch.get_num_threads(),
        "isa": extension.cpu_isa,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }
