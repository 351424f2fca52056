"""All parameters in one flat float32 buffer, AdamW over it in one pass, StableAdamW, and the average of the weights."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cramfast import kernels
from cramfast.ranges import Range

STEADY_STEPS = 2000  # updates after which float16's loss scale is doubled, as torch.amp does
ALIGNMENT = 16  # entries; 64 bytes of float32 and 32 of bfloat16, so that no vector load straddles a segment's start


class FlatParameters:
    """Owns the numbers of a model: float32 master, hidden matrices first, then embedding tables, then vectors; a
    half-precision copy of the matrices.

    The module's Parameters become views: of `half` for matrices when `dtype` is a half precision (kept, never recast),
    of `master` otherwise. Norm weights and biases always stay float32. Gradients gather in `grad`, float32, over any
    number of backward passes.

    Attributes:
        master, grad: (P,) float32, P the padded size.
        half: (matrices_end,) in `dtype`, or None in float32.
        hidden_end: where the embedding tables begin; Muon's part ends there.
        matrices_end: where the vectors begin; weight decay ends there.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32):
        named = list(model.named_parameters())
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        ordered = sorted(named, key=lambda item: (item[1].dim() < 2, id(item[1]) in tables))
        self.places: dict[str, tuple[int, torch.Size]] = {}
        end = self.hidden_end = self.matrices_end = 0
        for name, parameter in ordered:
            self.places[name] = (end, parameter.shape)
            end += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
            if parameter.dim() >= 2:
                self.matrices_end = end
                self.hidden_end = self.hidden_end if id(parameter) in tables else end
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

    def views(self, flat: Tensor, offset: int = 0) -> Iterator[tuple[str, Tensor]]:
        """(name, view shaped like the parameter) of a buffer laid out like `master` from `offset` on."""
        for name, (place, shape) in self.places.items():
            begin = place - offset
            if 0 <= begin < len(flat):
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


class WeightAverage:
    """Exponential moving average of the weights, float32, laid out like the master.

    The decay of update t is at most (1 + t) / (10 + t), so that the first weights are soon forgotten, as TensorFlow's
    ExponentialMovingAverage does with `num_updates`.

    Attributes:
        values: (P,) float32.
    """

    def __init__(self, flat: FlatParameters, decay: float):
        self.flat, self.least = flat, 1.0 - decay
        self.values = flat.master.clone()

    def follow(self, updates: Tensor, skipped: Tensor) -> None:
        """Move towards the weights after update number `updates`, unless it was `skipped`; both 0-d."""
        share = (9.0 / (10.0 + updates)).clamp(min=self.least)
        self.values.lerp_(self.flat.master, share * (skipped == 0))

    def exchange(self) -> None:
        """Give the model the average and keep its weights here, or take that back."""
        weights = self.flat.master.clone()
        self.flat.master.copy_(self.values)
        self.values.copy_(weights)
        self.flat.refresh_half()


