"""One self-contained HTML page about a run, or about a prepared text: python -m cramfast.report FOLDER."""

import math
from dataclasses import dataclass
from html import escape
from pathlib import Path

from cramfast.errors import command
from cramfast.pages.charts import TWO, Line, chart, stretch
from cramfast.pages.page import document, figure, flat, table, tile, write_page
from cramfast.runtime.arguments import program
from cramfast.session.record import Record, read_record
from cramfast.session.summary import manifest_rows, tiles
from cramfast.text import report as text_report


def write_report(run_dir: Path) -> Path:
    """Write report.html into the run's folder and return its path.

    Raises:
        UserError: no run folder, a damaged config.json or manifest.json, or the disk refuses.
    """
    run_dir = Path(run_dir)
    return write_page(run_dir / "report.html", render(read_record(run_dir)))


def render(record: Record) -> str:
    """The page as text; nothing in it points outside it."""
    parts = [
        f"<h1>{escape(record.name)}</h1>",
        f'<p class="soft">{escape(_subtitle(record))}</p>',
        *(f"<p>{escape(note)}</p>" for note in _notes(record)),
        '<div class="tiles">',
        *(tile(name, value) for name, value in tiles(record)),
        "</div>",
        '<div class="charts">',
        *_figures(record),
        "</div>",
        *_scores(record),
        "<h2>Load the model</h2>",
        _loading(record),
        "<h2>Data</h2>",
        table(manifest_rows(record.manifest))
        if record.manifest
        else "<p class=soft>No manifest in the run folder.</p>",
        "<h2>Kernels</h2>",
        _kernels(record.run.get("kernels") or []),
        "<h2>Machine and versions</h2>",
        table(flat({key: value for key, value in record.run.items() if key != "kernels"})),
        "<details open><summary>Configuration</summary>",
        table(flat(record.config)) if record.config else "<p class=soft>No config.json in the run folder.</p>",
        "</details>",
    ]
    return document(record.name, parts)


def _subtitle(record: Record) -> str:
    config, run = record.config, record.run
    model = config.get("model", {})
    shape = f"{model['layers']} layers × {model['width']}" if {"layers", "width"} <= model.keys() else ""
    updates = f"{record.last('step'):,.0f} updates" if record.steps else ""
    parts = [config.get("preset"), shape, run.get("device"), config.get("dtype"), config.get("budget"), updates]
    return " · ".join(str(part) for part in parts if part)


def _notes(record: Record) -> list[str]:
    notes = []
    if record.skipped:
        notes.append(
            f"{record.skipped} of {len(record.steps)} updates were skipped because the loss or the gradient was not "
            "finite; orange ticks mark them."
        )
    if record.resumed:
        notes.append(f"Resumed {_count(record.resumed, 'time')}; what was done again after a resume is shown once.")
    if record.unreadable_lines:
        notes.append(f"{_count(record.unreadable_lines, 'unreadable line')} of metrics.jsonl left out.")
    if record.mfu_mark:
        notes.append(
            "Machine busy: the MFU refers to a matmul peak that is measured when training begins, and other work on "
            "the machine lowered it then. The true MFU is lower."
        )
    masking = record.config.get("masking", "bert")
    if masking != "bert":
        notes.append(
            f"Trained with --masking {masking}, while held-out tokens are masked as BERT does: 80 % [MASK], 10 % "
            "another word, 10 % left. Its held-out loss does not compare with that of a run trained that way: cramfast "
            "evaluate perplexity puts models under one masking, [MASK] alone."
        )
    if len(record.steps) < 10:
        notes.append(f"Only {_count(len(record.steps), 'update')} so far: the charts say little yet.")
    return notes


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _figures(record: Record) -> list[str]:
    if not record.steps and not record.evaluations:
        return ["<p>No steps recorded yet.</p>"]
    return [
        _loss_figure(record, "tokens", "tokens", wide=True),
        _loss_figure(record, *_time_axis(record)),
        _loss_figure(record, "flops", "FLOPs (logarithmic)", log_x=True),
        _step_figure(record, "lr", "learning rate"),
        _step_figure(record, "microbatches", "microbatches per update"),
        _step_figure(record, "tokens_per_s", "tokens/s, padding not counted"),
        _step_figure(record, "mfu", "MFU, % of the measured matmul peak", scale=100),
        _share_figure(record, "heldout_accuracy", "held-out accuracy, % of masked tokens"),
        _share_figure(record, "blimp_accuracy", "BLiMP probe, % of pairs judged right; chance is 50"),
        _step_figure(record, "grad_norm", "norm of the gradient, before clipping"),
    ]


