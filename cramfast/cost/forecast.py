"""From a recipe, a card and measured efficiencies to seconds a microbatch, tokens in a budget and expected loss."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cramfast.config import ModelConfig, TrainConfig
from cramfast.cost import counted
from cramfast.cost.calibration import Efficiency
from cramfast.cost.cards import Card
from cramfast.cost.losslaw import Law
from cramfast.cost.roofline import (
    Part,
    bound,
    cost,
    masked_tokens,
    matrix_parameters,
    microbatch_parts,
    muon_parameters,
    parameter_count,
    update_parts,
)
from cramfast.errors import UserError
from cramfast.kernels.cases import ragged_lengths
from cramfast.model.encoder import flops_per_token
from cramfast.optim import schedule
from cramfast.runtime.arguments import program
from cramfast.session.budget import Budget

SLICES = 1000  # of a budget, in which the batch ramp counts as constant


@dataclass(frozen=True)
class Line:
    """All runs of one part in a microbatch, or in an update: seconds, what bounds it, how near to that it comes."""

    part: Part
    seconds: float
    bound_by: str
    efficiency: Efficiency


@dataclass(frozen=True)
class Forecast:
    """Seconds of a microbatch of `tokens` and of an update, part by part."""

    config: TrainConfig
    tokens: int
    microbatch: list[Line]
    update: list[Line]
    flops_per_token: float

    @property
    def microbatch_s(self) -> float:
        return sum(line.seconds for line in self.microbatch)

    @property
    def update_s(self) -> float:
        return sum(line.seconds for line in self.update)

    def step_s(self, microbatches: float) -> float:
        """Seconds of a step of so many microbatches."""
        return microbatches * self.microbatch_s + self.update_s

    def tokens_per_s(self, microbatches: float) -> float:
        """Tokens a second in steps of so many microbatches."""
        return microbatches * self.tokens / self.step_s(microbatches)

    def run(self, budget: Budget) -> tuple[float, float, float]:
        """(tokens, seconds, steps) of a whole budget, the batch ramp included."""
        tokens = seconds = steps = 0.0
        config, pieces = self.config, round(self.config.microbatch_tokens / self.tokens)
        for index in range(SLICES):
            fraction = (index + 0.5) / SLICES
            count = pieces * schedule.microbatches(
                fraction, config.microbatch_tokens, config.batch_tokens, config.ramp_fraction
            )
            step = {"tokens": count * self.tokens, "seconds": self.step_s(count), "steps": 1.0}
            step["flops"] = step["tokens"] * self.flops_per_token
            made = budget.amount / SLICES / step[budget.unit]
            tokens, seconds, steps = tokens + made * step["tokens"], seconds + made * step["seconds"], steps + made
        return tokens, seconds, steps


def forecast(config: TrainConfig, card: Card, tokens: int, efficiencies: Mapping[str, Efficiency]) -> Forecast:
    """Predict microbatches of `tokens`; an efficiency is looked up by the part's name, then by its operator."""

    def lines(parts: list[Part]) -> list[Line]:
        return [line(part, config, card, efficiencies) for part in parts]

    microbatch, update = microbatch_parts(config, tokens), update_parts(config)
    return Forecast(config, tokens, lines(microbatch), lines(update), mean_flops(config, tokens))


def floor_forecast(config: TrainConfig, card: Card, tokens: int) -> Forecast:
    """The same for stock PyTorch's operators on a GPU, each call at its bound: a line for all calls of a name."""
    dtype = getattr(torch, config.dtype)
    chip = "sm_{}{}".format(*card.capability)
    lengths = ragged_lengths(tokens, config.sequence_len)
    passing = counted.microbatch(config.model, chip, dtype, lengths, config.sequence_len, masked_tokens(config, tokens))
    by_adamw = parameter_count(config.model) - muon_parameters(config)
    matrices = matrix_parameters(config.model) - muon_parameters(config)
    # What is no operator's call is the same for both: gathering gradients, clearing them, Muon's products, averages.
    gathered = [part for part in microbatch_parts(config, tokens) if part.name == "gradients"]
    others = [part for part in update_parts(config) if part.op != "adamw"]
    return Forecast(
        config,
        tokens,
        [*called(passing, card), *(line(part, config, card, {}) for part in gathered)],
        [*called(counted.adamw(by_adamw, matrices, dtype), card), *(line(part, config, card, {}) for part in others)],
        mean_flops(config, tokens),
    )


def line(part: Part, config: TrainConfig, card: Card, efficiencies: Mapping[str, Efficiency]) -> Line:
    """A part at its bound over its efficiency."""
    least = bound(card, part.op, *cost(part.op, part.shape, getattr(torch, config.dtype), card.capability is not None))
    efficiency = efficiencies.get(part.name) or efficiencies.get(part.op) or Efficiency()
    return Line(part, part.count * least.seconds / efficiency.value, least.by, efficiency)


def called(calls: counted.Calls, card: Card) -> list[Line]:
    """Every call at its bound, those of a name together, in the order in which the names come."""
    found: dict[str, Line] = {}
    for call in calls.calls:
        # Products run on tensor cores; all else moves its tensors.
        least = bound(card, "linear", call.bytes, call.flops)
        before = found.get(call.name) or Line(Part(call.name, "call", {}, 0), 0.0, least.by, Efficiency())
        part = replace(before.part, count=before.part.count + 1)
        found[call.name] = replace(before, part=part, seconds=before.seconds + least.seconds)
    return list(found.values())


def mean_flops(config: TrainConfig, tokens: int) -> float:
    """FLOPs of a token, forward and backward, in a microbatch of `tokens` in the middle of a run."""
    attended = sum(n * n for n in ragged_lengths(tokens, config.sequence_len)) / tokens
    masked = (config.mask_fraction + config.mask_fraction_end) / 2
    return flops_per_token(config.model, masked, attended)


@dataclass(frozen=True)
class ScalingLaw(Law):
    """A law as it was fitted.

    `count` says what N counts: "total" or "body", the parameters outside the embedding table. `ranges` are the least
    and the most N and D that the law was fitted to.
    """

    count: str
    ranges: dict[str, list[float]]

    def size(self, model: ModelConfig) -> int:
        """N of a model."""
        return parameter_count(model) - (model.vocab_size * model.width if self.count == "body" else 0)

    def extrapolates(self, N: float, D: float) -> bool:
        """Whether that lies outside what the law was fitted to."""
        return any(not low <= x <= high for x, (low, high) in ((N, self.ranges["N"]), (D, self.ranges["D"])))


def read_law(path: Path) -> ScalingLaw:
    """The law in fit.json of `python -m cramfast.scaling fit`.

    Raises:
        UserError: no such file, no JSON object, or a constant that is missing or no number.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        constants = {key: float(found["law"][key]) for key in ("E", "A", "alpha", "B", "beta")}
        ranges = {key: [float(end) for end in found["ranges"][key]] for key in ("N", "D")}
        law = ScalingLaw(**constants, count=found["count"], ranges=ranges)
    except OSError as error:
        raise UserError(f"--fit {path}: unreadable ({error.strerror}) — {program('scaling')} fit writes it") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"--fit {path}: no fit with E, A, alpha, B and beta ({error}) — {program('scaling')} fit writes one"
        ) from None
    if not all(math.isfinite(value) for value in constants.values()):
        raise UserError(f"--fit {path}: a constant is not finite — fit again from more runs")
    return law
