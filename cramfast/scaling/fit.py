"""python -m cramfast.scaling fit: the law of a plan's runs, its word on runs it has not seen, and the shift test."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from cramfast.config import require
from cramfast.cost.losslaw import Law
from cramfast.errors import UserError
from cramfast.pages.numbers import short
from cramfast.pages.page import write_page
from cramfast.pages.scoretable import ScoreTable
from cramfast.runtime.arguments import program
from cramfast.runtime.jsonfile import dumps
from cramfast.scaling import law as laws
from cramfast.scaling.law import Points, interval
from cramfast.scaling.optimum import Cost, budget_name, optimum, six_nd
from cramfast.scaling.shift import shifts
from cramfast.scaling.table import TABLE, read_table

FIT_FILE = "fit.json"
LEAST_FLOOR = 0.05  # nats; no text is that predictable
COUNTS = {"total": "parameters", "body": "body_parameters"}


def points_of(rows: list[dict], count: str) -> Points:
    """The runs as points of the law."""
    return Points(*(np.array([row[key] for row in rows], float) for key in (COUNTS[count], "tokens", "loss")))


def reference_runs(rows: list[dict], path: Path) -> list[dict]:
    """The runs that the law is fitted to: the first shape of each size, so that shape does not blur the curve.

    Raises:
        UserError: a row without loss or size, rows of several precisions or machines.
    """
    for row in rows:
        if not all(
            isinstance(row.get(key), int | float) for key in ("parameters", "body_parameters", "tokens", "loss")
        ):
            raise UserError(f"{path}: {row['name']} has no loss or size — remove its row and run the plan again")
    kinds = {(row["device"], row["dtype"]) for row in rows}
    if len(kinds) > 1:
        raise UserError(f"{path}: runs of {len(kinds)} machines or precisions — a law belongs to one; split the table")
    return [row for row in rows if row["reference"]]


def held_out(rows: list[dict], number: int) -> tuple[list[dict], list[dict]]:
    """(runs to fit, runs to predict): the `number` that took the most FLOPs are predicted, as a real use would."""
    ordered = sorted(rows, key=lambda row: row["flops"])
    return (ordered[:-number], ordered[-number:]) if number else (ordered, [])


def predictions(rows: list[dict], number: int, count: str, samples: int) -> list[dict[str, Any]]:
    """Loss of the largest runs, predicted by the law of all the others."""
    known, unseen = held_out(rows, number)
    if not unseen:
        return []
    points = points_of(known, count)
    law = laws.fit(points)
    others = laws.bootstrap(points, law, samples)
    found = []
    for row in unseen:
        N, D = row[COUNTS[count]], row["tokens"]
        predicted = float(law.loss(N, D))
        found.append(
            {
                "name": row["name"], "N": N, "D": D, "measured": row["loss"], "predicted": predicted,
                "interval": interval([other.loss(N, D) for other in others]), "error": predicted / row["loss"] - 1,
            }
        )  # fmt: skip
    return found


def fitted(rows: list[dict], count: str, samples: int, unseen: int) -> dict[str, Any]:
    """All of fit.json that comes from the law.

    Raises:
        UserError: too few or degenerate runs.
    """
    points = points_of(rows, count)
    law = laws.fit(points)
    others = laws.bootstrap(points, law, samples)
    off = laws.residuals(law, points)
    return {
        "count": count, "law": asdict(law),
        "intervals": {key: interval([asdict(other)[key] for other in others]) for key in asdict(law)},
        "bootstrap": [[float(f"{x:.6g}") for x in asdict(other).values()] for other in others],
        "residuals": {row["name"]: float(r) for row, r in zip(rows, off, strict=True)},
        "rms_residual": float(np.sqrt(np.mean(off**2))),
        "predictions": predictions(rows, unseen, count, samples),
        "ranges": {"N": [points.N.min(), points.N.max()], "D": [points.D.min(), points.D.max()]},
    }  # fmt: skip


def advice(rows: list[dict], law: Law, others: list[Law], count: str, hours, flops) -> dict[str, Any]:
    """The best size for every budget of hours, at the measured speed, and of FLOPs, at the counted cost."""
    N, most = np.array([row[COUNTS[count]] for row in rows], float), max(row["tokens"] for row in rows)
    seconds = Cost.measured(N, 1 / np.array([row["tokens_per_s"] for row in rows]))
    work = Cost.measured(N, np.array([row["flops"] / row["tokens"] for row in rows]))
    found = {"hours": [], "flops": []}
    for amount in hours:
        found["hours"].append({"budget": amount} | asdict(optimum(law, others, seconds, 3600 * amount, most)))
    for amount in flops:
        best = optimum(law, others, work, amount, most)
        found["flops"].append({"budget": amount} | asdict(best) | {"six_nd": six_nd(law, amount)})
    found["speed"] = {"N": seconds.N.tolist(), "tokens_per_s": (1 / seconds.per_token).tolist()}
    return found


def read_fit(folder: Path) -> dict[str, Any]:
    """fit.json of a plan's folder, {} where there is none yet.

    Raises:
        UserError: a damaged one.
    """
    path = folder / FIT_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}) — {program('scaling')} fit {folder} writes it anew") from None


def laws_of(found: dict[str, Any]) -> tuple[Law, list[Law]]:
    """The law in fit.json and those of its bootstrap."""
    return Law(**found["law"]), [Law(*values) for values in found["bootstrap"]]


def tables(found: dict[str, Any]) -> list[ScoreTable]:
    """What a reader wants to see of fit.json."""
    return [law_table(found), prediction_table(found), shift_table(found), advice_table(found)]


def law_table(found: dict[str, Any]) -> ScoreTable:
    """The constants with their intervals."""
    rows = [
        [key, f"{value:.4g}", "{:.4g} to {:.4g}".format(*found["intervals"][key])]
        for key, value in found["law"].items()
    ]
    other = found.get("other_count")
    compared = f" With {other['count']} parameters it is {other['rms_residual']:.2%}." if other else ""
    notes = [
        f"{len(found['residuals'])} runs; root mean square residual {found['rms_residual']:.2%} of the loss, "
        f"N counted as {found['count']} parameters.{compared}",
        "Intervals: 95 % of resampled runs. The constants hang together; their wide intervals leave predictions inside "
        "the measured range narrow.",
    ]
    if found["intervals"]["E"][0] < LEAST_FLOOR:
        notes.append(
            "E cannot be told from zero: these runs are too small or too short to show where the loss ends, so that "
            "losses expected far beyond them are too low or too high."
        )
    return ScoreTable("L(N, D) = E + A / N^alpha + B / D^beta", ["constant", "value", "95 % interval"], rows, notes)


def prediction_table(found: dict[str, Any]) -> ScoreTable:
    """Runs left out of a fit, measured beside predicted loss in nats per masked token."""
    rows = [
        [p["name"], short(p["N"]), short(p["D"]), f"{p['measured']:.4f}", f"{p['predicted']:.4f}",
         "{:.4f} to {:.4f}".format(*p["interval"]), f"{p['error']:+.2%}"]
        for p in found["predictions"]
    ]  # fmt: skip
    columns = ["run left out", "N", "D", "measured loss", "predicted", "95 % interval", "error"]
    return ScoreTable("Runs that the law had not seen", columns, rows, [] if rows else ["None was left out."])


def shift_table(found: dict[str, Any]) -> ScoreTable:
    """The factor on tokens between two shapes of equal size, with what is left after it."""
    rows = []
    for s in found["shifts"]:
        between = "–" if s["interval"] is None else "{:.3f} to {:.3f}".format(*s["interval"])
        noise = "–" if not math.isfinite(s["noise"] or math.nan) else f"{s['noise']:.4f}"
        cells = [s["shape"], s["reference"], f"{s['factor']:.3f}", between, f"{s['before']:.4f}", f"{s['after']:.4f}"]
        rows.append([*cells, noise, str(s["seeds"])])
    columns = ["shape", "beside", "factor on tokens", "95 % interval", "distance before", "after", "of seeds", "pairs"]
    notes = [
        "Factor: tokens that the shape needs for one token of the shape beside it, at equal size. Distances: root mean "
        "square, nats per masked token, of training loss in the plateau of the learning rate. The curves are the same "
        "up to the factor where the distance after it is no larger than that between seeds. Intervals need two seeds.",
    ]
    empty = ["No size has a second shape with the same budget and seed, and runs long enough to compare."]
    return ScoreTable("Are curves of equal size the same up to a factor?", columns, rows, notes if rows else empty)


def advice_table(found: dict[str, Any]) -> ScoreTable:
    """Size, tokens and expected loss for each budget."""
    rows = [advice_row(budget_name(a["budget"]), a, "–") for a in found["advice"]["hours"]]
    for a in found["advice"]["flops"]:
        rows.append(
            advice_row(
                f"{short(a['budget'])} FLOPs", a, "{} × {}".format(*map(short, a["six_nd"])) if a["six_nd"] else "–"
            )
        )
    columns = ["budget", "size N", "95 % interval", "tokens D", "expected loss", "95 % interval", "N × D by 6ND", ""]
    notes = [
        "Hours at the tokens/s measured for each size, with lines between them; FLOPs as counted, 6ND beside them."
    ]
    if any(row[-1] for row in rows):
        notes.append("beyond: a larger size or more tokens than any run had; the law is extrapolated there.")
    return ScoreTable("What to train on this machine", columns, rows, notes)


def advice_row(name: str, a: dict[str, Any], closed: str) -> list[str]:
    """One budget's line; `closed` is what 6ND says."""
    sizes, losses = " to ".join(map(short, a["N_interval"])), "{:.3f} to {:.3f}".format(*a["loss_interval"])
    return [name, short(a["N"]), sizes, short(a["D"]), f"{a['loss']:.3f}", losses, closed, "beyond" * a["beyond"]]


