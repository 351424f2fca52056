"""What a budget buys on a card, before it is spent: python -m cramfast.plan --budget 24h [--gpu "RTX 2080 Ti"].

Takes the flags of cramfast.train that say what a run is, not those that say where it lies or how it goes on (--run-dir,
--resume, --schedule-from-here, --replay). Without --gpu the machine at hand is measured; a card is predicted from its
data sheet and from measurements where there are any.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from cramfast.config import TrainConfig, require
from cramfast.cost import calibration, counted, footprint, measurements
from cramfast.cost.calibration import Efficiency
from cramfast.cost.cards import Card, find_card
from cramfast.cost.forecast import Forecast, Line, ScalingLaw, floor_forecast, forecast, read_law
from cramfast.cost.measurements import Comparison
from cramfast.cost.roofline import microbatch_parts, parameter_count, update_parts
from cramfast.errors import command
from cramfast.kernels import dispatch
from cramfast.pages.numbers import short, span
from cramfast.recipes import choose_device, resolve, starting_config
from cramfast.runtime.allocator import keep_freed_memory
from cramfast.runtime.arguments import VOCABULARY, program, under_one_name
from cramfast.session.budget import Budget, parse_budget
from cramfast.session.memory import size_of_part, smaller

USABLE_MEMORY = 0.9  # of a device: the count came out 5 to 8 % below what steps took on a CPU (docs/log)


@dataclass(frozen=True)
class Arguments:
    """Predict what a budget buys: tokens, speed, memory and loss.

    Takes the flags of cramfast.train but --run-dir, --resume, --schedule-from-here and --replay; --objective rtd and
    --short-sequence-len are not counted, and refused. Without --gpu it is measured, in half a minute, what this machine
    does.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    gpu: str | None = None
    """A card to predict for, as "RTX 2080 Ti"; an unknown name prints the list. Without it: the machine at hand."""
    fit: Path | None = None
    """Scaling law for the expected loss: the JSON of python -m cramfast.scaling fit."""
    runs: Path = Path("runs")
    """Folder of recorded runs that the prediction is compared with, where they fit."""
    results: tuple[Path, ...] = ()
    """Results of pytest bench/ on a GPU, whose efficiencies are taken for --gpu."""


@dataclass(frozen=True)
class Plan:
    """A prediction and what it is held against; `floor` is that of stock PyTorch, for a card by its name."""

    forecast: Forecast
    floor: Forecast | None
    card: Card
    budget: Budget
    baseline: int
    law: ScalingLaw | None
    compared: list[Comparison]


def parse(args: list[str] | None = None) -> Arguments:
    """Read the command line, with every "auto" resolved for the card or for this machine.

    Raises:
        UserError: a value that cannot work, or a card that is not in the table.
    """
    args = under_one_name(args, dict([VOCABULARY]))
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--preset", "--recipe", "--device", "--gpu"):
        early.add_argument(flag)
    first, _ = early.parse_known_args(args)
    asked = first.device if first.device in ("cpu", "cuda") else "auto"
    default = starting_config(first.preset, first.recipe, "cuda" if first.gpu else choose_device(asked))
    arguments = tyro.cli(
        tyro.conf.configure(tyro.conf.FlagConversionOff)(Arguments),
        args=args,
        default=Arguments(config=default),
        prog=program("plan"),
    )
    config = arguments.config
    require(config.objective == "mlm", f"a plan for --objective {config.objective}", "leave it out: it is not counted")
    require(config.short_sequence_len == 0, "a plan for --short-sequence-len", "leave it out: it is not counted")
    if arguments.gpu is None:
        return replace(arguments, config=resolve(config))
    card = find_card(arguments.gpu)
    dtype = card.dtype if config.dtype == "auto" else config.dtype
    require(
        dtype != "bfloat16" or card.dtype == "bfloat16",
        f"dtype=bfloat16 on {card.name}",
        "use --dtype float16: its tensor cores know no bfloat16",
    )
    return replace(arguments, config=replace(config, device="cuda", dtype=dtype))


