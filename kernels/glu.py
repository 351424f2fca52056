"""Gated activation: csrc/glu.h, triton_glu.py."""

import torch

from cramfast.kernels import dispatch
from cramfast.kernels.extension import ACTIVATION_CODES, DTYPE_CODES, check, check_activations
from cramfast.kernels.registry import register


def _rows_and_features(x_N2F, activation, implementation):
    check_activations("x", x_N2F, implementation)
    if x_N2F.dim() != 2 or x_N2F.shape[1] % 2:
        raise ValueError(f"x: expected (N, 2 F), got {tuple(x_N2F.shape)}")
    if activation not in ACTIVATION_CODES:
        raise ValueError(f"activation: {activation!r} is not one of {', '.join(ACTIVATION_CODES)}")
    return x_N2F.shape[0], x_N2F.shape[1] // 2


def _forward(x_N2F, activation, implementation="cpp"):
    N, F = _rows_and_features(x_N2F, activation, implementation)
    h_NF = _forward_fake(x_N2F, activation)
    launch = dispatch.launcher(implementation)
    launch("glu_fwd", x_N2F, x_N2F, h_NF, N, F, ACTIVATION_CODES[activation], DTYPE_CODES[x_N2F.dtype])
    return h_NF


def _forward_fake(x_N2F, activation, implementation="cpp"):
    return x_N2F.new_empty(x_N2F.shape[0], x_N2F.shape[1] // 2)


def _backward(dh_NF, x_N2F, activation, implementation="cpp"):
    N, F = _rows_and_features(x_N2F, activation, implementation)
    check("dh", dh_NF, (N, F), x_N2F.dtype, x_N2F)
    dx_N2F = torch.empty_like(x_N2F)
    launch = dispatch.launcher(implementation)
    launch(
        "glu_bwd",
        x_N2F,
        dh_NF,
        x_N2F,
        dx_N2F,
        N,
        F,
        ACTIVATION_CODES[activation],
        DTYPE_CODES[x_N2F.dtype],
    )
    return dx_N2F


def _backward_fake(dh_NF, x_N2F, activation, implementation="cpp"):
    return torch.empty_like(x_N2F)


glu_fwd = register('glu_fwd(Tensor x, str activation, str implementation="cpp") -> Tensor', _forward, _forward_fake)
glu_bwd = register(
    'glu_bwd(Tensor dh, Tensor x, str activation, str implementation="cpp") -> Tensor', _backward, _backward_fake
)


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_N2F, activation, implementation):
        ctx.activation, ctx.implementation = activation, implementation
        ctx.save_for_backward(x_N2F)
        return glu_fwd(x_N2F, activation, implementation)

    @staticmethod
    def backward(ctx, dh_NF):
        (x_N2F,) = ctx.saved_tensors
        return glu_bwd(dh_NF.contiguous(), x_N2F, ctx.activation, ctx.implementation), None, None


def glu(x, activation="gelu"):
    """Gate the packed output of one matmul: act(first half) * second half.

    Args:
        x: (N, 2 F), float32 or bfloat16.
        activation: "gelu" (exact erf form: GeGLU) or "silu" (SwiGLU).

    Returns:
        (N, F), the dtype of `x`.

    Raises:
        ValueError: an odd width, an unknown activation, a tensor that is not contiguous or not on 16 bytes.

    The activation is computed again in backward. Source: Shazeer, arXiv:2002.05202.
    """
    implementation, function = dispatch.pick("glu", x)
    if function:
        return function(x, activation)
    return _Glu.apply(x, activation, implementation)
