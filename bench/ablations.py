"""Each training option against the default, at equal tokens and at equal time: python -m bench.ablations --data TEXT.

The default is a preset as it stands, with AdamW under warm-up, stable, decay; what of these runs is worth having makes
the recipe `cramfast` (cramfast/recipes.py).

Every option trains the same preset on the same text with the same seeds, for the same number of tokens; its worth is
the difference of the held-out losses, seed by seed. Where its updates take another time, it trains once more, for as
many tokens as fit into the time that the default took: tokens x median over the seeds of (seconds of the default /
seconds of the option). A loss read off the middle of the longer curve would not do, as the schedules end with the
budget and the rate has not decayed there; a budget in seconds would charge an option for whatever else the machine did.

Every finished run is a line of --results; started again with the same file, only the missing ones are made. Run it on a
quiet machine: the times of a busy one say nothing. Small models keep two cores busier as two runs of one thread each
(--jobs 2 --threads 1) than as one run of two; then every run has the same company.
"""

import math
import multiprocessing
import signal
import statistics
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
import tyro
from rich.console import Console

from bench import machine
from bench.tables import append, read
from cramfast import stages
from cramfast.config import TrainConfig, config_hash, require
from cramfast.errors import UserError, command
from cramfast.pages.numbers import span
from cramfast.pages.scoretable import ScoreTable
from cramfast.recipes import choose_device, crammed, plain, resolve
from cramfast.runtime.allocator import keep_freed_memory
from cramfast.session.budget import Budget
from cramfast.session.record import read_record
from cramfast.train import train

DEFAULT = "default"
SAME_SPEED = 0.02  # an option whose time differs by less is not run again: the machine's own noise is of that size
CALIBRATION_S = 20.0
NEVER_S = 1e9
TOKENS, TIME = "tokens", "time"  # what a run shares with the default's


def changed(**values) -> Callable[[TrainConfig], TrainConfig]:
    """An option that sets these keys."""
    return lambda config: replace(config, **values)


# name -> the option as a function from the default's config; the default, a preset by no recipe, comes first. All train
# on the same prepared text, so what an option says of curation counts for nothing here; of order, it counts.
OPTIONS: dict[str, Callable[[TrainConfig], TrainConfig]] = {
    DEFAULT: changed(),
    "crammed": crammed,
    "triangle": changed(schedule="triangle"),
    "one-cycle": changed(schedule="one_cycle"),
    "linear": changed(schedule="linear"),
    "cosine": changed(schedule="cosine"),
    "batches x 4": lambda config: replace(config, batch_tokens=4 * config.batch_tokens, ramp_fraction=0.0),
    "batches x 4 after a ramp": lambda config: replace(config, batch_tokens=4 * config.batch_tokens, ramp_fraction=0.6),
    "masks 0.15": changed(mask_fraction=0.15, mask_fraction_end=0.15),
    "masks 0.30 to 0.15": changed(mask_fraction_end=0.15),
    "most full stops first": changed(order="sentences"),
    "commonest words first": changed(order="likelihood"),
    "length 64 for a quarter": changed(short_sequence_len=64, short_fraction=0.25),
    "always [MASK]": changed(masking="all_mask"),
    "StableAdamW": changed(optimizer="stable_adamw"),
    "StableAdamW, no clip": changed(optimizer="stable_adamw", max_norm=0.0),
    "Muon": changed(optimizer="muon", muon_rate=1.0),
    "Muon x 3": changed(optimizer="muon", muon_rate=3.0),
    "Muon x 6": changed(optimizer="muon", muon_rate=6.0),
    "Muon, lr x 3": lambda config: replace(config, optimizer="muon", muon_rate=1.0, lr=3 * config.lr),
    "Muon, lr x 6": lambda config: replace(config, optimizer="muon", muon_rate=1.0, lr=6 * config.lr),
    "Muon, lr x 3, triangle": lambda config: replace(
        config, optimizer="muon", muon_rate=1.0, lr=3 * config.lr, schedule="triangle"
    ),
    "Muon, lr x 6, triangle": lambda config: replace(
        config, optimizer="muon", muon_rate=1.0, lr=6 * config.lr, schedule="triangle"
    ),
    "Muon x 3, triangle": changed(optimizer="muon", muon_rate=3.0, schedule="triangle"),
    "Muon x 1.5, decay 0.1": changed(optimizer="muon", muon_rate=1.5, weight_decay=0.1),
    "AdamW, lr / 2": lambda config: replace(config, lr=config.lr / 2),
    "AdamW, lr x 3": lambda config: replace(config, lr=3 * config.lr),
    "average 0.99": changed(ema_decay=0.99),
    "z-loss 1e-4": changed(z_loss=1e-4),
}


