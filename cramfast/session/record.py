"""What a run wrote down, read back: metrics.jsonl, config.json, manifest.json. The report and the model card use it."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from cramfast.errors import UserError
from cramfast.pages.scoretable import ScoreTable
from cramfast.runtime.jsonfile import read_json

SCORES_REMEDY = "remove the file and evaluate again"
HIGHEST_MFU = 0.9  # matmuls take 70 to 80 % of a step's time
EVALUATIONS = "evaluations"  # folder in a run's, one JSON file for each kind of evaluation


@dataclass(frozen=True)
class Record:
    """One run in `folder`, as it was named. `steps` and `evaluations` hold metrics rows in the order of their steps,
    each step once."""

    name: str
    folder: Path
    run: dict = field(default_factory=dict)
    steps: list[dict] = field(default_factory=list)
    evaluations: list[dict] = field(default_factory=list)
    config: dict = field(default_factory=dict)
    manifest: dict = field(default_factory=dict)
    unreadable_lines: int = 0
    resumed: int = 0
    exported: bool = False
    scores: list[ScoreTable] = field(default_factory=list)

    def column(self, key: str, rows: list[dict] | None = None) -> list[float]:
        """The values of one key over `rows` (the steps by default), NaN where a row has none."""
        return [number(row.get(key)) for row in (self.steps if rows is None else rows)]

    def last(self, key: str) -> float:
        """The latest known value of a key, over steps and evaluations; NaN when there is none."""
        rows = sorted(self.steps + self.evaluations, key=lambda row: row["step"])
        return next((number(row[key]) for row in reversed(rows) if key in row), math.nan)

    @property
    def unigram_entropy(self) -> float:
        """Nats per token of the training text's token distribution: what a model without context can reach."""
        return number(self.manifest.get("unigram_entropy_nats"))

    @property
    def parameters(self) -> float:
        """Number of parameters, NaN when the run did not note it."""
        return number(self.run.get("parameters"))

    @property
    def heldout(self) -> tuple[float, float]:
        """Held-out loss of the first and of the last evaluation, nats per masked token; NaN when there is none."""
        losses = self.column("heldout_loss", self.evaluations)
        return (losses[0], losses[-1]) if losses else (math.nan, math.nan)

    @property
    def skipped(self) -> int:
        """Updates left out because the loss or the gradient was not finite."""
        return sum(bool(row.get("skipped")) for row in self.steps)

    @property
    def mfu_mark(self) -> str:
        """What is said behind an MFU whose peak other work disturbed, or that is too high to be true; else ""."""
        return " (machine busy)" if self.run.get("matmul_peak_busy") or self.middle("mfu") > HIGHEST_MFU else ""

    def middle(self, key: str) -> float:
        """The median of a key over the steps; NaN when there is none."""
        values = sorted(value for value in self.column(key) if math.isfinite(value))
        return values[len(values) // 2] if values else math.nan


def number(value) -> float:
    """A float; NaN for what is missing or no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value)


def parse_row(line: str | bytes) -> dict | None:
    """A row of metrics.jsonl, {"run": {...}} or {"step": N, ...}; None for a line that no run wrote whole."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(row, dict) and (isinstance(row.get("run"), dict) or isinstance(row.get("step"), int))
    return row if whole else None


def read_record(run_dir: Path) -> Record:
    """Read a run folder.

    A line that a killed run left half-written is counted and left out. Where a resumed run repeats steps, what it
    wrote replaces the rows from that step on.

    Raises:
        UserError: no such folder, no metrics.jsonl in it, a damaged config.json or manifest.json.
    """
    run_dir = Path(run_dir)
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        place = "no such folder" if not run_dir.is_dir() else "no metrics.jsonl in it"
        raise UserError(f"{run_dir}: {place} — give a run folder, e.g. runs/NAME, that cramfast.train wrote")
    run, steps, evaluations, unreadable, resumed = {}, [], [], 0, 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        row = parse_row(line)
        if row is None:
            unreadable += 1
        elif "run" in row:
            resumed += bool(steps or evaluations)
            run = row["run"]
        elif "heldout_loss" in row:
            evaluations = [*before(evaluations, row["step"]), row]
        else:
            if steps and row["step"] <= steps[-1]["step"]:
                steps = before(steps, row["step"])
                evaluations = before(evaluations, row["step"])
            steps.append(row)
    return Record(
        name=run_dir.resolve().name,
        folder=run_dir,
        run=run,
        steps=steps,
        evaluations=evaluations,
        config=read_json(run_dir / "config.json"),
        manifest=read_json(run_dir / "manifest.json"),
        unreadable_lines=unreadable,
        resumed=resumed,
        exported=(run_dir / "hf" / "config.json").exists(),
        scores=read_scores(run_dir),
    )


def read_scores(run_dir: Path) -> list[ScoreTable]:
    """The tables that cramfast.evaluate left in a run, in the order of their files' names.

    Raises:
        UserError: a file without a table.
    """
    tables = []
    for path in sorted((run_dir / EVALUATIONS).glob("*.json")):
        try:
            tables.append(ScoreTable(**read_json(path, SCORES_REMEDY)["table"]))
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: holds no table ({error}) — remove it and evaluate again") from None
    return tables


def before(rows: list[dict], step: int) -> list[dict]:
    """The rows of earlier steps; what a killed run wrote beyond its last checkpoint is done again after a resume."""
    while rows and rows[-1]["step"] >= step:
        rows.pop()
    return rows
