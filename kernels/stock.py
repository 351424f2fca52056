"""Every operator from PyTorch's own: what a GPU runs unasked, because it needs no measurement there.

They keep what ours keep for the backward pass, and no float32 copy of an activation; the host reads nothing, so that a
CUDA graph captures them. Dimension letters as in reference.py; B blocks of Q queries that see W keys.
"""

import math

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cramfast.kernels import arrange, linear
from cramfast.kernels.places import Places

CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}  # of float32 logits that exist at one time
GRADIENT_SCALE = 256.0  # on p - y in half precision: float16 then holds probabilities down to 2e-10
ADAMW_CHUNK = 1 << 24  # entries whose temporaries exist at one time

_GELU_BACKWARD = torch.ops.aten.gelu_backward
_SILU_BACKWARD = torch.ops.aten.silu_backward


def _normalised(stream_ND, weight_D, bias_D, eps):
    """LayerNorm in the dtype of the rows; its statistics are float32 whatever that is."""
    if stream_ND.dtype == weight_D.dtype:
        return F.layer_norm(stream_ND, weight_D.shape, weight_D, bias_D, eps)
    y_ND = F.layer_norm(stream_ND, weight_D.shape, None, None, eps)
    if bias_D is None:
        return torch.mul(y_ND, weight_D, out=y_ND)  # computed in float32, rounded as it is stored
    return torch.addcmul(bias_D, y_ND, weight_D, out=torch.empty_like(y_ND))


def _norm_backward(dy_ND, stream_ND, weight_D, bias_D, eps):
    """Gradients of _normalised, computed in float32 from the rows; the first in their dtype."""
    if not len(stream_ND):  # var_mean warns of rows that are not there
        zeros = [None if weight is None else torch.zeros_like(weight) for weight in (weight_D, bias_D)]
        return torch.zeros_like(stream_ND), *zeros
    wide_ND = stream_ND.to(weight_D.dtype)
    variance_N1, mean_N1 = torch.var_mean(wide_ND, -1, correction=0, keepdim=True)
    rstd_N1 = variance_N1.add_(eps).rsqrt_()
    dx_ND, dweight_D, dbias_D = torch.ops.aten.native_layer_norm_backward(
        dy_ND.to(wide_ND.dtype), wide_ND, weight_D.shape, mean_N1, rstd_N1, weight_D, bias_D,
        [True, True, bias_D is not None],
    )  # fmt: skip
    return dx_ND.to(stream_ND.dtype), dweight_D, dbias_D if bias_D is not None else None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, weight_D, bias_D, residual_ND, eps):
        stream_ND = x_ND if residual_ND is None else x_ND + residual_ND
        ctx.eps, ctx.has_residual = eps, residual_ND is not None
        ctx.save_for_backward(stream_ND, weight_D, bias_D)
        ctx.set_materialize_grads(False)
        y_ND = _normalised(stream_ND, weight_D, bias_D, eps)
        return (y_ND, stream_ND) if ctx.has_residual else y_ND

    @staticmethod
    def backward(ctx, dy_ND, dstream_ND=None):
        stream_ND, weight_D, bias_D = ctx.saved_tensors
        dy_ND = torch.zeros_like(stream_ND) if dy_ND is None else dy_ND
        dx_ND, dweight_D, dbias_D = _norm_backward(dy_ND, stream_ND, weight_D, bias_D, ctx.eps)
        if dstream_ND is not None:
            dx_ND += dstream_ND
        return dx_ND, dweight_D, dbias_D, dx_ND if ctx.has_residual else None, None


def layernorm(x, weight, bias=None, residual=None, eps=1e-5):
    """As kernels.layernorm; kept for backward: stream."""
    outputs = _LayerNorm.apply(x, weight, bias, residual, eps)
    return outputs if residual is not None else (outputs, x)


def _gate(x_N2F, activation):
    gated_NF, linear_NF = x_N2F.chunk(2, dim=-1)
    return (F.gelu(gated_NF) if activation == "gelu" else F.silu(gated_NF)).mul_(linear_NF)


def _gate_backward(dh_NF, x_N2F, activation):
    dx_N2F = torch.empty_like(x_N2F)
    (a_NF, b_NF), (da_NF, db_NF) = (t.chunk(2, dim=-1) for t in (x_N2F, dx_N2F))
    activated_NF = F.gelu(a_NF) if activation == "gelu" else F.silu(a_NF)
    torch.mul(dh_NF, activated_NF, out=db_NF)
    up_NF = torch.mul(dh_NF, b_NF, out=activated_NF)
    backward = _GELU_BACKWARD if activation == "gelu" else _SILU_BACKWARD
    backward(up_NF, a_NF, grad_input=da_NF)
    return dx_N2F


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_N2F, activation):
        ctx.activation = activation
        ctx.save_for_backward(x_N2F)
        return _gate(x_N2F, activation)

    @staticmethod
    def backward(ctx, dh_NF):
        (x_N2F,) = ctx.saved_tensors
        return _gate_backward(dh_NF, x_N2F, ctx.activation), None


