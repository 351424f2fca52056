"""What was measured before, for a prediction to start from and to be held against: rows of bench/, records of runs."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from cramfast.config import TrainConfig, from_json
from cramfast.cost.calibration import Efficiency
from cramfast.cost.cards import Card
from cramfast.cost.forecast import forecast
from cramfast.cost.roofline import TENSOR_CORE_OPERATORS
from cramfast.errors import UserError
from cramfast.session.record import Record, number, read_record


@dataclass(frozen=True)
class Comparison:
    """Predicted and measured tokens/s of one run; `conditions` says under what it ran."""

    name: str
    predicted: float
    measured: float
    conditions: str

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted / self.measured - 1


def read_rows(paths: Iterable[Path]) -> list[dict]:
    """Rows of results files, as `pytest bench/ --results FILE` writes them.

    Raises:
        UserError: a file that is missing or of another kind, or a line that is no JSON.
    """
    rows = []
    for path in paths:
        try:
            found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except OSError as error:
            raise UserError(f"--results {path}: unreadable ({error.strerror}) — give files of pytest bench/") from None
        except ValueError as error:
            raise UserError(f"--results {path}: damaged JSON ({error}) — measure again") from None
        if not all(isinstance(row, dict) and row.keys() >= {"op", "implementation"} for row in found):
            raise UserError(f"--results {path}: not of pytest bench/ --results FILE — give such a file")
        rows += found
    return rows


def of_card(card: Card, device: str) -> bool:
    """Whether a device's own name means this card."""
    return card.name.lower() in device.lower() if card.capability else device == card.name


def row_efficiencies(rows: Iterable[Mapping], card: Card, dtype: str) -> dict[str, Efficiency]:
    """Efficiency by operator from the rows of a GPU: the nearest to the roofline that ours came, over the shapes.

    The matmul peak measured beside them stands for the linear layers.
    """
    found: dict[str, Efficiency] = {}
    for row in rows:
        ours = row.get("implementation") == "ours" and row.get("ms") and of_card(card, row.get("gpu", ""))
        if not ours or row["dtype"] != (dtype if row["op"] != "adamw" else "float32"):
            continue
        peak = card.tensor_flops if row["op"] in TENSOR_CORE_OPERATORS else card.plain_flops
        reached = {row["op"]: max(1e9 * row["gb_per_s"] / card.bandwidth, 1e9 * row["gflop_per_s"] / peak)}
        if row["op"] != "adamw":
            matmul = 1e11 * row["gflop_per_s"] / row["percent_of_matmul"]
            reached["linear"] = matmul / card.tensor_flops
        for op, value in reached.items():
            if op not in found or found[op].value < value:
                found[op] = Efficiency(value, f"bench row of commit {row['commit']}")
    return found


def comparisons(
    folder: Path, config: TrainConfig, card: Card, efficiencies: Mapping[str, Efficiency]
) -> list[Comparison]:
    """Every recorded run in `folder` of this model, precision and card, predicted at its own microbatches.

    Raises:
        UserError: a record that cannot be read.
    """
    found = []
    for path in sorted(folder.glob("*/metrics.jsonl")):
        record = read_record(path.parent)
        if not record.steps or not record.config or not of_card(card, record.run.get("device", "")):
            continue
        theirs = from_json(TrainConfig, record.config, str(path.parent / "config.json"))
        same = all(
            getattr(theirs, key) == getattr(config, key) for key in ("model", "dtype", "optimizer", "sequence_len")
        )
        if same and (card.capability or record.run.get("threads") == torch.get_num_threads()):
            found.append(comparison(record, theirs, card, efficiencies))
    return found


def comparison(record: Record, theirs: TrainConfig, card: Card, efficiencies: Mapping[str, Efficiency]) -> Comparison:
    """One recorded run beside its prediction: tokens of all its steps over their seconds."""
    size = record.run.get("microbatch_tokens", theirs.microbatch_tokens)
    predicted = forecast(theirs, card, size, efficiencies)
    seconds = sum(predicted.step_s(row["microbatches"]) for row in record.steps)
    last = record.steps[-1]
    peak = number(record.run.get("matmul_peak_flops"))
    conditions = f"microbatches of {size:,}; matmul peak then {peak / 1e9:,.0f} GFLOP/s"
    return Comparison(record.name, last["tokens"] / seconds, last["tokens"] / last["seconds"], conditions)
