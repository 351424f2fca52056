"""Matrix products of a linear layer, which a GPU may add up in half precision where that is harmless.

By their data sheets, GeForce cards multiply float16 at twice the rate when the sum is float16 too. The forward pass and
the input gradient sum over a layer's width (at most a few thousand terms), the weight gradient over all tokens of a
microbatch: there, half precision would lose the small terms, so it is never allowed. Nor is it for the decoder, whose
input gradient sums over the vocabulary.
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


def product(x_ND, weight_ED):
    """x weight^T: (N, D), (E, D) -> (N, E), outside autograd."""
    with _half_accumulation() if _allowed else contextlib.nullcontext():
        return F.linear(x_ND, weight_ED)


def input_gradient(dy_NE, weight_ED):
    """dy weight: (N, E), (E, D) -> (N, D), outside autograd."""
    with _half_accumulation() if _allowed else contextlib.nullcontext():
        return dy_NE @ weight_ED


class LinearFunction(torch.autograd.Function):
    """(N, D) and (E, D) -> (N, E) by product(), the input's gradient by input_gradient(), the weight's by torch."""

    @staticmethod
    def forward(ctx, x_ND, weight_ED):
        ctx.save_for_backward(x_ND, weight_ED)
        return product(x_ND, weight_ED)

    @staticmethod
    def backward(ctx, dy_NE):
        x_ND, weight_ED = ctx.saved_tensors
        return input_gradient(dy_NE, weight_ED), dy_NE.t() @ x_ND


def linear(x, weight):
    """A linear layer without bias: (N, D) and (E, D) -> (N, E).

    Only where half-precision accumulation is allowed is this more than torch's own: the flag stands for the whole
    process, so it is set around two of the three products and taken back for the third.
    """
    return LinearFunction.apply(x, weight) if _allowed else F.linear(x, weight)
