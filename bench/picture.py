"""The picture of the README, for light and dark pages: python -m bench.picture [--out docs].

Drawn from committed results alone: the curves of docs/results.json (python -m bench.runs) and rows of whole steps
(python -m bench.step). One SVG for each background; text stays text, in the reader's own font.
"""

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from bench.tables import read
from cramfast.config import require
from cramfast.errors import command
from cramfast.runtime import atomic
from cramfast.runtime.jsonfile import read_json

RESULTS = Path("docs/results.json")
STEPS = (
    Path("bench/results/2026-11-27-step-4x256-zen5-2core.jsonl"),
    Path("bench/results/2026-11-27-step-12x768-zen5-2core.jsonl"),
)
SYSTEMS = {"cramfast": "cramfast", "transformers compiled": "transformers, compiled", "transformers": "transformers"}
RECIPES = {"cramfast": "cramfast", "crammed": "recipe of Cramming"}
FONT = "system-ui, -apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"


@dataclass(frozen=True)
class Colours:
    """Of one background; the background itself stays transparent."""

    ink: str
    faint: str
    ours: str
    other: str


BACKGROUNDS = {
    "light": Colours(ink="#1f2328", faint="#d1d9e0", ours="#0969da", other="#8c959f"),
    "dark": Colours(ink="#e6edf3", faint="#3d444d", ours="#58a6ff", other="#7d8590"),
}


def picture(runs: list[dict[str, Any]], steps: list[list[dict[str, Any]]], colours: Colours) -> str:
    """The SVG: held-out loss over tokens on the left, useful tokens/s of every system on the right.

    Args:
        runs: as in results.json, each with its curve.
        steps: rows of bench.step, one list for each size of model.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": "picture", "font.size": 10, "text.color": colours.ink}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10, 3.4))
        loss = figure.add_axes((0.03, 0.145, 0.43, 0.66))
        draw_loss(loss, runs, colours)
        height = 0.66 / len(steps)
        for place, rows in enumerate(steps):
            axes = figure.add_axes((0.665, 0.165 + (len(steps) - 1 - place) * height, 0.26, 0.72 * height))
            draw_speed(axes, rows, colours)
        threads = {row["threads"] for rows in steps for row in rows}
        require(len(threads) == 1, f"--steps with {sorted(threads)} threads", "take rows of one machine")
        for x, title, what in (
            (0.03, "It learns", "loss on unseen text, nats per masked token"),
            (0.53, "It is fast", f"useful tokens per second in training, {cores(threads.pop())}"),
        ):
            figure.text(x, 0.955, title, fontsize=12, fontweight="bold", va="center")
            figure.text(x, 0.875, what, fontsize=9.5, va="center")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return finished(buffer.getvalue(), colours)


def cores(threads: int) -> str:
    """How many cores so many threads keep busy, in words."""
    return "one CPU core" if threads == 1 else f"{threads} CPU cores"


def draw_loss(axes, runs: list[dict[str, Any]], colours: Colours) -> None:
    """Held-out loss of each recipe, and what the frequencies of words alone would give."""
    for run in runs:
        ours = run["recipe"] == "cramfast"
        x, y = [tokens / 1e6 for tokens in run["curve"]["tokens"]], run["curve"]["heldout_loss"]
        colour = colours.ours if ours else colours.other
        axes.plot(x, y, color=colour, linewidth=2.4 if ours else 1.8, solid_capstyle="round")
        axes.plot(x[-1:], y[-1:], "o", color=colour, markersize=5)
        axes.annotate(
            f"{RECIPES[run['recipe']]}: {y[-1]:.2f}", (x[-1], y[-1]), (3, -7 if ours else 24),
            textcoords="offset points", ha="right", va="top" if ours else "bottom", fontsize=9.5,
            color=colour if ours else colours.ink, fontweight="bold" if ours else "normal",
        )  # fmt: skip
    level = runs[0]["unigram_entropy"]
    axes.axhline(level, color=colours.ink, linewidth=1, linestyle=(0, (4, 4)), alpha=0.7)
    right = max(run["curve"]["tokens"][-1] for run in runs) / 1e6
    axes.annotate(
        f"word frequencies alone: {level:.2f}", (right, level), (0, 5), textcoords="offset points", ha="right",
        fontsize=9.5,
    )  # fmt: skip
    axes.set_xlim(0, 1.02 * right)
    axes.set_ylim(2, 9.5)
    axes.set_yticks([2, 4, 6, 8])
    axes.set_xlabel(
        f"million tokens read, in {runs[0]['seconds'] / 60:.0f} minutes on {cores(runs[0]['threads'])}",
        color=colours.ink,
        fontsize=9.5,
    )
    axes.grid(axis="y", color=colours.faint, linewidth=0.8)
    axes.tick_params(colors=colours.ink, labelcolor=colours.ink, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(colours.faint)


def draw_speed(axes, rows: list[dict[str, Any]], colours: Colours) -> None:
    """One bar a system, with its figure and how many times as fast ours is."""
    by_system = {row["system"]: row for row in rows}
    ours = by_system["cramfast"]
    names = [name for name in SYSTEMS if name in by_system]
    for place, name in enumerate(names):
        rate, mine = by_system[name]["tokens_per_s"], name == "cramfast"
        axes.barh(place, rate, height=0.72, color=colours.ours if mine else colours.other, linewidth=0)
        times = "" if mine else f" ({ours['tokens_per_s'] / rate:.1f}× slower)"
        axes.annotate(
            f"{rate:,.0f}{times}", (rate, place), (5, 0), textcoords="offset points", va="center", fontsize=9.5,
            fontweight="bold" if mine else "normal",
        )  # fmt: skip
    axes.set_title(f"{ours['layers']} layers of {ours['width']}", loc="left", fontsize=9.5, color=colours.ink, pad=3)
    axes.set_yticks(range(len(names)), [SYSTEMS[name] for name in names], fontsize=9.5)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02 * ours["tokens_per_s"])
    axes.set_xticks([])
    axes.tick_params(colors=colours.ink, labelcolor=colours.ink, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "left")
        spine.set_color(colours.faint)


def finished(svg: str, colours: Colours) -> str:
    """The reader's own font, a name for screen readers, and no white space at line ends."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r"font-family: [^;\"]*", f"font-family: {FONT}", svg)
    svg = svg.replace("<svg ", '<svg role="img" aria-label="Held-out loss, and speed beside transformers" ', 1)
    return "\n".join(line.rstrip() for line in svg.splitlines() if line.strip()) + "\n"


@dataclass(frozen=True)
class Options:
    """Draw the README's picture."""

    results: Path = RESULTS
    """results.json of python -m bench.runs."""
    steps: tuple[Path, ...] = STEPS
    """Rows of python -m bench.step, one file for each size of model, of one machine."""
    out: Path = Path("docs")
    """Folder of overview-light.svg and overview-dark.svg."""


def main() -> None:
    """Draw for both backgrounds."""
    options = tyro.cli(Options, prog="python -m bench.picture", description=__doc__)
    runs = read_json(options.results).get("runs", [])
    require(bool(runs), f"{options.results} without runs", "write it with python -m bench.runs")
    steps = [read(path) for path in options.steps]
    for name, colours in BACKGROUNDS.items():
        path = options.out / f"overview-{name}.svg"
        atomic.write_text(path, picture(runs, steps, colours))
        print(f"written: {path}")


if __name__ == "__main__":
    command(main)
