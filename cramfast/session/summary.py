"""What a run's record says first, as rows of a name and a value: for the report, the model card and the screen."""

import math
from pathlib import Path

from cramfast.pages.numbers import short, span
from cramfast.pages.page import flat
from cramfast.session.record import Record


def tiles(record: Record) -> list[tuple[str, str]]:
    """The figures a reader looks for first, as (name, value); what the run does not know is left out."""
    first, last = record.heldout
    entropy = record.unigram_entropy
    detection, probe = record.last("heldout_detection_loss"), record.last("blimp_accuracy")
    of = " of the generator" if record.config.get("objective") == "rtd" else ""
    candidates = [
        (f"held-out loss{of}, nats per masked token", f"{loss(first)} → {loss(last)}", last),
        ("unigram entropy of the text, nats", loss(entropy), entropy),
        (f"held-out accuracy{of}", f"{100 * record.last('heldout_accuracy'):.1f} %", record.last("heldout_accuracy")),
        ("held-out detection loss, nats per token", loss(detection), detection),
        ("BLiMP probe, mean over paradigms", f"{100 * probe:.1f} %", probe),
        ("tokens trained on", short(record.last("tokens")), record.last("tokens")),
        ("tokens/s, median", short(record.middle("tokens_per_s")), record.middle("tokens_per_s")),
        ("MFU, median", f"{100 * record.middle('mfu'):.1f} %{record.mfu_mark}", record.middle("mfu")),
        ("training time", span(record.last("seconds")), record.last("seconds")),
        ("training FLOPs", short(record.last("flops")), record.last("flops")),
        ("parameters", short(record.parameters), record.parameters),
    ]
    return [(name, value) for name, value, known in candidates if math.isfinite(known)]


def loss(value: float) -> str:
    """Three decimals; – for NaN."""
    return f"{value:.3f}" if math.isfinite(value) else "–"


def manifest_rows(manifest: dict) -> list[tuple[str, str]]:
    """What the prepared text holds, as (name, value): sources, documents, tokens and characters of each split."""
    rows = []
    sources = manifest.get("sources", [])
    if sources:
        named = ", ".join(Path(str(_source_name(source))).name for source in sources[:5])
        rows.append(("sources", named + (f" and {len(sources) - 5} more" if len(sources) > 5 else "")))
    for split, counts in manifest.get("splits", {}).items():
        rows.append((split, ", ".join(f"{value:,} {key}" for key, value in counts.items())))
    for key, value in flat({k: v for k, v in manifest.items() if k not in ("version", "sources", "splits", "files")}):
        rows.append((key, value))
    return rows


def _source_name(source) -> str:
    if isinstance(source, dict):
        return source.get("name") or source.get("path") or next(iter(source.values()), "")
    return source
