"""Loss over the masked positions from hidden states and decoder: csrc/cross_entropy.h, triton_cross_entropy.py."""

import torch

from cramfast.kernels import dispatch
from cramfast.kernels.extension import DTYPE_CODES, check, check_activations
from cramfast.kernels.registry import register

# Logits that exist at one time. More saves nothing measurable; less rounds the weight gradient more often.
CHUNK_BYTES = 32 << 20


def _forward(hidden_MD, weight_VD, target_M, z_loss, want_gradient, implementation="cpp"):
    M, D = hidden_MD.shape
    V = weight_VD.shape[0]
    check_activations("hidden", hidden_MD, implementation)
    check("weight", weight_VD, (V, D), hidden_MD.dtype)
    check("target", target_M, (M,), torch.int64)
    if hidden_MD.device.type == "cpu" and M and int(target_M.max()) >= V:
        raise ValueError(f"target: {int(target_M.max())} is outside the vocabulary of {V}")
    loss, dhidden_MD, dweight_VD = _forward_fake(hidden_MD, weight_VD, target_M, z_loss, want_gradient)
    loss_M = torch.empty(M, dtype=torch.float32, device=hidden_MD.device)
    scale = (target_M >= 0).sum().clamp(min=1).float().reciprocal()
    launch = dispatch.launcher(implementation)
    rows = max(1, CHUNK_BYTES // (V * hidden_MD.element_size()))
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
            scale,
            len(target_m),
            V,
            z_loss,
            want_gradient,
            DTYPE_CODES[hidden_MD.dtype],
        )
        if want_gradient:
            torch.mm(logits_mV, weight_VD, out=dhidden_MD[chunk])
            torch.addmm(dweight_VD, logits_mV.t(), hidden_MD[chunk], beta=0.0 if begin == 0 else 1.0, out=dweight_VD)
    if M == 0:
        dweight_VD.zero_()
    torch.mul(loss_M.sum(), scale, out=loss)
    return loss, dhidden_MD, dweight_VD


def _forward_fake(hidden_MD, weight_VD, target_M, z_loss, want_gradient, implementation="cpp"):
    loss = torch.empty((), dtype=torch.float32, device=hidden_MD.device)
    if not want_gradient:
        return loss, hidden_MD.new_empty(0), weight_VD.new_empty(0)
    return loss, torch.empty_like(hidden_MD), torch.empty_like(weight_VD)


masked_cross_entropy_fwd = register(
    "masked_cross_entropy_fwd(Tensor hidden, Tensor weight, Tensor target, float z_loss, bool want_gradient,"
    ' str implementation="cpp") -> (Tensor loss, Tensor dhidden, Tensor dweight)',
    _forward,
    _forward_fake,
)


class _MaskedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_MD, weight_VD, target_M, z_loss, implementation):
        want_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        inputs = (hidden_MD, weight_VD, target_M, z_loss)
        loss, dhidden_MD, dweight_VD = masked_cross_entropy_fwd(*inputs, want_gradient, implementation)
        ctx.save_for_backward(dhidden_MD, dweight_VD)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        dhidden_MD, dweight_VD = ctx.saved_tensors
        if dloss.device.type == "cpu" and not torch.compiler.is_compiling() and dloss.item() == 1.0:
            return dhidden_MD, dweight_VD, None, None, None  # loss.backward(): spare a pass over the V x D gradient
        return dhidden_MD * dloss, dweight_VD * dloss, None, None, None


def masked_cross_entropy(hidden, weight, target, z_loss=0.0):
    """Mean cross-entropy of the masked positions, never holding all their logits.

    Args:
        hidden: (M, D), float32 or bfloat16; rows of the masked positions only.
        weight: (V, D), the dtype of `hidden`; the decoder, usually the embedding table.
        target: (M,), int64 token ids; a negative one leaves its row out.
        z_loss: weight of the square of log Z, Z the sum of the exponentiated logits of a row; it keeps them from
            drifting together, which a softmax does not see. Source: Chowdhery et al., arXiv:2204.02311.

    Returns:
        () float32, the mean over the rows with a target, z_loss included; 0 when there is none.

    Raises:
        ValueError: a shape or dtype that does not fit, a target outside the vocabulary.

    The forward pass computes the gradient of each chunk of logits in place and multiplies it at once, so backward is
    free and no logit is computed twice; CHUNK_BYTES bounds the memory.
    """
    implementation, function = dispatch.pick("cross_entropy", hidden)
    if function:
        return function(hidden, weight, target, z_loss)
    return _MaskedCrossEntropy.apply(hidden, weight, target, float(z_loss), implementation)
