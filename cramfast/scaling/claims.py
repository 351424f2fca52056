"""python -m cramfast.scaling claims: does each throughput modification buy the loss that the law predicts?

A claim compares two variants of one model at a constant number of parameters: with the modification, and without it.
Tokens/s come from interleaved rounds in this process; the law turns them into a loss at the same budget of time; runs
of that budget show the loss itself, seed by seed.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from cramfast.config import TrainConfig
from cramfast.cost.losslaw import Law
from cramfast.errors import UserError
from cramfast.pages.numbers import span
from cramfast.pages.page import write_page
from cramfast.pages.scoretable import ScoreTable
from cramfast.runtime.jsonfile import dumps, read_json
from cramfast.scaling.fit import laws_of, read_fit
from cramfast.scaling.law import interval
from cramfast.scaling.plan import Run, parameters
from cramfast.scaling.run import read_settings, runs_of
from cramfast.scaling.runner import Job, Runner
from cramfast.scaling.shift import confidence
from cramfast.scaling.stepper import Stepper, as_the_trainer
from cramfast.scaling.switches import SWITCHES, Variant
from cramfast.session.runfolder import cpu_name

CLAIMS_FILE, CLAIMS_TABLE = "claims.json", "claims.jsonl"
LEAST_SEEDS = 3
DRAWS = 2000  # resamplings of rounds


@dataclass(frozen=True)
class Claim:
    """One modification.

    Attributes:
        off: switches of the side without it.
        on: switches of the side with it, where those of the other side differ in more than the modification.
        obstacle: config -> why it cannot be tried on this machine with this text; "" when it can.
    """

    name: str
    off: tuple[str, ...]
    on: tuple[str, ...] = ()
    obstacle: Callable[[TrainConfig], str] = lambda config: ""


def needs_gpu(config: TrainConfig) -> str:
    """Obstacle of what only a GPU has."""
    return "" if config.device == "cuda" else "needs a GPU"


def needs_long_positions(config: TrainConfig) -> str:
    """Obstacle of sequences of 512 tokens where tables or microbatches are shorter."""
    if config.model.max_len >= 512 and config.microbatch_tokens >= 512:
        return ""
    return "needs model.max_len and microbatch_tokens of 512"


def needs_adamw(config: TrainConfig) -> str:
    """Obstacle of what takes AdamW's place."""
    return "" if config.optimizer == "adamw" else f"needs optimizer=adamw, the plan has {config.optimizer}"


HALF = {"cpu": "bfloat16", "cuda": "float16"}
OFF = ("biases", "dense_prediction", "padding", "torch_norm_and_gate", "materialised_scores", "per_tensor_adamw")


def claims_of(config: TrainConfig) -> list[Claim]:
    """Every claim, for a device; the precision that the plan used is that of all the others."""
    slow = config.dtype == "float32"  # where the plan does not use half precision, that claim alone tries it
    half = HALF[config.device] if slow else config.dtype
    off = [name for name in OFF if not (SWITCHES[name].optimizer and needs_adamw(config))]
    everything = (*off, "dropout", "float32") if config.device == "cpu" else (*off, "dropout", "float32", "no_graph")
    return [
        Claim("no biases", ("biases",), ("separate_gate",)),
        Claim("sparse prediction", ("dense_prediction",)),
        Claim("packing, not padding", ("padding",)),
        Claim("isolated documents, not naive packing", ("cross_document",)),
        Claim("LayerNorm + GLU in one node", ("separate_gate",)),
        Claim("our LayerNorm and GLU, not PyTorch's", ("torch_norm_and_gate",)),
        Claim("our attention, not materialised scores", ("materialised_scores",)),
        Claim("our attention, not padded SDPA", ("torch_attention",)),
        Claim("fused AdamW over flat buffers", ("per_tensor_adamw",), obstacle=needs_adamw),
        Claim(f"half precision ({half})", ("float32",), (half,) if slow else ()),
        Claim("half-precision accumulation", ("float16",), ("half_accumulation",), needs_gpu),
        Claim("graph capture", ("no_graph",), obstacle=needs_gpu),
        Claim("no dropout", ("dropout",)),
        Claim("length 128, not 512", ("length_512",), obstacle=needs_long_positions),
        Claim("all of them", everything),
    ]


