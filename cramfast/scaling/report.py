"""python -m cramfast.scaling report: one self-contained HTML page about a plan, and its pictures as PNG."""

import base64
import io
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Annotated, Any

import tyro

from cramfast.errors import UserError
from cramfast.pages.numbers import short, span
from cramfast.pages.page import document, write_page
from cramfast.pages.page import table as html_table
from cramfast.pages.scoretable import ScoreTable
from cramfast.runtime.arguments import program
from cramfast.runtime.jsonfile import read_json
from cramfast.scaling import claims, fit, plots
from cramfast.scaling.optimum import budget_name
from cramfast.scaling.table import TABLE, read_table
from cramfast.session.record import number

PAGE = "report.html"
CAPTIONS = {
    "loss": "A line a run, a dot at its end, where the learning rate has come down to zero: only dots compare. The "
    "size whose dots lie lowest is the one to train for so much.",
    "collapse": "Left, shapes of equal size; right, each with its tokens divided by a factor.",
    "fit": "Left, final losses and the law; right, what the law leaves over.",
    "sizes": "From the law and the tokens/s measured for each size. What takes more tokens than any run had is an "
    "extrapolation, solid or dashed.",
    "claims": "Confirmed where the intervals overlap and the measured one lies above zero.",
}
PICTURES = ".picture { background: #ffffff; } .picture img { display: block; width: 100%; height: auto; }"


def write_report(folder: Path) -> list[Path]:
    """Write report.html and the PNGs into a plan's folder; the files, the page first.

    Raises:
        UserError: no table, or something damaged beside it.
    """
    rows = read_table(folder)
    if not rows:
        raise UserError(f"{folder}: no {TABLE} there — {program('scaling')} run writes it")
    found, judged = fit.read_fit(folder), read_json(folder / claims.CLAIMS_FILE)
    pictures = {name: png for name, figure in figures(rows, found, judged).items() if (png := drawn(figure))}
    for name, png in pictures.items():
        (folder / f"{name}.png").write_bytes(png)
    write_page(folder / PAGE, render(folder.resolve().name, rows, found, judged, pictures))
    return [folder / PAGE, *(folder / f"{name}.png" for name in pictures)]


def figures(rows: list[dict], found: dict[str, Any], judged: dict[str, Any]) -> dict[str, Any]:
    """Every picture that there are data for, by the name of its file; None where there is nothing to show."""
    made = {"loss": plots.loss_curves(rows), "collapse": plots.collapse(rows)}
    if found:
        made |= {"fit": plots.law_and_residuals(rows, found), "sizes": plots.sizes_for_budget(found)}
    if judged:
        made["claims"] = plots.claims(judged)
    return made


def drawn(figure) -> bytes:
    """A figure as PNG; nothing for None. No date in it: the same data give the same bytes."""
    if figure is None:
        return b""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=plots.DPI, metadata={"Software": None})
    return buffer.getvalue()


def render(name: str, rows: list[dict], found: dict, judged: dict, pictures: dict[str, bytes]) -> str:
    """The page as text; nothing in it points outside it."""
    parts = [f"<h1>Scaling on this machine: {escape(name)}</h1>", f'<p class="soft">{escape(subtitle(rows))}</p>']
    parts += advice(found)
    parts += picture(pictures, "loss")
    parts += ["<h2>Does shape matter?</h2>"] if found or "collapse" in pictures else []
    parts += picture(pictures, "collapse")
    parts += section(fit.shift_table(found)) if found else []
    parts += ["<h2>The law</h2>"] if found else ["<p>No law yet: python -m cramfast.scaling fit</p>"]
    parts += picture(pictures, "fit")
    parts += [part for t in (fit.law_table, fit.prediction_table) for part in section(t(found))] if found else []
    parts += ["<h2>Sizes for a budget</h2>"] if found else []
    parts += picture(pictures, "sizes")
    parts += section(fit.advice_table(found)) if found else []
    if judged:
        parts += ["<h2>Claims</h2>", *section(claims.table(judged)), *picture(pictures, "claims")]
    parts += ["<details><summary>All runs</summary>", all_runs(rows), "</details>"]
    return document(f"{name}, scaling", parts, PICTURES)


def subtitle(rows: list[dict]) -> str:
    """What was run, on what."""
    first, sizes = rows[0], [row["parameters"] for row in rows]
    tokens, seconds = (sum(row[key] for row in rows) for key in ("tokens", "seconds"))
    return (
        f"{len(rows)} runs of {short(min(sizes))} to {short(max(sizes))} parameters, "
        f"{short(tokens)} tokens in {span(seconds)} of training · "
        f"{first['device']}, {first['threads']} threads · {first['dtype']} · "
        + " · ".join(f"{key} {value}" for key, value in first["versions"].items())
    )


def advice(found: dict[str, Any]) -> list[str]:
    """The sentences a reader came for."""
    if not found:
        return []
    lines = []
    for a in found["advice"]["hours"]:
        passes = a["D"] / found["corpus_tokens"]
        caveats = ["extrapolated"] * a["beyond"] + [f"{passes:.1f} passes over the text"] * (passes > 1)
        cells = (
            f"<b>{short(a['N'])}</b> parameters", f"<b>{short(a['D'])}</b> tokens",
            "expected loss <b>{:.2f}</b> ({:.2f} to {:.2f})".format(a["loss"], *a["loss_interval"]), ", ".join(caveats),
        )  # fmt: skip
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f"<tr><th>{budget_name(a['budget'])}</th>{row}</tr>")
    return ["<h2>On this machine, for a budget of</h2>", f"<div class=scroll><table>{''.join(lines)}</table></div>"]


def section(table: ScoreTable) -> list[str]:
    """A table with its heading and notes."""
    notes = [f'<p class="soft">{escape(note)}</p>' for note in table.notes]
    return [f"<h3>{escape(table.title)}</h3>", html_table(table.rows, table.columns) if table.rows else "", *notes]


def picture(pictures: dict[str, bytes], name: str) -> list[str]:
    """A figure with its caption, if it was drawn."""
    if name not in pictures:
        return []
    data, caption = base64.b64encode(pictures[name]).decode(), escape(CAPTIONS[name])
    image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
    return [f"<figure class=picture>{image}<figcaption>{caption}</figcaption></figure>"]


def all_runs(rows: list[dict]) -> str:
    """Every row of the table, without its curves."""
    columns = ["run", "parameters", "body", "tokens", "FLOPs", "seconds", "tokens/s", "loss", "config"]
    counts = ("parameters", "body_parameters", "tokens")
    cells = [
        [row["name"], *(f"{row[key]:,}" for key in counts), short(row["flops"]), f"{row['seconds']:.1f}",
         f"{row['tokens_per_s']:,.0f}", f"{number(row['loss']):.4f}", row["config_hash"]]
        for row in sorted(rows, key=lambda row: (row["parameters"], row["tokens"], row["seed"]))
    ]  # fmt: skip
    return html_table(cells, columns)


@dataclass(frozen=True)
class Arguments:
    """Write report.html, self-contained, and its pictures as PNG into a plan's folder."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of a plan."""

    def run(self, console) -> None:
        """Draw and write.

        Raises:
            UserError: as write_report.
        """
        for path in write_report(self.folder):
            console.print(f"written: {path}", markup=False, highlight=False, soft_wrap=True)
