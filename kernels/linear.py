"""Matrix products of a linear layer, which a GPU may add up in half precision where that is harmless.

By their data sheets, GeForce cards multiply float16 at twice the rate when the sum is float16 too. The forward pass and
the input gradient sum over a layer's width (at most a few thousand terms), the weight gradient over all tokens of a
microbatch: there, half precision would lose the small terms, so it is never allowed. Nor is it for the decoder, whose
input gradient sums over the vocabulary.

Besides, torch by default lets cuBLAS split a sum and add the parts in half precision ("reduced precision reduction").
For the weight gradient that is switched off too.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F

_allowed = False


def allow_half_accumulation(allowed: bool) -> None:
    """Let float16 products of forward pass and input gradients add up in float16, from here on in this process."""
    global _allowed
    _allowed = allowed


@contextlib.contextmanager
def _half_accumulation() -> Iterator[None]:
    flags = torch.backends.cuda.matmul
    before = flags.allow_fp16_accumulation
    flags.allow_fp16_accumulation = True
    try:
        yield
    finally:
        flags.allow_fp16_accumulation = before


@contextlib.contextmanager
def whole_sums() -> Iterator[None]:
    """Inside the block no product adds parts of its sums in half precision. The flags are the host's: nothing waits."""
    flags = torch.backends.cuda.matmul
    before = flags.allow_fp16_reduced_precision_reduction, flags.allow_bf16_reduced_precision_reduction
    flags.allow_fp16_reduced_precision_reduction = flags.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        flags.allow_fp16_reduced_precision_reduction, flags.allow_bf16_reduced_precision_reduction = before


def product(x_ND, weight_ED):
    """x weight^T: (N, D), (E, D) -> (N, E), outside autograd."""
    with _half_accumulation() if _allowed else contextlib.nullcontext():
        return F.linear(x_ND, weight_ED)


def input_gradient(dy_NE, weight_ED):
    """dy weight: (N, E), (E, D) -> (N, D), outside autograd."""
    with _half_accumulation() if _allowed else contextlib.nullcontext():
        return dy_NE @ weight_ED


def weight_gradient(dy_NE, x_ND):
    """dy^T x: (N, E), (N, D) -> (E, D), outside autograd; the sum over all tokens is float32 throughout."""
    with contextlib.nullcontext() if x_ND.device.type == "cpu" else whole_sums():
        return dy_NE.t() @ x_ND


class LinearFunction(torch.autograd.Function):
    """(N, D) and (E, D) -> (N, E) by product(), gradients by input_gradient() and weight_gradient()."""

    @staticmethod
    def forward(ctx, x_ND, weight_ED):
        ctx.save_for_backward(x_ND, weight_ED)
        return product(x_ND, weight_ED)

    @staticmethod
    def backward(ctx, dy_NE):
        x_ND, weight_ED = ctx.saved_tensors
        return input_gradient(dy_NE, weight_ED), weight_gradient(dy_NE, x_ND)


def linear(x, weight):
    """A linear layer without bias: (N, D) and (E, D) -> (N, E).

    On a CPU, where no flag matters, it is torch's own: the flags stand for the whole process, so they are set around
    single products and taken back, which autograd's own backward pass would not allow.
    """
    return LinearFunction.apply(x, weight) if _allowed or x.device.type != "cpu" else F.linear(x, weight)
