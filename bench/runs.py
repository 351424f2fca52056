"""docs/results.md from real runs: python -m bench.runs [RUN ...] [--out docs] [--commands FILE].

With run folders, everything that the page needs of them is gathered into results.json; the page and its picture are
drawn from that file alone, so that without run folders they come out again as they are.
"""

import io
import itertools
import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bench.tables import grid
from cramfast.config import Curation, require
from cramfast.errors import UserError, command
from cramfast.pages.numbers import short, span
from cramfast.runtime import atomic
from cramfast.runtime.jsonfile import read_json
from cramfast.session.record import EVALUATIONS, Record, read_record

JSON, PAGE, PICTURE = "results.json", "results.md", "results-loss.svg"
CURVE_POINTS = 60  # of a held-out curve in the JSON
TASKS = ("cola", "rte", "mrpc", "sts-b", "sst-2")  # columns of the table; other scores of a run follow below it
DAY_2080TI = 53.8e12 * 0.4 * 86400  # FLOPs: a card's peak (half precision, dense), 40 % of it, a day
# Of Cramming, arXiv:2212.14034: training losses at the end of a day, nats per masked token.
PUBLISHED_LOSSES = (("paper, 8 layers, A4000 day", 1.84), ("paper, 24 layers, A4000 day", 1.97))
PUBLISHED_DAYS = (
    ("RTX 2080 Ti day at 40 % of its peak", DAY_2080TI),
    ("A6000 day of the paper", 104.5e3 * 86400 * 623e6),
)
INTRODUCTION = (
    "Written by `python -m bench.runs` from [results.json](results.json); every figure comes from the runs at the end."
)
TABLE_NOTE = f"""Held-out loss: nats per masked token, 15 % masked, the same text and masks for every row. GLUE:
development sets, Cramming's protocol (5 epochs, batch 16, last epoch), median (lowest–highest) over the seeds:
Matthews correlation for cola, F1 for mrpc, Pearson correlation for sts-b, else accuracy. BLiMP: mean over the
paradigms, by pseudo-log-likelihood; chance is 50. A 2080 Ti day is {DAY_2080TI / 1e18:.2f} exaFLOP: 40 % of its peak
for 24 hours."""
PICTURE_NOTE = """The levels are losses that the paper (arXiv:2212.14034) ends a day on an A4000 with, at 15 % masks,
second-hand: training losses over a vocabulary of 32,768 and other text. **They do not compare with ours in nats**,
and the FLOPs behind them were not published, so they are levels, not points. An A6000 day: the 103–106 thousand
tokens/s published for it, at 623 MFLOP a token."""
COLOURS = ("#1f6feb", "#c4500c", "#1a7f37", "#8250df")


def gather(folder: Path) -> dict:
    """What the page needs of one run folder.

    Raises:
        UserError: no run, or one without a held-out loss.
    """
    record = read_record(folder)
    loss = record.heldout[1]
    require(math.isfinite(loss), f"{folder}: a run without a held-out loss", "train it first")
    rows = thinned(record.evaluations)
    return {
        "name": record.name,
        **{key: record.config.get(key) for key in ("preset", "recipe", "optimizer", "seed", "budget", "dtype")},
        "masking": record.config.get("masking", "bert"),
        "parameters": record.parameters,
        **{key: record.last(key) for key in ("tokens", "flops", "seconds", "heldout_loss", "heldout_accuracy")},
        "steps": record.last("step"),
        "tokens_per_s": record.middle("tokens_per_s"),
        "mfu": record.middle("mfu"),
        "unigram_entropy": record.unigram_entropy,
        "curve": {key: record.column(key, rows) for key in ("flops", "tokens", "heldout_loss")},
        "device": record.run.get("device"),
        "threads": record.run.get("threads"),
        "versions": record.run.get("versions", {}),
        "text": text_of(record),
        "scores": scores_of(folder),
    }


def thinned(rows: list[dict]) -> list[dict]:
    """At most CURVE_POINTS rows, the first and the last among them."""
    every = max(1, math.ceil(len(rows) / CURVE_POINTS))
    return [row for number, row in enumerate(rows) if number % every == 0 or number == len(rows) - 1]


def text_of(record: Record) -> dict:
    """Sources without their folders, sizes, and the checksums that tell whether two runs had the same text."""
    manifest = record.manifest
    return {
        "sources": [Path(str(source)).name for source in manifest.get("sources", [])],
        "curation": manifest.get("curation", {}),
        "splits": manifest.get("splits", {}),
        "files": manifest.get("files", {}),
    }


