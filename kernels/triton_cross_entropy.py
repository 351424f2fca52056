"""Loss and gradient of rows of logits in place, in Triton: the formulas of csrc/cross_entropy.h. Bound by memory.

One program for each row. A row that fits the registers is read once and written once; a longer one is read in chunks,
three times, mostly from the L2 cache. A target outside the vocabulary, which the host could only see by waiting, makes
its row's loss and gradient NaN.
"""

import triton
import triton.language as tl

LONGEST_ROW = 16384  # logits held at a time: 32 a thread; 32 warps leave 64 registers a thread, which would spill


@triton.jit
def _whole_row_kernel(logits, target, loss, vocabulary, z_loss, gain, WRITE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(target + row)
    column = tl.arange(0, BLOCK)
    inside = column < vocabulary
    logits += row * vocabulary + column
    z = tl.load(logits, inside, other=float("-inf")).to(tl.float32)
    largest = tl.max(z, 0)
    at_target = tl.where(wanted < vocabulary, tl.sum(tl.where(column == wanted, z, 0.0), 0), float("nan"))
    # largest + log(sum) would round away digits that all probabilities of the row share: keep the two apart.
    log_sum = tl.log(tl.sum(tl.exp(z - largest), 0))
    lse = largest + log_sum
    tl.store(loss + row, tl.where(wanted < 0, 0.0, log_sum + (largest - at_target) + z_loss * lse * lse))
    if WRITE:
        # Exponentials of other arguments: the first ones, held beside the logits, would not fit the registers.
        probability = tl.exp((z - largest) - log_sum)
        slope = probability * (1.0 + 2.0 * z_loss * lse) - tl.where(column == wanted, 1.0, 0.0)
        slope = tl.where(wanted < vocabulary, slope * gain, float("nan"))
        slope = tl.where(wanted < 0, 0.0, slope)
        tl.store(logits, slope.to(logits.dtype.element_ty), inside)


@triton.jit
def _chunked_row_kernel(logits, target, loss, vocabulary, z_loss, gain, WRITE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(target + row)
    logits += row * vocabulary
    lane = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    at_target = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, vocabulary, BLOCK):
        column = begin + lane
        z = tl.load(logits + column, column < vocabulary, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, z)
        at_target += tl.where(column == wanted, z, 0.0)
    largest = tl.max(largest, 0)
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, vocabulary, BLOCK):
        column = begin + lane
        z = tl.load(logits + column, column < vocabulary, other=float("-inf")).to(tl.float32)
        total += tl.exp(z - largest)
    total = tl.sum(total, 0)
    lse = largest + tl.log(total)
    row_loss = tl.log(total) + (largest - tl.sum(at_target, 0)) + z_loss * lse * lse
    row_loss = tl.where(wanted < vocabulary, row_loss, float("nan"))
    tl.store(loss + row, tl.where(wanted < 0, 0.0, row_loss))
    if WRITE:
        share = (1.0 + 2.0 * z_loss * lse) / total
        for begin in range(0, vocabulary, BLOCK):
            column = begin + lane
            inside = column < vocabulary
            z = tl.load(logits + column, inside, other=float("-inf")).to(tl.float32)
            slope = (tl.exp(z - largest) * share - tl.where(column == wanted, 1.0, 0.0)) * gain
            slope = tl.where(wanted < vocabulary, slope, float("nan"))
            slope = tl.where(wanted < 0, 0.0, slope)
            tl.store(logits + column, slope.to(logits.dtype.element_ty), inside)


def cross_entropy(logits, target, loss, rows, vocabulary, z_loss, gain, write_gradient, _dtype_code):
    """Loss of every row, gradient in place of the logits; arguments, shapes and formula: csrc/cross_entropy.h."""
    if not rows:
        return
    if vocabulary <= LONGEST_ROW:
        block = triton.next_power_of_2(vocabulary)
        kernel, warps = _whole_row_kernel, max(4, min(32, block // 1024))
    else:
        block, kernel, warps = 8192, _chunked_row_kernel, 8
    options = {"WRITE": write_gradient, "BLOCK": block, "num_warps": warps}
    kernel[(rows,)](logits, target, loss, vocabulary, z_loss, gain, **options)
