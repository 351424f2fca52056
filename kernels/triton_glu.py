"""Gated activation in Triton: the formulas of csrc/glu.h. Bound by memory; computed in float32, rounded once."""

import triton
import triton.language as tl

BLOCK = 1024  # columns of one row a program takes; 8 values a thread with 4 warps

GELU = tl.constexpr(0)  # extension.ACTIVATION_CODES
INVERSE_SQRT_2 = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_2_PI = tl.constexpr(0.3989422804014327)


@triton.jit
def activated(a, ACTIVATION: tl.constexpr):
    """act(a) of a float32 tensor: exact GELU, or SiLU."""
    if ACTIVATION == GELU:
        return a * (0.5 * (1.0 + tl.erf(a * INVERSE_SQRT_2)))
    return a * tl.sigmoid(a)


@triton.jit
def _derivative(a, ACTIVATION: tl.constexpr):
    if ACTIVATION == GELU:
        return 0.5 * (1.0 + tl.erf(a * INVERSE_SQRT_2)) + a * INVERSE_SQRT_2_PI * tl.exp(-0.5 * a * a)
    sigmoid = tl.sigmoid(a)
    return sigmoid * (1.0 + a * (1.0 - sigmoid))


@triton.jit
def _glu_fwd_kernel(x, h, features, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < features
    x += row * 2 * features + column
    a = tl.load(x, inside, other=0.0).to(tl.float32)
    b = tl.load(x + features, inside, other=0.0).to(tl.float32)
    tl.store(h + row * features + column, (activated(a, ACTIVATION) * b).to(h.dtype.element_ty), inside)


@triton.jit
def _glu_bwd_kernel(dh, x, dx, features, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < features
    x += row * 2 * features + column
    dx += row * 2 * features + column
    a = tl.load(x, inside, other=0.0).to(tl.float32)
    b = tl.load(x + features, inside, other=0.0).to(tl.float32)
    up = tl.load(dh + row * features + column, inside, other=0.0).to(tl.float32)
    tl.store(dx, (up * b * _derivative(a, ACTIVATION)).to(dx.dtype.element_ty), inside)
    tl.store(dx + features, (up * activated(a, ACTIVATION)).to(dx.dtype.element_ty), inside)


def _grid_and_block(rows: int, features: int) -> tuple[tuple[int, int], int]:
    block = min(BLOCK, triton.next_power_of_2(features))
    return (rows, triton.cdiv(features, block)), block


def glu_fwd(x, h, rows, features, activation, _dtype_code):
    """h from x; arguments, shapes and formula: csrc/glu.h."""
    if rows and features:
        grid, block = _grid_and_block(rows, features)
        _glu_fwd_kernel[grid](x, h, features, ACTIVATION=activation, BLOCK=block)


def glu_bwd(dh, x, dx, rows, features, activation, _dtype_code):
    """dx from dh and x; arguments, shapes and formula: csrc/glu.h."""
    if rows and features:
        grid, block = _grid_and_block(rows, features)
        _glu_bwd_kernel[grid](dh, x, dx, features, ACTIVATION=activation, BLOCK=block)