@dataclass(frozen=True)
class Rates:
    """Tokens a second of both sides, a value a round; `useful` without padding, `slots` with it."""

    useful_on: list[float]
    useful_off: list[float]
    slots_on: list[float]
    slots_off: list[float]
    parameters_on: int
    parameters_off: int


def measure(claim: Claim, config: TrainConfig, prepared: Path, rounds: int, seconds: float) -> Rates:
    """Train both sides in turn. Which one begins changes every round: a drifting machine favours neither."""
    as_the_trainer(config)
    sides = {"on": claim.on, "off": claim.off}
    steppers = {side: Stepper(config, prepared, Variant(names)).warm_up() for side, names in sides.items()}
    rates: dict[str, list[float]] = {f"{kind}_{side}": [] for kind in ("useful", "slots") for side in sides}
    for number in range(rounds):
        for side in ("on", "off") if number % 2 == 0 else ("off", "on"):
            useful, slots = steppers[side].turn(seconds)
            rates[f"useful_{side}"].append(useful)
            rates[f"slots_{side}"].append(slots)
    counted = {f"parameters_{side}": sum(p.numel() for p in s.model.parameters()) for side, s in steppers.items()}
    return Rates(**rates, **counted)


def gain(on: list[float], off: list[float], seed: int = 0) -> tuple[float, tuple[float, float]]:
    """Median over rounds of on / off, and its 95 % interval by resampled rounds."""
    ratios = np.array(on) / np.array(off)
    drawn = np.random.default_rng(seed).integers(0, len(ratios), (DRAWS, len(ratios)))
    return float(np.median(ratios)), interval(np.median(ratios[drawn], axis=1))


def predicted_gain(law: Law, others: list[Law], N: int, rates: Rates, seconds: float) -> tuple[float, ...]:
    """(gain, low, high) in nats that the law gives for the tokens that both sides see in `seconds`.

    The interval holds the uncertainty of the law and of the rounds: each law of the bootstrap meets one resampling.
    """
    on, off = np.array(rates.useful_on), np.array(rates.useful_off)

    def of(law: Law, index) -> float:
        return float(law.loss(N, np.median(off[index]) * seconds) - law.loss(N, np.median(on[index]) * seconds))

    drawn = np.random.default_rng(1).integers(0, len(on), (len(others), len(on)))
    return of(law, slice(None)), *interval([of(other, index) for other, index in zip(others, drawn, strict=True)])


def verdict(predicted: tuple[float, ...] | None, measured: tuple[float, ...] | None, seeds: int) -> tuple[str, str]:
    """(confirmed, refuted or undecided; why).

    Confirmed: the intervals overlap, and the measured gain is surely above zero. Refuted: they do not overlap.
    Undecided: they overlap, but the runs do not show a gain; or something is missing.
    """
    if predicted is None:
        return "undecided", "no fitted law: python -m cramfast.scaling fit"
    if measured is None or seeds < LEAST_SEEDS:
        return "undecided", f"{seeds} of the {LEAST_SEEDS} seeds that it takes"
    if measured[1] > predicted[2]:
        return "refuted", "the runs gained more than throughput explains"
    if measured[2] < predicted[1]:
        return "refuted", "the runs gained less than throughput promises"
    if measured[1] > 0:
        return "confirmed", "intervals overlap, gain above zero"
    return "undecided", "intervals overlap, the measured one holds zero"


def jobs_of(claims: list[Claim], run: Run, options: "Options", start_s: float) -> list[Job]:
    """Budgeted runs, of the run's shape, of both sides of every claim; a shared side is trained once a seed."""
    sides = list(dict.fromkeys(names for claim in claims for names in (claim.on, claim.off)))
    jobs = []
    for seed in range(options.seeds):
        for names in sides if seed % 2 == 0 else sides[::-1]:
            variant = Variant(names)
            changed = variant.config(run.config)
            budget = f"{options.seconds:g}s"
            changed = replace(changed, seed=seed, budget=budget, eval_interval=options.seconds, checkpoint_interval=1e9)
            labels = {"switches": list(names), "size": 0, "shape": run.shape, "reference": not names}
            name = f"{run.shape}-{'+'.join(names) or 'all-on'}-{budget}-s{seed}"
            jobs.append(Job(name, changed, options.seconds + start_s, labels, names))
    return jobs


