"""LayerNorm -> matmul -> gate as one autograd node that keeps no normalised rows."""

import torch

from cramfast.kernels import dispatch, reference
from cramfast.kernels.glu import glu_bwd, glu_fwd
from cramfast.kernels.layernorm import layernorm_bwd, layernorm_fwd
from cramfast.kernels.linear import input_gradient, product


class _LayerNormGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, norm_weight_D, norm_bias_D, weight_2FD, activation, residual_ND, eps):
        y_ND, stream_ND, mean_N, rstd_N = layernorm_fwd(x_ND, residual_ND, norm_weight_D, norm_bias_D, eps)
        gates_N2F = product(y_ND, weight_2FD)
        ctx.activation, ctx.eps = activation, eps
        ctx.has_residual = residual_ND is not None
        kept_ND = stream_ND if ctx.has_residual else x_ND
        ctx.save_for_backward(kept_ND, mean_N, rstd_N, norm_weight_D, norm_bias_D, weight_2FD, gates_N2F)
        ctx.set_materialize_grads(False)
        h_NF = glu_fwd(gates_N2F, activation)
        return (h_NF, stream_ND) if ctx.has_residual else h_NF

    @staticmethod
    def backward(ctx, dh_NF, dstream_ND=None):
        stream_ND, mean_N, rstd_N, norm_weight_D, norm_bias_D, weight_2FD, gates_N2F = ctx.saved_tensors
        dh_NF = gates_N2F.new_zeros(len(gates_N2F), gates_N2F.shape[1] // 2) if dh_NF is None else dh_NF.contiguous()
        dgates_N2F = glu_bwd(dh_NF, gates_N2F, ctx.activation)
        # One pass over the stream is cheaper than holding N x D normalised values from forward to backward.
        y_ND = layernorm_fwd(stream_ND, None, norm_weight_D, norm_bias_D, ctx.eps)[0]
        dweight_2FD = dgates_N2F.t() @ y_ND
        dy_ND = input_gradient(dgates_N2F, weight_2FD)
        dstream_ND = None if dstream_ND is None else dstream_ND.contiguous()
        dx_ND, dnorm_weight_D, dnorm_bias_D = layernorm_bwd(dy_ND, dstream_ND, stream_ND, mean_N, rstd_N, norm_weight_D)
        dresidual_ND = dx_ND if ctx.has_residual else None
        dnorm_bias_D = None if norm_bias_D is None else dnorm_bias_D
        return dx_ND, dnorm_weight_D, dnorm_bias_D, dweight_2FD, None, dresidual_ND, None


def layernorm_glu(x, norm_weight, norm_bias, weight_in, activation="gelu", residual=None, eps=1e-5):
    """The first half of a feed-forward block: glu(LayerNorm(x + residual) @ weight_in.T).

    Args:
        x: (N, D), float32 or bfloat16.
        norm_weight: (D,), float32.
        norm_bias: (D,), float32, or None.
        weight_in: (2 F, D), the dtype of `x`; the first F rows give the activated part.
        activation: "gelu" or "silu".
        residual: (N, D), the dtype of `x`, or None.
        eps: added to the variance.

    Returns:
        (h, stream): h is (N, F); stream is x + residual, (N, D), or `x` itself without a residual.

    Raises:
        ValueError: as layernorm and glu.

    Kept for backward: stream, two statistics a row, and the (N, 2 F) pre-activations; the normalised rows are
    computed again. Sources: arXiv:1607.06450, arXiv:2002.05202.
    """
    if dispatch.uses_reference("layernorm_glu", x):
        return reference.layernorm_glu(x, norm_weight, norm_bias, weight_in, activation, residual, eps)
    if residual is None:
        return _LayerNormGlu.apply(x, norm_weight, norm_bias, weight_in, activation, None, eps), x
    return _LayerNormGlu.apply(x, norm_weight, norm_bias, weight_in, activation, residual, eps)
