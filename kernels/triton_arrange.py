"""The rotation of queries and keys before attention, in Triton: arrange.py. Bound by memory; computed in float32."""

import torch
import triton
import triton.language as tl


@triton.jit
def _arrange_kernel(
    out, x, cos, sin, own, shift, offset, tokens, heads, direction,
    HALF: tl.constexpr, HEADS: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # of out
    token = row - offset
    inside = (token >= 0) & (token < tokens)
    inside = inside & (tl.load(own + tl.minimum(tl.maximum(token, 0), tokens - 1)) != 0)
    head, k = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    reach = tl.where(inside, HALF, 0)  # a row of no sequence reads nothing
    written = (head < heads) & (k < HALF)
    read = (head < heads) & (k < reach)
    if ROTARY:
        c = tl.load(cos + token * HALF + k, k < reach, other=0.0).to(tl.float32)
        s = tl.load(sin + token * HALF + k, k < reach, other=0.0).to(tl.float32) * direction
    for part in tl.static_range(3):
        place = (part * heads + head) * 2 * HALF + k
        source, target = x + (row - shift) * 3 * heads * 2 * HALF + place, out + row * 3 * heads * 2 * HALF + place
        a = tl.load(source, read, other=0.0).to(tl.float32)
        b = tl.load(source + HALF, read, other=0.0).to(tl.float32)
        turned_a, turned_b = a, b
        if ROTARY and part < 2:
            turned_a = a * c - b * s
            turned_b = b * c + a * s
        tl.store(target, turned_a.to(out.dtype.element_ty), written)
        tl.store(target + HALF, turned_b.to(out.dtype.element_ty), written)


def arrange(out, x, tables, own_N, shift, direction):
    """out[n + shift] = x[n], rotated: arrange._write; head widths K that are twice a power of two."""
    rows, _, heads, K = out.shape
    own_N = own_N.view(torch.uint8)
    cos, sin = (own_N, own_N) if tables is None else tables
    _arrange_kernel[(rows,)](
        out, x, cos, sin, own_N, shift, max(shift, 0), len(own_N), heads, direction,
        HALF=K // 2, HEADS=triton.next_power_of_2(heads), ROTARY=tables is not None,
    )  # fmt: skip
