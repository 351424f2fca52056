"""What the HTML pages share: style sheet, frame, tiles, figures and tables. Nothing in them points outside the page."""

from html import escape
from pathlib import Path

from cramfast.errors import UserError
from cramfast.runtime import atomic

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


def write_page(path: Path, page: str) -> Path:
    """Replace the file whole; returns its path.

    Raises:
        UserError: the disk refuses.
    """
    try:
        atomic.write_text(path, page)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}) — free disk space or make the folder writable"
        ) from None
    return path


def document(title: str, parts: list[str], style: str = "") -> str:
    """A complete page.

    Args:
        title: plain text.
        parts: HTML of the body.
        style: what this page adds to the style sheet.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · cramfast</title><style>{STYLE}{style}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def tile(name: str, value: str) -> str:
    """A figure in large type above its name."""
    return f"<div class={'tile2' if '→' in value else 'tile'}><b>{escape(value)}</b><span>{escape(name)}</span></div>"


def figure(svg: str, caption: str = "", wide: bool = False) -> str:
    """A chart with its caption; wide: over the full width."""
    caption = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure{' class=wide' if wide else ''}>{svg}{caption}</figure>"


def flat(values: dict, prefix: str = "") -> list[tuple[str, str]]:
    """One (dotted name, text) for each leaf; floats to six digits."""
    rows = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + str(key), cell_text(value)))
    return rows


def table(rows: list, names: list[str] = ()) -> str:
    """An HTML table; the first cell of a row names it when there is no header."""
    head = "<tr>" + "".join(f"<th>{escape(str(name))}</th>" for name in names) + "</tr>" if names else ""
    body = []
    for row in rows:
        cells = [f"<td class=n>{escape(cell_text(cell))}</td>" for cell in row]
        if not names:
            cells[0] = f"<th>{escape(str(row[0]))}</th>"
        body.append("<tr>" + "".join(cells) + "</tr>")
    return f'<div class="scroll"><table>{head}{"".join(body)}</table></div>'


def cell_text(value) -> str:
    """A list's members, six digits of a float, thousands of an integer set apart."""
    if isinstance(value, list):
        return ", ".join(map(cell_text, value)) or "(none)"
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value >= 10000 else str(value)
