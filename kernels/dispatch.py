"""Which implementation of an operator runs for a device and dtype, and why. There is no silent fallback: every choice
has a reason, which `python -m cramfast.doctor` and the first lines of a run show."""

from dataclasses import dataclass

import torch

from cramfast.kernels import emulated, extension

OPERATORS = ("layernorm", "glu", "layernorm_glu", "attention", "cross_entropy", "adamw")
IMPLEMENTATIONS = ("cpp", "reference", "emulated")
# What an operator calls below autograd, where that is not the operator itself.
_PARTS = {"layernorm_glu": ("layernorm", "glu")}
_overrides: dict[str, str] = {}


@dataclass(frozen=True)
class Choice:
    """One line of the table: the implementation of `op` and the reason for it."""

    op: str
    device: str
    dtype: str
    implementation: str
    reason: str


def override(op: str, implementation: str, architecture: int = 860) -> None:
    """Force an implementation of one operator, or of "all"; "auto" takes the override back.

    "emulated" runs the CUDA kernels of `architecture` (750 or 860) on the CPU, thousands of times slower, to test
    them; nothing ever chooses it by itself.

    Raises:
        ValueError: an unknown operator or implementation, "cpp" where the module is missing, "emulated" where it
            cannot be built or has no such kernel.
    """
    if op not in (*OPERATORS, "all"):
        raise ValueError(f"kernels: unknown operator {op!r}; one of {', '.join(OPERATORS)}, all")
    if implementation not in (*IMPLEMENTATIONS, "auto"):
        raise ValueError(
            f"kernels: unknown implementation {implementation!r}; one of {', '.join(IMPLEMENTATIONS)}, auto"
        )
    if implementation == "cpp" and extension.module is None:
        raise ValueError(f"kernels: {op}=cpp is not possible: {extension.missing_reason}")
    if implementation == "emulated" and (reason := emulated.missing_reason()):
        raise ValueError(f"kernels: {op}=emulated is not possible: {reason}")
    target = emulated.load(architecture) if implementation == "emulated" else None
    for name in OPERATORS if op == "all" else (op,):
        if target and name not in target.cuda_operators:
            if op != "all":
                raise ValueError(f"kernels: {op} has no CUDA kernel yet")
            continue
        if implementation == "auto":
            _overrides.pop(name, None)
        else:
            _overrides[name] = implementation
        for part in _PARTS.get(name, (name,)):
            if target:
                extension.emulated[part] = target
            else:
                extension.emulated.pop(part, None)


def choose(op: str, device_type: str, dtype: torch.dtype) -> Choice:
    """The implementation that `op` takes for tensors of this device and dtype."""

    def choice(implementation: str, reason: str) -> Choice:
        return Choice(op, device_type, str(dtype).removeprefix("torch."), implementation, reason)

    if op in _overrides:
        return choice(_overrides[op], "asked for")
    if dtype not in extension.storage_dtypes(device_type):
        return choice("reference", f"no kernel for {dtype}")
    if extension.module is None:
        return choice("reference", extension.missing_reason)
    if device_type == "cpu":
        return choice("cpp", f"C++ for the CPU, {extension.cpu_isa}")
    if device_type == "cuda" and op in extension.module.cuda_operators:
        # Emulated and compiled, never run on a GPU: until its tests have passed on one, nobody gets it unasked.
        return choice("reference", f"CUDA kernel not yet proven on a GPU; dispatch.override({op!r}, 'cpp') takes it")
    return choice("reference", f"no kernel was built for {device_type}")


def uses_reference(op: str, tensor: torch.Tensor) -> bool:
    """Whether `op` runs as plain PyTorch on this tensor."""
    return choose(op, tensor.device.type, tensor.dtype).implementation == "reference"


def table(device_type: str) -> list[Choice]:
    """The choice for every operator and storage dtype on a device."""
    return [choose(op, device_type, dtype) for op in OPERATORS for dtype in extension.storage_dtypes(device_type)]
