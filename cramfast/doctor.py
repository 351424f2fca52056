"""What runs on this machine, why, what is missing, and whether it is right: python -m cramfast.doctor.

Exit status 0 only if every operator reproduces float64 of its reference, forward and backward; 1 otherwise.
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

import cramfast.kernels
from cramfast.config import read_config
from cramfast.errors import UserError, command
from cramfast.kernels import cuda_build, dispatch, extension, reference
from cramfast.kernels.cases import CASES, Case, Inputs
from cramfast.qualify import resolve
from cramfast.qualify.verdict import settle
from cramfast.recipes import resolve as resolve_config
from cramfast.recipes import starting_config
from cramfast.runtime.arguments import program
from cramfast.session import kernelchoice

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "numba",
    "datasets",
    "flash-attn",
    "apex",
)
BUILDS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16")  # what csrc/cpu_dispatch.cpp knows as CRAMFAST_CPU
DRIVER = Path("/proc/driver/nvidia/version")
NARROWEST = 100  # characters of a table: in fewer, names of operators and implementations would be cut
SHAPES_CHECKED = 2  # of each Case: a plain one and one with other options


@dataclass(frozen=True)
class Check:
    """One operator in one dtype: `problem` is "" when it reproduces the reference (or cannot run there, as the choice
    says); `worst` is the largest of error divided by allowed error over its outputs and gradients."""

    choice: dispatch.Choice
    worst: float
    problem: str


def op_table(device: str | None = None) -> list[dispatch.Choice]:
    """What runs for every operator and dtype on a device, and why; the GPU if there is one unless told otherwise."""
    return dispatch.table(device or default_device())


def possible(choices: list[dispatch.Choice]) -> list[tuple[str, str, str]]:
    """(operator, its dtypes, the implementations that could run in place of the chosen one)."""
    found: dict[tuple[str, str], list[str]] = {}
    for choice in choices:
        dtype = getattr(torch, choice.dtype)
        others = [
            name
            for name in dispatch.IMPLEMENTATIONS[choice.op]
            if name != choice.implementation and not dispatch.obstacle(choice.op, name, choice.device, dtype)
        ]
        found.setdefault((choice.op, ", ".join(others)), []).append(choice.dtype)
    return [(op, ", ".join(dtypes), others) for (op, others), dtypes in found.items()]


def impossible(device: str) -> list[tuple[str, str, str]]:
    """(implementation, its operators, why it cannot run on this device and how to get it), without repetitions."""
    found: dict[tuple[str, str], list[str]] = {}
    for op, implementations in dispatch.IMPLEMENTATIONS.items():
        for name in implementations:
            for dtype in extension.storage_dtypes(device):
                if why := dispatch.obstacle(op, name, device, dtype):
                    found.setdefault((name, why), []).append(op)
    return [(name, ", ".join(dict.fromkeys(ops)), why) for (name, why), ops in sorted(found.items())]


def default_device() -> str:
    """ "cuda" where torch sees a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_operators(device: str) -> list[Check]:
    """Run each operator as it would run in training and compare with float64 of the reference."""
    cases = {case.op: case for case in CASES}
    return [_check(cases[choice.op], choice) for choice in op_table(device)]


def _check(case: Case, choice: dispatch.Choice) -> Check:
    if choice.obstacle:
        return Check(choice, 0.0, "")
    dtype = getattr(torch, choice.dtype)
    worst, problem = 0.0, ""
    for shape in case.test_shapes[:SHAPES_CHECKED]:
        inputs = case.make(**shape, dtype=dtype, seed=0)
        truth = _evaluate(reference, case, _convert(inputs, "cpu", torch.float64))
        try:
            eager = _evaluate(reference, case, _convert(inputs, choice.device))
            ours = _evaluate(cramfast.kernels, case, _convert(inputs, choice.device))
        except (RuntimeError, ValueError, TypeError, ImportError) as error:
            return Check(choice, float("inf"), f"failed: {str(error).strip().splitlines()[0]}")
        for name, true in truth.items():
            # The rule of tests/kernels/test_ops.py: twice eager PyTorch's error, plus one ulp of the largest value.
            ulp = torch.finfo(ours[name].dtype).eps * float(true.abs().max())
            allowed = 2 * _error(eager[name], true) + ulp
            excess = _error(ours[name], true) / allowed if allowed else 0.0
            if not excess <= 1:  # also true of NaN
                problem = problem or f"{name}: error {_error(ours[name], true):.2g}, allowed {allowed:.2g}"
            worst = max(worst, excess) if excess == excess else float("inf")
    return Check(choice, worst, problem)


