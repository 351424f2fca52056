"""What the compiler made of each Triton kernel, as bench/sass.py says it of the CUDA kernels; no GPU needed.

`python -m bench.triton_sass` compiles every kernel as the operators launch it at the sizes of the base recipe, for the
architectures of CHIPS, prints a table and what is wrong with it, and exits 1 if anything is.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench.sass import Kernel, parse_ptxas, parse_sass
from cramfast.errors import UserError, command
from cramfast.kernels import peers

CHIPS = (86, 90)
BLOCK_SHARED_BYTES = {86: 99 << 10, 90: 227 << 10}  # CUDA C++ programming guide: most a block may have
N, D, F, V, P = 64, 768, 1536, 32768, 4096


class NoDevice:
    """What Triton asks of a driver before it launches, answered for a GPU that is not there."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device=None) -> int:
        return 0


def run_operators(dtype: torch.dtype) -> None:
    """Call every operator that has Triton kernels, forward and backward, and the rotation before stock attention."""
    from cramfast.kernels import triton_kernels  # imports Triton, which must see NoDevice first
    from cramfast.kernels.triton_cross_entropy import LONGEST_ROW

    ops, rows = torch.ops.cramfast, torch.zeros(N, D, dtype=dtype)
    vector, gates = torch.zeros(D), torch.zeros(N, 2 * F, dtype=dtype)
    weight, table = torch.zeros(2 * F, D, dtype=dtype), torch.zeros(V, 64, dtype=dtype)
    _, stream, mean, rstd = ops.layernorm_fwd(rows, rows, vector, None, 1e-5, "triton")
    ops.layernorm_bwd(rows, rows, stream, mean, rstd, vector, "triton")
    ops.glu_fwd(gates, "gelu", "triton")
    ops.glu_bwd(gates[:, :F].contiguous(), gates, "gelu", "triton")
    ops.layernorm_glu_fwd(rows, rows, vector, None, weight, "gelu", 1e-5, "triton")
    for vocabulary in (LONGEST_ROW, V):  # a row held whole, and one in chunks
        decoder, targets = table[:vocabulary], torch.zeros(N, dtype=torch.int64)
        ops.masked_cross_entropy_fwd(table[:N], decoder, targets, 0.0, True, "triton")
    own, heads = torch.ones(N, dtype=torch.bool), rows.view(N, 1, D // 64, 64).expand(-1, 3, -1, -1).contiguous()
    triton_kernels.call("arrange", heads, torch.empty_like(heads), heads, (torch.ones(N, 32),) * 2, own, 0, 1)
    if dtype != torch.float32:
        buffers = [torch.zeros(P) for _ in range(4)]
        segments = (torch.tensor([P // 2, P]), torch.zeros(2), torch.ones(2), torch.zeros(5))
        ops.adamw(*buffers, torch.zeros(P // 2, dtype=dtype), *segments, 0.9, 0.98, 1e-8, 0.5, "triton")


def compile_kernels(architecture: int) -> list[Kernel]:
    """Every kernel that the operators launch, in every dtype, compiled and described, not launched."""
    import triton

    found: dict[str, Kernel] = {}

    def compile_only(function, grid):
        def launch(*arguments, **options):
            compiled = function.run(*arguments, grid=grid, warmup=True, **options)
            name = f"{function.fn.__name__.strip('_')}<{str(dtype).removeprefix('torch.')}>"
            if name not in found:
                found[name] = describe(name, architecture, compiled)

        return launch

    triton.runtime.driver.set_active(NoDevice(architecture))
    triton.JITFunction.__getitem__ = compile_only
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        run_operators(dtype)
    return list(found.values())


def describe(name: str, architecture: int, compiled) -> Kernel:
    """Registers and spills from ptxas, instructions from cuobjdump, both of the Triton package."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(compiled.asm["ptx"])
        cubin.write_bytes(compiled.asm["cubin"])
        target = re.search(r"^\.target (sm_\w+)", compiled.asm["ptx"], flags=re.M)[1]
        (resources,) = parse_ptxas(output([tools / "ptxas", "-v", f"-arch={target}", ptx, "-o", "/dev/null"])).values()
        (instructions,) = parse_sass(output([tools / "cuobjdump", "-sass", cubin])).values()
    resources["shared_bytes"] = compiled.metadata.shared
    return Kernel(name, architecture, 32 * compiled.metadata.num_warps, **resources, **instructions)


def output(arguments: list) -> str:
    """Both streams of a command that must succeed."""
    result = subprocess.run(arguments, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"{arguments[0]}: {result.stderr.strip()}")
    return result.stdout + result.stderr


def problems(kernel: Kernel) -> list[str]:
    """What must not be in a kernel, beside what Kernel.problems() knows by the names of the CUDA kernels."""
    found = kernel.problems()
    most = BLOCK_SHARED_BYTES[kernel.architecture]
    if kernel.shared_bytes > most:
        found.append(f"{kernel.shared_bytes} bytes of shared memory, a block has {most}")
    if kernel.wide_loads == 0 and "sum" not in kernel.name:
        found.append("no 16-byte global load")
    if kernel.tensor_core == 0 and re.match(r"layernorm_glu_kernel<\w*float16", kernel.name):
        found.append("no tensor-core instruction")
    return found


def main() -> None:
    """Compile, check, print."""
    if not peers.installed("triton"):
        raise UserError("triton: not installed — pip install triton")
    os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported, which happens only now
    kernels = [kernel for architecture in CHIPS for kernel in compile_kernels(architecture)]
    print(f"{'kernel':<38} sm threads registers  shared spilled blocks/SM LDG.128 HMMA")
    for k in sorted(kernels, key=lambda k: (k.name, k.architecture)):
        print(
            f"{k.name:<38} {k.architecture} {k.threads:>7} {k.registers:>9} {k.shared_bytes:>7} {k.spill_bytes:>7}"
            f" {k.blocks:>9} {k.wide_loads:>7} {k.tensor_core:>4}"
        )
    found = [f"{k.name}, sm_{k.architecture}: {problem}" for k in kernels for problem in problems(k)]
    print("\n".join(found) or f"{len(kernels)} kernels: no spills, 16-byte loads and tensor cores where they belong")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    command(main)
