"""LayerNorm -> matmul -> gate as one autograd node that keeps no normalised rows: its parts, or one kernel for the
forward pass (csrc/layernorm_glu.h, triton_layernorm_glu.py)."""

import torch

from cramfast.kernels import dispatch, linear
from cramfast.kernels.extension import ACTIVATION_CODES, DTYPE_CODES, check, check_activations
from cramfast.kernels.glu import glu_bwd, glu_fwd
from cramfast.kernels.layernorm import MAX_WIDTH, layernorm_bwd, layernorm_fwd
from cramfast.kernels.registry import register

FUSED = ("cpp_fused", "triton", "emulated_fused")  # implementations with one kernel for the forward pass
PIECE = 8  # values of a half-precision row that the compiled kernel moves at a time


def _forward(x_ND, residual_ND, norm_weight_D, norm_bias_D, weight_2FD, activation, eps, implementation):
    check_activations("x", x_ND, implementation)
    N, D = x_ND.shape
    if residual_ND is not None:
        check("residual", residual_ND, (N, D), x_ND.dtype, x_ND)
    check("norm_weight", norm_weight_D, (D,), torch.float32, x_ND)
    if norm_bias_D is not None:
        check("norm_bias", norm_bias_D, (D,), torch.float32, x_ND)
    check("weight_in", weight_2FD, (weight_2FD.shape[0], D), x_ND.dtype, x_ND)
    if weight_2FD.shape[0] % 2:
        raise ValueError(f"weight_in: expected (2 F, D), got {tuple(weight_2FD.shape)}")
    if activation not in ACTIVATION_CODES:
        raise ValueError(f"activation: {activation!r} is not one of {', '.join(ACTIVATION_CODES)}")
    inputs = (x_ND, residual_ND, norm_weight_D, norm_bias_D, weight_2FD)
    outputs = _forward_fake(*inputs, activation, eps, implementation)
    features = weight_2FD.shape[0] // 2
    launch = dispatch.launcher(implementation)
    scratch = () if implementation == "triton" else _scratch(launch, x_ND, features, implementation)
    codes = (ACTIVATION_CODES[activation], eps, DTYPE_CODES[x_ND.dtype])
    launch("layernorm_glu_fwd", x_ND, *inputs, *outputs, *scratch, N, D, features, *codes)
    return outputs


def _scratch(launch, x_ND, features, implementation):
    """What the compiled kernel works with besides: the weight with norm_weight folded in, and two sums a column."""
    D = x_ND.shape[1]
    if D % PIECE or features % PIECE or not 0 < D <= MAX_WIDTH:
        raise ValueError(
            f"layernorm_glu={implementation} takes widths D up to {MAX_WIDTH} and F that are multiples of {PIECE},"
            f" not {D} and {features}; use layernorm_glu=cpp"
        )
    folded = x_ND.new_empty(launch("layernorm_glu_folded", x_ND, features), D)
    return folded, torch.empty(2, 2 * features, dtype=torch.float32, device=x_ND.device)


