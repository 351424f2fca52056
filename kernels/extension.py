"""The compiled module and the one place that turns tensors into addresses for it."""

import contextlib
import ctypes
import importlib.util
import re
from pathlib import Path

import torch

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATION_CODES = {"gelu": 0, "silu": 1}
_OPENMP_LIBRARY = re.compile(r"/(libgomp|libiomp5|libomp)[^/]*\.so[^/]*$")


def openmp_runtime() -> str | None:
    """Path of the OpenMP runtime that torch has loaded, or None where the process map cannot be read."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    paths = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "/" in line}
    found = sorted(path for path in paths if _OPENMP_LIBRARY.search(path))
    ours = [path for path in found if "/torch/" in path]
    return (ours or found or [None])[0]


def _load():
    # The module is compiled for OpenMP but linked to no runtime. Making the symbols of torch's runtime global before
    # loading gives both one pool of threads; two pools would spin against each other on the same cores.
    ctypes.CDLL(openmp_runtime() or "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
    from cramfast import _C

    return _C


try:
    module = _load()
    cpu_isa = module.cpu_isa()
    missing_reason = ""
except (ImportError, OSError) as error:  # shown by doctor and at the start of every run, never silent
    module, cpu_isa = None, "none"
    why = error if importlib.util.find_spec("cramfast._C") else "it was installed without it"
    missing_reason = f"compiled module not loaded ({why}); build it with: pip install -e ."


def storage_dtypes(device_type: str) -> tuple[torch.dtype, ...]:
    """What the kernels of a device take; float16 is for GPUs, Turing above all, which has no bfloat16."""
    widths = (torch.float32, torch.bfloat16)
    return widths if device_type == "cpu" else (*widths, torch.float16)


# Operator -> emulated module that takes its calls on CPU tensors; filled by dispatch.override alone.
emulated: dict[str, object] = {}


def call(name: str, on: torch.Tensor, *arguments):
    """Call a compiled function where the tensor `on` lives and return its result.

    Tensors among the arguments become addresses, None becomes 0, the rest passes as it is. The device tag in front
    holds the threads as torch has them, or the current stream of the tensor's GPU.
    """
    if emulated and (target := emulated.get(name.rsplit("_", 1)[0]) or emulated.get(name)):
        return _call_emulated(target, name, arguments)
    if on.device.type == "cpu":
        device = module.Cpu(torch.get_num_threads())
        return getattr(module, name)(device, *map(_plain, arguments))
    device = module.Cuda(torch._C._cuda_getCurrentRawStream(on.device.index))
    with torch.cuda.device(on.device.index) if torch.cuda.device_count() > 1 else contextlib.nullcontext():
        return getattr(module, name)(device, *map(_plain, arguments))


_NUMBERS = frozenset((int, float, bool))


def _plain(argument):
    # The caller's frame keeps every tensor alive until the call returns. No isinstance: torch's costs 0.3 us each.
    if type(argument) in _NUMBERS:
        return argument
    return 0 if argument is None else argument.data_ptr()


def _call_emulated(target, name: str, arguments):
    for tensor in arguments:
        if isinstance(tensor, torch.Tensor):
            target.register_tensor(tensor.data_ptr(), tensor.nbytes)
    return getattr(target, name)(target.Cuda(0), *map(_plain, arguments))


def check(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, on: torch.Tensor) -> None:
    """Raise ValueError unless the tensor has this shape and dtype, lies on the device of the operator's first tensor
    `on`, is contiguous and starts on 16 bytes."""
    if tensor.device != on.device:
        raise ValueError(f"{name}: on {tensor.device}, but the operator's first tensor is on {on.device}; move one")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype}, got {tensor.dtype}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: not contiguous; call .contiguous() first")
    if tensor.data_ptr() % 16:
        raise ValueError(f"{name}: not aligned to 16 bytes; clone the slice first")


def check_activations(name: str, tensor: torch.Tensor, implementation: str = "cpp", on: torch.Tensor = None) -> None:
    """Raise ValueError unless the tensor is stored in a supported dtype, contiguous, aligned and, unless it is the
    operator's first, on the device of that one."""
    for_gpus = emulated or implementation == "triton"  # wherever these run, they are kernels for a GPU
    if tensor.dtype not in storage_dtypes("cuda" if for_gpus else tensor.device.type):
        raise ValueError(f"{name}: dtype {tensor.dtype} is not supported; use float32 or bfloat16")
    check(name, tensor, tuple(tensor.shape), tensor.dtype, tensor if on is None else on)