def _error(value: torch.Tensor, true: torch.Tensor) -> float:
    return float((value.double().cpu() - true).abs().max())


def _evaluate(operators, case: Case, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Outputs and gradients by name."""
    inputs = dict(inputs)
    wanted = [name for name in case.gradients if inputs.get(name) is not None]
    for name in wanted:
        inputs[name] = inputs[name].detach().clone().requires_grad_()
    outputs = case.run(operators, inputs)
    result = {f"output {place}": output.detach() for place, output in enumerate(outputs)}
    if wanted:
        generator = torch.Generator().manual_seed(1)
        # Drawn in bfloat16, so that every dtype differentiates the same function.
        weights = [torch.randn(o.shape, generator=generator).bfloat16().to(o) for o in outputs]
        gradients = torch.autograd.grad(outputs, [inputs[name] for name in wanted], weights)
        result |= {f"gradient of {name}": g for name, g in zip(wanted, gradients, strict=True)}
    return result


def _convert(value, device: str, dtype: torch.dtype | None = None):
    if isinstance(value, dict):
        return {key: _convert(item, device, dtype) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_convert(item, device, dtype) for item in value)
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None)


def machine() -> list[tuple[str, str]]:
    """(what, how it is) of processor, threads, GPU and compilers."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    runtime = extension.openmp_runtime()
    return [
        ("processor", f"{_processor()}, {allowed} of {os.cpu_count()} logical cores usable"),
        ("instruction set", f"{_instruction_sets()}; our build in use: {_build()}"),
        ("threads", f"{torch.get_num_threads()} (torch's; our kernels follow)"),
        ("OpenMP", f"{Path(runtime).name}, shared with torch" if runtime else "runtime not found in the process map"),
        ("GPU", _gpu()),
        ("NVIDIA driver", _driver()),
        ("CUDA in torch", torch.version.cuda or "none: this is a CPU build of torch"),
        ("CUDA kernels", _cuda_kernels()),
        ("empty CUDA launch", _empty_launch()),
        ("CUDA compiler", _compiler("nvcc", cuda_build.nvcc())),
        ("C++ compiler", _compiler("c++", shutil.which(os.environ.get("CXX", "c++")))),
    ]


def _processor() -> str:
    match = re.search(r"^model name\s*: (.*)$", _cpuinfo(), flags=re.M)
    return f"{match[1] if match else platform.processor() or 'unknown'} ({platform.machine()})"


def _instruction_sets() -> str:
    flags = set((re.search(r"^(?:flags|Features)\s*: (.*)$", _cpuinfo(), flags=re.M) or ["", ""])[1].split())
    known = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")
    return "processor has " + (", ".join(flag for flag in known if flag in flags) or "none of the wide ones")


def _build() -> str:
    wanted = os.environ.get("CRAMFAST_CPU")
    if not wanted or extension.module is None:
        return extension.cpu_isa
    if wanted == extension.cpu_isa:
        return f"{wanted}, limited by CRAMFAST_CPU={wanted}"
    why = "more than this processor has" if wanted in BUILDS else f"unknown, use one of {', '.join(BUILDS)}"
    return f"{extension.cpu_isa}; CRAMFAST_CPU={wanted} is ignored: {why}"


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "a driver is loaded, but torch sees no GPU" if _driver_loaded() else "none"
    major, minor = torch.cuda.get_device_capability()
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"{torch.cuda.get_device_name()}, sm_{major}{minor}, {total:.0f} GiB, {torch.cuda.device_count()} in all"


def _empty_launch() -> str:
    """What came of a kernel that does nothing: whether our build, the driver and the card work together."""
    module, visible = extension.module, torch.cuda.is_available()
    if module is None or not module.cuda:
        return "none to make: no CUDA kernels are built"
    if not visible and not _driver_loaded():
        return "none to make: no GPU"
    try:
        module.empty_launch(module.Cuda(torch.cuda.current_stream().cuda_stream if visible else 0))
    except RuntimeError as error:
        return f"failed: {error}"
    return "works"


def _driver_loaded() -> bool:
    return DRIVER.exists()


def _driver() -> str:
    match = re.search(r"Kernel Module\D*?\s([\d.]+)", DRIVER.read_text()) if _driver_loaded() else None
    takes = (cuda_build.versions() or (0,))[0]
    found = (match and match[1], takes and f"takes CUDA {cuda_build.written(takes)}")
    return ", ".join(filter(None, found)) or "none"


def _cuda_kernels() -> str:
    module = extension.module
    if module is None or not module.cuda:
        return f"not built: {_no_cuda()}"
    runtime = cuda_build.written(cuda_build.versions()[1])
    built = f"for {cuda_build.summary(module.cuda_architectures)}, by toolkit {module.cuda_toolkit}, runtime {runtime}"
    if not torch.cuda.is_available():
        return built
    path, why = cuda_build.code_path(dispatch.architecture("cuda"))
    return f"{built}; {why or f'this card runs the code of sm_{path // 10}'}"


def _no_cuda() -> str:
    return "there is no compiled module" if extension.module is None else extension.module.cuda_missing


def _compiler(name: str, path: str | None) -> str:
    if path is None:
        return f"{name} not found"
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    version = re.search(r"release [\d.]+|\d+\.\d+\.\d+", answer.stdout)
    return f"{path}, {version[0] if version else 'version unknown'}"


def versions() -> list[tuple[str, str]]:
    """(package, version), with Python first; "not installed" where it is so."""
    rows = [("python", platform.python_version()), ("cramfast", _version("cramfast"))]
    return rows + [(name, _version(name)) for name in PACKAGES]


def _version(name: str) -> str:
    if name == "torch":  # its own word names the build too, 2.14.1+cu130, which the package's metadata leave out
        return torch.__version__
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def missing() -> list[tuple[str, str, str]]:
    """(what is missing, what that costs, how to get it); on a machine without GPU, nothing that only a GPU needs."""
    rows = []
    if extension.module is None:
        # Processor time of an update of `mini`, bfloat16, one thread: 1.23 s for 0.42 s (torch 2.13.0, 2026-12-01).
        cost = f"PyTorch's operators run instead, about three times as slow; {extension.missing_reason}"
        rows.append(("compiled kernels", cost, "pip install -e ."))
    if _driver_loaded() and not torch.cuda.is_available():
        how = "install torch for CUDA: pytorch.org/get-started"
        if torch.version.cuda:
            how = f"update the driver, or install torch for an older CUDA than {torch.version.cuda}"
        rows.append(("torch for the GPU", "training runs on the CPU", how))
    if torch.cuda.is_available():
        if extension.module is not None and not extension.module.cuda:
            how = "pip install -e ." if cuda_build.nvcc() else "install the CUDA toolkit (nvcc), then pip install -e ."
            rows.append(("CUDA kernels", f"others run on the GPU; {_no_cuda()}", how))
        if problem := cuda_build.driver_problem():
            rows.append(("a newer driver", "our CUDA kernels cannot run", problem))
        if importlib.util.find_spec("triton") is None:
            rows.append(("triton", "no torch.compile and no Triton kernels on the GPU", "pip install triton"))
    if importlib.util.find_spec("datasets") is None:
        rows.append(("datasets", "--data hf:NAME does not work", "pip install -e '.[hf]'"))
    return rows


@dataclass(frozen=True)
class Arguments:
    """What runs on this machine, why, what is missing; exit status 0 only if every operator is right."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device whose operators are shown and checked."""
    kernels: tuple[str, ...] = ()
    """OPERATOR=IMPLEMENTATION to show and check instead of the one chosen, as attention=flash_attn."""
    qualify: bool = False
    """Try every implementation on this GPU first, anew and in a process of its own, and keep the verdicts for runs."""
    run_dir: Path | None = None
    """Run whose config, vocabulary and text --qualify takes, to try what it could not in its own time. New runs like it
    take the outcome; the run itself keeps what it began with."""
    preset: str | None = None
    """Size whose widths, heads, vocabulary and lengths --qualify takes: tiny, mini, small or base."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Storage of matrices and activations that --qualify takes; auto: what a run would choose."""
    seconds: float = 300.0
    """What --qualify may take; a run's own trial stops after 60, or its --qualify-seconds."""


def qualify(arguments: Arguments, device: str) -> None:
    """Try the implementations, settle the verdicts in this process and print a line for each operator.

    Raises:
        UserError: there is no GPU, no such preset or run, or a run and a preset.
    """
    prepared = None
    if arguments.run_dir:
        if (arguments.preset, arguments.dtype, arguments.kernels) != (None, "auto", ()):
            raise UserError("--run-dir with --preset, --dtype or --kernels: its config says that — leave them out")
        config = replace(read_config(arguments.run_dir / "config.json"), device=device)
        kernelchoice.override(config.kernels, device)
    else:
        config = starting_config(arguments.preset, None, device)
        config = resolve_config(replace(config, device=device, dtype=arguments.dtype, kernels=arguments.kernels))
    if not resolve.needed(config):
        raise UserError(
            "--qualify: a CPU runs our C++ kernels untried — leave it out, or run it where torch sees a GPU"
        )
    if arguments.run_dir:
        from cramfast import stages  # all that trains, which a look at the machine does without

        prepared, config = stages.prepare_text(config)  # found again, or made again, as when the run is resumed
    outcome = resolve.of_card(config, prepared, arguments.seconds, anew=True, run_dir=arguments.run_dir)
    settle(list(outcome.verdicts), device, getattr(torch, config.dtype))
    print(f"qualified for {arguments.run_dir or f'preset {config.preset}'} in {config.dtype}:")
    for line in resolve.lines(outcome):
        print(f"  {line}")


def main() -> None:
    """The command line."""
    import tyro
    from rich.console import Console
    from rich.markup import escape

    arguments = tyro.cli(Arguments, prog=program("doctor"))
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU — leave --device out to see what is missing")
    device = default_device() if device == "auto" else device
    kernelchoice.override(arguments.kernels, device)
    if arguments.qualify:
        qualify(arguments, device)
    console = Console()
    console.width = max(console.width, NARROWEST)
    _print_pairs(console, "Machine", machine())
    _print_pairs(console, "Versions", versions())
    checks = check_operators(device)
    rows = [_row(check) for check in checks]
    names = ("op", "dtype", "runs", "error/allowed", "check", "why this one")
    _print(console, f"Operators on {device}, against float64 of the reference", names, rows)
    for check in checks:
        if check.problem:
            console.print(f"[red]{check.choice.op}, {check.choice.dtype}:[/]", escape(check.problem), highlight=False)
    columns = ("op", "dtypes", "--kernels OP=")
    _print(console, f"Could run on {device} if asked for", columns, possible([check.choice for check in checks]))
    columns = ("implementation", "of", "why not, and how to get it")
    _print(console, f"Cannot run on {device}", columns, impossible(device))
    if missing():
        _print(console, "Missing", ("what", "what that costs", "how to get it"), missing())
    wrong = sorted({check.choice.op for check in checks if check.problem})
    if wrong:
        console.print(
            f"[bold red]wrong on this machine:[/] {', '.join(wrong)} — do not train; please report this output"
        )
        sys.exit(1)
    console.print("[bold green]every operator reproduces its reference[/]")


def _row(check: Check) -> tuple[str, ...]:
    choice, verdict = check.choice, "WRONG" if check.problem else "ok"
    if choice.obstacle:
        return choice.op, choice.dtype, choice.implementation, "–", "impossible", choice.obstacle
    return (
        choice.op,
        choice.dtype,
        choice.implementation,
        f"{check.worst:.2f}" if check.worst < 1000 else f"{check.worst:.0e}",
        verdict,
        choice.reason,
    )


def _print_pairs(console, title: str, rows: list[tuple[str, str]]) -> None:
    """A line to a pair, however long: only the terminal breaks it, so that a value can be searched for and copied."""
    from rich.markup import escape

    width = max(len(name) for name, _ in rows)
    console.print(f"\n[bold]{title}[/]")
    for name, value in rows:
        console.print(f"{name:<{width}}  {escape(value)}", soft_wrap=True, highlight=False)


def _print(console, title: str, names: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0))
    for place, name in enumerate(names):
        short = place == 0 or (len(names) > 3 and place < len(names) - 1)
        table.add_column(name, no_wrap=short, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row), style="red" if "WRONG" in row else None)
    console.print(f"\n[bold]{title}[/]")
    console.print(table)


if __name__ == "__main__":
    command(main)
