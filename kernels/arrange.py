"""Queries and keys rotated by their positions, rows of no sequence zeroed: what attention of other makes needs first.

Eight operators of torch, or, where `fused`, one Triton kernel of ours: attention's implementations whose names end in
_triton, which are tried on the card like any other before they run unasked.
"""

import torch


class _Arrange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv_N3HK, tables, own_N, before, after, fused):
        ctx.tables, ctx.before, ctx.fused = tables, before, fused
        ctx.save_for_backward(own_N)
        out = qkv_N3HK.new_empty(before + len(qkv_N3HK) + after, *qkv_N3HK.shape[1:])
        return _write(out, qkv_N3HK.contiguous(), tables, own_N, before, 1, fused)

    @staticmethod
    def backward(ctx, dout):
        (own_N,) = ctx.saved_tensors
        dqkv_N3HK = dout.new_empty(len(own_N), *dout.shape[1:])
        _write(dqkv_N3HK, dout.contiguous(), ctx.tables, own_N, -ctx.before, -1, ctx.fused)
        return dqkv_N3HK, None, None, None, None, None


def arrange(qkv_N3HK, places, rotary=None, before=0, after=0, fused=False):
    """(before + N + after, 3, H, K): rotated queries and keys, values; zeros in rows of no sequence and around them.

    Args:
        qkv_N3HK: as varlen_attention takes it; whatever stands in rows of no sequence.
        places: Places of the batch.
        rotary: (cos, sin) by position, or None.
        before, after: rows of zeros to add.
        fused: by the Triton kernel.

    The gradient of rows of no sequence is zero, whatever comes back for them.
    """
    tables = None
    if rotary is not None:
        tables = places.rotary(rotary, torch.float32 if fused else qkv_N3HK.dtype)
    return _Arrange.apply(qkv_N3HK, tables, places.own_N, before, after, fused)


def _write(out, x, tables, own_N, shift, direction, fused):
    """out[n + shift] = x[n], rotated forwards (1) or backwards (-1), for the rows n that both have; else zero.

    The tables and own_N go by the shorter one's rows: forwards x has them, backwards out.
    """
    if fused and out.numel():
        from cramfast.kernels import triton_kernels

        triton_kernels.call("arrange", x, out, x, tables, own_N, shift, direction)
        return out
    N = len(own_N)
    if direction == 1:
        target, source = out[shift : shift + N], x
        out[:shift].zero_()
        out[shift + N :].zero_()
    else:
        target, source = out, x[-shift : N - shift]
    if tables is None:
        target.copy_(source)
    else:
        cos, sin = (table[:, None, None] for table in tables)
        (a, b), (ra, rb) = (t[:, :2].chunk(2, dim=-1) for t in (source, target))
        torch.mul(a, cos, out=ra).addcmul_(b, sin, value=-direction)
        torch.mul(b, cos, out=rb).addcmul_(a, sin, value=direction)
        target[:, 2].copy_(source[:, 2])
    target.masked_fill_(~own_N[:, None, None, None], 0)
    return out
