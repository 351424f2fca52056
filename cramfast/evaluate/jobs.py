"""One task fine-tuned with several seeds: the fits, their scores as JSON values, and the table's rows."""

import statistics
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import Progress

from cramfast.evaluate.checkpoints import Checkpoint
from cramfast.evaluate.examples import Examples
from cramfast.evaluate.finetune import Encoded, Fit, Protocol, encode, fit
from cramfast.evaluate.scores import METRICS
from cramfast.model.encoder import Encoder
from cramfast.pages.numbers import span

COLUMNS = ["task", "metric", "median", "lowest", "highest", "std", "seeds", "data"]


@dataclass(frozen=True)
class Job:
    """Attributes:
    classes: how many; 0 for regression.
    dev: development sets by the name of their row in the table.
    remark: what the table says about the data; "" for an official split.
    keeps_predictions: whether the JSON holds them, for an analysis.
    """

    name: str
    classes: int
    metric: str
    train: Encoded
    dev: dict[str, Encoded]
    left_out: int
    remark: str
    keeps_predictions: bool = False

    @property
    def rows(self) -> dict[str, int]:
        """Examples of the training set and of each development set."""
        return {"train": len(self.train.ids)} | {row: len(part.ids) for row, part in self.dev.items()}


def make_job(
    model: Checkpoint, protocol: Protocol, name: str, classes: int, metric: str, train: Examples,
    dev: dict[str, Examples], remark: str, keeps_predictions: bool = False,
) -> Job:  # fmt: skip
    """Tokenize the examples once for all seeds."""
    return Job(
        name, classes, metric, encode(model, train, protocol.max_len),
        {row: encode(model, part, protocol.max_len) for row, part in dev.items()},
        train.left_out + sum(part.left_out for part in dev.values()), remark, keeps_predictions,
    )  # fmt: skip


def run(
    job: Job, encoder: Encoder, protocol: Protocol, seed: int, device: torch.device, dtype: torch.dtype,
    console: Console, stored: dict[str, dict],
) -> Fit:  # fmt: skip
    """Fine-tune with one seed, add the scores to `stored` under the job's name, and say so on the console."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task(f"{job.name}, seed {seed}")
        done = fit(
            encoder, job.classes, job.train, list(job.dev.values()), protocol, seed, device, dtype,
            lambda step, steps: bar.update(shown, completed=step, total=steps),
        )  # fmt: skip
    entry = stored.setdefault(job.name, _empty(job))
    found = []
    for (row, part), predicted in zip(job.dev.items(), done.predictions, strict=True):
        score = METRICS[job.metric](part.labels.tolist(), predicted.tolist())
        entry["scores"][row].append(score)
        found.append(f"{row} {job.metric} {100 * score:.2f}")
        if job.keeps_predictions:
            entry["predictions"][row].append(predicted.tolist())
    entry["seeds"].append(seed)
    entry["seconds"].append(done.seconds)
    entry["skipped_updates"] += done.skipped
    console.print(
        f"  seed {seed}: {', '.join(found)}  ({done.steps:,} updates in {span(done.seconds)})", highlight=False
    )
    return done


def _empty(job: Job) -> dict:
    return {
        "metric": job.metric,
        "remark": job.remark,
        "rows": job.rows,
        "left_out_rows": job.left_out,
        "seeds": [],
        "seconds": [],
        "skipped_updates": 0,
        "scores": {row: [] for row in job.dev},
    } | ({"predictions": {row: [] for row in job.dev}} if job.keeps_predictions else {})


def table_rows(stored: dict[str, dict]) -> list[list[str]]:
    """One row of COLUMNS for each development set; scores times 100."""
    rows = []
    for entry in stored.values():
        for row, scores in entry["scores"].items():
            points = [100 * score for score in scores]
            spread = f"{statistics.stdev(points):.2f}" if len(points) > 1 else "–"
            figures = [statistics.median(points), min(points), max(points)]
            data = entry["remark"] or "official"
            if entry["left_out_rows"]:
                data += f", {entry['left_out_rows']:,} rows left out"
            rows.append([row, entry["metric"], *(f"{v:.2f}" for v in figures), spread, str(len(points)), data])
    return rows
