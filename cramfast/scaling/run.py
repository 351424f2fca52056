"""python -m cramfast.scaling run: train every run of a plan, one after the other."""

import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cramfast.config import TrainConfig, require
from cramfast.errors import UserError
from cramfast.pages.numbers import short, span
from cramfast.prepare import prepare
from cramfast.recipes import choose_device
from cramfast.runtime.arguments import program
from cramfast.runtime.progress import Stages
from cramfast.scaling import plan as plans
from cramfast.scaling import table
from cramfast.scaling.plan import Plan, Run
from cramfast.scaling.runner import Job, Runner

CALIBRATION_S = 0.7  # of training for each shape, three times; the median counts
PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class Calibration:
    """Seconds that a shape takes on this machine now."""

    token_s: float
    evaluation_s: float


def calibrate(configs: dict[str, TrainConfig], prepared: Path, report) -> dict[str, Calibration]:
    """Train each shape for a moment in this process, under the trainer's settings."""
    from cramfast.scaling.stepper import Stepper, as_the_trainer

    as_the_trainer(next(iter(configs.values())))
    found = {}
    for number, (shape, config) in enumerate(configs.items()):
        report("calibrating", number, len(configs))
        stepper = Stepper(config, prepared).warm_up()
        rate = statistics.median(stepper.turn(CALIBRATION_S)[0] for _ in range(3))
        found[shape] = Calibration(1 / rate, stepper.evaluation_s())
    report("calibrating", len(configs), len(configs))
    return found


