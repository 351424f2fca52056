"""(Residual add +) LayerNorm in Triton: the formulas of csrc/layernorm.h. Bound by memory.

A program holds whole rows in registers: one read, two-pass statistics in float32. dweight and dbias are summed in two
stages, blocks of rows in each program, then the programs in order: no atomics, the same bits every time.
"""

import torch
import triton
import triton.language as tl

TILE = 2048  # values a program holds at a time: 16 a thread with 4 warps; twice that spills in float32
SUM_ROWS, SUM_COLUMNS = 32, 64  # tile of the second stage


@triton.jit
def _layernorm_fwd_kernel(
    x, residual, weight, bias, y, stream, mean, rstd, rows, width, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    offset = row[:, None] * width + column[None, :]
    s = tl.load(x + offset, inside, other=0.0)
    if residual is not None:
        # Rounded as it is stored, before the statistics see it: backward reads the stored values.
        s = (s.to(tl.float32) + tl.load(residual + offset, inside, other=0.0).to(tl.float32)).to(s.dtype)
        tl.store(stream + offset, s, inside)
    s = s.to(tl.float32)
    mean_of_row = tl.sum(s, 1) / width
    centred = tl.where(inside, s - mean_of_row[:, None], 0.0)
    rstd_of_row = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / width + eps)
    tl.store(mean + row, mean_of_row, row < rows)
    tl.store(rstd + row, rstd_of_row, row < rows)
    out = centred * rstd_of_row[:, None] * tl.load(weight + column, column < width, other=0.0)[None, :]
    if bias is not None:
        out += tl.load(bias + column, column < width, other=0.0)[None, :]
    tl.store(y + offset, out.to(y.dtype.element_ty), inside)


@triton.jit
def _layernorm_bwd_kernel(
    dy, dstream, stream, mean, rstd, weight, dx, partial, rows, width, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    column = tl.arange(0, WIDTH)
    w = tl.load(weight + column, column < width, other=0.0)[None, :]
    dweight = tl.zeros((WIDTH,), tl.float32)
    dbias = tl.zeros((WIDTH,), tl.float32)
    for begin in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (begin + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        offset = row[:, None] * width + column[None, :]
        up = tl.load(dy + offset, inside, other=0.0).to(tl.float32)
        s = tl.load(stream + offset, inside, other=0.0).to(tl.float32)
        mean_of_row = tl.load(mean + row, row < rows, other=0.0)[:, None]
        rstd_of_row = tl.load(rstd + row, row < rows, other=0.0)[:, None]
        xhat = (s - mean_of_row) * rstd_of_row
        dweight += tl.sum(up * xhat, 0)  # `up` is zero outside
        dbias += tl.sum(up, 0)
        c1 = tl.sum(up * w * xhat, 1) / width
        c2 = tl.sum(up * w, 1) / width
        ds = rstd_of_row * (up * w - c2[:, None] - xhat * c1[:, None])
        if dstream is not None:
            ds += tl.load(dstream + offset, inside, other=0.0).to(tl.float32)
        tl.store(dx + offset, ds.to(dx.dtype.element_ty), inside)
    partial += tl.program_id(0) * 2 * width
    tl.store(partial + column, dweight, column < width)
    tl.store(partial + width + column, dbias, column < width)


@triton.jit
def _layernorm_sum_kernel(partial, partials, width, dweight, dbias, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, partials, ROWS):
        row = begin + tl.arange(0, ROWS)
        inside = (row < partials)[:, None] & (column < 2 * width)[None, :]
        total += tl.load(partial + row[:, None] * 2 * width + column[None, :], inside, other=0.0)
    total = tl.sum(total, 0)
    tl.store(dweight + column, total, column < width)
    tl.store(dbias + column - width, total, (column >= width) & (column < 2 * width))


def _tile(width: int) -> dict[str, int]:
    """Rows and padded width of a program's tile, and the warps that share it."""
    padded = triton.next_power_of_2(width)
    rows = max(1, TILE // padded)
    return {"ROWS": rows, "WIDTH": padded, "num_warps": max(4, min(16, padded // 512))}


def layernorm_partials(on: torch.Tensor, rows: int) -> int:
    """Rows of `partial`: the programs of the backward pass, two a multiprocessor at most."""
    multiprocessors = 2  # of the interpreter, enough for a second stage with something to add
    if on.is_cuda:
        multiprocessors = torch.cuda.get_device_properties(on.device).multi_processor_count
    return min(rows, 2 * multiprocessors)


def layernorm_fwd(x, residual, weight, bias, y, stream, mean, rstd, rows, width, eps, _dtype_code):
    """stream, y and the statistics of every row; arguments, shapes and formula: csrc/layernorm.h."""
    tile = _tile(width)
    if rows:
        grid = (triton.cdiv(rows, tile["ROWS"]),)
        _layernorm_fwd_kernel[grid](x, residual, weight, bias, y, stream, mean, rstd, rows, width, eps, **tile)


def layernorm_bwd(
    dy, dstream, stream, mean, rstd, weight, dx, partial, dweight, dbias, rows, width, _dtype_code
):  # fmt: skip
    """dx, dweight and dbias, the sums in two fixed stages; arguments, shapes and formula: csrc/layernorm.h."""
    partials = len(partial)
    if rows:
        _layernorm_bwd_kernel[(partials,)](
            dy, dstream, stream, mean, rstd, weight, dx, partial, rows, width, **_tile(width)
        )
    grid = (triton.cdiv(2 * width, SUM_COLUMNS),)
    _layernorm_sum_kernel[grid](partial, partials, width, dweight, dbias, ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS)