def _time_axis(record: Record) -> tuple[str, str, float]:
    seconds = record.last("seconds")
    unit, scale = ("s", 1) if not seconds >= 300 else ("min", 60) if seconds < 7200 else ("h", 3600)
    return "seconds", f"training time, {unit}", scale


def _loss_figure(
    record: Record, key: str, label: str, scale: float = 1, wide: bool = False, log_x: bool = False
) -> str:
    usable = [row for row in record.steps if not log_x or (row.get(key) or 0) > 0]
    evaluations = [row for row in record.evaluations if not log_x or (row.get(key) or 0) > 0]
    lines = []
    for name, rows, look in (
        ("training", usable, {"band": True}),
        ("held out", evaluations, {"colour": TWO, "dots": True}),
    ):
        value = "loss" if name == "training" else "heldout_loss"
        if rows:
            x = [x / scale for x in record.column(key, rows)]
            lines.append(Line(name, x, record.column(value, rows), **look))
    marks = [x / scale for x in record.column(key, [row for row in usable if row.get("skipped")])]
    level = (record.unigram_entropy, "unigram entropy of the text")
    svg = chart(
        lines,
        label,
        "loss, nats per masked token",
        salt=key,
        wide=wide,
        level=level,
        marks=marks,
        log_x=log_x,
        legend=wide,
    )
    caption = ""
    if (joined := stretch(len(usable))) > 1:
        caption = f"Line: mean of {joined} neighbouring updates; band: their lowest and highest."
    return figure(svg, caption if wide else "", wide)


def _step_figure(record: Record, key: str, label: str, scale: float = 1) -> str:
    values = [scale * value for value in record.column(key)]
    if not any(map(math.isfinite, values)):
        return ""
    line = Line(label, record.column("tokens"), values, band=True)
    return figure(chart([line], "tokens", label, salt=key))


def _share_figure(record: Record, key: str, label: str) -> str:
    values = [100 * value for value in record.column(key, record.evaluations)]
    if not any(map(math.isfinite, values)):
        return ""
    line = Line(label, record.column("tokens", record.evaluations), values, colour=TWO, dots=True)
    return figure(chart([line], "tokens", label, salt=key))


def _scores(record: Record) -> list[str]:
    parts = ["<h2>Scores</h2>"] if record.scores else []
    for scores in record.scores:
        parts += [f"<h3>{escape(scores.title)}</h3>", table(scores.rows, scores.columns)]
        parts += [f"<p class=soft>{escape(note)}</p>" for note in scores.notes]
    return parts


def _loading(record: Record) -> str:
    model = record.config.get("model", {})
    folder, made = str(record.folder / "hf"), ""
    if not record.exported:
        folder = f"{record.name}-hf"
        made = f"# first: python -m cramfast.export {record.folder} {folder}\n"
    if model.get("positions") == "sinusoidal" or model.get("first_norm"):
        code = (
            "from cramfast.export import load  # stock transformers cannot express this model\n\n"
            f'model, tokenizer = load("{folder}")'
        )
    else:
        code = (
            "from transformers import pipeline\n\n"
            f'fill = pipeline("fill-mask", model="{folder}")\n'
            'print(fill(f"The capital of France is {fill.tokenizer.mask_token}."))'
        )
    return f"<pre><code>{escape(made + code)}</code></pre>"


def _kernels(rows: list) -> str:
    if not rows:
        return "<p class=soft>The run noted none.</p>"
    cells = [list(row.values()) if isinstance(row, dict) else list(row) for row in rows]
    names = list(rows[0]) if isinstance(rows[0], dict) else ["op", "implementation", "reason", "alternatives"]
    return table(cells, names)


@dataclass(frozen=True)
class Arguments:
    """Write report.html, one self-contained page, into a run folder or a prepared one."""

    folder: Path
    """Run folder, e.g. runs/NAME, or a folder made by python -m cramfast.prepare."""


def main() -> None:
    """The command line."""
    import tyro
    from rich.console import Console

    form = tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(Arguments)
    folder = tyro.cli(form, prog=program("report")).folder
    path = text_report.write_report(folder) if (folder / "train.ids").exists() else write_report(folder)
    size = f"{path.stat().st_size / 1e3:.0f} kB"
    Console(soft_wrap=True, highlight=False, markup=False).print(f"report: {path} ({size})")


if __name__ == "__main__":
    command(main)