def start_up_s(config: TrainConfig, console) -> float:
    """Wall seconds of a run of one step: starting, loading, two evaluations, saving."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for _ in Runner(Path(folder), console).train(Job("start", replace(config, budget="1steps"), 1.0, {})):
            pass
    return time.perf_counter() - started


def run_s(run: Run, found: dict[str, Calibration], start_s: float, evaluations: int) -> float:
    """Estimated wall seconds of a run."""
    shape = found[run.shape]
    return start_s + run.tokens * shape.token_s + (evaluations - 1) * shape.evaluation_s


def with_interval(run: Run, found: dict[str, Calibration], evaluations: int) -> Run:
    """The run with its evaluations spread over the estimated training time."""
    interval = max(0.05, run.tokens * found[run.shape].token_s / evaluations)
    return replace(run, config=replace(run.config, eval_interval=round(interval, 2)))


def fitted_into(plan: Plan, estimate_s, limit_s: float) -> Plan:
    """The plan, or with every budget divided by the smallest factor, in steps of a tenth, that fits into the limit.

    Raises:
        UserError: starting and evaluating alone take longer.
    """
    factor, shorter = 1.0, plan
    while limit_s and estimate_s(shorter) > limit_s:
        factor *= 1.1
        if factor > 1000:
            raise UserError(
                f"plan {plan.name}: its runs do not fit {span(limit_s)} on this machine, however short — "
                "raise --minutes, or name fewer runs in a plan of your own"
            )
        shorter = plans.shortened(plan, factor)
    return shorter


def read_settings(folder: Path) -> dict[str, Any]:
    """plan.json of a plan's folder: the plan as it is run, its text, device and estimate.

    Raises:
        UserError: none there, or a damaged one.
    """
    path = folder / PLAN_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found — {program('scaling')} run writes it") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}) — restore it, or start the plan in another folder") from None


def differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value before, value now) of every value that differs; lists of equal length go item by item."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in before | now:
            yield from differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from differences(old, new, f"{key}[{number}]")
    elif before != now:
        yield key, before, now


def runs_of(settings: dict[str, Any], folder: Path) -> list[Run]:
    """Every run of the plan in a folder, ready to start."""
    plan = plans.from_dict(settings["plan"], str(folder / PLAN_FILE))
    runs = plans.expand(plan, Path(settings["data"]), settings["device"], settings["threads"], settings["dtype"])
    found = {shape: Calibration(**times) for shape, times in settings["calibration"].items()}
    return [with_interval(run, found, plan.evaluations) for run in runs]


@dataclass(frozen=True)
class Arguments:
    """Train every run of a plan and gather one table; started again, it goes on where it was."""

    plan: str = "auto"
    """smoke, cpu, gpu, rehearsal or a .toml file; auto: gpu on a GPU, cpu elsewhere."""
    out: Path | None = None
    """Folder of the plan; by default scaling/NAME."""
    data: tuple[str, ...] = ()
    """Text, as for cramfast.train; enough that no run sees it twice. A plan that goes on keeps its own."""
    minutes: float | None = None
    """Longest time that the whole plan may take by its estimate, in place of the plan's own; 0: no limit."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch."""
    estimate: bool = False
    """Calibrate, say how long the plan takes, and stop."""
    keep_checkpoints: bool = False
    """Keep the weights of every run."""

    def run(self, console) -> None:
        """Calibrate, estimate, train.

        Raises:
            UserError: a plan, text or machine that does not fit, a folder that holds another plan, or a failed run.
        """
        require(self.minutes is None or 0 <= self.minutes < math.inf, f"minutes={self.minutes}", "use 0 or more")
        device = choose_device(self.device)
        name = self.plan if self.plan != "auto" else "gpu" if device == "cuda" else "cpu"
        plan = plans.read_plan(name, device)
        plan = plan if self.minutes is None else replace(plan, minutes=self.minutes)
        folder = self.out or Path("scaling") / plan.name
        settings = self.settings(plan, folder, device, console)
        if self.estimate:
            return
        runs = runs_of(settings, folder)
        jobs = [Job(run.name, run.config, settings["estimates_s"][run.name], labels(run)) for run in runs]
        started = time.perf_counter()
        rows = Runner(folder, console, keep_checkpoints=self.keep_checkpoints).work(jobs)
        console.print(
            f"{len(rows)} runs, {short(sum(r['tokens'] for r in rows))} tokens, {span(time.perf_counter() - started)} "
            f"now: {folder / table.TABLE}\nnext: {program('scaling')} fit {folder}",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip

    def settings(self, plan: Plan, folder: Path, device: str, console) -> dict[str, Any]:
        """The folder's plan.json, written after a calibration if this is the first start."""
        path = folder / PLAN_FILE
        asked = {
            "plan": plans.to_json(plan), "data": list(self.data), "device": device, "dtype": self.dtype,
            "threads": self.threads,
        }  # fmt: skip
        if path.exists():
            stored = read_settings(folder)
            before = {"threads": stored["threads"]} | stored["asked"]  # which had no threads at first
            asked["data"] = asked["data"] or before["data"]
            if found := next(differences(before, asked), None):
                key, old, new = found
                raise UserError(
                    f"{folder}: holds a plan with {key}={old!r}, not {new!r} — ask for {old!r}, or choose another --out"
                )
            self.describe(stored, console)
            return stored
        with Stages() as stages:
            base = plans.base_config(plan, device)
            prepared = prepare(
                self.data, None, tokenizer=base.tokenizer, vocab_size=base.model.vocab_size,
                heldout_fraction=base.heldout_fraction, documents=base.documents, text_key=base.text_key,
                format=base.format, encoding=base.encoding, skip_malformed=base.skip_malformed,
                curation=base.curation, progress=stages,
            )  # fmt: skip
            runs = plans.expand(plan, prepared, device, self.threads, self.dtype)
            found = calibrate({run.shape: run.config for run in runs}, prepared, stages)
            smallest = min(runs, key=lambda run: plans.parameters(run.config.model))
            start_s = start_up_s(smallest.config, console)

        def estimates(plan: Plan) -> dict[str, float]:
            runs = plans.expand(plan, prepared, device, self.threads, self.dtype)
            return {run.name: round(run_s(run, found, start_s, plan.evaluations), 2) for run in runs}

        short_plan = fitted_into(plan, lambda p: sum(estimates(p).values()), 60 * plan.minutes)
        settings = {
            "asked": asked, "plan": plans.to_json(short_plan), "data": str(prepared), "device": device,
            "dtype": self.dtype, "threads": self.threads, "start_s": round(start_s, 2),
            "calibration": {shape: asdict(times) for shape, times in found.items()},
            "estimates_s": estimates(short_plan),
            "corpus_tokens": corpus_tokens(prepared),
        }  # fmt: skip
        if not self.estimate:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        self.describe(settings, console)
        return settings

    def describe(self, settings: dict[str, Any], console) -> None:
        """What is going to happen, and for how long."""
        from rich.markup import escape
        from rich.table import Table

        runs = plans.expand(
            plans.from_dict(settings["plan"], PLAN_FILE), Path(settings["data"]), settings["device"],
            settings["threads"], settings["dtype"],
        )  # fmt: skip
        shown = Table(title=escape(f"plan {settings['plan']['name']}"), title_justify="left")
        for number, column in enumerate(("shape", "parameters", "lr", "tokens", "runs", "tokens/s", "minutes")):
            shown.add_column(column, justify="right" if number else "left")
        for shape in dict.fromkeys(run.shape for run in runs):
            mine = [run for run in runs if run.shape == shape]
            shown.add_row(
                shape, short(plans.parameters(mine[0].config.model)[0]), f"{mine[0].config.lr:.2g}",
                ", ".join(short(tokens) for tokens in sorted({run.tokens for run in mine})), str(len(mine)),
                f"{1 / settings['calibration'][shape]['token_s']:,.0f}",
                f"{sum(settings['estimates_s'][run.name] for run in mine) / 60:.1f}",
            )  # fmt: skip
        console.print(shown)
        total, first = sum(settings["estimates_s"].values()), settings["asked"]["plan"]["sizes"][0]["tokens"][0]
        cut = first / settings["plan"]["sizes"][0]["tokens"][0]
        limit = settings["asked"]["plan"]["minutes"]
        note = f"; every budget was divided by {cut:.3g} to fit {limit:g} minutes" if cut > 1.001 else ""
        console.print(
            f"estimate: {span(total)} for {len(runs)} runs, {span(settings['start_s'])} of it to start each{note}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        if (most := max(run.tokens for run in runs)) > settings["corpus_tokens"]:
            console.print(
                f"note: the longest run takes {short(most)} tokens, the text has {short(settings['corpus_tokens'])}: "
                "it sees text again, which buys less than new text — give more --data",
                highlight=False, soft_wrap=True,
            )  # fmt: skip


def labels(run: Run) -> dict[str, Any]:
    """What the table says of a run's place in its plan."""
    return {"size": run.size, "shape": run.shape, "reference": run.reference, "budget_tokens": run.tokens}


def corpus_tokens(prepared: Path) -> int:
    """Tokens of the training split."""
    from cramfast.text.prepared import read_manifest

    return read_manifest(prepared)["splits"]["train"]["tokens"]