def fitting_microbatch(config: TrainConfig, card: Card, baseline: int) -> int:
    """The recipe's microbatch, in as few parts as the memory asks for, as training splits it (session/memory.py)."""
    usable, whole, parts = USABLE_MEMORY * card.memory_bytes, config.microbatch_tokens, 1
    while footprint.training_bytes(config, size_of_part(whole, parts), baseline) > usable:
        choices = [more for more in smaller(whole, parts, config.sequence_len) if more > parts]
        if not choices:
            break
        parts = choices[0]
    return size_of_part(whole, parts)


def make_plan(arguments: Arguments) -> Plan:
    """Measure or look up, then predict.

    Raises:
        UserError: an unreadable fit, results file or record.
    """
    config = arguments.config
    law = read_law(arguments.fit) if arguments.fit else None
    budget = parse_budget(config.budget)
    dtype = getattr(torch, config.dtype)
    efficiencies: dict[str, Efficiency]
    if arguments.gpu:
        card, baseline = find_card(arguments.gpu), footprint.CONTEXT_BYTES
        efficiencies = measurements.row_efficiencies(measurements.read_rows(arguments.results), card, config.dtype)
        tokens = fitting_microbatch(config, card, baseline)
    else:
        baseline = footprint.resident_bytes() if config.device == "cpu" else footprint.CONTEXT_BYTES
        card = calibration.machine_at_hand(config.device, dtype)
        tokens = fitting_microbatch(config, card, baseline)
        efficiencies = calibration.measure(card, microbatch_parts(config, tokens) + update_parts(config), dtype)
    compared = measurements.comparisons(arguments.runs, config, card, efficiencies)
    floor = floor_forecast(config, card, tokens) if arguments.gpu else None
    return Plan(forecast(config, card, tokens, efficiencies), floor, card, budget, baseline, law, compared)


def limit(plan: Plan) -> tuple[Line, float]:
    """The part that takes the most time over the whole run, and its share."""
    tokens, seconds, steps = plan.forecast.run(plan.budget)
    spent = [(line, line.seconds * tokens / plan.forecast.tokens) for line in plan.forecast.microbatch]
    spent += [(line, line.seconds * steps) for line in plan.forecast.update]
    line, most = max(spent, key=lambda pair: pair[1])
    return line, most / seconds


def memory_rows(plan: Plan) -> list[tuple[str, str, str]]:
    """(what, figure, how it is known) of memory and microbatch."""
    made, card, usable = plan.forecast, plan.card, USABLE_MEMORY * plan.card.memory_bytes
    needed = footprint.training_bytes(made.config, made.tokens, plan.baseline)
    largest = footprint.largest_microbatch(made.config, usable, plan.baseline)
    verdict = f"counted; microbatches of {made.tokens:,}" if needed <= usable else "counted; does not fit"
    return [
        ("memory", f"{needed / 1e9:.2f} of {card.memory_bytes / 1e9:.1f} GB", verdict),
        ("largest microbatch", f"{largest:,} tokens" if largest else "none", f"in {USABLE_MEMORY:.0%} of the memory"),
    ]


def expected_loss(law: ScalingLaw | None, config: TrainConfig, tokens: float) -> tuple[str, str]:
    """The loss that the law expects, and what to think of it."""
    if law is None:
        return "no fit", "--fit FILE gives one"
    N = law.size(config.model)
    beyond = "; outside the sizes and tokens of the fit" if law.extrapolates(N, tokens) else ""
    return f"{law.loss(N, tokens):.3f}", f"nats per masked token, for the fit's text{beyond}"


def speed_rows(plan: Plan, most: str, rate: float, basis: str) -> list[tuple[str, str, str]]:
    """Tokens/s, and whose operators they assume; for a card by its name, those of its floor too."""
    config = plan.forecast.config
    dtype, windowed = getattr(torch, config.dtype), config.model.global_every > 1
    figure = f"{most}{rate:,.0f}"
    if plan.floor is None:
        used = {op: dispatch.choose(op, config.device, dtype).implementation for op in dispatch.OPERATORS}
        return [("tokens/s", figure, f"operators: {named(used)}; {basis}")]
    chip = "sm_{}{}".format(*plan.card.capability)
    used = counted.implementations(chip, dtype)
    if windowed:
        used["local attention"] = counted.implementations(chip, dtype, windowed)["attention"]
    tokens, seconds, _ = plan.floor.run(plan.budget)
    ours = "cpp for all, our kernels, as far as a trial on the card takes them"
    return [
        ("tokens/s", figure, f"operators: {ours}; {basis}"),
        (
            "tokens/s of the floor",
            f"at most {tokens / seconds:,.0f}",
            f"operators: {named(used)}; each call at its bound",
        ),
    ]


