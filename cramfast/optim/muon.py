"""Muon for the hidden matrices, AdamW for the embedding table and the vectors."""

import math

import torch
from torch import Tensor

from cramfast.optim.adamw import AdamW
from cramfast.optim.flat import FlatParameters
from cramfast.optim.sharding import Part

MOMENTUM = 0.95
# Matrices that stand one above the other in one tensor; each is orthogonalised alone.
STACKED = {"attn.Wqkv.weight": 3, "mlp.Wi.weight": 2}
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of the polynomial a x + b x^3 + c x^5, steep at 0
NEWTON_SCHULZ_STEPS = 5


class Muon(AdamW):
    """A hidden matrix moves by the orthogonal factor of its Nesterov momentum; AdamW updates everything else.

    Updates are scaled by 0.2 sqrt(longer side), which gives them the size of AdamW's, and by `rate`, as is the weight
    decay of these matrices. Clip, loss scale, skipped updates and the half-precision copy are as in AdamW; the numbers
    agree with torch.optim.Muon (adjust_lr_fn="match_rms_adamw"), which cannot leave an update out without a look at the
    device and multiplies in bfloat16 on processors that have none.

    Sources: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; Liu et al.,
    arXiv:2502.16982 (the scale).
    """

    def __init__(self, flat: FlatParameters, *, rate: float = 1.0, **options):
        """rate: learning rate of the hidden matrices over that of the rest."""
        self.rate = rate
        super().__init__(flat, begin=flat.hidden_end, **options)
        self.momentum = torch.zeros_like(flat.master[self.hidden.own])
        self.dtype = product_dtype(torch.float32 if flat.half is None else flat.half.dtype)

    def update(self) -> None:
        factor, norm = self.gradient_factor()
        finite = factor.isfinite()
        self.update_hidden(torch.where(finite, self.flat.grad[self.hidden.own] * factor, 0.0), finite)
        self.run_clipped(factor, norm)

    def update_hidden(self, gradient: Tensor, finite: Tensor) -> None:
        """Muon's part of an update, this process's whole matrices; where it is not `finite` (0-d), nothing changes.

        Args:
            gradient: of these matrices, (hidden_end,) in a process alone, unscaled and clipped; zeros where not finite;
                overwritten.
        """
        flat, own = self.flat, self.hidden.own
        self.momentum.lerp_(gradient, (1.0 - MOMENTUM) * finite)
        direction = gradient.lerp_(self.momentum, MOMENTUM)
        lr = self.rate * self.scalars[0] * finite
        keep = 1.0 - lr * self.weight_decay
        views = zip(flat.views(flat.master[own], own.start), flat.views(direction, own.start), strict=True)
        for (name, weight), (_, direction_of_weight) in views:
            parts = next((count for suffix, count in STACKED.items() if name.endswith(suffix)), 1)
            direction_BRC = direction_of_weight.view(parts, -1, weight.shape[1])
            step_BRC = orthogonalised(direction_BRC.to(self.dtype)).float()
            scale = 0.2 * math.sqrt(max(step_BRC.shape[1:]))
            weight.mul_(keep).sub_(step_BRC.reshape(weight.shape) * (lr * scale))
        if flat.half is not None:
            flat.half[own].copy_(flat.master[own])

    def buffers(self) -> dict[str, tuple[Tensor, list[Part]]]:
        """AdamW's, and the momentum of the hidden matrices."""
        return super().buffers() | {"momentum": (self.momentum, [self.hidden])}


def product_dtype(stored: torch.dtype) -> torch.dtype:
    """What Newton-Schulz multiplies in; float16 has too few exponents for the squares of small entries."""
    return torch.bfloat16 if stored == torch.bfloat16 else torch.float32


def orthogonalised(x_BRC: Tensor) -> Tensor:
    """(B, R, C) matrices with the singular vectors of `x_BRC` and singular values between about 0.7 and 1.2.

    Five Newton-Schulz steps; a matrix of zeros stays one.
    """
    tall = x_BRC.shape[1] > x_BRC.shape[2]
    x_BRC = x_BRC.mT if tall else x_BRC
    a, b, c = NEWTON_SCHULZ
    x_BRC = x_BRC / x_BRC.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram_BRR = x_BRC @ x_BRC.mT
        gram_BRR = torch.baddbmm(gram_BRR, gram_BRR, gram_BRR, beta=b, alpha=c)
        x_BRC = torch.baddbmm(x_BRC, gram_BRR, x_BRC, beta=a)
    return x_BRC.mT if tall else x_BRC
