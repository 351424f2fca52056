"""One self-contained HTML page about a run: python -m cramfast.report RUN."""

import math
import os
from dataclasses import dataclass
from html import escape
from pathlib import Path

from cramfast.charts import TWO, Line, chart, stretch
from cramfast.errors import command
from cramfast.record import Record, read_record, short, span

STYLE = """
:root { color-scheme: light dark; --page: #fbfbf9; --card: #ffffff; --ink: #24292f; --soft: #636c76; --grid: #dfe2e6;
  --one: #1f6feb; --two: #c4500c; --good: #1a7f37; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1c2024; --ink: #e2e6ea; --soft: #98a2ac;
  --grid: #363c43; --one: #6cb0ff; --two: #ff9a4d; --good: #56d364; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 62rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: .95rem; margin: 1.2rem 0 .4rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem; margin: 1.4rem 0; }
.tile, .tile2, figure { background: var(--card); border: 1px solid var(--grid); border-radius: 8px; }
.tile, .tile2 { padding: .7rem .85rem; } .tile2 { grid-column: span 2; }
.tile2 b, .tile b { display: block; font-size: 1.35rem; line-height: 1.3; font-weight: 600; }
.tile span, .tile2 span { color: var(--soft); font-size: .82rem; }
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .8rem; }
figure { margin: 0; padding: .5rem; } figure.wide { grid-column: 1 / -1; }
svg { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .82rem; padding: .2rem .4rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .88rem; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--grid); vertical-align: top; }
th { color: var(--soft); font-weight: 500; } td.n { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--grid); border-radius: 8px; padding: .8rem 1rem; overflow-x: auto;
  font-size: .85rem; } details { margin-top: 2.2rem; } summary { cursor: pointer; font-size: 1.1rem; font-weight: 600; }
@media (max-width: 44rem) { .charts { grid-template-columns: 1fr; } }
@media print { body { max-width: none; } figure, .tile, .tile2 { break-inside: avoid; } }
"""


def write_report(run_dir: Path) -> Path:
    """Write report.html into the run's folder and return its path.

    Raises:
        UserError: no run folder, or a damaged config.json or manifest.json.
    """
    run_dir = Path(run_dir)
    path = run_dir / "report.html"
    page = render(read_record(run_dir))
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path


def render(record: Record) -> str:
    """The page as text; nothing in it points outside it."""
    parts = [
        f"<h1>{escape(record.name)}</h1>",
        f'<p class="soft">{escape(_subtitle(record))}</p>',
        *(f"<p>{escape(note)}</p>" for note in _notes(record)),
        '<div class="tiles">',
        *(_tile(name, value) for name, value in tiles(record)),
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
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(record.name)} · cramfast</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def tiles(record: Record) -> list[tuple[str, str]]:
    """The figures a reader looks for first, as (name, value); what the run does not know is left out."""
    first, last = record.heldout
    entropy = record.unigram_entropy
    candidates = [
        ("held-out loss, nats per masked token", f"{loss(first)} → {loss(last)}", last),
        ("unigram entropy of the text, nats", loss(entropy), entropy),
        ("held-out accuracy", f"{100 * record.last('heldout_accuracy'):.1f} %", record.last("heldout_accuracy")),
        ("tokens trained on", short(record.last("tokens")), record.last("tokens")),
        ("tokens/s, median", short(record.middle("tokens_per_s")), record.middle("tokens_per_s")),
        ("MFU, median", f"{100 * record.middle('mfu'):.1f} %", record.middle("mfu")),
        ("training time", span(record.last("seconds")), record.last("seconds")),
        ("training FLOPs", short(record.last("flops")), record.last("flops")),
        ("parameters", short(record.parameters), record.parameters),
    ]
    return [(name, value) for name, value, known in candidates if math.isfinite(known)]


def _tile(name: str, value: str) -> str:
    return f"<div class={'tile2' if '→' in value else 'tile'}><b>{escape(value)}</b><span>{escape(name)}</span></div>"


def loss(value: float) -> str:
    """Three decimals; – for NaN."""
    return f"{value:.3f}" if math.isfinite(value) else "–"


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
        _accuracy_figure(record),
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
    return _figure(svg, caption if wide else "", wide)


def _step_figure(record: Record, key: str, label: str, scale: float = 1) -> str:
    values = [scale * value for value in record.column(key)]
    if not any(map(math.isfinite, values)):
        return ""
    line = Line(label, record.column("tokens"), values, band=True)
    return _figure(chart([line], "tokens", label, salt=key))


def _accuracy_figure(record: Record) -> str:
    values = [100 * value for value in record.column("heldout_accuracy", record.evaluations)]
    if not any(map(math.isfinite, values)):
        return ""
    label = "held-out accuracy, % of masked tokens"
    line = Line(label, record.column("tokens", record.evaluations), values, colour=TWO, dots=True)
    return _figure(chart([line], "tokens", label, salt="accuracy"))


def _figure(svg: str, caption: str = "", wide: bool = False) -> str:
    caption = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure{' class=wide' if wide else ''}>{svg}{caption}</figure>"


def _scores(record: Record) -> list[str]:
    parts = ["<h2>Scores</h2>"] if record.scores else []
    for scores in record.scores:
        parts += [f"<h3>{escape(scores.title)}</h3>", table(scores.rows, scores.columns)]
        parts += [f"<p class=soft>{escape(note)}</p>" for note in scores.notes]
    return parts


def _loading(record: Record) -> str:
    model = record.config.get("model", {})
    folder, made = f"runs/{record.name}/hf", ""
    if not record.exported:
        folder = f"{record.name}-hf"
        made = f"# first: python -m cramfast.export runs/{record.name} {folder}\n"
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


def flat(values: dict, prefix: str = "") -> list[tuple[str, str]]:
    """One (dotted name, text) for each leaf; floats to six digits."""
    rows = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + str(key), _text(value)))
    return rows


def _text(value) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "(none)"
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value >= 10000 else str(value)


def table(rows: list, names: list[str] = ()) -> str:
    """An HTML table; the first cell of a row names it when there is no header."""
    head = "<tr>" + "".join(f"<th>{escape(str(name))}</th>" for name in names) + "</tr>" if names else ""
    body = []
    for row in rows:
        cells = [f"<td class=n>{escape(_text(cell))}</td>" for cell in row]
        if not names:
            cells[0] = f"<th>{escape(str(row[0]))}</th>"
        body.append("<tr>" + "".join(cells) + "</tr>")
    return f'<div class="scroll"><table>{head}{"".join(body)}</table></div>'


@dataclass(frozen=True)
class Arguments:
    """Write report.html, one self-contained page, into a run folder."""

    run: Path
    """Run folder, e.g. runs/NAME."""


def main() -> None:
    """The command line."""
    import tyro
    from rich.console import Console

    form = tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(Arguments)
    path = write_report(tyro.cli(form, prog="python -m cramfast.report").run)
    size = f"{path.stat().st_size / 1e3:.0f} kB"
    Console(soft_wrap=True, highlight=False, markup=False).print(f"report: {path} ({size})")


if __name__ == "__main__":
    command(main)
