"""One task fine-tuned with several seeds: the fits, their scores as JSON values, and the table's rows."""

import math
import statistics
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import Progress

from cramfast.evaluate.checkpoints import Checkpoint
from cramfast.evaluate.examples import Examples, class_counts
from cramfast.evaluate.finetune import Encoded, Fit, Protocol, encode, fit
from cramfast.evaluate.scores import METRICS, f1
from cramfast.model.encoder import Encoder
from cramfast.pages.numbers import span

COLUMNS = ["task", "metric", "median", "lowest", "highest", "std", "seeds", "data"]


@dataclass(frozen=True)
class Job:
    """Attributes:
    classes: their names in the order of their numbers; empty for regression.
    positive: the class whose F1 is meant, where there are two.
    counts: examples of each class, by name, then by set.
    dev: development sets by the name of their row in the table.
    remark: what the table says about the data; "" for an official split.
    keeps_predictions: whether the JSON holds them, for an analysis.
    """

    name: str
    classes: tuple[str, ...]
    metric: str
    train: Encoded
    dev: dict[str, Encoded]
    left_out: int
    remark: str
    counts: dict[str, dict[str, int]]
    positive: int = 1
    keeps_predictions: bool = False

    @property
    def shown_metric(self) -> str:
        """The metric's name in tables; for F1 with the class that it is of."""
        if self.metric != "f1":
            return self.metric
        return f"f1 of {self.classes[self.positive]}" if len(self.classes) == 2 else "macro f1"

    def score(self, truth: list[float], predicted: list[float]) -> float:
        """The metric of one development set; NaN where a prediction is not finite."""
        if not all(map(math.isfinite, predicted)):
            return math.nan
        if self.metric == "f1":
            return f1(truth, predicted, self.positive if len(self.classes) == 2 else None)
        return METRICS[self.metric](truth, predicted)

    def class_lines(self) -> list[str]:
        """One line a class: its name and how many examples each set has."""
        lines = []
        for number, name in enumerate(self.classes):
            counted = ", ".join(f"{count:,} in {part}" for part, count in self.counts[name].items())
            lines.append(f"  class {number} {name!r}: {counted}")
        return lines

    @property
    def rows(self) -> dict[str, int]:
        """Examples of the training set and of each development set."""
        return {"train": len(self.train.ids)} | {row: len(part.ids) for row, part in self.dev.items()}


def make_job(
    model: Checkpoint, protocol: Protocol, name: str, classes: tuple[str, ...], metric: str, train: Examples,
    dev: dict[str, Examples], remark: str, positive: int = 1, keeps_predictions: bool = False,
) -> Job:  # fmt: skip
    """Tokenize the examples once for all seeds, cut to the protocol's length on this model."""
    protocol = protocol.at(model.encoder.config.max_len)
    parts = {"train": train} | dev
    counted = {part: class_counts(classes, examples) for part, examples in parts.items()}
    counts = {name: {part: counted[part][name] for part in parts} for name in classes}
    return Job(
        name, classes, metric, encode(model, train, protocol.max_len),
        {row: encode(model, part, protocol.max_len) for row, part in dev.items()},
        train.left_out + sum(part.left_out for part in dev.values()), remark, counts, positive, keeps_predictions,
    )  # fmt: skip


def run(
    job: Job, encoder: Encoder, protocol: Protocol, seed: int, device: torch.device, dtype: torch.dtype,
    console: Console, stored: dict[str, dict],
) -> Fit:  # fmt: skip
    """Fine-tune with one seed, add the scores to `stored` under the job's name, and say so on the console."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task(f"{job.name}, seed {seed}")
        done = fit(
            encoder, len(job.classes), job.train, list(job.dev.values()), protocol, seed, device, dtype,
            lambda step, steps: bar.update(shown, completed=step, total=steps),
        )  # fmt: skip
    entry = stored.setdefault(job.name, _empty(job))
    found = []
    for (row, part), predicted in zip(job.dev.items(), done.predictions, strict=True):
        score = job.score(part.labels.tolist(), predicted.tolist())
        entry["scores"][row].append(score if math.isfinite(score) else None)
        found.append(f"{row} {job.shown_metric} {100 * score:.2f}")
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
        "shown_metric": job.shown_metric,
        "classes": job.counts,
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
            points = [100 * score for score in scores if score is not None]
            spread = f"{statistics.stdev(points):.2f}" if len(points) > 1 else "–"
            figures = [f"{of(points):.2f}" if points else "–" for of in (statistics.median, min, max)]
            data = entry["remark"] or "official"
            if entry["left_out_rows"]:
                data += f", {entry['left_out_rows']:,} rows left out"
            if lost := len(scores) - len(points):
                data += f", {lost} more {'seed' if lost == 1 else 'seeds'} without a finite prediction"
            rows.append([row, entry.get("shown_metric", entry["metric"]), *figures, spread, str(len(points)), data])
    return rows
