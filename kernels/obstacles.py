"""Why an implementation of an operator cannot run somewhere: one function each, Target to the reason with its remedy.

"" where it can run. kernels/dispatch.py has the table of what they belong to, and chooses.
"""

import os
from dataclasses import dataclass

import torch

from cramfast.kernels import cuda_build, extension, peers
from cramfast.kernels import emulated as emulator

HALF = (torch.float16, torch.bfloat16)
NO_GPU = "sm_0"  # the architecture where torch sees no GPU
# What an operator calls below autograd, where that is not the operator alone.
PARTS = {"layernorm_glu": ("layernorm", "glu", "layernorm_glu")}


@dataclass(frozen=True)
class Target:
    """What an operator is to run on.

    Attributes:
        device: "cpu" or "cuda".
        architecture: "sm_90", or the instruction set of our build for the CPU.
        windowed: whether attention is local.
    """

    op: str
    device: str
    dtype: torch.dtype
    architecture: str
    windowed: bool = False


def cpp(target: Target) -> str:
    """Our compiled kernels, on a CPU or a GPU."""
    module = extension.module
    if module is None:
        return extension.missing_reason
    if found := _dtype(target, extension.storage_dtypes(target.device)):
        return found
    return _cpp_cuda(target) if target.device == "cuda" else ""


def _cpp_cuda(target: Target) -> str:
    module = extension.module
    if not module.cuda:
        return f"no CUDA kernels: {module.cuda_missing}; install the CUDA toolkit (nvcc), then pip install -e ."
    if target.op not in module.cuda_operators:
        return f"{target.op} has no CUDA kernel yet"
    if found := _gpu(target, 75):
        return found
    if target.op == "attention" and target.dtype == torch.bfloat16:  # on tensor cores
        return cuda_build.bfloat16_obstacle(target.architecture)
    return cuda_build.code_path(target.architecture)[1]


def cpp_fused(target: Target) -> str:
    """LayerNorm, matmul and gate in one CUDA kernel."""
    lowest = 80 if target.dtype == torch.bfloat16 else 75
    found = _gpu(target, lowest) or _dtype(target, HALF) or cpp(target)
    return found or (cuda_build.bfloat16_obstacle(target.architecture) if target.dtype == torch.bfloat16 else "")


def triton(target: Target) -> str:
    """Our Triton kernels, in Triton's interpreter too."""
    interpreted = target.device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and (found := _gpu(target, 80)):
        return found
    return _missing("triton", "pip install triton") or _dtype(target, extension.storage_dtypes("cuda"))


def emulated(target: Target) -> str:
    """The CUDA kernels on the emulator, for tests."""
    if target.device != "cpu":
        return "it runs the CUDA kernels on the CPU, for tests"
    sources = [emulator.CSRC / f"{part}_cuda.cu" for part in PARTS.get(target.op, (target.op,))]
    if emulator.CSRC.is_dir() and not all(source.exists() for source in sources):
        return f"{target.op} has no CUDA kernel yet"
    return emulator.missing_reason() or _dtype(target, extension.storage_dtypes("cuda"))


def emulated_fused(target: Target) -> str:
    """The fused one on the emulator."""
    return emulated(target) or _dtype(target, HALF)


def flash_attn(target: Target) -> str:
    """The package flash-attn."""
    found = _gpu(target, 80) or _missing("flash_attn", "pip install flash-attn")
    return found or _dtype(target, HALF)


def torch_varlen(target: Target) -> str:
    """torch's varlen attention."""
    if found := _gpu(target, 80):
        return found
    if not peers.torch_has_flash_attention():
        return f"torch {torch.__version__} was built without flash attention; install a build from pytorch.org"
    if target.windowed and not peers.varlen_attn_has_window():
        return f"varlen_attn of torch {torch.__version__} takes no window; pip install -U torch"
    return _dtype(target, HALF)


def torch_efficient(target: Target) -> str:
    """torch's memory-efficient attention."""
    if target.windowed:
        return "it has no two-sided window; take another, or --model.global-every 1"
    found = _gpu(target, 80 if target.dtype == torch.bfloat16 else 50)
    return found or _dtype(target, (torch.float32, *HALF))


def apex(target: Target) -> str:
    """apex's LayerNorm."""
    how = "build it with its CUDA extensions from github.com/NVIDIA/apex"
    found = _gpu(target, 50) or _missing("apex", how) or _missing("fused_layer_norm_cuda", how)
    return found or _dtype(target, (torch.float32, *HALF))


def apex_adamw(target: Target) -> str:
    """apex's FusedAdam, which cannot take the operator's place anywhere."""
    return "FusedAdam overwrites the gradient, takes one weight decay a launch and clips nothing"


def _gpu(target: Target, lowest: int) -> str:
    if target.device != "cuda":
        return "it runs on GPUs only"
    if target.architecture == NO_GPU:
        return "torch sees no GPU"
    return f"it needs sm_{lowest} or later" if int(target.architecture.removeprefix("sm_")) < lowest else ""


def _missing(module: str, how: str) -> str:
    return "" if peers.installed(module) else f"{module} is not installed; {how}"


def _dtype(target: Target, dtypes: tuple[torch.dtype, ...]) -> str:
    names = ", ".join(name_of(dtype) for dtype in dtypes)
    return "" if target.dtype in dtypes else f"it takes {names}, not {name_of(target.dtype)}"


def none(target: Target) -> str:
    """What runs everywhere."""
    return ""


def name_of(dtype: torch.dtype) -> str:
    """float16 of torch.float16."""
    return str(dtype).removeprefix("torch.")