@dataclass(frozen=True)
class Options:
    """How to fit, and which budgets to advise on."""

    count: Literal["total", "body"] = "total"
    """What N counts: all parameters, or those outside the embedding table."""
    hold_out: int = 2
    """Runs with the most FLOPs that a law of the others predicts; 0: none."""
    samples: int = 300
    """Resamplings of the runs for the intervals."""
    hours: tuple[float, ...] = (1 / 3, 1.0, 8.0, 24.0)
    flops: tuple[float, ...] = (1e15, 1e16, 1e17)

    def __post_init__(self):
        require(self.hold_out >= 0, f"hold_out={self.hold_out}", "use 0 or more")
        require(self.samples >= 1, f"samples={self.samples}", "use 1 or more; 300 are usual")
        for key in ("hours", "flops"):
            good = all(0 < amount < math.inf for amount in getattr(self, key))
            require(good, f"{key}={getattr(self, key)}", "use finite values above 0")


@dataclass(frozen=True)
class Arguments:
    """Fit the scaling law to a plan's runs: constants, predictions, shift test, advice; writes fit.json."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of a plan, as cramfast.scaling run leaves it."""
    options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)

    def run(self, console) -> None:
        """Fit, print, write.

        Raises:
            UserError: no table, or runs that no law can be fitted to.
        """
        found = fit_folder(self.folder, self.options)
        write_page(self.folder / FIT_FILE, dumps(found, indent=1) + "\n")
        for table in tables(found):
            table.show(console)
        console.print(f"written: {self.folder / FIT_FILE}", markup=False, highlight=False, soft_wrap=True)


def fit_folder(folder: Path, options: Options) -> dict[str, Any]:
    """All of fit.json.

    Raises:
        UserError: as Arguments.run.
    """
    rows = read_table(folder)
    if not rows:
        raise UserError(f"{folder}: no {TABLE} there — {program('scaling')} run writes it")
    references = reference_runs(rows, folder / TABLE)
    found = fitted(references, options.count, options.samples, options.hold_out)
    other = next(count for count in COUNTS if count != options.count)
    points = points_of(references, other)
    rms = float(np.sqrt(np.mean(laws.residuals(laws.fit(points), points) ** 2)))
    law, others = laws_of(found)
    return found | {
        "other_count": {"count": other, "rms_residual": rms},
        "shifts": [asdict(s) | {"noise": s.noise if math.isfinite(s.noise) else None} for s in shifts(rows)],
        "advice": advice(references, law, others, options.count, options.hours, options.flops),
        "device": rows[0]["device"], "dtype": rows[0]["dtype"], "corpus_tokens": rows[0]["corpus_tokens"],
    }  # fmt: skip
