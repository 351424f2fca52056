"""Variable-length attention: csrc/attention.h."""

import numpy as np
import torch

from cramfast.kernels import dispatch, extension
from cramfast.kernels.extension import DTYPE_CODES, check, check_activations
from cramfast.kernels.registry import register

HEAD_WIDTHS = (32, 64, 128)


def _check_inputs(qkv, cu_seqlens, max_seqlen, cos, sin):
    check_activations("qkv", qkv)
    if qkv.dim() != 4 or qkv.shape[1] != 3 or qkv.shape[3] not in HEAD_WIDTHS:
        raise ValueError(f"qkv: expected (N, 3, H, K) with K one of {HEAD_WIDTHS}, got {tuple(qkv.shape)}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"cu_seqlens: expected (S + 1,), got {tuple(cu_seqlens.shape)}")
    check("cu_seqlens", cu_seqlens, (len(cu_seqlens),), torch.int32, qkv)
    if qkv.device.type == "cpu":  # free to look at here; on a GPU it would wait for the device
        offsets = cu_seqlens.numpy()  # a tensor's comparisons cost 20 us in every layer
        lengths = np.diff(offsets)
        if offsets[0] != 0 or lengths.min(initial=0) < 0 or offsets[-1] > len(qkv):
            raise ValueError(f"cu_seqlens: must start at 0, never decrease and end at {len(qkv)} at most")
        if lengths.max(initial=0) > max_seqlen:
            raise ValueError(f"cu_seqlens: a sequence of {lengths.max()} tokens exceeds max_seqlen {max_seqlen}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table is not None:
            if len(table) < max_seqlen:
                raise ValueError(f"rotary {name}: {len(table)} rows for max_seqlen {max_seqlen}")
            check(f"rotary {name}", table, (len(table), qkv.shape[3] // 2), torch.float32, qkv)


def _forward(qkv, cu_seqlens, max_seqlen, cos, sin, window):
    _check_inputs(qkv, cu_seqlens, max_seqlen, cos, sin)
    N, _, H, K = qkv.shape
    out, lse = _forward_fake(qkv, cu_seqlens, max_seqlen, cos, sin, window)
    extension.call(
        "attention_fwd",
        qkv,
        qkv,
        cu_seqlens,
        cos,
        sin,
        out,
        lse,
        N,
        len(cu_seqlens) - 1,
        H,
        K,
        max_seqlen,
        window,
        DTYPE_CODES[qkv.dtype],
    )
    return out, lse


def _forward_fake(qkv, cu_seqlens, max_seqlen, cos, sin, window):
    N, _, H, K = qkv.shape
    return qkv.new_empty(N, H, K), torch.empty(H, N, dtype=torch.float32, device=qkv.device)


def _backward(dout, qkv, out, lse, cu_seqlens, max_seqlen, cos, sin, window):
    N, _, H, K = qkv.shape
    _check_inputs(qkv, cu_seqlens, max_seqlen, cos, sin)
    check("dout", dout, (N, H, K), qkv.dtype, qkv)
    check("out", out, (N, H, K), qkv.dtype, qkv)
    check("lse", lse, (H, N), torch.float32, qkv)
    dqkv = torch.empty_like(qkv)
    extension.call(
        "attention_bwd",
        qkv,
        dout,
        qkv,
        out,
        lse,
        cu_seqlens,
        cos,
        sin,
        torch.empty_like(lse),
        dqkv,
        N,
        len(cu_seqlens) - 1,
        H,
        K,
        max_seqlen,
        window,
        DTYPE_CODES[qkv.dtype],
    )
    return dqkv


def _backward_fake(dout, qkv, out, lse, cu_seqlens, max_seqlen, cos, sin, window):
    return torch.empty_like(qkv)


attention_fwd = register(
    "attention_fwd(Tensor qkv, Tensor cu_seqlens, SymInt max_seqlen, Tensor? cos, Tensor? sin, int window)"
    " -> (Tensor out, Tensor lse)",
    _forward,
    _forward_fake,
)
attention_bwd = register(
    "attention_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor lse, Tensor cu_seqlens, SymInt max_seqlen,"
    " Tensor? cos, Tensor? sin, int window) -> Tensor",
    _backward,
    _backward_fake,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cu_seqlens, max_seqlen, cos, sin, window):
        out, lse = attention_fwd(qkv, cu_seqlens, max_seqlen, cos, sin, window)
        ctx.max_seqlen, ctx.window = max_seqlen, window
        ctx.save_for_backward(qkv, out, lse, cu_seqlens, cos, sin)
        return out

    @staticmethod
    def backward(ctx, dout):
        qkv, out, lse, cu_seqlens, cos, sin = ctx.saved_tensors
        dqkv = attention_bwd(dout.contiguous(), qkv, out, lse, cu_seqlens, ctx.max_seqlen, cos, sin, ctx.window)
        return dqkv, None, None, None, None, None


def varlen_attention(qkv, cu_seqlens, max_seqlen, rotary=None, window=None, places=None):
    """Attend within each packed sequence, in both directions.

    Args:
        qkv: (N, 3, H, K), float32 or bfloat16, on a GPU float16 too; N tokens of all sequences end to end; K is 32, 64
            or 128.
        cu_seqlens: (S + 1,), int32, offsets of the sequences; equal neighbours mean an empty one. Rows after the last
            offset belong to no sequence: their output and gradient are zero.
        max_seqlen: length in tokens that no sequence exceeds; on a GPU it chooses the kernel.
        rotary: (cos, sin), each (max_seqlen or more, K / 2) float32, or None.
        window: largest |i - j| attended, or None for all.
        places: Places(cu_seqlens, N, max_seqlen), where several calls share a batch: what stock PyTorch's forms derive
            from the offsets is then made once. Our kernels need none of it.

    Returns:
        (N, H, K), the dtype of `qkv`.

    Raises:
        ValueError: offsets that do not start at 0, decrease or pass N; tensors on two devices; a head width no kernel
            was built for; on a GPU what no CUDA kernel takes (bfloat16 before sm_80, half precision beyond 8,192
            tokens). Bad offsets there, which nobody can look at without waiting, end the launch: standard output says
            what is wrong with them, torch that the launch failed.

    Softmax and sums run in float32; the largest error is at most twice that of eager PyTorch in the same dtype
    (tests/kernels/test_ops.py). Source: Dao et al., arXiv:2205.14135.
    """
    if window is not None and window < 0:
        raise ValueError(f"window: {window} is negative; use None for no limit")
    _, function = dispatch.pick("attention", qkv, windowed=window is not None)
    if function:
        return function(qkv, cu_seqlens, max_seqlen, rotary, window, places)
    cos, sin = rotary if rotary is not None else (None, None)
    return _Attention.apply(qkv, cu_seqlens, max_seqlen, cos, sin, -1 if window is None else window)
