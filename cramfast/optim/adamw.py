"""AdamW over the flat buffers in one pass, StableAdamW, and the average of the weights; alone or on many processes."""

import contextlib
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator

import torch
from torch import Tensor

from cramfast import kernels
from cramfast.optim.flat import ALIGNMENT, FlatParameters
from cramfast.optim.sharding import Part, Sharding, divide
from cramfast.runtime.distributed import ALONE, Team
from cramfast.runtime.ranges import Range

STEADY_STEPS = 2000  # updates after which float16's loss scale is doubled, as torch.amp does


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
    """Exponential moving average of the weights, float32.

    The decay of update t is at most (1 + t) / (10 + t), so that the first weights are soon forgotten, as TensorFlow's
    ExponentialMovingAverage does with `num_updates`.

    Attributes:
        values: (own entries,) float32; in a process alone (P,), laid out like the master.
    """

    def __init__(self, sharding: Sharding, decay: float):
        self.sharding, self.flat, self.least = sharding, sharding.flat, 1.0 - decay
        self.values = sharding.own(self.flat.master).clone()

    def follow(self, updates: Tensor, skipped: Tensor) -> None:
        """Move towards the weights after update number `updates`, unless it was `skipped`; both 0-d."""
        share = (9.0 / (10.0 + updates)).clamp(min=self.least)
        self.values.lerp_(self.sharding.own(self.flat.master), share * (skipped == 0))

    def exchange(self) -> None:
        """Give the model the average and keep its weights here, or take that back."""
        weights = self.sharding.own(self.flat.master).clone()
        self.sharding.put(self.values, self.flat.master)
        self.values.copy_(weights)
        self.flat.refresh_half()
        self.sharding.publish()


