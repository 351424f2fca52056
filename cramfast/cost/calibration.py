"""What the machine at hand does: its peaks, and how near to them each operator comes at the shapes of a model."""

import math
import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import cramfast.kernels
from cramfast.cost.cards import Card
from cramfast.cost.roofline import CASE_OF, ORTHOGONALISE, Part, bound, cost
from cramfast.kernels.cases import on_device, training_pass
from cramfast.kernels.cross_entropy import chunk_rows
from cramfast.optim.muon import orthogonalised, product_dtype
from cramfast.runtime.stopwatch import Stopwatch, Work, interleaved
from cramfast.session.metrics import measure_copy_bandwidth, measure_matmul_peak
from cramfast.session.runfolder import cpu_name

PART_S = 0.2  # least time of one pass at a reduced shape, at the machine's peak
ROUNDS = 5
MOST_PARAMETERS = 1 << 24  # updated in a pass; far beyond any cache, a fraction of a gigabyte
LEAST_ROWS = 512  # fewer would not fill the blocks of a matmul


@dataclass(frozen=True)
class Efficiency:
    """Least time over real time of an operator, 1 at the roofline; `source` says who measured it, "" nobody."""

    value: float = 1.0
    source: str = ""


def machine_at_hand(device: str, dtype: torch.dtype) -> Card:
    """The machine as a card: its rates measured now, in a second or two."""
    there = torch.device(device)
    matmul, bandwidth = measure_matmul_peak(dtype, there).flops, measure_copy_bandwidth(device)
    source = "measured now: copy of a large buffer, large square matmul"
    if device == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Card(cpu_name(), bandwidth, matmul, matmul, memory, None, source)
    properties = torch.cuda.get_device_properties(there)
    capability = (properties.major, properties.minor)
    plain = measure_matmul_peak(torch.float32, there).flops
    return Card(properties.name, bandwidth, matmul, plain, properties.total_memory, capability, source)


def fewer_rows(part: Part, share: float, dtype: torch.dtype, device: str) -> Part:
    """The part at about this share of its rows, the whole of it from 1 on.

    Sequences are kept whole, and so are Muon's matrices and, where there are several, the loss's chunks of logits.
    """
    if share >= 1 or part.op in ORTHOGONALISE.values():
        return part
    key = {"adamw": "P", "cross_entropy": "M", "attention": "lengths"}.get(part.op, "N")
    whole = part.shape[key]
    if key == "lengths":
        shape = {key: whole[: max(1, math.ceil(share * len(whole)))]}
    else:
        step = LEAST_ROWS
        if part.op == "cross_entropy":
            step = chunk_rows(device, part.shape["V"], dtype)
        shape = {key: min(whole, step * max(1, round(share * whole / step)))}
    return replace(part, shape={**part.shape, **shape})


def work(part: Part, device: str, dtype: torch.dtype) -> Work:
    """The part forward and backward, on random inputs."""
    if part.op in ORTHOGONALISE.values():
        x_BRC = torch.randn(*(part.shape[key] for key in "BRC"), device=device).to(product_dtype(dtype))
        return lambda: orthogonalised(x_BRC)
    if part.op != "linear":
        case = CASE_OF[part.op]
        return training_pass(case, cramfast.kernels, on_device(case.make(**part.shape, dtype=dtype, seed=0), device))
    N, D, E = (part.shape[key] for key in "NDE")
    x_ND, weight_ED, dy_NE = (torch.randn(*s, device=device).to(dtype) for s in ((N, D), (E, D), (N, E)))
    x_ND.requires_grad_(), weight_ED.requires_grad_()
    return lambda: torch.autograd.grad(F.linear(x_ND, weight_ED), (x_ND, weight_ED), dy_NE)


def measure(card: Card, parts: Iterable[Part], dtype: torch.dtype, rounds: int | None = None) -> dict[str, Efficiency]:
    """Efficiency by name of every part but copies, which go at the bandwidth that is measured already.

    The parts run in turn, as in a step, so that each finds the caches as the others left them; medians over rounds.
    """
    device = "cpu" if card.capability is None else "cuda"
    least, works = {}, {}
    for part in parts:
        if part.op == "copy":
            continue
        seconds = bound(card, part.op, *cost(part.op, part.shape, dtype, device == "cuda")).seconds
        most = MOST_PARAMETERS / part.shape["P"] if part.op == "adamw" else math.inf
        reduced = fewer_rows(part, min(PART_S / seconds, most), dtype, device)
        least[part.name] = bound(card, part.op, *cost(reduced.op, reduced.shape, dtype, device == "cuda")).seconds
        works[part.name] = work(reduced, device, dtype)
    times, _ = interleaved(Stopwatch(device), works, rounds or ROUNDS)
    return {name: Efficiency(least[name] / statistics.median(times[name]), "measured now") for name in works}
