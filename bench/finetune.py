"""Fine-tuning speed beside stock transformers on the same weights: python -m bench.finetune RUN --data GLUE.

Both take the exported folder of one run, the same examples in the same order and the paper's protocol; stock pads each
batch to its own longest example (dynamic padding). They train in turn, task by task and seed by seed, in one process;
the clock runs over updates only. Scores stand beside the times, because speed at another score means nothing.
"""

import math
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from bench import machine, tables
from cramfast.config import require
from cramfast.errors import command
from cramfast.evaluate import checkpoints, finetune, glue
from cramfast.evaluate.examples import dev_name
from cramfast.evaluate.finetune import Encoded, Protocol
from cramfast.evaluate.tasks import Task, find_task
from cramfast.export import export
from cramfast.hf.check import quiet_transformers
from cramfast.recipes import choose_dtype
from cramfast.runtime.allocator import keep_freed_memory
from cramfast.text.tally import Tally

SYSTEMS = ("cramfast", "transformers")


@dataclass(frozen=True)
class Options:
    """Time fine-tuning of both systems and print their scores."""

    run: tyro.conf.Positional[Path]
    """Run folder; it is exported to a temporary folder."""
    data: Path
    """Folder in GLUE's original layout."""
    tasks: tuple[str, ...] = ("rte", "cola", "mrpc", "sts-b")
    seeds: int = 3
    epochs: int = 5
    limit: int = 0
    """Train on the first so many examples of each task only, for a rehearsal; 0 takes all."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Storage of ours and autocast of theirs; auto: what this processor multiplies fastest."""
    threads: int = 0
    """CPU threads of both; 0 leaves the choice to torch."""
    results: Path | None = None
    """Append one JSON line for every task and system to this file."""

    def __post_init__(self):
        for key, least in (("seeds", 1), ("limit", 0), ("threads", 0)):
            require(getattr(self, key) >= least, f"--{key} {getattr(self, key)}", f"use {least} or more")
        require(bool(self.tasks), "--tasks without a name", "name a task, or leave it out")


def fit_stock(
    folder: Path, classes: int, train: Encoded, dev: Encoded, protocol: Protocol, seed: int, dtype: torch.dtype
) -> tuple[np.ndarray, float]:
    """(predictions, seconds of training) of AutoModelForSequenceClassification.

    Its dropout stands where stock ModernBERT has it: embedding, feed-forward and classifier; attention has none,
    because dropout on its weights costs stock the fused attention kernel.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(seed)
    rate = protocol.dropout
    config = AutoConfig.from_pretrained(
        folder, num_labels=max(1, classes), embedding_dropout=rate, mlp_dropout=rate, classifier_dropout=rate
    )
    config.reference_compile = False  # 4.57 would compile the model on a GPU machine
    with quiet_transformers():
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, config=config, attn_implementation="sdpa", dtype=torch.float32
        ).train()
    torch.nn.init.normal_(model.classifier.weight, 0.0, 0.02)  # as ours
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0, fused=True)
    steps = protocol.epochs * math.ceil(len(train.ids) / protocol.batch)
    half = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    began = time.perf_counter()
    for step, rows in enumerate(finetune.shuffled(len(train.ids), protocol, seed)):
        optimizer.param_groups[0]["lr"] = protocol.rate(step, steps)
        with half:
            scores = model(**padded([train.ids[row] for row in rows])).logits
        finetune.loss_of(scores.float(), torch.from_numpy(train.labels[rows]), classes).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - began
    model.eval()
    with torch.no_grad(), half:
        found = [model(**padded(dev.ids[i : i + 64])).logits.float() for i in range(0, len(dev.ids), 64)]
    scores = torch.cat(found)
    return (scores.argmax(1) if classes else scores[:, 0].double()).numpy(), seconds


def padded(rows: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask, padded to the longest row."""
    longest = max(map(len, rows))
    ids = np.zeros((len(rows), longest), np.int64)
    attended = np.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
        attended[number, : len(row)] = 1
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(attended)}


def measure(task: Task, folder: Path, options: Options, protocol: Protocol, dtype: torch.dtype) -> list[dict]:
    """One row for each system: seconds and scores of every seed."""
    model = checkpoints.load(folder)
    job = glue.prepare_job(model, task, options.data, protocol, Tally())
    train, dev = job.train, job.dev[dev_name(task, task.dev[0])]
    if options.limit:
        train = Encoded(train.ids[: options.limit], train.labels[: options.limit])
    tokens = protocol.epochs * sum(map(len, train.ids))
    rows = {
        name: {"task": task.name, "system": name, "seconds": [], "scores": [], "tokens": tokens} for name in SYSTEMS
    }
    for seed in range(options.seeds):
        done = finetune.fit(model.encoder, len(job.classes), train, [dev], protocol, seed, torch.device("cpu"), dtype)
        stock, seconds = fit_stock(folder, len(job.classes), train, dev, protocol, seed, dtype)
        for name, predicted, spent in (
            ("cramfast", done.predictions[0], done.seconds),
            ("transformers", stock, seconds),
        ):
            rows[name]["seconds"].append(spent)
            rows[name]["scores"].append(job.score(dev.labels.tolist(), predicted.tolist()))
    ratios = [b / a for a, b in zip(*(rows[name]["seconds"] for name in SYSTEMS), strict=True)]
    for row in rows.values():
        row |= {"metric": task.metric, "ours_speedup": statistics.median(ratios), "rows": len(train.ids)}
    return list(rows.values())


def show(rows: list[dict]) -> None:
    """The table a person reads."""
    table = Table()
    for column in ("task", "system", "s a fit", "tokens/s", "ours is", "metric", "median score", "lowest", "highest"):
        table.add_column(column, justify="left" if column in ("task", "system", "metric") else "right")
    for row in rows:
        seconds, scores = statistics.median(row["seconds"]), [100 * score for score in row["scores"]]
        figures = [f"{seconds:.1f}", f"{row['tokens'] / seconds:,.0f}", f"{row['ours_speedup']:.2f}x", row["metric"]]
        spread = (statistics.median(scores), min(scores), max(scores))
        table.add_row(row["task"], row["system"], *figures, *(f"{score:.2f}" for score in spread))
    Console(width=130).print(table)


def main() -> None:
    """Export, fine-tune both on every task, print, append to the results file."""
    options = tyro.cli(Options, description=__doc__)
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    dtype = getattr(torch, choose_dtype("cpu") if options.dtype == "auto" else options.dtype)
    protocol = replace(Protocol(), epochs=options.epochs)
    tasks = [find_task(name) for name in options.tasks]
    if options.results:
        tables.append(options.results)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = export(options.run, Path(scratch) / "hf").path
        protocol = protocol.at(checkpoints.load(folder).encoder.config.max_len)
        for task in tasks:
            rows += measure(task, folder, options, protocol, dtype)
            show(rows[-len(SYSTEMS) :])
    show(rows)
    if options.results:
        settings = {"seeds": options.seeds, "limit": options.limit, "dtype": str(dtype), **asdict(protocol)}
        tables.append(options.results, *(row | settings | machine.description() for row in rows))


if __name__ == "__main__":
    command(main)