@dataclass(frozen=True)
class Options:
    """Train every option with every seed; print the table and its Markdown."""

    data: tuple[str, ...] = ()
    """Text, as cramfast.train takes it; nothing: docstrings found on this machine."""
    results: Path = Path("ablations.jsonl")
    """One JSON line for every run; lines that are there are not run again."""
    preset: str = "mini"
    seeds: int = 3
    minutes_per_run: float = 5.0
    """Training time of a run of the default; it is turned into tokens by a trial."""
    tokens: int = 0
    """Tokens of a run, in place of --minutes-per-run."""
    only: tuple[str, ...] = ()
    """Names of the options to run, beside the default; nothing: all of them."""
    threads: int = 0
    """CPU threads of a run; 0 leaves the choice to torch."""
    jobs: int = 1
    """Runs at the same time."""
    estimate: bool = False
    """Say how long it will take, and stop."""
    show: bool = False
    """Print the table of --results as it is, and stop."""

    def __post_init__(self):
        for least, keys in ((1, ("seeds", "jobs")), (0, ("tokens", "threads"))):
            for key in keys:
                require(getattr(self, key) >= least, f"--{key} {getattr(self, key)}", f"use {least} or more")
        minutes = self.minutes_per_run
        require(0 < minutes < math.inf, f"--minutes-per-run {minutes}", "use a finite value above 0")


@dataclass(frozen=True)
class Plan:
    """What all runs of a results file share; its first line."""

    tokens: int
    seconds: float  # of a run of the default, by the trial
    preset: str
    config: str  # hash of the default's config
    device: str
    dtype: str
    threads: int
    jobs: int = 1


@dataclass(frozen=True)
class Run:
    """One training run: an option and a seed, for as many tokens as the default (TOKENS) or in its time (TIME)."""

    option: str
    seed: int
    equal: str
    tokens: int

    @property
    def key(self) -> tuple[str, int, str]:
        return self.option, self.seed, self.equal


def chosen(options: Options) -> list[str]:
    """The default and the options asked for.

    Raises:
        UserError: a name that does not exist.
    """
    for name in options.only:
        if name not in OPTIONS:
            raise UserError(f"--only {name!r}: no such option — choose from {', '.join(OPTIONS)}")
    return [name for name in OPTIONS if name == DEFAULT or not options.only or name in options.only]


def train_once(config: TrainConfig, prepared: Path, budget: Budget) -> dict:
    """Train in a folder that is removed afterwards; what its record says at the end.

    Raises:
        KeyboardInterrupt: a signal ended the training before its budget.
    """
    config = replace(config, eval_interval=NEVER_S, checkpoint_interval=NEVER_S)
    with tempfile.TemporaryDirectory() as scratch:
        if not train(config, Path(scratch), prepared, budget):
            raise KeyboardInterrupt
        record = read_record(Path(scratch))
    keys = ("heldout_loss", "heldout_accuracy", "tokens", "seconds")
    return {key: record.last(key) for key in keys} | {"steps": len(record.steps), "skipped": record.skipped}