def glu(x, activation="gelu"):
    """As kernels.glu; the activation is computed again in backward."""
    return _Glu.apply(x, activation)


class _LayerNormGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, norm_weight_D, norm_bias_D, weight_2FD, activation, residual_ND, eps):
        stream_ND = x_ND if residual_ND is None else x_ND + residual_ND
        gates_N2F = linear.product(_normalised(stream_ND, norm_weight_D, norm_bias_D, eps), weight_2FD)
        ctx.activation, ctx.eps, ctx.has_residual = activation, eps, residual_ND is not None
        ctx.save_for_backward(stream_ND, norm_weight_D, norm_bias_D, weight_2FD, gates_N2F)
        ctx.set_materialize_grads(False)
        h_NF = _gate(gates_N2F, activation)
        return (h_NF, stream_ND) if ctx.has_residual else h_NF

    @staticmethod
    def backward(ctx, dh_NF, dstream_ND=None):
        stream_ND, norm_weight_D, norm_bias_D, weight_2FD, gates_N2F = ctx.saved_tensors
        dh_NF = gates_N2F.new_zeros(len(gates_N2F), gates_N2F.shape[1] // 2) if dh_NF is None else dh_NF
        dgates_N2F = _gate_backward(dh_NF, gates_N2F, ctx.activation)
        y_ND = _normalised(stream_ND, norm_weight_D, norm_bias_D, ctx.eps)
        dweight_2FD = linear.weight_gradient(dgates_N2F, y_ND)
        dy_ND = linear.input_gradient(dgates_N2F, weight_2FD)
        dx_ND, dnorm_weight_D, dnorm_bias_D = _norm_backward(dy_ND, stream_ND, norm_weight_D, norm_bias_D, ctx.eps)
        if dstream_ND is not None:
            dx_ND += dstream_ND
        return dx_ND, dnorm_weight_D, dnorm_bias_D, dweight_2FD, None, dx_ND if ctx.has_residual else None, None


def layernorm_glu(x, norm_weight, norm_bias, weight_in, activation="gelu", residual=None, eps=1e-5):
    """As kernels.layernorm_glu; kept for backward: stream and the (N, 2 F) pre-activations."""
    outputs = _LayerNormGlu.apply(x, norm_weight, norm_bias, weight_in, activation, residual, eps)
    return outputs if residual is not None else (outputs, x)


def padded_attention(qkv, cu_seqlens, max_seqlen, rotary=None, window=None, places=None, fused=False):
    """As kernels.varlen_attention, by one scaled_dot_product_attention in four dimensions: (B, H, Q, W).

    A query sees nothing beyond the longest sequence's reach, so rows are cut into blocks where they lie, and each
    block gets the keys that reach it: 1 query and about 3 keys a token, however many sequences there are. A row of
    keys for each place that a sequence may take would be 13 a token at length 512, and most of them empty. `fused`:
    rotated by our Triton kernel, which is then no longer the floor.
    """
    places = places or Places(cu_seqlens, len(qkv), max_seqlen)
    N = len(qkv)
    if max_seqlen == 0 or N == 0:
        return arrange.arrange(qkv, places)[:, 2]
    block, halo = places.blocks(window)
    count = -(-N // block)
    rows = arrange.arrange(qkv, places, rotary, halo, count * block - N + halo, fused)
    q = rows[halo : halo + count * block, 0].unflatten(0, (count, block)).transpose(1, 2)
    k, v = (rows[:, part].unfold(0, block + 2 * halo, block).transpose(-1, -2) for part in (1, 2))  # no copies
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):  # cuDNN's wants other strides
        out_BHQK = F.scaled_dot_product_attention(q, k, v, attn_mask=places.bias(window, qkv.dtype))
    out_NHK = out_BHQK.transpose(1, 2).flatten(0, 1)[:N]
    return torch.where(places.own_N[:, None, None], out_NHK, 0)


class _MaskedCrossEntropy(torch.autograd.Function):
    """The gradients of each chunk are made while its logits are there; 1 / M and what comes from above, a float16 run's
    loss scale, are folded in at the end, in float32: before, they would push p - y below float16's least number."""

    @staticmethod
    def forward(ctx, hidden_MD, weight_VD, target_M, z_loss):
        M, V = len(target_M), len(weight_VD)
        wide = torch.promote_types(hidden_MD.dtype, torch.float32)
        valid_M = target_M >= 0
        count = valid_M.sum().clamp(min=1).to(wide)
        total = hidden_MD.new_zeros((), dtype=wide)
        ctx.gradient_scale = 1.0 if hidden_MD.dtype == wide else GRADIENT_SCALE
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dhidden_MD = torch.empty_like(hidden_MD) if wanted else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=wide) if wanted else None
        rows = chunk_rows(hidden_MD.device.type, V)
        for begin in range(0, M, rows):
            chunk = slice(begin, min(M, begin + rows))
            hidden_mD, valid_m1 = hidden_MD[chunk], valid_M[chunk, None]
            target_m1 = target_M[chunk, None].clamp(min=0)
            logits_mV = hidden_mD @ weight_VD.t()
            log_p_mV = torch.log_softmax(logits_mV, -1, dtype=wide)
            log_p_m1 = log_p_mV.gather(1, target_m1)
            lse_m1 = logits_mV.gather(1, target_m1) - log_p_m1 if z_loss else None
            loss_m1 = z_loss * lse_m1.square() - log_p_m1 if z_loss else -log_p_m1
            total += torch.where(valid_m1, loss_m1, 0).sum()
            if not wanted:
                continue
            factor_m1 = valid_m1 * ((1 + 2 * z_loss * lse_m1 if z_loss else 1.0) * ctx.gradient_scale)
            dlogits_mV = log_p_mV.exp_().mul_(factor_m1)
            dlogits_mV.scatter_add_(1, target_m1, valid_m1 * torch.full_like(log_p_m1, -ctx.gradient_scale))
            dlogits_mV = logits_mV.copy_(dlogits_mV)  # rounded
            torch.mm(dlogits_mV, weight_VD, out=dhidden_MD[chunk])
            _add_product(dweight_VD, dlogits_mV, hidden_mD)
        ctx.save_for_backward(dhidden_MD, dweight_VD, count)
        return total / count

    @staticmethod
    def backward(ctx, dloss):
        dhidden_MD, dweight_VD, count = ctx.saved_tensors
        # In two dimensions, since a 0-d tensor would be rounded to the other's dtype first: 65,536 is too large for it.
        factor_11 = (dloss / (count * ctx.gradient_scale)).view(1, 1)
        dhidden_MD = torch.mul(dhidden_MD, factor_11, out=torch.empty_like(dhidden_MD))
        dweight_VD = torch.mul(dweight_VD, factor_11, out=torch.empty_like(dweight_VD, dtype=dhidden_MD.dtype))
        return dhidden_MD, dweight_VD, None, None


