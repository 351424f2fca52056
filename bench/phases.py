"""Where a step's time on a GPU goes, from the kernels that torch.profiler saw."""

import re
from collections.abc import Iterable

import torch

Kernel = tuple[str, float, float]  # name, start and end in µs

# First match wins. In compiled peers one kernel can hold several operators; it counts for the first phase here.
PHASES = (
    ("optimizer", r"adam|multi_tensor|foreach|lpnorm|amp_update|amp_foreach"),
    ("attention", r"attention|flash|fmha"),
    ("loss", r"cross_entropy|nll_loss|softmax"),
    ("matmul", r"layernorm_glu|gemm|gemv|cutlass|nvjet|xmma|cublas|split_?k|triton_tem|triton_mm"),
    ("norm", r"layer_?norm|gammabeta"),
    ("gate", r"glu|gelu|silu"),
    ("copies", r"memcpy|memset|copy|cat"),
)


def phase(name: str) -> str:
    """The phase that a kernel of this name belongs to, or "other"."""
    return next((title for title, words in PHASES if re.search(words, name, flags=re.IGNORECASE)), "other")


def busy_us(kernels: Iterable[Kernel]) -> float:
    """Time in which at least one kernel ran; those of several streams may overlap."""
    total, reached = 0.0, float("-inf")
    for _, start, end in sorted(kernels, key=lambda kernel: kernel[1]):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def breakdown(kernels: list[Kernel], steps: int) -> dict[str, object]:
    """Milliseconds a step by phase, and the percentage of the time from first to last kernel in which none ran."""
    by_phase: dict[str, float] = {}
    for name, start, end in kernels:
        by_phase[phase(name)] = by_phase.get(phase(name), 0.0) + (end - start) / 1e3 / steps
    wall = max(end for _, _, end in kernels) - min(start for _, start, _ in kernels)
    gaps = wall - busy_us(kernels)
    by_phase = dict(sorted(by_phase.items(), key=lambda item: -item[1]))
    return {"phases_ms": by_phase | {"gaps": gaps / 1e3 / steps}, "launch_gaps": 100 * gaps / wall}


def profiled(step, steps: int) -> dict[str, object]:
    """breakdown() of some steps, and the kernels that took longest, in ms a step."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    kernels = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in record.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    longest: dict[str, float] = {}
    for name, start, end in kernels:
        longest[name[:120]] = longest.get(name[:120], 0.0) + (end - start) / 1e3 / steps
    top = sorted(longest.items(), key=lambda item: -item[1])[:12]
    return breakdown(kernels, steps) | {"kernels_ms": dict(top)}