class Workers(ProcessPoolExecutor):
    """Processes that Ctrl-C does not reach, though the terminal sends it to all: the one that started them decides."""

    def submit(self, *arguments):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a process started here inherits it
        try:
            return super().submit(*arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def workers(options: Options) -> Iterator[Executor]:
    """Processes that train, as many as runs go at a time, and a folder for what they leave.

    An exception, as of Ctrl-C, kills them: nothing of an unfinished run is of use.
    """
    with tempfile.TemporaryDirectory() as scratch:
        started = (options.threads, scratch)
        with Workers(options.jobs, multiprocessing.get_context("spawn"), begin, started) as pool:
            try:
                yield pool
            except BaseException:
                for process in multiprocessing.active_children():
                    process.kill()
                raise


def begin(threads: int, scratch: str) -> None:
    """What a process does before its first run, whose temporary folders then lie in `scratch`."""
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()
    tempfile.tempdir = scratch


def make_plan(tokens: int, seconds: float, options: Options, config: TrainConfig) -> Plan:
    """The plan of these options on this machine."""
    threads = options.threads or torch.get_num_threads()
    of_runs = (options.preset, config_hash(config), config.device, config.dtype, threads, options.jobs)
    return Plan(tokens, seconds, *of_runs)


def new_plan(options: Options, config: TrainConfig, prepared: Path, pool: Executor) -> Plan:
    """A plan with the speed of the default, from a trial that goes through the whole schedule in a few seconds."""
    seconds = 60 * options.minutes_per_run
    trial = pool.submit(train_once, config, prepared, Budget("seconds", min(CALIBRATION_S, seconds))).result()
    tokens_per_s = trial["tokens"] / trial["seconds"]
    tokens = options.tokens or round(seconds * tokens_per_s)
    return make_plan(tokens, tokens / tokens_per_s, options, config)


def open_results(options: Options, config: TrainConfig, prepared: Path, pool: Executor) -> tuple[Plan, list[dict]]:
    """The plan and the finished runs of the results file; a new file gets its plan.

    Raises:
        UserError: the file belongs to other runs.
    """
    if options.results.exists():
        plan, rows = read_results(options.results)
        for key, value in vars(make_plan(options.tokens or plan.tokens, plan.seconds, options, config)).items():
            if value != getattr(plan, key):
                remedy = "choose another --results, or the values of before"
                raise UserError(f"{options.results}: begun with {key}={getattr(plan, key)!r}, not {value!r} — {remedy}")
        return plan, rows
    plan = new_plan(options, config, prepared, pool)
    append(options.results, {"plan": vars(plan)} | machine.description())
    return plan, []


def read_results(path: Path) -> tuple[Plan, list[dict]]:
    """The plan and the finished runs.

    Raises:
        UserError: no such file, or another kind of file.
    """
    rows = read(path)
    if not rows or "plan" not in rows[0]:
        raise UserError(f"{path}: does not begin with a plan — choose another --results")
    return Plan(**rows[0]["plan"]), rows[1:]


def equal_tokens(names: list[str], plan: Plan, seeds: int) -> Iterator[Run]:
    """Every option with a seed before the next seed, so that a file cut short holds pairs."""
    for seed in range(seeds):
        for name in names:
            yield Run(name, seed, TOKENS, plan.tokens)


def equal_time(names: list[str], plan: Plan, seeds: int, rows: list[dict]) -> Iterator[Run]:
    """The options whose speed is not that of the default."""
    for seed in range(seeds):
        for name in names:
            share = speed(rows, name)
            if abs(share - 1) > SAME_SPEED:
                yield Run(name, seed, TIME, round(plan.tokens * share))


def speed(rows: list[dict], option: str) -> float:
    """Median over the seeds of the default's seconds divided by the option's, for as many tokens; NaN without one."""
    ratios = [default["seconds"] / other["seconds"] for default, other in pairs(rows, option, TOKENS)]
    return statistics.median(ratios) if ratios else math.nan


def pairs(rows: list[dict], option: str, equal: str) -> list[tuple[dict, dict]]:
    """(row of the default, row of the option) of every seed that has both.

    At equal time, an option as fast as the default is paired by its run at equal tokens.
    """
    found = {(row["option"], row["seed"], row["equal"]): row for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    if equal == TIME and not any(row["option"] == option and row["equal"] == TIME for row in rows):
        equal = TOKENS if abs(speed(rows, option) - 1) <= SAME_SPEED else TIME
    both = ((found.get((DEFAULT, seed, TOKENS)), found.get((option, seed, equal))) for seed in seeds)
    return [(default, other) for default, other in both if default and other]


def table(rows: list[dict], plan: Plan) -> ScoreTable:
    """Mean ± standard deviation over the seeds: losses, and differences to the default of the same seed."""
    lines = []
    for option in [name for name in OPTIONS if any(row["option"] == name for row in rows)]:
        cells = [option]
        for equal in (TOKENS, TIME):
            both = pairs(rows, option, equal)
            if equal == TOKENS:
                cells.append(spread([other["heldout_loss"] for _, other in both]))
            differences = [other["heldout_loss"] - default["heldout_loss"] for default, other in both]
            cells.append("" if option == DEFAULT else spread(differences, "+"))
        lines.append([*cells, f"{speed(rows, option):.2f}×", str(len(pairs(rows, option, TOKENS)))])
    columns = ["option", "held-out loss", "Δ at equal tokens", "Δ at equal time", "speed", "seeds"]
    notes = [
        f"Preset {plan.preset}, {plan.tokens:,} tokens a run, {plan.dtype} on {plan.device}, {plan.threads} threads, "
        f"{plan.jobs} at a time. "
        "Held-out loss: nats per masked token, 15 % masked whatever the option trains with. Δ: difference to the "
        "default of the same seed, below zero is better. ±: standard deviation over the seeds. Equal time: trained "
        f"again for tokens × speed where the speed is more than {SAME_SPEED:.0%} off, else the run at equal tokens."
    ]
    return ScoreTable("Ablations", columns, lines, notes)


def spread(values: list[float], sign: str = "") -> str:
    """mean ± standard deviation; the mean alone of one value, – of none."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):{sign}.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def estimate(options: Options, plan: Plan, rows: list[dict], names: list[str]) -> str:
    """How many runs are missing and how long they take."""
    done = {(row["option"], row["seed"], row["equal"]) for row in rows}
    missing = sum(run.key not in done for run in equal_tokens(names, plan, options.seeds))
    timed = [row["seconds"] for row in rows if row["option"] == DEFAULT]
    each = statistics.median(timed) if timed else plan.seconds
    again = sum(name != DEFAULT for name in names) * options.seeds
    return (
        f"{missing} runs of {plan.tokens:,} tokens are missing, about {span(missing * each)} of training; then up to "
        f"{again} at equal time, at most {span(again * each)}; starting, evaluating and saving come on top"
    )


def run_missing(
    runs: Iterator[Run], rows: list[dict], options: Options, config: TrainConfig, prepared: Path, pool: Executor
) -> None:
    """Train what has no line yet; each run adds its line to the results file and to `rows`."""

    def submit(run: Run):
        print(f"{run.option}, seed {run.seed}, equal {run.equal}: {run.tokens:,} tokens", flush=True)
        option = replace(OPTIONS[run.option](config), seed=run.seed)
        return pool.submit(train_once, option, prepared, Budget("tokens", run.tokens))

    done = {(row["option"], row["seed"], row["equal"]) for row in rows}
    missing = iter([run for run in runs if run.key not in done])
    running = {submit(run): run for run in islice(missing, options.jobs)}
    while running:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            run = running.pop(future)
            row = {"option": run.option, "seed": run.seed, "equal": run.equal, "planned_tokens": run.tokens}
            append(options.results, row | future.result())
            rows.append(row | future.result())
            running |= {submit(following): following for following in islice(missing, 1)}


def main() -> None:
    """Prepare, estimate, train, print."""
    options = tyro.cli(Options, description=__doc__)
    if options.show:
        return show(*read_results(options.results))
    names = chosen(options)
    config = resolve(plain(options.preset, choose_device("auto")))
    prepared, config = stages.prepare_text(replace(config, data=options.data))
    with workers(options) as pool:
        plan, rows = open_results(options, config, prepared, pool)
        print(estimate(options, plan, rows, names), flush=True)
        if options.estimate:
            return
        run_missing(equal_tokens(names, plan, options.seeds), rows, options, config, prepared, pool)
        run_missing(equal_time(names, plan, options.seeds, rows), rows, options, config, prepared, pool)
    show(plan, rows)


def show(plan: Plan, rows: list[dict]) -> None:
    """Print the table, for a person and as Markdown."""
    found = table(rows, plan)
    found.show(Console(width=130))
    print(f"\n{found.markdown()}")


if __name__ == "__main__":
    command(main)
