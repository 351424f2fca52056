"""Operators of other libraries that may stand in for ours where they are installed; nothing here is needed.

Each takes the arguments of the public function and keeps its meaning: rotary positions, which these libraries lack, are
applied before (arrange.py), and rows that belong to no sequence come out as zeros with zero gradients. None of them has
run with this code on a GPU yet. torch's own two are the floor of attention where they can run (dispatch.FLOOR); where
`fused`, our Triton kernel rotates before them, and they are no longer the floor.
"""

import importlib.util
import inspect

import torch

from cramfast.kernels import arrange
from cramfast.kernels.places import Places

NO_MASK = 0  # custom_mask_type of aten::_efficient_attention_forward


def installed(module: str) -> bool:
    """Whether a top-level module can be found; it is not imported."""
    return importlib.util.find_spec(module) is not None


def _attention(attend, qkv, cu_seqlens, max_seqlen, rotary, places, fused=False):
    """attend(q, k, v, cu_seqlens, max_seqlen) on the rows of the sequences, zeros elsewhere.

    Rows of no sequence are replaced on the way in and out: these libraries leave them unwritten in output and gradient
    (NaN: pytorch issue 176793), and torch.where lets no gradient through where it replaces. Cutting them off would
    wait for the device to say where the last sequence ends.
    """
    places = places or Places(cu_seqlens, len(qkv), max_seqlen)
    max_seqlen = min(max_seqlen, len(qkv))  # the efficient operator's backward pass refuses more
    q, k, v = arrange.arrange(qkv, places, rotary if max_seqlen else None, fused=fused).unbind(1)
    if max_seqlen == 0:  # all rows are zeros now, and no kernel can be launched for no block
        return v
    return torch.where(places.own_N[:, None, None], attend(q, k, v, cu_seqlens, max_seqlen), 0)


def flash_attn(qkv, cu_seqlens, max_seqlen, rotary=None, window=None, places=None):
    """FlashAttention-2 of the package flash-attn, with its deterministic backward pass."""
    from flash_attn import flash_attn_varlen_qkvpacked_func

    both = (-1, -1) if window is None else (window, window)

    def attend(q, k, v, cu_seqlens, max_seqlen):
        packed = torch.stack([q, k, v], dim=1)
        return flash_attn_varlen_qkvpacked_func(packed, cu_seqlens, max_seqlen, window_size=both, deterministic=True)

    return _attention(attend, qkv, cu_seqlens, max_seqlen, rotary, places)


def torch_varlen(qkv, cu_seqlens, max_seqlen, rotary=None, window=None, places=None, fused=False):
    """FlashAttention-2 as torch.nn.attention.varlen has it; its backward pass adds in any order unless
    torch.use_deterministic_algorithms is set."""
    from torch.nn.attention.varlen import varlen_attn

    local = {} if window is None else {"window_size": (window, window)}

    def attend(q, k, v, cu_seqlens, max_seqlen):
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **local)

    return _attention(attend, qkv, cu_seqlens, max_seqlen, rotary, places, fused)


def torch_efficient(qkv, cu_seqlens, max_seqlen, rotary=None, window=None, places=None, fused=False):
    """The memory-efficient attention that torch has for Turing too; no window, and a backward pass that adds in any
    order unless torch.use_deterministic_algorithms is set."""
    if window is not None:
        raise ValueError("kernels: attention=torch_efficient has no two-sided window")

    def attend(q, k, v, cu_seqlens, max_seqlen):
        offsets, longest = (cu_seqlens, cu_seqlens), (max_seqlen, max_seqlen)
        forward = torch.ops.aten._efficient_attention_forward
        return forward(q[None], k[None], v[None], None, *offsets, *longest, 0.0, NO_MASK, q.requires_grad)[0][0]

    return _attention(attend, qkv, cu_seqlens, max_seqlen, rotary, places, fused)


def torch_has_flash_attention() -> bool:
    """Whether this torch's varlen_attn has kernels; a build for the CPU, where a card is only counted, stands for one
    that has them."""
    cuda = torch.backends.cuda
    return not cuda.is_built() or cuda.is_flash_attention_available()


def varlen_attn_has_window() -> bool:
    """Whether this torch's varlen_attn takes a two-sided window."""
    from torch.nn.attention.varlen import varlen_attn

    return "window_size" in inspect.signature(varlen_attn).parameters


def apex_layernorm(x, weight, bias=None, residual=None, eps=1e-5):
    """apex's LayerNorm for half-precision rows and float32 weights; the residual is added before."""
    from apex.normalization.fused_layer_norm import mixed_dtype_fused_layer_norm_affine

    stream = x if residual is None else x + residual
    bias = torch.zeros_like(weight) if bias is None else bias
    y = mixed_dtype_fused_layer_norm_affine(stream, weight, bias, weight.shape, eps)  # in the dtype of the weight
    return y.to(x.dtype), stream