def _forward_fake(x_ND, residual_ND, norm_weight_D, norm_bias_D, weight_2FD, activation, eps, implementation):
    N = x_ND.shape[0]
    stream_ND = x_ND.new_empty(0) if residual_ND is None else torch.empty_like(x_ND)
    mean_N, rstd_N = (torch.empty(N, dtype=torch.float32, device=x_ND.device) for _ in range(2))
    gates_N2F = x_ND.new_empty(N, weight_2FD.shape[0])
    return x_ND.new_empty(N, weight_2FD.shape[0] // 2), stream_ND, mean_N, rstd_N, gates_N2F


layernorm_glu_fwd = register(
    "layernorm_glu_fwd(Tensor x, Tensor? residual, Tensor norm_weight, Tensor? norm_bias, Tensor weight,"
    " str activation, float eps, str implementation)"
    " -> (Tensor h, Tensor stream, Tensor mean, Tensor rstd, Tensor gates)",
    _forward,
    _forward_fake,
)


class _LayerNormGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, norm_weight_D, norm_bias_D, weight_2FD, activation, residual_ND, eps, implementation):
        norm = (x_ND, residual_ND, norm_weight_D, norm_bias_D)
        if implementation in FUSED:
            h_NF, stream_ND, mean_N, rstd_N, gates_N2F = layernorm_glu_fwd(
                *norm, weight_2FD, activation, eps, implementation
            )
        else:
            y_ND, stream_ND, mean_N, rstd_N = layernorm_fwd(*norm, eps, implementation)
            gates_N2F = linear.product(y_ND, weight_2FD)
            h_NF = glu_fwd(gates_N2F, activation, implementation)
        ctx.activation, ctx.eps, ctx.implementation = activation, eps, implementation
        ctx.has_residual = residual_ND is not None
        kept_ND = stream_ND if ctx.has_residual else x_ND
        ctx.save_for_backward(kept_ND, mean_N, rstd_N, norm_weight_D, norm_bias_D, weight_2FD, gates_N2F)
        ctx.set_materialize_grads(False)
        return (h_NF, stream_ND) if ctx.has_residual else h_NF

    @staticmethod
    def backward(ctx, dh_NF, dstream_ND=None):
        stream_ND, mean_N, rstd_N, norm_weight_D, norm_bias_D, weight_2FD, gates_N2F = ctx.saved_tensors
        dh_NF = gates_N2F.new_zeros(len(gates_N2F), gates_N2F.shape[1] // 2) if dh_NF is None else dh_NF.contiguous()
        dgates_N2F = glu_bwd(dh_NF, gates_N2F, ctx.activation, ctx.implementation)
        # One pass over the stream is cheaper than holding N x D normalised values from forward to backward.
        y_ND = layernorm_fwd(stream_ND, None, norm_weight_D, norm_bias_D, ctx.eps, ctx.implementation)[0]
        dweight_2FD = linear.weight_gradient(dgates_N2F, y_ND)
        dy_ND = linear.input_gradient(dgates_N2F, weight_2FD)
        dstream_ND = None if dstream_ND is None else dstream_ND.contiguous()
        dx_ND, dnorm_weight_D, dnorm_bias_D = layernorm_bwd(
            dy_ND, dstream_ND, stream_ND, mean_N, rstd_N, norm_weight_D, ctx.implementation
        )
        dresidual_ND = dx_ND if ctx.has_residual else None
        dnorm_bias_D = None if norm_bias_D is None else dnorm_bias_D
        return dx_ND, dnorm_weight_D, dnorm_bias_D, dweight_2FD, None, dresidual_ND, None, None


def layernorm_glu(x, norm_weight, norm_bias, weight_in, activation="gelu", residual=None, eps=1e-5):
    """The first half of a feed-forward block: glu(LayerNorm(x + residual) @ weight_in.T).

    Args:
        x: (N, D), float32 or bfloat16; float16 too on a GPU.
        norm_weight: (D,), float32.
        norm_bias: (D,), float32, or None.
        weight_in: (2 F, D), the dtype of `x`; the first F rows give the activated part.
        activation: "gelu" or "silu".
        residual: (N, D), the dtype of `x`, or None.
        eps: added to the variance.

    Returns:
        (h, stream): h is (N, F); stream is x + residual, (N, D), or `x` itself without a residual.

    Raises:
        ValueError: as layernorm and glu; widths that the compiled fused kernel does not take, where it was asked for.

    Kept for backward: stream, two statistics a row, and the (N, 2 F) pre-activations; the normalised rows are
    computed again. Sources: arXiv:1607.06450, arXiv:2002.05202.
    """
    implementation, function = dispatch.pick("layernorm_glu", x)
    arguments = (x, norm_weight, norm_bias, weight_in, activation, residual, eps)
    if function:
        return function(*arguments)
    outputs = _LayerNormGlu.apply(*arguments, implementation)
    return outputs if residual is not None else (outputs, x)
