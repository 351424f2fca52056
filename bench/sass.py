"""What the compiler made of each CUDA kernel: registers, shared memory, spills, occupancy and the instructions that
matter, for each architecture; no GPU needed. `python -m bench.sass` prints what is wrong and exits 1 if anything is,
the table bench/results/sass.md included, where it was written with the same compiler; `--write` writes it.

Registers, memory and spills come from ptxas. Instructions come from cuobjdump: of the CUDA toolkit, or the copy inside
an installed Triton, or CUOBJDUMP; without it they are not checked, which is said.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cramfast.errors import UserError, command
from cramfast.kernels import cuda_build

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "bench" / "results" / "sass.md"


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one multiprocessor: CUDA C++ programming guide, technical specifications per compute capability."""

    threads: int
    blocks: int
    shared_bytes: int
    reserved_bytes: int  # shared memory that the system keeps of each block
    registers: int = 65536


ARCHITECTURES = {
    75: Multiprocessor(1024, 16, 64 << 10, 0),
    80: Multiprocessor(2048, 32, 164 << 10, 1 << 10),
    86: Multiprocessor(1536, 16, 100 << 10, 1 << 10),
    90: Multiprocessor(2048, 32, 228 << 10, 1 << 10),
}


# printf takes its values in local memory; these kernels print before they trap, and do nothing else that takes time.
PRINTS = ("attention_check_kernel", "cross_entropy_check_kernel")


