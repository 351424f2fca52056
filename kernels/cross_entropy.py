"""Loss over the masked positions from hidden states and decoder: csrc/cross_entropy.h, triton_cross_entropy.py."""

import torch

from cramfast.kernels import accumulate, dispatch, linear
from cramfast.kernels.extension import DTYPE_CODES, check, check_activations
from cramfast.kernels.registry import register

# Logits that exist at one time. A GPU needs more of them to be busy, and sums the decoder's gradient less often.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
# In float16 the gradient of a logit is stored this many times as large: the probability of a rare word would vanish
# below 6e-8. A power of two costs no digit, and this one leaves room for weights of a hundred in the product.
FLOAT16_GAIN = 256.0


def chunk_rows(device: str, vocabulary: int, dtype: torch.dtype) -> int:
    """How many rows of logits exist at one time on a device, "cpu" or "cuda"."""
    return max(1, CHUNK_BYTES[device] // (vocabulary * dtype.itemsize))


def _gain(hidden_MD, share) -> float:
    """Factor of the stored gradient of the logits; what is missing of `share` comes in backward, in float32.

    1 / M and the loss scale must not touch a float16 number before the products are summed up: 1 / 20,000 alone makes
    every probability subnormal. Other dtypes have the range, and a host that sees `share` spares the decoder a pass.
    """
    if hidden_MD.dtype == torch.float16:
        return FLOAT16_GAIN
    return share.item() if hidden_MD.device.type == "cpu" else 1.0


def _add_product(total_VD, logits_mV, hidden_mD, first: bool) -> None:
    """total += logits^T hidden, summed in float32; where `first`, total is not read."""
    beta = 0.0 if first else 1.0
    if logits_mV.is_cuda and logits_mV.dtype != torch.float32:
        # A float32 `total` beside half-precision factors: torch takes it since 2.10 (pytorch pull request 167931).
        with linear.whole_sums():
            torch.addmm(total_VD, logits_mV.t(), hidden_mD, out_dtype=torch.float32, beta=beta, out=total_VD)
    elif logits_mV.dtype != torch.bfloat16:  # float16 on a CPU comes from the emulator: a test
        torch.addmm(total_VD, logits_mV.t().float(), hidden_mD.float(), beta=beta, out=total_VD)
    elif first:
        total_VD.copy_(logits_mV.t() @ hidden_mD)
    else:  # torch's CPU products of bfloat16 have no float32 result
        accumulate.accumulate(total_VD, logits_mV.t() @ hidden_mD)


def _forward(hidden_MD, weight_VD, target_M, z_loss, want_gradient, implementation="cpp"):
    M, D = hidden_MD.shape
    V = weight_VD.shape[0]
    check_activations("hidden", hidden_MD, implementation)
    check("weight", weight_VD, (V, D), hidden_MD.dtype, hidden_MD)
    check("target", target_M, (M,), torch.int64, hidden_MD)
    if hidden_MD.device.type == "cpu" and M and int(target_M.max()) >= V:
        raise ValueError(f"target: {int(target_M.max())} is outside the vocabulary of {V}")
    loss, dhidden_MD, dweight_VD, rest = _forward_fake(hidden_MD, weight_VD, target_M, z_loss, want_gradient)
    loss_M = torch.empty(M, dtype=torch.float32, device=hidden_MD.device)
    share = (target_M >= 0).sum().clamp(min=1).float().reciprocal()  # of a row in the mean
    gain = _gain(hidden_MD, share)
    launch = dispatch.launcher(implementation)
    rows = chunk_rows(hidden_MD.device.type, V, hidden_MD.dtype)
    for begin in range(0, M, rows):
        chunk = slice(begin, min(M, begin + rows))
        logits_mV = hidden_MD[chunk] @ weight_VD.t()
        target_m = target_M[chunk]
        launch(
            "cross_entropy",
            hidden_MD,
            logits_mV,
            target_m,
            loss_M[begin:],
            len(target_m),
            V,
            z_loss,
            gain,
            want_gradient,
            DTYPE_CODES[hidden_MD.dtype],
        )
        if want_gradient:
            torch.mm(logits_mV, weight_VD, out=dhidden_MD[chunk])
            _add_product(dweight_VD, logits_mV, hidden_MD[chunk], first=begin == 0)
    if M == 0:
        dweight_VD.zero_()
    torch.mul(loss_M.sum(), share, out=loss)
    torch.div(share, gain, out=rest)
    return loss, dhidden_MD, dweight_VD, rest


def _forward_fake(hidden_MD, weight_VD, target_M, z_loss, want_gradient, implementation="cpp"):
    loss, rest = (torch.empty((), dtype=torch.float32, device=hidden_MD.device) for _ in range(2))
    if not want_gradient:
        return loss, hidden_MD.new_empty(0), weight_VD.new_empty(0, dtype=torch.float32), rest
    return loss, torch.empty_like(hidden_MD), torch.empty_like(weight_VD, dtype=torch.float32), rest


masked_cross_entropy_fwd = register(
    "masked_cross_entropy_fwd(Tensor hidden, Tensor weight, Tensor target, float z_loss, bool want_gradient,"
    ' str implementation="cpp") -> (Tensor loss, Tensor dhidden, Tensor dweight, Tensor rest)',
    _forward,
    _forward_fake,
)


def _scaled(gradient, factor, dtype):
    """gradient * factor in float32, rounded once; a 0-d factor would be rounded to the gradient's dtype first."""
    if torch.compiler.is_compiling():
        return (gradient.float() * factor).to(dtype)
    return torch.mul(gradient, factor.view(1), out=torch.empty_like(gradient, dtype=dtype))


class _MaskedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_MD, weight_VD, target_M, z_loss, implementation):
        want_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        inputs = (hidden_MD, weight_VD, target_M, z_loss)
        loss, dhidden_MD, dweight_VD, rest = masked_cross_entropy_fwd(*inputs, want_gradient, implementation)
        ctx.save_for_backward(dhidden_MD, dweight_VD, rest)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        dhidden_MD, dweight_VD, rest = ctx.saved_tensors
        factor, dtype = dloss * rest, dhidden_MD.dtype
        if factor.device.type == "cpu" and not torch.compiler.is_compiling() and factor.item() == 1.0:
            return dhidden_MD, dweight_VD.to(dtype), None, None, None  # loss.backward(): spare a pass over V x D
        return _scaled(dhidden_MD, factor, dtype), _scaled(dweight_VD, factor, dtype), None, None, None


