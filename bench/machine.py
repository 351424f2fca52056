"""What this machine can do at most, measured in the same run as everything that is compared with it."""

import functools
import platform
import shutil
import statistics
import subprocess
from pathlib import Path

import torch

from cramfast.errors import UserError
from cramfast.kernels import dispatch, extension
from cramfast.runtime.stopwatch import Stopwatch
from cramfast.session.metrics import measure_copy_bandwidth
from cramfast.session.runfolder import cpu_name

CPU_MATMULS = ((4096, 768, 3072), (2048, 2048, 2048), (8192, 512, 512))
CUDA_MATMULS = ((8192, 8192, 8192), (65536, 768, 3072), (16384, 4096, 4096))
CLOCKS = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"  # nvidia-smi --help-query-gpu


def devices(asked: str) -> tuple[str, ...]:
    """What --device stands for: every device there is under "auto", the CPU first, or the one asked for.

    Raises:
        UserError: a GPU was asked for and torch sees none.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU — python -m cramfast.doctor says why")
    there = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return there if asked == "auto" else (asked,)


def take_kernels(implementation: str) -> dict[str, str]:
    """Override every operator with this implementation where it exists on a GPU; return {operator: why it does not}."""
    missing = {}
    for op in dispatch.OPERATORS:
        try:
            dispatch.override(op, implementation, device="cuda")
        except ValueError as error:
            missing[op] = str(error)
    return missing


@functools.cache
def copy_bytes_per_s(device: str = "cpu") -> float:
    """Bytes read plus bytes written a second by a copy, measured once in a process."""
    return measure_copy_bandwidth(device)


@functools.cache
def matmul_flops(dtype: torch.dtype, device: str = "cpu") -> float:
    """FLOP a second of the best of three large matmuls, medians of five (on a GPU, of ten)."""
    watch, rates = Stopwatch(device), []
    for n, k, m in CPU_MATMULS if device == "cpu" else CUDA_MATMULS:
        a, b = (torch.randn(*shape, device=device).to(dtype) for shape in ((n, k), (k, m)))
        times = watch.seconds(lambda a=a, b=b: a @ b, 5 if device == "cpu" else 10)
        rates.append(2 * n * k * m / statistics.median(times))
    return max(rates)


def commit() -> str:
    """The checkout's commit, with a plus sign if files differ from it."""
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=root, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def _gpu() -> dict[str, object]:
    """Name, size, CUDA version, and what nvidia-smi says of driver, clocks (MHz, now) and power limit (W)."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    found = {
        "gpu": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return found | {"driver": "unknown: no nvidia-smi"}
    query = [tool, f"--query-gpu={CLOCKS}", "--format=csv,noheader,nounits", "-i", f"GPU-{properties.uuid}"]
    answer = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    values = dict(zip(CLOCKS.split(","), answer.split(", "), strict=False))
    names = {"clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "clocks.max.sm": "sm_max_mhz", "power.limit": "watts"}
    return found | {names.get(key, "driver"): value for key, value in values.items()}


@functools.cache
def description(device: str = "cpu") -> dict[str, object]:
    """Device, threads, instruction set, versions and commit: what every number needs beside it."""
    return {
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "isa": extension.cpu_isa,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    } | (_gpu() if device == "cuda" else {})
