"""The table of a plan: one JSON line for each finished run."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from cramfast.config import read_config
from cramfast.errors import UserError
from cramfast.runtime.jsonfile import dumps
from cramfast.scaling.plan import parameters
from cramfast.session.record import Record, read_record

TABLE = "runs.jsonl"
CURVE_POINTS = 48  # of the training loss, at equal distances in log tokens: enough to compare, small enough for git


def row_of(run_dir: Path, labels: dict[str, Any]) -> dict[str, Any]:
    """What the table keeps of a finished run; `labels` say what it was in its plan.

    Losses are nats per masked token; `heldout` and `training` are columns of equal length.

    Raises:
        UserError: a run without a final evaluation.
    """
    record, config = read_record(run_dir), read_config(run_dir / "config.json")
    if not record.steps or not record.evaluations or record.evaluations[-1]["step"] != record.steps[-1]["step"]:
        raise UserError(f"{run_dir}: its record has no final evaluation — remove the folder and start the plan again")
    total, body = parameters(config.model)
    last = record.steps[-1]
    return labels | {
        "layers": config.model.layers, "width": config.model.width, "feedforward": config.model.feedforward,
        "parameters": int(record.parameters), "body_parameters": body + int(record.parameters) - total,
        "seed": config.seed, "lr": config.lr, "batch_tokens": config.batch_tokens, "updates": last["step"],
        "tokens": last["tokens"], "flops": last["flops"], "seconds": round(last["seconds"], 3),
        "tokens_per_s": round(record.middle("tokens_per_s"), 1), "skipped": record.skipped,
        "loss": record.heldout[1], "heldout": heldout_curve(record), "training": training_curve(record),
        "corpus_tokens": record.manifest["splits"]["train"]["tokens"],
        "device": record.run["device"], "threads": record.run["threads"], "dtype": config.dtype,
        "config_hash": record.run["config_hash"], "versions": record.run["versions"],
        "kernels": {k["op"]: k["implementation"] for k in record.run["kernels"]},
    }  # fmt: skip


def heldout_curve(record: Record) -> dict[str, list[float]]:
    """Every held-out evaluation, as columns."""
    keys = ("tokens", "seconds", "flops", "heldout_loss")
    return {key.removeprefix("heldout_"): [_short(x) for x in record.column(key, record.evaluations)] for key in keys}


def training_curve(record: Record) -> dict[str, list[float]]:
    """Mean training loss in stretches of equal length in log tokens, as columns; `tokens` is where a stretch ends."""
    tokens, loss = np.array(record.column("tokens")), np.array(record.column("loss"))
    edges = np.geomspace(tokens[0], tokens[-1] * (1 + 1e-9), CURVE_POINTS + 1)
    place = np.clip(np.searchsorted(edges, tokens, side="right") - 1, 0, CURVE_POINTS - 1)
    filled = np.unique(place)
    return {
        "tokens": [int(tokens[place == p][-1]) for p in filled],
        "loss": [_short(float(loss[place == p].mean())) for p in filled],
    }


def _short(value: float) -> float:
    return value if not math.isfinite(value) else float(f"{value:.6g}")


def read_table(folder: Path, name: str = TABLE) -> list[dict[str, Any]]:
    """The rows in a plan's folder, none where there is no table yet. A line that a kill cut off is left out.

    Raises:
        UserError: another line that is no JSON object.
    """
    path = folder / name
    if not path.exists():
        return []
    rows, lines = [], path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["name"]
        except (ValueError, TypeError, KeyError):
            if number == len(lines) and not line.endswith("\n"):
                break
            raise UserError(
                f"{path}, line {number}: no row of a table — remove the line; its run is read anew"
            ) from None
        rows.append(row)
    return rows


def append(folder: Path, row: dict[str, Any], name: str = TABLE) -> None:
    """Add a row, after cutting off what a kill left of another."""
    path = folder / name
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text and not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write(dumps(row) + "\n")
