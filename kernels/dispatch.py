"""Which implementation of an operator runs for a device and dtype, and why. There is no silent fallback: every choice
has a reason, which `python -m cramfast.doctor` and the first lines of a run show."""

from dataclasses import dataclass

import torch

from cramfast.kernels import extension

OPERATORS = ("layernorm", "glu", "layernorm_glu", "attention", "cross_entropy", "adamw")
IMPLEMENTATIONS = ("cpp", "reference")
_overrides: dict[str, str] = {}


@dataclass(frozen=True)
class Choice:
    """One line of the table: the implementation of `op` and the reason for it."""

    op: str
    device: str
    dtype: str
    implementation: str
    reason: str


def override(op: str, implementation: str) -> None:
    """Force an implementation of one operator, or of "all"; "auto" takes the override back.

    Raises:
        ValueError: an unknown operator or implementation, or "cpp" where the module is missing.
    """
    if op not in (*OPERATORS, "all"):
        raise ValueError(f"kernels: unknown operator {op!r}; one of {', '.join(OPERATORS)}, all")
    if implementation not in (*IMPLEMENTATIONS, "auto"):
        raise ValueError(
            f"kernels: unknown implementation {implementation!r}; one of {', '.join(IMPLEMENTATIONS)}, auto"
        )
    if implementation == "cpp" and extension.module is None:
        raise ValueError(f"kernels: {op}=cpp is not possible: {extension.missing_reason}")
    for name in OPERATORS if op == "all" else (op,):
        if implementation == "auto":
            _overrides.pop(name, None)
        else:
            _overrides[name] = implementation


def choose(op: str, device_type: str, dtype: torch.dtype) -> Choice:
    """The implementation that `op` takes for tensors of this device and dtype."""

    def choice(implementation: str, reason: str) -> Choice:
        return Choice(op, device_type, str(dtype).removeprefix("torch."), implementation, reason)

    if op in _overrides:
        return choice(_overrides[op], "asked for")
    if dtype not in (torch.float32, torch.bfloat16):
        return choice("reference", f"no kernel for {dtype}")
    if extension.module is None:
        return choice("reference", extension.missing_reason)
    if device_type == "cpu":
        return choice("cpp", f"C++ for the CPU, {extension.cpu_isa}")
    if device_type == "cuda" and extension.module.cuda:
        return choice("cpp", "CUDA")
    return choice("reference", f"no kernel was built for {device_type}")


def uses_reference(op: str, tensor: torch.Tensor) -> bool:
    """Whether `op` runs as plain PyTorch on this tensor."""
    return choose(op, tensor.device.type, tensor.dtype).implementation == "reference"


def table(device_type: str) -> list[Choice]:
    """The choice for every operator and storage dtype on a device."""
    return [choose(op, device_type, dtype) for op in OPERATORS for dtype in (torch.float32, torch.bfloat16)]