@dataclass(frozen=True)
class Kernel:
    """One instantiation on one architecture. Counts of instructions are None where no cuobjdump was found."""

    name: str
    architecture: int
    threads: int
    registers: int
    shared_bytes: int  # static, and what the launcher adds (launched_bytes)
    stack_bytes: int
    spill_bytes: int
    wide_loads: int | None = None
    local_accesses: int | None = None
    tensor_core: int | None = None

    @property
    def blocks(self) -> int:
        """Blocks that one multiprocessor holds. Registers are handed out to warps in units of 256."""
        limits = ARCHITECTURES[self.architecture]
        warps = -(-self.threads // 32)
        register_units = warps * (-(-self.registers * 32 // 256) * 256)
        shared = self.shared_bytes + limits.reserved_bytes
        by_shared = limits.shared_bytes // shared if shared else limits.blocks
        return min(limits.blocks, limits.threads // self.threads, limits.registers // register_units, by_shared)

    @property
    def occupancy(self) -> float:
        """Threads that one multiprocessor holds, as a part of its limit."""
        return self.blocks * self.threads / ARCHITECTURES[self.architecture].threads

    def problems(self) -> list[str]:
        """What must not be in a shipped kernel."""
        found = []
        if self.spill_bytes:
            found.append(f"{self.spill_bytes} bytes of registers spilled")
        if self.local_accesses and self.name not in PRINTS:
            found.append(f"{self.local_accesses} accesses to local memory")
        multiplies = needs_tensor_cores(self.name, self.architecture)
        if self.wide_loads == 0 and (multiplies or needs_wide_loads(self.name)):
            found.append("no 16-byte global load")
        if self.tensor_core == 0 and multiplies:
            found.append("no tensor-core instruction")
        return found


def needs_wide_loads(name: str) -> bool:
    """Every kernel that is bound by memory, but for the one-value-at-a-time forms and the sum over few rows."""
    if name.startswith(("adamw", "layernorm_glu_fold")):
        return True
    match = re.match(r"(?:layernorm_[fb]wd|glu_[fb]wd|cross_entropy)_kernel<\w+, (\d+)", name)
    return bool(match) and int(match[1]) > 1


def needs_tensor_cores(name: str, architecture: int) -> bool:
    """Attention in half precision and the matmul of layernorm_glu, but for bfloat16 before sm_80, where the launcher
    refuses an empty kernel."""
    match = re.match(r"(?:attention_\w+|layernorm_glu)_(?:fwd|bwd)_kernel<(bf16|f16)", name)
    return bool(match) and (match[1] == "f16" or architecture >= 80)


def launched_bytes(name: str, architecture: int) -> int:
    """Dynamic shared memory, which no compiler knows; the sources hold static_asserts of the same numbers."""
    if match := re.match(r"attention_short_fwd_kernel<\w+, (\d+)>", name):
        return 512 * int(match[1])
    if match := re.match(r"attention_short_bwd_kernel<\w+, (\d+)>", name):
        return 96 << 10 if architecture >= 80 and match[1] == "64" else 64 << 10
    if match := re.match(r"attention_tiled_[fb]wd_kernel<\w+, (\d+)(, true)?", name):
        width, keys = int(match[1]), bool(match[2])
        columns = {32: 32, 64: 32, 128: 16} if keys else {32: 64, 64: 64 if architecture >= 80 else 32, 128: 32}
        own_rows = 128 if keys and width == 128 else 0
        return columns[width] * (8 * width + 16) + own_rows * width * 2
    return 0


def nvcc() -> str:
    """The CUDA compiler.

    Raises:
        UserError: there is none.
    """
    found = cuda_build.nvcc()
    if not found:
        raise UserError("nvcc: not found; install a CUDA toolkit or set CUDACXX to its compiler")
    return found


def cuobjdump() -> str | None:
    """The disassembler, or None."""
    candidates = [os.environ.get("CUOBJDUMP"), "cuobjdump", str(Path(nvcc()).resolve().parent / "cuobjdump")]
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        candidates.append(str(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"))
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def _output(arguments: list[str], **options) -> subprocess.CompletedProcess:
    result = subprocess.run(arguments, capture_output=True, text=True, **options)
    if result.returncode:
        raise UserError(f"{' '.join(arguments)}: {result.stderr.strip()}")
    return result


def readable(mangled: list[str]) -> dict[str, str]:
    """Kernel names as written in the source: no namespaces, parameters or casts of template arguments."""
    plain = _output(["c++filt"], input="\n".join(mangled)).stdout.splitlines()
    names = {}
    for symbol, name in zip(mangled, plain, strict=True):
        name = re.sub(r"cramfast::|\(anonymous namespace\)::|_GLOBAL__N__\w+::|^void |\(int\)", "", name)
        names[symbol] = re.sub(r"\([^()]*\)$", "", name)
    return names


def parse_ptxas(log: str) -> dict[str, dict[str, int]]:
    """Resources of each entry function from the messages of `ptxas -v`."""
    kernels: dict[str, dict[str, int]] = {}
    current: dict[str, int] = {}
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            current = kernels.setdefault(match[1], {})
        if match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            current |= {"stack_bytes": int(match[1]), "spill_bytes": int(match[2]) + int(match[3])}
        if match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            current |= {"registers": int(match[1]), "shared_bytes": int(shared[1]) if shared else 0}
    return kernels


def parse_sass(listing: str) -> dict[str, dict[str, int]]:
    """Counts of the instructions that matter in each function of a cuobjdump listing; LDGSTS is cp.async."""
    counts = {}
    for part in listing.split("Function : ")[1:]:
        counts[part.split(maxsplit=1)[0]] = {
            "wide_loads": len(re.findall(r"\bLDG(?:STS)?\.E[.\w]*\.128", part)),
            "local_accesses": len(re.findall(r"\b(?:LDL|STL)\b", part)),
            "tensor_core": len(re.findall(r"\bHMMA\.", part)),
        }
    return counts


def compile_kernels(source: Path, architecture: int) -> list[Kernel]:
    """Compile one .cu file for one architecture and describe its kernels."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / f"{source.stem}.cubin"
        flags = ["-std=c++17", "-O3", f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v"]
        keep = ["--keep", "--keep-dir", folder]
        log = _output([nvcc(), *flags, *keep, "-o", str(cubin), str(source)]).stderr
        resources = parse_ptxas(log)
        ptx = (Path(folder) / f"{source.stem}.ptx").read_text()
        threads = {m[1]: int(m[2]) for m in re.finditer(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)", ptx)}
        tool = cuobjdump()
        instructions = parse_sass(_output([tool, "-sass", str(cubin)]).stdout) if tool else {}
    names = readable(list(resources))
    for symbol, values in resources.items():
        values["shared_bytes"] += launched_bytes(names[symbol], architecture)
    return [
        Kernel(names[symbol], architecture, threads[symbol], **values, **instructions.get(symbol, {}))
        for symbol, values in resources.items()
    ]


def all_kernels() -> list[Kernel]:
    """Every kernel in csrc/ on every architecture, by name."""
    jobs = [(source, a) for source in sorted((ROOT / "csrc").glob("*_cuda.cu")) for a in ARCHITECTURES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [kernel for kernels in pool.map(lambda job: compile_kernels(*job), jobs) for kernel in kernels]
    return sorted(found, key=lambda k: (k.name, k.architecture))


def compiler_version() -> str:
    """As V13.0.88."""
    version = re.search(r"release [\d.]+, (\S+)", _output([nvcc(), "--version"]).stdout)
    return version[1] if version else "?"


def table(kernels: list[Kernel], version: str) -> str:
    """Markdown, one line a kernel and architecture, by the compiler of this version."""
    lines = [
        "# Compiled kernels",
        "",
        f"Written by `python -m bench.sass --write` with nvcc {version}. From the compiler",
        "alone: no time is measured here. Shared memory is what a block takes, static and dynamic; occupancy counts",
        "it, threads and registers. Tensor-core kernels in bfloat16 have no body on sm_75: their launchers refuse.",
        "LDG.128 (with cp.async) and HMMA count instructions in the code; those in a loop run more than once.",
        "",
        "| kernel | sm | threads | registers | shared B | spilled B | blocks/SM | occupancy | LDG.128 | HMMA |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for k in kernels:
        wide, hmma = ("?" if n is None else n for n in (k.wide_loads, k.tensor_core))
        lines.append(
            f"| {k.name} | {k.architecture} | {k.threads} | {k.registers} | {k.shared_bytes} | {k.spill_bytes}"
            f" | {k.blocks} | {k.occupancy:.0%} | {wide} | {hmma} |"
        )
    return "\n".join(lines) + "\n"


def compare(kept: str, kernels: list[Kernel], version: str) -> tuple[list[str], str]:
    """(lines of the committed table that these kernels do not give, and theirs; why none were compared, or "")."""
    if f"with nvcc {version}." not in kept:
        return [], f"the table is of another compiler than nvcc {version}"
    if any(kernel.wide_loads is None for kernel in kernels):
        return [], "instructions were not counted"
    before, now = (set(text.splitlines()) for text in (kept, table(kernels, version)))
    return sorted([f"- {line}" for line in before - now] + [f"+ {line}" for line in now - before]), ""


def main() -> None:
    """Compile, check, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write the table to {TABLE.relative_to(ROOT)}")
    options = parser.parse_args()
    kernels, version = all_kernels(), compiler_version()
    if options.write:
        TABLE.write_text(table(kernels, version))
    problems = [f"{k.name}, sm_{k.architecture}: {problem}" for k in kernels for problem in k.problems()]
    print(f"{len(kernels)} kernels for {', '.join(f'sm_{a}' for a in ARCHITECTURES)}")
    differences, reason = compare(TABLE.read_text(), kernels, version)
    name = TABLE.relative_to(ROOT)
    print(f"{name} was not compared: {reason}" if reason else f"{name}: {len(differences)} lines differ")
    if differences:
        print("\n".join(differences))
        problems.append(f"{name} is not of these sources — python -m bench.sass --write")
    if cuobjdump() is None:
        print("no cuobjdump (set CUOBJDUMP): instructions were not checked, only registers and spills")
    print("\n".join(problems) or "no spills" + ("" if cuobjdump() is None else ", 16-byte loads where they belong"))
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    command(main)
