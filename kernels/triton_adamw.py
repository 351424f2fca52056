"""Clip, loss-scale removal, AdamW and the half-precision copy in Triton: the formulas of csrc/adamw.h. Bound by memory.

Two launches and no wait for the device: the first leaves a partial sum of squares for each program, and the step
count; in the second each program adds up the partial sums in the same order and updates its share.
"""

import math

import torch
import triton
import triton.language as tl

BLOCK = 1024  # elements a program takes at a time; 8 a thread with 4 warps
PROGRAMS_EACH = 8  # programs for each multiprocessor


@triton.jit
def _adamw_norm_kernel(grad, scalars, partial, size, BLOCK: tl.constexpr):
    # Each lane adds a few dozen squares in float32; everything after that is float64.
    lanes = tl.zeros((BLOCK,), tl.float32)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    for begin in range(tl.program_id(0).to(tl.int64) * BLOCK, size, stride):
        i = begin + tl.arange(0, BLOCK)
        g = tl.load(grad + i, i < size, other=0.0)
        lanes += g * g
    tl.store(partial + tl.program_id(0), tl.sum(lanes.to(tl.float64), 0))
    if tl.program_id(0) == 0:
        # The update writes the step count, so its other programs cannot read it where it stands.
        tl.store(partial + tl.num_programs(0), tl.load(scalars + 1).to(tl.float64))


@triton.jit
def _segment_of(segment_end, segments, i):
    """The first segment that ends behind element i."""
    low = tl.zeros((), tl.int64)
    high = segments + low
    while low < high:
        middle = (low + high) // 2
        if tl.load(segment_end + middle) > i:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def _adamw_kernel(
    master, grad, exp_avg, exp_avg_sq, half, segment_end, segment_decay, segment_lr, scalars, partial, size, half_size,
    segments, one_minus_beta1, beta2, one_minus_beta2, log_beta1, log_beta2, eps, max_norm,
    PARTIALS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot = tl.arange(0, PARTIALS)
    total = tl.sum(tl.load(partial + slot, slot < tl.num_programs(0), other=0.0), 0)
    step = tl.load(partial + tl.num_programs(0)) + 1.0
    lr, inverse_scale = tl.load(scalars), tl.load(scalars + 2)
    norm = (tl.sqrt(total) * inverse_scale).to(tl.float32)
    finite = norm < float("inf")  # false for NaN
    if tl.program_id(0) == 0:
        tl.store(scalars + 3, norm)
        tl.store(scalars + 4, tl.where(finite, 0.0, 1.0))
        if finite:
            tl.store(scalars + 1, step.to(tl.float32))
    if finite:
        factor = inverse_scale
        if max_norm > 0:
            factor *= tl.minimum(1.0, max_norm / (norm + 1e-6))
        # In float64, once a program: 1 - beta^step loses its digits in float32 when beta^step is near 1.
        rate = (lr / (1.0 - tl.exp(step * log_beta1))).to(tl.float32)
        inverse_root = (1.0 / tl.sqrt(1.0 - tl.exp(step * log_beta2))).to(tl.float32)
        stride = tl.num_programs(0).to(tl.int64) * BLOCK
        for begin in range(tl.program_id(0).to(tl.int64) * BLOCK, size, stride):
            i = begin + tl.arange(0, BLOCK)
            inside = i < size
            # Nearly always one segment covers the block; each that touches it hands out its decay and its rate.
            segment = _segment_of(segment_end, segments, begin)
            end = tl.load(segment_end + segment)
            decay = tl.zeros((BLOCK,), tl.float32) + tl.load(segment_decay + segment)
            share = tl.zeros((BLOCK,), tl.float32) + tl.load(segment_lr + segment)
            while end < tl.minimum(begin + BLOCK, size):
                segment += 1
                decay = tl.where(i >= end, tl.load(segment_decay + segment), decay)
                share = tl.where(i >= end, tl.load(segment_lr + segment), share)
                end = tl.load(segment_end + segment)
            g = tl.load(grad + i, inside, other=0.0) * factor
            m = tl.load(exp_avg + i, inside, other=0.0)
            v = tl.load(exp_avg_sq + i, inside, other=0.0)
            p = tl.load(master + i, inside, other=0.0)
            m += one_minus_beta1 * (g - m)
            v = beta2 * v + one_minus_beta2 * g * g
            p = p * (1.0 - lr * share * decay) - rate * share * m / (tl.sqrt(v) * inverse_root + eps)
            tl.store(exp_avg + i, m, inside)
            tl.store(exp_avg_sq + i, v, inside)
            tl.store(master + i, p, inside)
            if half is not None:
                tl.store(half + i, p.to(half.dtype.element_ty), i < half_size)


def _programs(on: torch.Tensor, size: int) -> int:
    multiprocessors = 1  # of the interpreter: a few programs with a few blocks each
    if on.is_cuda:
        multiprocessors = torch.cuda.get_device_properties(on.device).multi_processor_count
    return max(1, min(triton.cdiv(size, BLOCK), PROGRAMS_EACH * multiprocessors))


def adamw_partials(on: torch.Tensor, size: int) -> int:
    """One sum of squares for each program, and the step count as the update finds it."""
    return _programs(on, size) + 1


def adamw(
    master, grad, exp_avg, exp_avg_sq, half, segment_end, segment_decay, segment_lr, scalars, partial, size, half_size,
    segments, beta1, beta2, eps, max_norm, _dtype_code,
):  # fmt: skip
    """One update in place; arguments, shapes and formula: csrc/adamw.h."""
    programs = len(partial) - 1
    _adamw_norm_kernel[(programs,)](grad, scalars, partial, size, BLOCK=BLOCK)
    logs = (math.log(beta) if beta else -math.inf for beta in (beta1, beta2))
    _adamw_kernel[(programs,)](
        master, grad, exp_avg, exp_avg_sq, half, segment_end, segment_decay, segment_lr, scalars, partial, size,
        half_size, segments, 1 - beta1, beta2, 1 - beta2, *logs, eps, max_norm,
        PARTIALS=triton.next_power_of_2(programs), BLOCK=BLOCK,
    )  # fmt: skip
