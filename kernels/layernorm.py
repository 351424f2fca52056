"""(Residual add +) LayerNorm: csrc/layernorm.h, triton_layernorm.py."""

import torch

from cramfast.kernels import dispatch
from cramfast.kernels.extension import DTYPE_CODES, check, check_activations
from cramfast.kernels.registry import register

MAX_WIDTH = 8192  # as in csrc/layernorm.h: a row lives in registers or on the stack


def _forward(x_ND, residual_ND, weight_D, bias_D, eps, implementation="cpp"):
    check_activations("x", x_ND, implementation)
    N, D = x_ND.shape
    if not 0 < D <= MAX_WIDTH:
        raise ValueError(f"x: width {D} is outside 1..{MAX_WIDTH}")
    if residual_ND is not None:
        check("residual", residual_ND, (N, D), x_ND.dtype, x_ND)
    check("weight", weight_D, (D,), torch.float32, x_ND)
    if bias_D is not None:
        check("bias", bias_D, (D,), torch.float32, x_ND)
    y_ND, stream_ND, mean_N, rstd_N = _forward_fake(x_ND, residual_ND, weight_D, bias_D, eps)
    launch = dispatch.launcher(implementation)
    launch(
        "layernorm_fwd",
        x_ND,
        x_ND,
        residual_ND,
        weight_D,
        bias_D,
        y_ND,
        stream_ND,
        mean_N,
        rstd_N,
        N,
        D,
        eps,
        DTYPE_CODES[x_ND.dtype],
    )
    return y_ND, stream_ND, mean_N, rstd_N


def _forward_fake(x_ND, residual_ND, weight_D, bias_D, eps, implementation="cpp"):
    # Without a residual the stream is x itself; a functional operator may not return its input, so it returns nothing.
    stream_ND = x_ND.new_empty(0) if residual_ND is None else torch.empty_like(x_ND)
    statistics_2N = [torch.empty(x_ND.shape[0], dtype=torch.float32, device=x_ND.device) for _ in range(2)]
    return torch.empty_like(x_ND), stream_ND, *statistics_2N


def _backward(dy_ND, dstream_ND, stream_ND, mean_N, rstd_N, weight_D, implementation="cpp"):
    N, D = stream_ND.shape
    check_activations("stream", stream_ND, implementation)
    check("dy", dy_ND, (N, D), stream_ND.dtype, stream_ND)
    if dstream_ND is not None:
        check("dstream", dstream_ND, (N, D), stream_ND.dtype, stream_ND)
    for name, statistic_N in (("mean", mean_N), ("rstd", rstd_N)):
        check(name, statistic_N, (N,), torch.float32, stream_ND)
    check("weight", weight_D, (D,), torch.float32, stream_ND)
    dx_ND, dweight_D, dbias_D = _backward_fake(dy_ND, dstream_ND, stream_ND, mean_N, rstd_N, weight_D)
    launch = dispatch.launcher(implementation)
    partials = launch("layernorm_partials", dy_ND, N)
    partial = torch.empty(partials, 2, D, dtype=torch.float32, device=dy_ND.device)
    launch(
        "layernorm_bwd",
        dy_ND,
        dy_ND,
        dstream_ND,
        stream_ND,
        mean_N,
        rstd_N,
        weight_D,
        dx_ND,
        partial,
        dweight_D,
        dbias_D,
        N,
        D,
        DTYPE_CODES[stream_ND.dtype],
    )
    return dx_ND, dweight_D, dbias_D


def _backward_fake(dy_ND, dstream_ND, stream_ND, mean_N, rstd_N, weight_D, implementation="cpp"):
    return torch.empty_like(stream_ND), torch.empty_like(weight_D), torch.empty_like(weight_D)


layernorm_fwd = register(
    'layernorm_fwd(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, str implementation="cpp")'
    " -> (Tensor y, Tensor stream, Tensor mean, Tensor rstd)",
    _forward,
    _forward_fake,
)
layernorm_bwd = register(
    "layernorm_bwd(Tensor dy, Tensor? dstream, Tensor stream, Tensor mean, Tensor rstd, Tensor weight,"
    ' str implementation="cpp") -> (Tensor dx, Tensor dweight, Tensor dbias)',
    _backward,
    _backward_fake,
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, weight_D, bias_D, residual_ND, eps, implementation):
        y_ND, stream_ND, mean_N, rstd_N = layernorm_fwd(x_ND, residual_ND, weight_D, bias_D, eps, implementation)
        ctx.has_residual, ctx.has_bias, ctx.implementation = residual_ND is not None, bias_D is not None, implementation
        ctx.save_for_backward(stream_ND if ctx.has_residual else x_ND, mean_N, rstd_N, weight_D)
        # An unused stream gets no gradient; materialising zeros would cost a pass over memory.
        ctx.set_materialize_grads(False)
        return (y_ND, stream_ND) if ctx.has_residual else y_ND

    @staticmethod
    def backward(ctx, dy_ND, dstream_ND=None):
        stream_ND, mean_N, rstd_N, weight_D = ctx.saved_tensors
        dy_ND = torch.zeros_like(stream_ND) if dy_ND is None else dy_ND.contiguous()
        dstream_ND = None if dstream_ND is None else dstream_ND.contiguous()
        saved = (stream_ND, mean_N, rstd_N, weight_D)
        dx_ND, dweight_D, dbias_D = layernorm_bwd(dy_ND, dstream_ND, *saved, ctx.implementation)
        return dx_ND, dweight_D, dbias_D if ctx.has_bias else None, dx_ND if ctx.has_residual else None, None, None


def layernorm(x, weight, bias=None, residual=None, eps=1e-5):
    """Add the residual, if there is one, and normalise every row.

    Args:
        x: (N, D), float32 or bfloat16.
        weight: (D,), float32.
        bias: (D,), float32, or None.
        residual: (N, D), the dtype of `x`, or None.
        eps: added to the variance.

    Returns:
        (y, stream): both (N, D) in the dtype of `x`. stream = x + residual, rounded to that dtype before the
        statistics are taken; it is `x` itself when there is no residual.

    Raises:
        ValueError: a shape or dtype that does not fit, a tensor that is not contiguous or not on 16 bytes.

    Source: Ba et al., arXiv:1607.06450.
    """
    implementation, function = dispatch.pick("layernorm", x)
    if function:
        return function(x, weight, bias, residual, eps)
    outputs = _LayerNorm.apply(x, weight, bias, residual, eps, implementation)
    return outputs if residual is not None else (outputs, x)
