"""Line charts of a run as SVG text for the report: small however long the run, coloured by the page's style sheet."""

import contextlib
import io
import math
import re
from dataclasses import dataclass

import numpy as np

BINS = 240  # points a line keeps: about one for each 3 pixels of a chart at full width
# Matplotlib gets these placeholders, the page's variables take their place: one chart serves light and dark.
INK = {"#010101": "var(--ink)", "#020202": "var(--grid)", "#030303": "var(--one)", "#040404": "var(--two)"}
INK_COLOUR, GRID_COLOUR, ONE, TWO = INK


@dataclass(frozen=True)
class Line:
    """One series. `band` draws the range of the values that share a bin, `dots` marks every point instead."""

    label: str
    x: list[float]
    y: list[float]
    colour: str = ONE
    band: bool = False
    dots: bool = False


def binned(x, y, bins: int = BINS) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(x, mean, low, high) over at most `bins` stretches of neighbouring points; values not finite are left out."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    if len(x) <= bins:
        return x, y, y, y
    starts = np.arange(0, len(x), stretch(len(x), bins))
    counts = np.diff(np.append(starts, len(x)))
    low, high = np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts, low, high


def stretch(points: int, bins: int = BINS) -> int:
    """How many neighbouring points become one."""
    return max(1, math.ceil(points / bins))


def chart(
    lines: list[Line],
    x_label: str,
    y_label: str,
    *,
    salt: str,
    wide: bool = False,
    level: tuple[float, str] | None = None,
    marks: list[float] = (),
    log_x: bool = False,
    legend: bool = False,
) -> str:
    """An <svg> element.

    Args:
        lines: what to draw; points that are not finite are left out.
        x_label: with unit.
        y_label: with unit; stands above the chart.
        salt: unlike in any other chart of the page, because element ids come from it.
        wide: for the full width of the page rather than half of it.
        level: (y, label) of a horizontal reference line; one that is not finite is left out.
        marks: x of skipped steps, drawn as ticks on the lower edge.
        log_x: logarithmic x axis.
        legend: name the lines.
    """
    with _canvas(x_label, y_label, salt, wide) as (axes, buffer):
        if log_x:
            axes.set_xscale("log")
        drawn = [_draw(axes, line) for line in lines]
        if not any(drawn):
            axes.text(0.5, 0.5, "no finite values", transform=axes.transAxes, ha="center", color=INK_COLOUR)
        if level is not None and math.isfinite(level[0]):
            _draw_level(axes, *level, on_the_left=log_x)
        if marks:
            x = np.asarray(marks)[:: math.ceil(len(marks) / BINS)]
            axes.plot(x, np.full(len(x), 0.015), "|", color=TWO, transform=axes.get_xaxis_transform(), markersize=7)
        _limits(axes, from_zero=level is None, log_x=log_x)
        if legend:
            axes.legend(frameon=False, labelcolor=INK_COLOUR, loc="upper right")
    return _for_page(buffer.getvalue(), f"{y_label} over {x_label}")


def bars(edges: np.ndarray, heights: np.ndarray, x_label: str, y_label: str, *, salt: str, log_x: bool = False) -> str:
    """A histogram as an <svg> element.

    Args:
        edges: (bins + 1,), ascending.
        heights: (bins,).
        x_label, y_label, salt, log_x: as in chart().
    """
    with _canvas(x_label, y_label, salt, wide=False) as (axes, buffer):
        if log_x:
            axes.set_xscale("log")
        axes.bar(edges[:-1], heights, width=0.94 * np.diff(edges), align="edge", color=ONE, linewidth=0)
        axes.set_ylim(0, 1.06 * max(1, np.max(heights)))
    return _for_page(buffer.getvalue(), f"{y_label} over {x_label}")


@contextlib.contextmanager
def _canvas(x_label: str, y_label: str, salt: str, wide: bool):
    """(axes to draw on, buffer that holds the SVG once the context has ended)."""
    import matplotlib

    size = (9.4, 3.7) if wide else (4.6, 2.7)
    # No font is asked for by name and none is embedded: the page's style sheet names it.
    style = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9, "path.simplify_threshold": 0.3}
    with matplotlib.rc_context(style):
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        _decorate(axes, x_label, y_label)
        buffer = io.StringIO()
        yield axes, buffer
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})


def _draw(axes, line: Line) -> bool:
    x, mean, low, high = binned(line.x, line.y)
    if line.dots:
        axes.plot(x, mean, "o-", color=line.colour, label=line.label, markersize=3.5, linewidth=1)
    else:
        if line.band and not np.array_equal(low, high):
            axes.fill_between(x, low, high, color=line.colour, alpha=0.18, linewidth=0)
        # A short run is a handful of points, and one point draws no line.
        axes.plot(
            x, mean, "o-" if len(x) < 20 else "-", color=line.colour, label=line.label, markersize=3, linewidth=1.5
        )
    return len(x) > 0


def _draw_level(axes, y: float, label: str, on_the_left: bool) -> None:
    # A falling loss leaves room above the line on the right, and, where the log axis stretches its start, below it.
    axes.axhline(y, color=INK_COLOUR, linewidth=1, linestyle=(0, (5, 4)), alpha=0.7)
    axes.annotate(
        label,
        (0 if on_the_left else 1, y),
        (4, -11) if on_the_left else (-4, 4),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        color=INK_COLOUR,
        ha="left" if on_the_left else "right",
    )


def _limits(axes, from_zero: bool, log_x: bool) -> None:
    if not log_x:
        right = axes.get_xlim()[1]
        axes.set_xlim(-0.02 * right, right)
    low, high = axes.get_ylim()
    axes.set_ylim(0 if from_zero else low - 0.04 * (high - low), high + 0.06 * (high - low if not from_zero else high))


def tick(value: float, _position: int = 0) -> str:
    """0.0005, 2.5, 400, 20 k, 150 M, 1.2 B."""
    for scale, letter in ((1e15, "e15"), (1e12, "e12"), (1e9, " B"), (1e6, " M"), (1e4, None)):
        if abs(value) >= scale:
            return f"{value / 1e3:.6g} k" if letter is None else f"{value / scale:.6g}{letter}"
    return f"{value:.6g}"


def _decorate(axes, x_label: str, y_label: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_title(y_label, loc="left", fontsize=9.5, color=INK_COLOUR)
    axes.set_xlabel(x_label, color=INK_COLOUR)
    axes.tick_params(colors=INK_COLOUR, length=0)
    axes.grid(axis="y", color=GRID_COLOUR, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(tick))
    axes.xaxis.set_major_formatter(FuncFormatter(tick))
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID_COLOUR)


def _for_page(svg: str, name: str) -> str:
    """Strip the file header, name the picture for screen readers, and hand colours and fonts to the style sheet."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    for placeholder, variable in INK.items():
        svg = svg.replace(placeholder, variable)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)