class AdamW:
    """AdamW with global-norm clip, loss-scale removal and the half-precision copy; skips non-finite gradients.

    Source: Loshchilov and Hutter, arXiv:1711.05101.

    Args:
        flat: parameters and gradients.
        beta1, beta2, eps, weight_decay: of AdamW; nothing decays norms and biases.
        max_norm: largest global norm of the gradient; 0 for no clip.
        ema_decay: of the average of the weights; 0 keeps none.
        begin: the first entry of the flat buffers that AdamW updates.

    Attributes:
        loss_scale: what the loss is to be multiplied with before its backward pass.
        average: of the weights, or None.
    """

    def __init__(
        self, flat: FlatParameters, *, beta1: float, beta2: float, eps: float, weight_decay: float, max_norm: float,
        ema_decay: float = 0.0, begin: int = 0,
    ):  # fmt: skip
        self.flat, self.begin, self.weight_decay = flat, begin, weight_decay
        self.beta1, self.beta2, self.eps, self.max_norm = beta1, beta2, eps, max_norm
        self.exp_avg, self.exp_avg_sq = (torch.zeros_like(flat.master[begin:]) for _ in range(2))
        self.scalars = torch.zeros(5, device=flat.master.device)
        self.loss_scale = LossScale(torch.float32 if flat.half is None else flat.half.dtype, flat.master.device)
        self.average = WeightAverage(flat, ema_decay) if ema_decay else None
        self.set_segments([flat.matrices_end, flat.master.numel()])

    def set_segments(self, ends: list[int]) -> None:
        """Let each stretch of the flat buffers that ends at one of `ends` have a learning rate of its own."""
        device, decays = self.flat.master.device, [end <= self.flat.matrices_end for end in ends]
        self.segment_end = torch.tensor(ends, device=device) - self.begin
        self.segment_decay = torch.tensor(decays, device=device) * self.weight_decay
        self.segment_lr = torch.ones(len(ends), device=device)

    @Range("optimizer")
    @torch.no_grad()
    def step(self, lr: float, loss_sum: Tensor, microbatches: float) -> None:
        """Update with the gathered gradients and clear them; the host reads nothing.

        Args:
            lr: learning rate of this step.
            loss_sum: 0-d, summed loss of the microbatches; a non-finite one skips the update as a gradient would.
            microbatches: how many; the gradient is divided by this and by the loss scale before the clip.
        """
        self.scalars[0] = lr
        # 0 * inf is nan, and a nan scale counts as non-finite
        self.scalars[2] = 1.0 / (self.loss_scale.value * microbatches) + 0.0 * loss_sum
        self.update()
        self.flat.grad.zero_()
        self.loss_scale.update(self.scalars[4])
        if self.average is not None:
            self.average.follow(self.scalars[1], self.scalars[4])

    def update(self) -> None:
        """Change the weights as the scalars say."""
        self.run_kernel(self.max_norm)

    def run_kernel(self, max_norm: float) -> None:
        """csrc/adamw.h over the entries from `begin` on."""
        flat, begin = self.flat, self.begin
        half = None if flat.half is None else flat.half[begin:]
        kernels.adamw(
            flat.master[begin:], flat.grad[begin:], self.exp_avg, self.exp_avg_sq, half,
            self.segment_end, self.segment_decay, self.segment_lr, self.scalars,
            beta1=self.beta1, beta2=self.beta2, eps=self.eps, max_norm=max_norm,
        )  # fmt: skip

    def gradient_factor(self) -> tuple[Tensor, Tensor]:
        """What the kernel multiplies the gradient with to unscale and clip it, NaN for an update to be left out, and
        the norm before the clip; both 0-d."""
        norm = torch.linalg.vector_norm(self.flat.grad) * self.scalars[2]
        clip = (self.max_norm / (norm + 1e-6)).clamp(max=1.0) if self.max_norm else 1.0
        return torch.where(norm < math.inf, self.scalars[2] * clip, math.nan), norm

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block the model has the averaged weights, where there are any; afterwards its own, bit for bit."""
        if self.average is None:
            yield
            return
        with torch.no_grad():
            self.average.exchange()
            try:
                yield
            finally:
                self.average.exchange()

    def reset(self) -> None:
        """Forget every update; the weights stay."""
        for tensor in (*self.state().values(), self.scalars):
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
        named = {f"exp_avg.{name}": view for name, view in self.flat.views(self.exp_avg, self.begin)}
        named |= {f"exp_avg_sq.{name}": view for name, view in self.flat.views(self.exp_avg_sq, self.begin)}
        return named | {"updates": self.scalars[1:2]}


class StableAdamW(AdamW):
    """AdamW whose learning rate for a tensor is divided by the root mean square of g^2 / max(v, eps^2) where that is
    above 1: when gradients outgrow what v remembers, the step stays as long as it was.

    One more pass over the gradients in plain PyTorch, with two buffers of their size. The clip by global norm stays.
    Source: Wortsman et al., arXiv:2304.13013, algorithm 2.
    """

    def __init__(self, flat: FlatParameters, **options):
        super().__init__(flat, **options)
        begins = [begin for begin, _ in flat.places.values()]
        self.set_segments([*begins[1:], flat.master.numel()])

    def update(self) -> None:
        factor, _ = self.gradient_factor()
        correction2 = -torch.expm1((self.scalars[1] + 1) * (math.log(self.beta2) if self.beta2 else -math.inf))
        square = (self.flat.grad * factor).square_()
        ratio = torch.lerp(square, self.exp_avg_sq, self.beta2).div_(correction2).clamp_(min=self.eps**2)
        torch.div(square, ratio, out=ratio)
        mean_square = torch.stack([view.mean() for _, view in self.flat.views(ratio)])
        torch.div(1.0, mean_square.sqrt().clamp(min=1.0), out=self.segment_lr)
        super().update()
