"""AdamW over flat buffers: csrc/adamw.h, triton_adamw.py."""

import torch

from cramfast.kernels import dispatch
from cramfast.kernels.extension import DTYPE_CODES, check, check_activations
from cramfast.kernels.registry import register


def _adamw(
    master, grad, exp_avg, exp_avg_sq, half, segment_end, segment_decay, segment_lr, scalars, beta1, beta2, eps,
    max_norm, implementation="cpp",
):  # fmt: skip
    size = master.numel()
    for name, buffer in (("master", master), ("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        check(name, buffer, (size,), torch.float32, master)
    if half is not None:
        if half.dtype == torch.float32:
            raise ValueError("half: float32; use bfloat16, or float16 on a GPU")
        check_activations("half", half, implementation, master)
        if half.numel() > size:
            raise ValueError(f"half: {half.numel()} elements for a master of {size}")
    segments = segment_end.numel()
    check("segment_end", segment_end, (segments,), torch.int64, master)
    check("segment_decay", segment_decay, (segments,), torch.float32, master)
    check("segment_lr", segment_lr, (segments,), torch.float32, master)
    check("scalars", scalars, (5,), torch.float32, master)
    if segment_end.device.type == "cpu" and (segments == 0 or int(segment_end[-1]) != size):
        raise ValueError(f"segment_end: must end at {size}")
    launch = dispatch.launcher(implementation)
    partials = launch("adamw_partials", master, size)
    partial = torch.empty(partials, dtype=torch.float64, device=master.device)
    launch(
        "adamw",
        master,
        master,
        grad,
        exp_avg,
        exp_avg_sq,
        half,
        segment_end,
        segment_decay,
        segment_lr,
        scalars,
        partial,
        size,
        0 if half is None else half.numel(),
        segments,
        beta1,
        beta2,
        eps,
        max_norm,
        DTYPE_CODES[torch.bfloat16 if half is None else half.dtype],
    )


def _adamw_fake(*_):
    return None


_adamw_op = register(
    "adamw(Tensor(a!) master, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? half,"
    " Tensor segment_end, Tensor segment_decay, Tensor segment_lr, Tensor(e!) scalars, float beta1, float beta2,"
    ' float eps, float max_norm, str implementation="cpp") -> ()',
    _adamw,
    _adamw_fake,
)


def adamw(
    master, grad, exp_avg, exp_avg_sq, half, segment_end, segment_decay, segment_lr, scalars, *, beta1, beta2, eps,
    max_norm,
):  # fmt: skip
    """One AdamW update in place: clip by global norm, remove the loss scale, update, refresh the half-precision copy.

    Args:
        master: (P,) float32 weights.
        grad: (P,) float32, the sum over microbatches of the scaled gradients; read only.
        exp_avg, exp_avg_sq: (P,) float32 moments.
        half: (Q,) bfloat16 copy (on a GPU also float16) of the first Q weights, or None.
        segment_end: (K,) int64, ascending ends of the segments; the last one is P.
        segment_decay: (K,) float32, weight decay of each segment.
        segment_lr: (K,) float32, factor on the learning rate of each segment.
        scalars: (5,) float32: learning rate, steps done, inverse scale of the gradient; out: gradient norm after
            scaling and before clipping, and 1 if it was not finite.
        beta1, beta2, eps: of AdamW.
        max_norm: clip the global norm to this; 0 for no clipping.

    Raises:
        ValueError: a shape or dtype that does not fit.

    A non-finite gradient changes nothing but scalars[3] and scalars[4]; the step count advances only on an update.
    Source: Loshchilov and Hutter, arXiv:1711.05101.
    """
    buffers = (master, grad, exp_avg, exp_avg_sq, half, segment_end, segment_decay, segment_lr, scalars)
    implementation, function = dispatch.pick("adamw", master)
    if function:
        function(*buffers, beta1=beta1, beta2=beta2, eps=eps, max_norm=max_norm)
    else:
        _adamw_op(*buffers, beta1, beta2, eps, max_norm, implementation)