def named(used: dict[str, str]) -> str:
    """Implementations in words: the one that most operators have, then the others."""
    common = max(used.values(), key=list(used.values()).count)
    rest = [f"{op} {name}" for op, name in used.items() if name != common]
    return ", ".join([*rest, f"the rest {common}"]) if rest else f"{common} for all"


def summary(plan: Plan) -> list[tuple[str, str, str]]:
    """(what, figure, how it is known) of the whole run."""
    made, card, config = plan.forecast, plan.card, plan.forecast.config
    tokens, seconds, steps = made.run(plan.budget)
    unmeasured = sum(line.part.op != "copy" and not line.efficiency.source for line in made.microbatch + made.update)
    timed = plan.budget.unit == "seconds"
    most, most_tokens = "at most " * (unmeasured > 0), "at most " * (unmeasured > 0 and timed)
    least_time = "at least " * (unmeasured > 0 and not timed)
    rate, peak, flops = tokens / seconds, card.tensor_flops, short(tokens * made.flops_per_token, "FLOP")
    spent = f"in {least_time}{span(seconds)}, {steps:,.0f} steps, {flops}"
    parameters = parameter_count(config.model)
    basis = f"the roofline, {unmeasured} parts unmeasured" if unmeasured else "all parts measured"
    loss, fitted = expected_loss(plan.law, config, tokens)
    line, share = limit(plan)
    return [
        ("card", card.name, card.source),
        ("peaks", f"{peak / 1e12:,.3g} TFLOP/s, {card.bandwidth / 1e9:,.0f} GB/s", f"{config.dtype} matmul; memory"),
        ("model", f"{config.preset}, {short(parameters)} parameters", f"sequences of up to {config.sequence_len}"),
        *speed_rows(plan, most, rate, basis),
        ("tokens", f"{most_tokens}{short(tokens)}", spent),
        ("MFU", f"{most}{rate * made.flops_per_token / peak:.0%}", "of the matmul peak above"),
        *memory_rows(plan),
        ("expected loss", loss, fitted),
        ("limit", line.part.name, f"{share:.0%} of the time, bound by {line.bound_by}"),
    ]


def show(plan: Plan) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"what {plan.forecast.config.budget} buys, predicted")
    for column in ("what", "figure", "how it is known"):
        table.add_column(column)
    for row in summary(plan):
        table.add_row(*row)
    table.add_section()
    for run in plan.compared:
        figures = f"{run.predicted:,.0f} for {run.measured:,.0f} tokens/s"
        table.add_row(f"run {run.name}", figures, f"error {run.error:+.0%}; {run.conditions}")
    if not plan.compared:
        table.add_row("error", "not known", "no recorded run of this model on this card")
    for title, lines in (("a microbatch", plan.forecast.microbatch), ("an update", plan.forecast.update)):
        table.add_section()
        total = sum(line.seconds for line in lines)
        table.add_row(title, f"{1e3 * total:,.2f} ms", "")
        for line in lines:
            figures = f"{1e3 * line.seconds:,.2f} ms, {line.seconds / total:.0%}"
            table.add_row(f"  {line.part.name}", figures, known(line))
    Console(width=118, markup=False).print(table)


def known(line: Line) -> str:
    """What bounds a part and how near it comes to that."""
    if line.part.op == "copy":
        return "memory, at the bandwidth of a copy"
    if not line.efficiency.source:
        return f"{line.bound_by}; taken at its peak, not measured"
    return f"{line.bound_by}; {line.efficiency.value:.0%} of its bound, {line.efficiency.source}"


def main() -> None:
    """The command line."""
    arguments = parse()
    if arguments.config.threads:
        torch.set_num_threads(arguments.config.threads)
    keep_freed_memory()
    show(make_plan(arguments))


if __name__ == "__main__":
    command(main)