def masked_cross_entropy(hidden, weight, target, z_loss=0.0):
    """Mean cross-entropy of the masked positions, never holding all their logits.

    Args:
        hidden: (M, D), float32 or bfloat16, on a GPU float16 too; rows of the masked positions only.
        weight: (V, D), the dtype of `hidden`; the decoder, usually the embedding table.
        target: (M,), int64 token ids; a negative one leaves its row out.
        z_loss: weight of the square of log Z, Z the sum of the exponentiated logits of a row; it keeps them from
            drifting together, which a softmax does not see. Source: Chowdhery et al., arXiv:2204.02311.

    Returns:
        () float32, the mean over the rows with a target, z_loss included; 0 when there is none.

    Raises:
        ValueError: a shape or dtype that does not fit, a target outside the vocabulary. On a GPU, which nobody can look
            at without waiting, such a target ends the launch and standard output names it; Triton's loss is NaN.

    The forward pass computes the gradient of each chunk of logits in place and multiplies it at once, so backward is
    free and no logit is computed twice; CHUNK_BYTES bounds the memory. The decoder's gradient is summed in float32 over
    the chunks; the share of a row in the mean and the incoming gradient (the loss scale) are multiplied in there, in
    float32, without waiting for the device.
    """
    implementation, function = dispatch.pick("cross_entropy", hidden)
    if function:
        return function(hidden, weight, target, z_loss)
    return _MaskedCrossEntropy.apply(hidden, weight, target, float(z_loss), implementation)
