"""All parameters in one flat float32 buffer, and AdamW over it in one pass."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cramfast import kernels
from cramfast.ranges import Range

STEADY_STEPS = 2000  # updates after which float16's loss scale is doubled, as torch.amp does
ALIGNMENT = 16  # entries; 64 bytes of float32 and 32 of bfloat16, so that no vector load straddles a segment's start


class FlatParameters:
    """Owns the numbers of a model: float32 master, matrices first, then vectors; a half-precision copy of the matrices.

    The module's Parameters become views: of `half` for matrices when `dtype` is a half precision (kept, never recast),
    of `master` otherwise. Norm weights and biases always stay float32. Gradients gather in `grad`, float32, over any
    number of backward passes.

    Attributes:
        master, grad: (P,) float32, P the padded size.
        half: (matrices_end,) in `dtype`, or None in float32.
        matrices_end: where the vectors begin; weight decay ends there.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32):
        named = list(model.named_parameters())
        ordered = [item for item in named if item[1].dim() >= 2] + [item for item in named if item[1].dim() < 2]
        self.places: dict[str, tuple[int, torch.Size]] = {}
        end = self.matrices_end = 0
        for name, parameter in ordered:
            self.places[name] = (end, parameter.shape)
            end += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
            if parameter.dim() >= 2:
                self.matrices_end = end
        device = ordered[0][1].device
        self.master = torch.zeros(end, device=device)
        self.grad = torch.zeros(end, device=device)
        for (_, parameter), (_, view) in zip(ordered, self.views(self.master), strict=True):
            view.copy_(parameter.detach())
        self.half = None if dtype == torch.float32 else self.master[: self.matrices_end].to(dtype)
        for (name, parameter), (_, view) in zip(ordered, self.views(self.master), strict=True):
            begin, shape = self.places[name]
            if self.half is not None and parameter.dim() >= 2:
                view = self.half[begin : begin + parameter.numel()].view(shape)
            parameter.data = view
        for (_, parameter), (_, view) in zip(ordered, self.views(self.grad), strict=True):
            parameter.register_post_accumulate_grad_hook(gather_into(view))

    def views(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, view shaped like the parameter) of a buffer laid out like `master`."""
        for name, (begin, shape) in self.places.items():
            yield name, flat[begin : begin + shape.numel()].view(shape)

    @torch.no_grad()
    def refresh_half(self) -> None:
        """Make the half-precision copy follow a master that was written from outside."""
        if self.half is not None:
            self.half.copy_(self.master[: self.matrices_end])


def gather_into(view: Tensor):
    """Hook that adds a finished gradient to its float32 place and frees it at once.

    Autograd would accumulate in the parameter's own dtype, where bfloat16 loses small microbatch gradients beside a
    large sum; and it insists that .grad has that dtype, so the float32 buffer cannot be .grad itself.
    """

    def hook(parameter: Tensor) -> None:
        view.add_(parameter.grad)
        parameter.grad = None

    return hook


class LossScale:
    """Factor on the loss that keeps small float16 gradients above zero; it changes on the device, read by no one.

    In float16 a skipped update halves it and 2000 good ones in a row double it; in other dtypes it stays 1.
    Source: Micikevicius et al., arXiv:1710.03740.

    Attributes:
        value: 0-d float32.
    """

    START = 65536.0

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dynamic = dtype == torch.float16
        self.value = torch.full((), self.START if self.dynamic else 1.0, device=device)
        self.steady_steps = torch.zeros((), dtype=torch.int32, device=device)

    def set(self, value: float, steady_steps: int) -> None:
        """Go on from a checkpoint."""
        self.value.fill_(value)
        self.steady_steps.fill_(steady_steps)

    def update(self, skipped: Tensor) -> None:
        """Follow an update; `skipped` is 0-d, 1.0 if it was left out."""
        if self.dynamic:  # the operator behind torch.amp.GradScaler: one launch
            torch._amp_update_scale_(self.value, self.steady_steps, skipped, 2.0, 0.5, STEADY_STEPS)


class AdamW:
    """AdamW with global-norm clip, loss-scale removal and the half-precision copy; skips non-finite gradients.

    Source: Loshchilov and Hutter, arXiv:1711.05101.

    Attributes:
        loss_scale: what the loss is to be multiplied with before its backward pass.
    """

    def __init__(
        self, flat: FlatParameters, *, beta1: float, beta2: float, eps: float, weight_decay: float, max_norm: float
    ):
        self.flat = flat
        self.options = {"beta1": beta1, "beta2": beta2, "eps": eps, "max_norm": max_norm}
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(flat.master), torch.zeros_like(flat.master)
        device = flat.master.device
        self.segment_end = torch.tensor([flat.matrices_end, flat.master.numel()], device=device)
        self.segment_decay = torch.tensor([weight_decay, 0.0], device=device)
        self.scalars = torch.zeros(5, device=device)
        self.loss_scale = LossScale(torch.float32 if flat.half is None else flat.half.dtype, device)

    @Range("optimizer")
    @torch.no_grad()
    def step(self, lr: float, loss_sum: Tensor, microbatches: float) -> None:
        """Update with the gathered gradients and clear them; the host reads nothing.

        Args:
            lr: learning rate of this step.
            loss_sum: 0-d, summed loss of the microbatches; a non-finite one skips the update as a gradient would.
            microbatches: how many; the gradient is divided by this and by the loss scale before the clip.
        """
        flat, scale = self.flat, self.loss_scale
        self.scalars[0] = lr
        # 0 * inf is nan, and a nan scale counts as non-finite
        self.scalars[2] = 1.0 / (scale.value * microbatches) + 0.0 * loss_sum
        kernels.adamw(
            flat.master, flat.grad, self.exp_avg, self.exp_avg_sq, flat.half,
            self.segment_end, self.segment_decay, self.scalars, **self.options,
        )  # fmt: skip
        flat.grad.zero_()
        scale.update(self.scalars[4])

    def reset(self) -> None:
        """Forget every update; the weights stay."""
        for tensor in (self.exp_avg, self.exp_avg_sq, self.scalars):
            tensor.zero_()

    @property
    def verdict(self) -> Tensor:
        """(2,) on the device: norm of the last step's gradient before the clip; 1 if that step was left out."""
        return self.scalars[3:5]

    @property
    def grad_norm(self) -> float:
        """Norm of the last step's gradient before the clip (host sync)."""
        return float(self.scalars[3])

    @property
    def skipped(self) -> bool:
        """Whether the last step was left out for a non-finite gradient or loss (host sync)."""
        return bool(self.scalars[4] != 0)

    def state(self) -> dict[str, Tensor]:
        """Moments by parameter name, and the count of updates."""
        named = {f"exp_avg.{name}": view for name, view in self.flat.views(self.exp_avg)}
        named |= {f"exp_avg_sq.{name}": view for name, view in self.flat.views(self.exp_avg_sq)}
        return named | {"updates": self.scalars[1:2]}