def measured_gain(claim: Claim, rows: list[dict[str, Any]]) -> tuple[tuple[float, ...] | None, int]:
    """((mean gain, low, high) in nats, pairs): final loss without minus with, seed by seed; Student's interval."""
    losses = {(tuple(row["switches"]), row["seed"]): row["loss"] for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    pairs = [(losses.get((claim.off, seed)), losses.get((claim.on, seed))) for seed in seeds]
    gains = np.array([off - on for off, on in pairs if off is not None and on is not None])
    between = confidence(gains)
    return (None if between is None else (float(gains.mean()), *between)), len(gains)


@dataclass(frozen=True)
class Options:
    """How much to measure."""

    shape: str = ""
    """Shape of the plan to try the claims on, as 4x256; nothing: the one in the middle."""
    only: tuple[str, ...] = ()
    """Claims whose name holds one of these words."""
    rounds: int = 7
    """Interleaved rounds for tokens/s."""
    round_s: float = 2.0
    """Least seconds of a round."""
    seconds: float = 60.0
    """Budget of each training run; within the range of tokens that the law was fitted to."""
    seeds: int = 3
    """Training runs of each side; 0 measures tokens/s alone."""


def chosen_run(runs: list[Run], shape: str) -> Run:
    """A run of the plan with the shape to try the claims on.

    Raises:
        UserError: no such shape in the plan.
    """
    references = {run.shape: run for run in runs if run.reference}
    references = sorted(references.values(), key=lambda run: parameters(run.config.model))
    if not shape:
        return references[len(references) // 2]
    for run in runs:
        if run.shape == shape:
            return run
    known = ", ".join(dict.fromkeys(run.shape for run in runs))
    raise UserError(f"--shape {shape}: not in the plan — one of {known}")


def judged(claim: Claim, rates: Rates, rows: list[dict], found: dict[str, Any], N: int, seconds: float) -> dict:
    """One entry of claims.json."""
    result = {"name": claim.name, "on": claim.on, "off": claim.off, "rates": asdict(rates)}
    for kind in ("slots", "useful"):
        value, between = gain(getattr(rates, f"{kind}_on"), getattr(rates, f"{kind}_off"))
        result[f"{kind}_gain"] = [value, *between]
    predicted = predicted_gain(*laws_of(found), N, rates, seconds) if found else None
    measured, seeds = measured_gain(claim, rows)
    word, why = verdict(predicted, measured, seeds)
    return result | {"predicted": predicted, "measured": measured, "seeds": seeds, "verdict": word, "why": why}


def _nats(gain: list[float] | None) -> str:
    return "{:+.3f} ({:+.3f} to {:+.3f})".format(*gain) if gain else "–"


def table(found: dict[str, Any]) -> ScoreTable:
    """The claims as a reader wants to see them."""
    rows = []
    for claim in found["claims"]:
        if "obstacle" in claim:
            rows.append([claim["name"], "–", "–", "–", "–", claim["obstacle"]])
            continue
        gains = ["{:.2f} ({:.2f} to {:.2f})".format(*claim[key]) for key in ("slots_gain", "useful_gain")]
        nats = [_nats(claim[key]) for key in ("predicted", "measured")]
        rows.append([claim["name"], *gains, *nats, f"{claim['verdict']}: {claim['why']}"])
    columns = ["with it", "tokens/s, times", "useful tokens/s, times", "predicted, nats", "measured, nats", "verdict"]
    settings, tried = found["settings"], [claim for claim in found["claims"] if "obstacle" not in claim]
    rounds = numbers([len(claim["rates"]["useful_on"]) for claim in tried] or [settings["rounds"]])
    seeds = numbers([claim["seeds"] for claim in tried] or [settings["seeds"]])
    where = f"{settings['shape']}, {settings['dtype']}, on {settings['device']}"
    notes = [
        f"{where}. Gains are of the side with the modification over the other. Tokens/s: median and 95 % interval of "
        f"{rounds} interleaved rounds. Nats: after {span(settings['seconds'])} of training; predicted by "
        f"the law from useful tokens/s, measured as the mean of {seeds} seeds, Student's 95 % interval.",
        "Biases are tried with LayerNorm and GLU in separate nodes on both sides. Lengths are compared on held-out "
        "sequences of 128 tokens.",
    ]
    return ScoreTable("What each throughput modification buys", columns, rows, notes)


def processor(config: TrainConfig) -> str:
    """What the claims were measured on."""
    import torch

    name = torch.cuda.get_device_name() if config.device == "cuda" else cpu_name()
    return f"{name}, {torch.get_num_threads()} threads"


def merged(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """claims.json with the claims of `now` in place of the same ones of `before`, which keeps the others.

    Nothing is kept where the shape, budget, precision or machine is another: the page states one for all of them.
    """
    old, new = before.get("settings", {}), now["settings"]
    if any(old.get(key) != new[key] for key in ("shape", "seconds", "dtype", "device")):
        return now
    entries = {claim["name"]: claim for claim in (*before["claims"], *now["claims"])}
    tokens = [*old.get("tokens", []), *new["tokens"]]
    between = [min(tokens), max(tokens)] if tokens else []
    return {"settings": new | {"tokens": between}, "claims": list(entries.values())}


def numbers(values: list[int]) -> str:
    """Their range: "3", or "3 to 6"."""
    return " to ".join(map(str, sorted({min(values), max(values)})))


def tokens_of(rows: list[dict[str, Any]]) -> list[int]:
    """Fewest and most tokens of a run: whether the law knows such budgets."""
    return [min(row["tokens"] for row in rows), max(row["tokens"] for row in rows)] if rows else []


@dataclass(frozen=True)
class Arguments:
    """Switch every throughput modification off, one at a time, and compare speed and loss; writes claims.json."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of a plan whose law was fitted."""
    options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)

    def run(self, console) -> None:
        """Measure, train, judge.

        Raises:
            UserError: no plan in the folder, no such shape or claim, or a run that failed.
        """
        options, settings = self.options, read_settings(self.folder)
        run, prepared = chosen_run(runs_of(settings, self.folder), options.shape), Path(settings["data"])
        config = run.config
        chosen = [c for c in claims_of(config) if not options.only or any(word in c.name for word in options.only)]
        if not chosen:
            names = "; ".join(claim.name for claim in claims_of(config))
            raise UserError(f"--only {' '.join(options.only)}: no such claim — they are: {names}")
        possible = [claim for claim in chosen if not claim.obstacle(config)]
        jobs = jobs_of(possible, run, options, settings["start_s"])
        total = 2 * len(possible) * options.rounds * options.round_s + sum(job.estimate_s for job in jobs)
        console.print(f"{len(possible)} claims, {len(jobs)} training runs: about {span(total)}", highlight=False)
        rates = {}
        for claim in possible:
            rates[claim.name] = measure(claim, config, prepared, options.rounds, options.round_s)
            value, _ = gain(rates[claim.name].useful_on, rates[claim.name].useful_off)
            console.print(f"{claim.name}: {value:.2f} times the useful tokens/s", highlight=False, soft_wrap=True)
        rows = Runner(self.folder / "claims", console, CLAIMS_TABLE).work(jobs) if jobs else []
        found = read_fit(self.folder)
        N = parameters(config.model)[found.get("count") == "body"]
        entries = [
            judged(claim, rates[claim.name], rows, found, N, options.seconds) if claim in possible
            else {"name": claim.name, "obstacle": claim.obstacle(config)}
            for claim in chosen
        ]  # fmt: skip
        about = {"shape": run.shape, "dtype": config.dtype, "device": processor(config), "tokens": tokens_of(rows)}
        result = {"settings": asdict(options) | about, "claims": entries}
        if options.only:
            result = merged(read_json(self.folder / CLAIMS_FILE), result)
        write_page(self.folder / CLAIMS_FILE, dumps(result, indent=1) + "\n")
        table(result).show(console)
        console.print(f"written: {self.folder / CLAIMS_FILE}", markup=False, highlight=False, soft_wrap=True)