def chunk_rows(device, V):
    """Rows of float32 logits that exist at one time on a device; anything but a CPU is a GPU."""
    return max(1, CHUNK_BYTES["cpu" if device == "cpu" else "cuda"] // (4 * V))


def _add_product(total_VD, dlogits_mV, hidden_mD):
    """total += dlogits^T hidden, summed and added in float32 (float64 for float64)."""
    if dlogits_mV.dtype == total_VD.dtype:
        total_VD.addmm_(dlogits_mV.t(), hidden_mD)
    elif dlogits_mV.device.type == "cpu":  # torch has no product with another dtype of output there
        total_VD.addmm_(dlogits_mV.to(total_VD.dtype).t(), hidden_mD.to(total_VD.dtype))
    else:
        with linear.whole_sums():
            total_VD.add_(torch.mm(dlogits_mV.t(), hidden_mD, out_dtype=total_VD.dtype))


def masked_cross_entropy(hidden, weight, target, z_loss=0.0):
    """As kernels.masked_cross_entropy, with a softmax of torch; CHUNK_BYTES bounds the memory of the logits."""
    return _MaskedCrossEntropy.apply(hidden, weight, target, float(z_loss))


def _norm(grad):
    """() float64, the length of a gradient. In float32 the squares of a finite one overflow from 2e19 on; in float64
    torch first makes a copy of what it is given, so it is given pieces."""
    pieces = [torch.linalg.vector_norm(piece.double()) for piece in grad.split(ADAMW_CHUNK)]
    return torch.linalg.vector_norm(torch.stack(pieces))


@torch.no_grad()
def adamw(
    master, grad, exp_avg, exp_avg_sq, half, segment_end, segment_decay, segment_lr, scalars, *, beta1, beta2, eps,
    max_norm,
):  # fmt: skip
    """As kernels.adamw: a non-finite gradient is left out by factors of zero, not by a branch of the host's."""
    lr, step, inverse_scale = scalars[0].double(), scalars[1].double(), scalars[2].double()
    norm = _norm(grad) * inverse_scale
    finite = norm < math.inf
    clip = (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm > 0 else 1.0
    taken = finite.float()
    scale = (inverse_scale * clip).float()
    bias1, bias2 = (-torch.expm1((step + 1) * (math.log(beta) if beta else -math.inf)) for beta in (beta1, beta2))
    rate, root2 = lr * taken, bias2.rsqrt().float()
    for begin in range(0, len(master), ADAMW_CHUNK):
        piece = slice(begin, min(len(master), begin + ADAMW_CHUNK))
        weights, m, v = master[piece], exp_avg[piece], exp_avg_sq[piece]
        place = torch.arange(begin, piece.stop, device=master.device)
        segment = torch.bucketize(place, segment_end, out_int32=True, right=True)
        rate_of = segment_lr[segment] * rate
        g = torch.where(finite, grad[piece] * scale, 0)
        m.lerp_(g, taken * (1 - beta1))
        v.lerp_(g.square_(), taken * (1 - beta2))
        weights.mul_(1 - rate_of * segment_decay[segment])
        change = (v.sqrt() * root2).add_(eps)
        weights.sub_(torch.div(m, change, out=change).mul_(rate_of).div_(bias1))
    scalars[1] += taken
    scalars[3] = norm
    scalars[4] = 1 - taken
    if half is not None:
        half.copy_(master[: half.numel()])