class AdamW:
    """AdamW with global-norm clip, loss-scale removal and the half-precision copy; skips non-finite gradients.

    Source: Loshchilov and Hutter, arXiv:1711.05101.

    Args:
        flat: parameters and gradients.
        beta1, beta2, eps, weight_decay: of AdamW; nothing decays norms and biases.
        max_norm: largest global norm of the gradient; 0 for no clip.
        ema_decay: of the average of the weights; 0 keeps none.
        begin: the first entry of the flat buffers that AdamW updates.
        team: the processes that share the work; each keeps the state of its own entries.

    Attributes:
        part, hidden: the entries from `begin` on, which AdamW updates, and the whole matrices before them.
        loss_scale: what the loss is to be multiplied with before its backward pass.
        average: of the weights, or None.
    """

    def __init__(
        self, flat: FlatParameters, *, beta1: float, beta2: float, eps: float, weight_decay: float, max_norm: float,
        ema_decay: float = 0.0, begin: int = 0, team: Team = ALONE,
    ):  # fmt: skip
        self.flat, self.team, self.weight_decay = flat, team, weight_decay
        self.beta1, self.beta2, self.eps, self.max_norm = beta1, beta2, eps, max_norm
        self.hidden = divide([place for place, _ in flat.places.values() if place <= begin], team)
        self.part = divide(range(begin, flat.master.numel() + 1, ALIGNMENT), team)
        self.sharding = Sharding(team, flat, [self.hidden, self.part])
        self.exp_avg, self.exp_avg_sq = (torch.zeros_like(flat.master[self.part.own]) for _ in range(2))
        self.scalars = torch.zeros(5, device=flat.master.device)
        self.loss_scale = LossScale(torch.float32 if flat.half is None else flat.half.dtype, flat.master.device)
        self.average = WeightAverage(self.sharding, ema_decay) if ema_decay else None
        self.set_segments([flat.matrices_end, flat.master.numel()])

    def set_segments(self, ends: list[int]) -> None:
        """Let each stretch of the flat buffers that ends at one of `ends` have a learning rate of its own; `held` are
        those that this process owns entries of."""
        device, own = self.flat.master.device, self.part.own
        first, last = bisect_right(ends, own.start), bisect_left(ends, own.stop)
        self.held = slice(first, last + 1)
        held = [(min(end, own.stop) - own.start, end <= self.flat.matrices_end) for end in ends[self.held]]
        self.segment_end, self.segment_decay = (
            torch.tensor(column, device=device) for column in zip(*held, strict=True)
        )
        self.segment_decay = self.segment_decay * self.weight_decay
        self.segment_lr = torch.ones(len(held), device=device)

    @Range("optimizer")
    @torch.no_grad()
    def step(self, lr: float, loss_sum: Tensor, microbatches: float | Tensor) -> None:
        """Update with the gathered gradients (of all processes: sharding.py) and clear them; the host reads nothing.

        Args:
            lr: learning rate of this step.
            loss_sum: 0-d, summed loss of the microbatches; a non-finite one skips the update as a gradient would.
            microbatches: how many, on all processes, a short one as the part that it is of a whole one; the gradient
                is divided by this and by the loss scale before the clip.
        """
        self.scalars[0] = lr
        # 0 * inf is nan, and a nan scale counts as non-finite
        self.scalars[2] = 1.0 / (self.loss_scale.value * microbatches) + 0.0 * loss_sum
        self.update()
        self.sharding.publish()
        self.flat.grad.zero_()
        self.loss_scale.update(self.scalars[4])
        if self.average is not None:
            self.average.follow(self.scalars[1], self.scalars[4])

    def update(self) -> None:
        """Change the weights as the scalars say."""
        if self.team.alone:
            self.run_kernel(self.max_norm)  # which sees the whole gradient and takes its norm
        else:
            self.run_clipped(*self.gradient_factor())

    def run_clipped(self, factor: Tensor, norm: Tensor) -> None:
        """The kernel on a part of the gradient, with factor and norm of the whole: see gradient_factor()."""
        self.scalars[2] = factor  # clips and, where it is NaN, leaves the update out
        self.run_kernel(max_norm=0.0)
        self.scalars[3], self.scalars[4] = norm, torch.where(factor.isfinite(), 0.0, 1.0)

    def run_kernel(self, max_norm: float) -> None:
        """csrc/adamw.h over this process's entries."""
        flat, own = self.flat, self.part.own
        half = None if flat.half is None or own.start >= flat.matrices_end else flat.half[own]
        kernels.adamw(
            flat.master[own], flat.grad[own], self.exp_avg, self.exp_avg_sq, half,
            self.segment_end, self.segment_decay, self.segment_lr, self.scalars,
            beta1=self.beta1, beta2=self.beta2, eps=self.eps, max_norm=max_norm,
        )  # fmt: skip

    def gradient_factor(self) -> tuple[Tensor, Tensor]:
        """What the kernel multiplies the gradient with to unscale and clip it, NaN for an update to be left out, and
        the norm before the clip, over all processes; both 0-d."""
        own = torch.linalg.vector_norm(self.sharding.own(self.flat.grad))
        norm = own if self.team.alone else torch.linalg.vector_norm(self.team.gathered(own))
        norm = norm * self.scalars[2]
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
        for values, _ in self.buffers().values():
            values.zero_()
        self.scalars.zero_()

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

    def buffers(self) -> dict[str, tuple[Tensor, list[Part]]]:
        """What is kept from one update to the next, by name: this process's entries, and of which parts they are."""
        return {"exp_avg": (self.exp_avg, [self.part]), "exp_avg_sq": (self.exp_avg_sq, [self.part])}

    @property
    def updates(self) -> Tensor:
        """(1,) float32: updates made."""
        return self.scalars[1:2]

    def state(self) -> dict[str, Tensor]:
        """Whole buffers by parameter name, and the count of updates; all processes call it, process 0 gets them."""
        named = {}
        for kind, (values, parts) in self.buffers().items():
            whole = self.sharding.collect(values, parts)
            named |= {f"{kind}.{name}": view for name, view in self.flat.views(whole, parts[0].cuts[0])}
        return named | {"updates": self.updates}

    def weights(self) -> dict[str, Tensor]:
        """The float32 weights by parameter name, as state()."""
        return dict(self.flat.views(self.collect(self.sharding.own(self.flat.master))))

    def averages(self) -> dict[str, Tensor]:
        """The averaged weights by parameter name, as state(); nothing where there are none."""
        return {} if self.average is None else dict(self.flat.views(self.collect(self.average.values)))

    def collect(self, values: Tensor) -> Tensor:
        """(P,) of every process's entries, on process 0."""
        return self.sharding.collect(values, self.sharding.parts)


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
        square = (self.flat.grad[self.part.own] * factor).square_()
        ratio = torch.lerp(square, self.exp_avg_sq, self.beta2).div_(correction2).clamp_(min=self.eps**2)
        torch.div(square, ratio, out=ratio)
        means, places = dict.fromkeys(self.flat.places, ratio.new_zeros(())), self.flat.places
        for name, _, piece in self.sharding.pieces(ratio, [self.part]):
            means[name] = piece.mean() * (len(piece) / places[name][1].numel())
        mean_square = self.team.total(torch.stack(list(means.values())))
        torch.div(1.0, mean_square[self.held].sqrt().clamp(min=1.0), out=self.segment_lr)
        super().update()
