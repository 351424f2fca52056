"""LayerNorm -> matmul -> gate in one Triton kernel: the first half of a feed-forward block.

    s = round(x + r),  y = round(LayerNorm(s)),  a = y Wa^T,  b = y Wb^T,  h = act(a) b

A program makes a tile of a and the tile of b beside it. It first reads its rows once for their statistics (chunks of
the row merged as Chan, Golub and LeVeque do, so that a large mean costs no digits) and then normalises them on the
way into the matmul: y never exists in memory. The pre-activations are written for backward; the programs of the first
column of tiles also write s, mean and rstd. Bound by the matmul.
"""

import torch
import triton
import triton.language as tl

from cramfast.kernels.triton_glu import activated

BLOCK_N, BLOCK_F = 128, 64  # two accumulators of 128 x 64 float32: 64 registers a thread with 8 warps
BYTES_D, STAGES = 64, 3  # of a row at a time, and how many such tiles wait in shared memory: 99 KB are an A6000's limit
GROUP = 8  # tiles of rows whose columns are made together, so that their rows and weights meet in the L2 cache


@triton.jit
def _stream_tile(x, residual, row, column, rows, width):
    """A tile of s in its stored dtype, zero outside."""
    inside = (row < rows)[:, None] & (column < width)[None, :]
    offset = row[:, None] * width + column[None, :]
    s = tl.load(x + offset, inside, other=0.0)
    if residual is not None:
        s = (s.to(tl.float32) + tl.load(residual + offset, inside, other=0.0).to(tl.float32)).to(s.dtype)
    return s


@triton.jit
def _statistics(x, residual, stream, row, rows, written, width, eps, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """(mean, rstd) of each row; writes s of the rows below `written`."""
    mean = tl.zeros((BLOCK_N,), tl.float32)
    square = tl.zeros((BLOCK_N,), tl.float32)  # sum of squared distances from the mean so far
    for begin in range(0, width, BLOCK_D):
        column = begin + tl.arange(0, BLOCK_D)
        inside = (column < width)[None, :]
        s = _stream_tile(x, residual, row, column, rows, width)
        if residual is not None:
            tl.store(stream + row[:, None] * width + column[None, :], s, (row < written)[:, None] & inside)
        s = s.to(tl.float32)
        count = tl.minimum(BLOCK_D, width - begin).to(tl.float32)
        mean_of_chunk = tl.sum(s, 1) / count
        distance = tl.where(inside, s - mean_of_chunk[:, None], 0.0)
        delta = mean_of_chunk - mean
        share = count / (begin + count)
        square += tl.sum(distance * distance, 1) + delta * delta * begin * share
        mean += delta * share
    return mean, 1.0 / tl.sqrt(square / width + eps)


@triton.jit
def _layernorm_glu_kernel(
    x, residual, norm_weight, norm_bias, weight, h, stream, mean, rstd, gates, rows, width, features, eps,
    ACTIVATION: tl.constexpr, DOT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_N), tl.cdiv(features, BLOCK_F)
    first_row_tile = tl.program_id(0) // (GROUP * column_tiles) * GROUP
    group = tl.minimum(GROUP, row_tiles - first_row_tile)
    place = tl.program_id(0) % (GROUP * column_tiles)
    column_tile = place // group
    row = ((first_row_tile + place % group) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    feature = (column_tile * BLOCK_F + tl.arange(0, BLOCK_F)).to(tl.int64)

    written = tl.where(column_tile == 0, rows, 0)
    mean_of_row, rstd_of_row = _statistics(x, residual, stream, row, rows, written, width, eps, BLOCK_N, BLOCK_D)
    tl.store(mean + row, mean_of_row, row < written)
    tl.store(rstd + row, rstd_of_row, row < written)

    a = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    b = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    for begin in range(0, width, BLOCK_D):
        column = begin + tl.arange(0, BLOCK_D)
        s = _stream_tile(x, residual, row, column, rows, width)
        y = (s.to(tl.float32) - mean_of_row[:, None]) * rstd_of_row[:, None]
        y *= tl.load(norm_weight + column, column < width, other=0.0)[None, :]
        if norm_bias is not None:
            y += tl.load(norm_bias + column, column < width, other=0.0)[None, :]
        y = y.to(s.dtype).to(DOT)
        # Weights are read transposed, (BLOCK_D, BLOCK_F), and are zero beyond the width.
        inside = (column < width)[:, None] & (feature < features)[None, :]
        source = weight + feature[None, :] * width + column[:, None]
        a = tl.dot(y, tl.load(source, inside, other=0.0).to(DOT), a, input_precision="ieee")
        source = weight + (features + feature)[None, :] * width + column[:, None]
        b = tl.dot(y, tl.load(source, inside, other=0.0).to(DOT), b, input_precision="ieee")

    a, b = a.to(gates.dtype.element_ty), b.to(gates.dtype.element_ty)  # the gate sees what backward will see
    inside = (row < rows)[:, None] & (feature < features)[None, :]
    source = gates + row[:, None] * 2 * features + feature[None, :]
    tl.store(source, a, inside)
    tl.store(source + features, b, inside)
    out = activated(a.to(tl.float32), ACTIVATION) * b.to(tl.float32)
    tl.store(h + row[:, None] * features + feature[None, :], out.to(h.dtype.element_ty), inside)


def layernorm_glu_fwd(
    x, residual, norm_weight, norm_bias, weight, h, stream, mean, rstd, gates, rows, width, features, activation, eps,
    _dtype_code,
):  # fmt: skip
    """Arguments as in kernels/layernorm_glu.py; h, stream, mean, rstd and gates are written."""
    if not rows:
        return
    # The interpreter keeps bfloat16 as 16-bit integers and would multiply those; in float32 the products are the same.
    interpreted = not isinstance(_layernorm_glu_kernel, triton.JITFunction)
    dot = tl.float32 if interpreted and x.dtype == torch.bfloat16 else getattr(tl, str(x.dtype).removeprefix("torch."))
    grid = (triton.cdiv(rows, BLOCK_N) * triton.cdiv(features, BLOCK_F),)
    _layernorm_glu_kernel[grid](
        x, residual, norm_weight, norm_bias, weight, h, stream, mean, rstd, gates, rows, width, features, eps,
        ACTIVATION=activation, DOT=dot,
        BLOCK_N=BLOCK_N, BLOCK_F=BLOCK_F, BLOCK_D=BYTES_D // x.element_size(), GROUP=GROUP,
        num_warps=8, num_stages=STAGES,
    )  # fmt: skip
