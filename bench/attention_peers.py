"""Other variable-length attention kernels, forward plus backward. They get separate contiguous q, k and v, which is
what each likes best; where a case has rotary positions, they get qkv as ours does, and a compiled rotation of it."""

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from cramfast.runtime.stopwatch import Work

NO_MASK = 0  # custom_mask_type of aten's memory-efficient attention


def flash_attention(q, k, v, cu_seqlens, longest):
    """torch's FlashAttention-2 over packed sequences."""
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest)


class EfficientAttention(torch.autograd.Function):
    """torch's memory-efficient attention over packed sequences: the one stock kernel that runs on Turing."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, longest):
        out, lse, seed, offset, *_ = torch.ops.aten._efficient_attention_forward(
            q[None], k[None], v[None], None, cu_seqlens, cu_seqlens, longest, longest, 0.0, NO_MASK, True
        )
        ctx.longest = longest
        ctx.save_for_backward(q, k, v, out, lse, seed, offset, cu_seqlens)
        return out[0]

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse, seed, offset, cu_seqlens = ctx.saved_tensors
        dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
            dout[None], q[None], k[None], v[None], None, out, cu_seqlens, cu_seqlens,
            ctx.longest, ctx.longest, lse, 0.0, seed, offset, NO_MASK, False,
        )  # fmt: skip
        return dq[0], dk[0], dv[0], None, None


def rotate_packed(qkv_N3HK, cos_N2, sin_N2):
    """q, k and v, with half-split rotary positions on the first two."""
    half = qkv_N3HK.shape[3] // 2
    q, k, v = qkv_N3HK.unbind(1)
    cos, sin = cos_N2[:, None].to(q.dtype), sin_N2[:, None].to(q.dtype)

    def turn(x):
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    return turn(q), turn(k), v


def packed(inputs, attend) -> Work:
    """`attend` (q, k, v, cu_seqlens, longest) over the packed sequences of a Case, forward and backward."""
    qkv, cu_seqlens, longest = inputs["qkv"], inputs["cu_seqlens"], inputs["max_seqlen"]
    cotangent = torch.randn_like(qkv[:, 0])
    if inputs["rotary"] is None:
        leaves = [x.contiguous().requires_grad_() for x in qkv.unbind(1)]
        return lambda: torch.autograd.grad(attend(*leaves, cu_seqlens, longest), leaves, cotangent)
    starts_N = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=len(qkv))
    place_N = torch.arange(len(qkv), device=qkv.device) - starts_N
    cos_N2, sin_N2 = (table[place_N] for table in inputs["rotary"])
    rotate = torch.compile(rotate_packed, dynamic=False) if qkv.device.type == "cuda" else rotate_packed
    leaf = qkv.detach().clone().requires_grad_()
    return lambda: torch.autograd.grad(attend(*rotate(leaf, cos_N2, sin_N2), cu_seqlens, longest), leaf, cotangent)


def padded(inputs) -> Work:
    """torch's scaled_dot_product_attention, padded to the longest sequence, with a key mask where lengths differ."""
    lengths = inputs["cu_seqlens"].diff()
    _, _, H, K = inputs["qkv"].shape
    B, L = len(lengths), inputs["max_seqlen"]
    like = {"dtype": inputs["qkv"].dtype, "device": inputs["qkv"].device}
    qkv = torch.randn(B, L, 3, H, K, **like).requires_grad_()
    full = bool((lengths == L).all())
    mask = None if full else (torch.arange(L, device=lengths.device) < lengths[:, None])[:, None, None, :]
    cotangent = torch.randn(B, H, L, K, **like)

    def work():
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if inputs["rotary"] is not None:
            cos, sin = (torch.cat([t, t], dim=-1)[:L].to(q.dtype) for t in inputs["rotary"])
            q, k = (t * cos + torch.cat([-t[..., K // 2 :], t[..., : K // 2]], dim=-1) * sin for t in (q, k))
        return torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), qkv, cotangent)

    return work


def attention_peers(inputs) -> dict[str, Work]:
    """Name -> work: padded on any device, packed where there are kernels for it."""
    found = {"padded SDPA": padded(inputs)}
    qkv = inputs["qkv"]
    if qkv.device.type != "cuda":
        return found
    if torch.cuda.get_device_capability() >= (8, 0) and qkv.dtype != torch.float32:
        found["FlashAttention-2 varlen"] = packed(inputs, flash_attention)
    return found | {"efficient attention varlen": packed(inputs, EfficientAttention.apply)}
