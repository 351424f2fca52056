"""Every operator in plain PyTorch: the definition that tests trust, and the path of a CPU without our module.

Dimension letters: N tokens of all sequences end to end, D width, H heads, K head width, F feed-forward width,
V vocabulary, M masked tokens, S sequences.
"""

import torch
import torch.nn.functional as F

ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu}


def layernorm(x, weight, bias=None, residual=None, eps=1e-5):
    """Return (y, stream): stream = x + residual, y = LayerNorm(stream)."""
    stream_ND = x if residual is None else x + residual
    y_ND = F.layer_norm(stream_ND.to(weight.dtype), weight.shape, weight, bias, eps)
    return y_ND.to(x.dtype), stream_ND


def glu(x, activation="gelu"):
    """Return act(first half) * second half of (N, 2 F); "gelu" is the exact erf form."""
    gated_NF, linear_NF = x.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gated_NF) * linear_NF


def layernorm_glu(x, norm_weight, norm_bias, weight_in, activation="gelu", residual=None, eps=1e-5):
    """Return (h, stream): h = glu(LayerNorm(stream) @ weight_in.T)."""
    y_ND, stream_ND = layernorm(x, norm_weight, norm_bias, residual, eps)
    return glu(F.linear(y_ND, weight_in), activation), stream_ND


def rotate(x_NHK, cos_NK2, sin_NK2):
    """Rotary positions, half-split (NeoX) form: pairs are (k, k + K/2)."""
    a, b = x_NHK.chunk(2, dim=-1)
    cos, sin = cos_NK2[:, None, :].to(x_NHK.dtype), sin_NK2[:, None, :].to(x_NHK.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def varlen_attention(qkv, cu_seqlens, max_seqlen, rotary=None, window=None, places=None):
    """Softmax attention inside each sequence, in both directions; rows outside every sequence are zero. It reads the
    offsets on the host and goes from sequence to sequence: never what a GPU runs unasked."""
    out_NHK = torch.zeros_like(qkv[:, 0])
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        if start == end:
            continue
        q, k, v = qkv[start:end].unbind(1)
        if rotary is not None:
            cos, sin = (table[: end - start] for table in rotary)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mask = None
        if window is not None:
            position = torch.arange(end - start, device=q.device)
            mask = (position[:, None] - position[None, :]).abs() <= window
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        out_NHK[start:end] = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)
    return out_NHK


def masked_cross_entropy(hidden, weight, target, z_loss=0.0):
    """Mean over the rows with target >= 0 of -log softmax(z)[target] + z_loss logsumexp(z)^2, z = hidden @ weight.T;
    zero when there is none."""
    logits_MV = F.linear(hidden, weight)
    logits_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    total = F.cross_entropy(logits_MV, target, ignore_index=-100, reduction="sum")
    if z_loss:
        total = total + z_loss * (logits_MV.logsumexp(-1) * (target >= 0)).square().sum()
    return total / (target >= 0).sum().clamp(min=1)


def adamw(
    master, grad, exp_avg, exp_avg_sq, half, segment_end, segment_decay, segment_lr, scalars, *, beta1, beta2, eps,
    max_norm,
):  # fmt: skip
    """One AdamW update in place; see cramfast.kernels.adamw for the arguments."""
    lr, step, inverse_scale = (float(s) for s in scalars[:3])
    norm = float(torch.linalg.vector_norm(grad, dtype=torch.float64)) * inverse_scale
    scalars[3] = norm
    finite = norm < float("inf")
    scalars[4] = 0.0 if finite else 1.0
    if not finite:
        return
    step += 1
    scalars[1] = step
    clip = min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0
    begin = 0
    for end, decay, share in zip(*(t.tolist() for t in (segment_end, segment_decay, segment_lr)), strict=True):
        piece, rate = slice(begin, end), lr * share
        begin = end
        g = grad[piece] * (inverse_scale * clip)
        exp_avg[piece].lerp_(g, 1 - beta1)
        exp_avg_sq[piece].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denominator = (exp_avg_sq[piece] / (1 - beta2**step)).sqrt_().add_(eps)
        master[piece].mul_(1 - rate * decay).addcdiv_(exp_avg[piece], denominator, value=-rate / (1 - beta1**step))
    if half is not None:
        half.copy_(master[: half.numel()])