def scores_of(folder: Path) -> dict:
    """Scores that cramfast.evaluate left in a run: {"blimp": ..., "glue": {row: ...}}, what there is of it."""
    found = {}
    if blimp := read_json(folder / EVALUATIONS / "blimp.json"):
        accuracies = [paradigm["accuracy"] for paradigm in blimp["paradigms"].values()]
        pairs = sum(paradigm["pairs"] for paradigm in blimp["paradigms"].values())
        found["blimp"] = {"mean": statistics.fmean(accuracies), "paradigms": len(accuracies), "pairs": pairs}
    if glue := read_json(folder / EVALUATIONS / "glue-cramming.json"):
        found["glue"] = {
            row: {"metric": entry["metric"], "remark": entry["remark"], "scores": scores}
            for entry in glue["tasks"].values()
            for row, scores in entry["scores"].items()
        }
    return found


def table(runs: list[dict]) -> str:
    """One row for each run: what was spent, and what came of it."""
    header = ["recipe", "preset", "parameters", "tokens", "FLOPs", "training time", "of a 2080 Ti day", "held-out loss"]
    header += ["BLiMP, %", *TASKS]
    lines = [
        [
            run["recipe"], run["preset"], short(run["parameters"]), short(run["tokens"]), short(run["flops"]),
            span(run["seconds"]), f"{100 * run['flops'] / DAY_2080TI:.2g} %", f"{run['heldout_loss']:.3f}", blimp(run),
            *(median(run["scores"].get("glue", {}).get(task)) for task in TASKS),
        ]
        for run in runs
    ]  # fmt: skip
    return grid(header, lines, left=2)


def blimp(run: dict) -> str:
    """Mean accuracy; marked where it is not the whole set."""
    scores = run["scores"].get("blimp")
    if not scores:
        return "–"
    whole = scores["pairs"] == 67000
    return f"{100 * scores['mean']:.1f}" + ("" if whole else f" ({scores['pairs']:,} pairs)")


def median(entry: dict | None) -> str:
    """Median (lowest–highest) over the seeds, points; marked where the data are not GLUE's own."""
    points = [100 * score for score in entry["scores"] if score is not None] if entry else []
    if not points:
        return "–"
    shown = f"{statistics.median(points):.1f} ({min(points):.1f}–{max(points):.1f})"
    return shown + (f", {entry['remark']}" if entry["remark"] else "")


def others(runs: list[dict]) -> str:
    """Scores that the table has no column for, as a list; "" where there are none."""
    lines = [
        f"- {run['recipe']}, {row} ({entry['metric']}): {median(entry)}"
        for run in runs
        for row, entry in run["scores"].get("glue", {}).items()
        if row not in TASKS
    ]
    return "\n".join(lines)


def picture(runs: list[dict]) -> str:
    """The SVG: on the left the runs by themselves, on the right beside what the paper published."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "results", "font.size": 9}):
        figure = Figure(figsize=(10, 4), layout="constrained")
        near, far = figure.subplots(1, 2)
        for axes, title in ((near, "held-out loss, nats per masked token"), (far, "beside the paper's losses")):
            for run, colour in zip(runs, itertools.cycle(COLOURS), strict=False):
                points = [
                    (x, y) for x, y in zip(*(run["curve"][k] for k in ("flops", "heldout_loss")), strict=True) if x
                ]
                x, y = zip(*points, strict=True) if points else ((), ())
                axes.plot(x, y, "o-", color=colour, markersize=3, linewidth=1.2, label=run["recipe"])
            axes.set_xscale("log", subs=(2, 5))  # minor ticks are labelled within a decade: all nine would run together
            axes.set_xlabel("training FLOPs")
            axes.set_title(title, loc="left", fontsize=10)
            axes.grid(color="#dfe2e6", linewidth=0.7)
            axes.spines[["top", "right"]].set_visible(False)
        near.legend(frameon=False)
        beside_the_paper(far)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def beside_the_paper(axes) -> None:
    """Levels of the published losses, whose FLOPs were not published, and days of cards for scale."""
    for label, loss in PUBLISHED_LOSSES:
        axes.axhline(loss, color="#636c76", linewidth=1, linestyle=(0, (5, 3)))
        below = loss == min(value for _, value in PUBLISHED_LOSSES)
        axes.annotate(
            f"{label}: {loss}", (0, loss), (4, -3 if below else 3), textcoords="offset points", fontsize=8,
            color="#636c76", xycoords=("axes fraction", "data"), va="top" if below else "bottom",
        )  # fmt: skip
    for label, flops in PUBLISHED_DAYS:
        axes.axvline(flops, color="#b0b7bf", linewidth=1)
        axes.annotate(
            label, (flops, 1), (-3, 0), textcoords="offset points", xycoords=("data", "axes fraction"), rotation=90,
            fontsize=8, color="#636c76", ha="right", va="top",
        )  # fmt: skip
    axes.set_ylim(bottom=1)
    axes.set_xlim(right=2e19)


def page(results: dict) -> str:
    """docs/results.md as text."""
    runs = results["runs"]
    text = runs[0]["text"]
    splits = "; ".join(
        f"{split}: {', '.join(f'{value:,} {key}' for key, value in counts.items())}"
        for split, counts in text["splits"].items()
    )
    more, entropy = others(runs), runs[0]["unigram_entropy"]
    parts = [
        "# Results",
        INTRODUCTION,
        table(runs),
        TABLE_NOTE,
        f"Other scores:\n\n{more}" if more else "",
        f"![Held-out loss over training FLOPs]({PICTURE})",
        f"{PICTURE_NOTE} Unigram entropy of our text: {entropy:.3f} nats.",
        "## How it was made",
        "\n".join(made(run) for run in runs),
        f"Text: {', '.join(text['sources'])}. {splits}. Curation: {curated(text)}.",
        "\n".join(["```bash", *results["commands"], "```"]) if results["commands"] else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def made(run: dict) -> str:
    """Machine, versions and speed of a run, as an item of a list."""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return (
        f"- {run['recipe']}: {run['device']}, {run['threads']} threads, {run['dtype']}; {versions}; optimizer "
        f"{run.get('optimizer', 'adamw')}, budget {run['budget']}, seed {run['seed']}, {run['steps']:,.0f} updates, "
        f"{short(run['tokens_per_s'])} tokens/s and MFU {run['mfu']:.0%} (medians)"
    )


def curated(text: dict) -> str:
    """Which documents were left out: the keys of Curation that differ from none."""
    idle = asdict(Curation())
    return ", ".join(f"{k} {v}" for k, v in text["curation"].items() if k in idle and v != idle[k]) or "none"


def check_comparable(runs: list[dict]) -> None:
    """Losses in one table are on one held-out set, of models trained under one masking.

    Raises:
        UserError: two runs had different text, or another masking.
    """
    for run in runs[1:]:
        if run["masking"] != runs[0]["masking"]:
            raise UserError(
                f"{run['name']}: trained with --masking {run['masking']}, {runs[0]['name']} with {runs[0]['masking']}, "
                "so their held-out losses do not compare — cramfast evaluate perplexity puts both under one masking"
            )
        if run["text"]["files"] != runs[0]["text"]["files"]:
            raise UserError(f"{run['name']}: another text than {runs[0]['name']} — train both on one prepared folder")


@dataclass(frozen=True)
class Options:
    """Write results.json, results.md and its picture."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Run folders with their evaluations; none: draw the page again from results.json."""
    out: Path = Path("docs")
    """Folder of results.json, results.md and the picture."""
    commands: Path | None = None
    """File of the commands that made the runs, for the page."""


def main() -> None:
    """Gather, then draw."""
    options = tyro.cli(Options, description=__doc__)
    stored = options.out / JSON
    if options.runs:
        runs = [gather(folder) for folder in options.runs]
        check_comparable(runs)
        try:
            commands = options.commands.read_text(encoding="utf-8").splitlines() if options.commands else []
        except OSError as error:
            raise UserError(f"--commands {options.commands}: cannot be read ({error.strerror})") from None
        atomic.write_text(stored, json.dumps({"commands": commands, "runs": runs}, indent=1, allow_nan=False) + "\n")
    results = read_json(stored)
    if not results.get("runs"):
        raise UserError(f"{stored}: no results there — name the run folders")
    atomic.write_text(options.out / PICTURE, picture(results["runs"]))
    atomic.write_text(options.out / PAGE, page(results))
    for name in (JSON, PAGE, PICTURE):
        print(f"written: {options.out / name}")


if __name__ == "__main__":
    command(main)
