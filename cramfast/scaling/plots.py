"""The pictures of a plan, as matplotlib figures: loss curves, collapse, fit and residuals, best sizes, claims."""

import math

import numpy as np
from matplotlib.figure import Figure

from cramfast.pages.charts import tick
from cramfast.scaling.fit import COUNTS, laws_of
from cramfast.scaling.optimum import Cost, budget_name
from cramfast.scaling.shift import shifts, stable_part
from cramfast.session.record import number

RED, BLUE, GREY = "#c4500c", "#1f6feb", "#636c76"
DISTINCT = (BLUE, "#1a7f37", RED, "#8250df", GREY)
DPI = 150
AXES = (("tokens", "tokens"), ("seconds", "training time, s"), ("flops", "FLOPs"))


def colours(rows: list[dict]) -> dict[str, tuple]:
    """A colour for every shape, dark for large; equal sizes next to each other."""
    from matplotlib import colormaps

    shapes = list(dict.fromkeys(r["shape"] for r in sorted(rows, key=lambda r: (r["parameters"], r["width"]))))
    return {s: colormaps["viridis"](0.92 - 0.88 * i / max(1, len(shapes) - 1)) for i, s in enumerate(shapes)}


def prepare(axes, x_label: str, y_label: str, log_x: bool = True, log_y: bool = False) -> None:
    """Scales, names and a light grid."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    for axis, log in ((axes.xaxis, log_x), (axes.yaxis, log_y)):
        if log:
            (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
            low, high = sorted(axis.get_view_interval())
            few = high / low < 60
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=12))
            axis.set_minor_formatter(NullFormatter())
        else:
            axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(scientific if axis is axes.xaxis and "FLOPs" in x_label else tick))
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_title(y_label, loc="left", fontsize=9.5)
    axes.grid(color="#dfe2e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, length=2)
    axes.spines[["top", "right"]].set_visible(False)


def scientific(value: float, _position: int = 0) -> str:
    """2e12: FLOPs have no letter that everyone knows."""
    return f"{value:.0e}".replace("e+", "e")


def loss_curves(rows: list[dict]) -> Figure:
    """Held-out loss over tokens, seconds and FLOPs: a line a run, a dot where its learning rate has come to zero."""
    figure, colour = Figure(figsize=(11, 4.2), layout="constrained"), colours(rows)
    panels = figure.subplots(1, 3, sharey=True)
    for axes, (key, label) in zip(panels, AXES, strict=True):
        for row in rows:
            x, y = (np.array(row["heldout"][column], float) for column in (key, "loss"))
            kept = x > 0  # the evaluation before the first step has no place on a logarithmic axis
            axes.plot(x[kept], y[kept], "-", color=colour[row["shape"]], linewidth=0.8, alpha=0.45)
            axes.plot(row[key], number(row["loss"]), "o", color=colour[row["shape"]], markersize=4.5, markeredgewidth=0)
        prepare(axes, label, "held-out loss, nats per masked token" if axes is panels[0] else "")
    size = {row["shape"]: row["parameters"] for row in rows}
    for shape, tint in colour.items():
        panels[0].plot([], [], "o-", color=tint, label=f"{shape.replace('x', ' × ')}, {tick(round(size[shape], -4))}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8.5, frameon=False,
                  title="layers × width, parameters", title_fontsize=8.5)  # fmt: skip
    return figure


def collapse(rows: list[dict]) -> Figure | None:
    """Training loss of equal-size shapes as it is, and over tokens divided by each shape's factor; None without any."""
    found = shifts(rows)
    if not found:
        return None
    figure = Figure(figsize=(9.4, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    factors = {s.shape: s.factor for s in found} | {s.reference: 1.0 for s in found}
    budget = {shape: max(r["budget_tokens"] for r in rows if r["shape"] == shape) for shape in factors}
    common = min(budget.values())
    for place, (shape, factor) in enumerate(factors.items()):
        label = f"{shape.replace('x', ' × ')}: {factor:.3f}"
        for row in (r for r in rows if r["shape"] == shape and r["budget_tokens"] == common):
            x, y = stable_part(row)
            tint = DISTINCT[place % len(DISTINCT)]
            look = {"color": tint, "linewidth": 1.0, "alpha": 0.7, "marker": ".", "markersize": 4}
            left.plot(np.exp(x), y, **look)
            right.plot(np.exp(x) / factor, y, **look, label=label)
            label = None
    prepare(left, "tokens", "training loss in the plateau, nats per masked token")
    prepare(right, "tokens / factor", "the same, each shape's tokens divided by its factor")
    right.legend(title="factor", fontsize=8.5, title_fontsize=8.5, frameon=False)
    return figure


def law_and_residuals(rows: list[dict], found: dict) -> Figure:
    """Final losses with the law's curve of each size, and measured over predicted for every run."""
    law, _ = laws_of(found)
    references, colour = [row for row in rows if row["reference"]], colours(rows)
    figure = Figure(figsize=(9.4, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    for shape in dict.fromkeys(row["shape"] for row in references):
        mine = [row for row in references if row["shape"] == shape]
        D = np.geomspace(0.8 * found["ranges"]["D"][0], 1.25 * found["ranges"]["D"][1], 60)
        left.plot(D, law.loss(mine[0][COUNTS[found["count"]]], D), color=colour[shape], linewidth=1.2)
        left.plot([r["tokens"] for r in mine], [r["loss"] for r in mine], "o", color=colour[shape], markersize=4.5,
                  label=shape.replace("x", " × "))  # fmt: skip
    prepare(left, "tokens", "held-out loss, nats per masked token")
    left.legend(fontsize=8.5, frameon=False)
    unseen = {p["name"]: -100 * p["error"] / (1 + p["error"]) for p in found["predictions"]}
    off = [100 * (row["loss"] / law.loss(row[COUNTS[found["count"]]], row["tokens"]) - 1) for row in rows]
    for kept, look, label in (
        (True, {"marker": "o", "color": BLUE}, "fitted"),
        (False, {"marker": "^", "color": GREY}, "other shapes, not fitted"),
    ):
        chosen = [(row["flops"], o) for row, o in zip(rows, off, strict=True) if row["reference"] == kept]
        if chosen:
            right.scatter(*zip(*chosen, strict=True), s=24, label=label, **look)
    if ahead := [(row["flops"], unseen[row["name"]]) for row in rows if row["name"] in unseen]:
        right.scatter(*zip(*ahead, strict=True), s=44, marker="D", facecolor="none", edgecolor=RED,
                      label="by a law that had not seen them")  # fmt: skip
    right.axhline(0, color="black", linewidth=0.8)
    prepare(right, "FLOPs", "measured loss over predicted, % too high")
    right.legend(fontsize=8.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    return figure


def sizes_for_budget(found: dict) -> Figure:
    """Expected loss over size for every budget of hours, dashed beyond what was trained; a dot at the best size."""
    law, _ = laws_of(found)
    speed = found["advice"]["speed"]
    cost = Cost(np.array(speed["N"]), 1 / np.array(speed["tokens_per_s"]))
    N = np.geomspace(cost.N[0], 4 * cost.N[-1], 200)
    figure = Figure(figsize=(9.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(found["advice"]["hours"]):
        loss, inside = law.loss(N, 3600 * row["budget"] / cost.at(N)), cost.N[-1] >= N
        tint = DISTINCT[place % len(DISTINCT)]
        axes.plot(N[inside], loss[inside], color=tint, label=budget_name(row["budget"]))
        axes.plot(N[~inside], loss[~inside], "--", color=tint, linewidth=1)
        axes.plot(row["N"], row["loss"], "o", color=tint)
    prepare(axes, f"parameters ({found['count']}); dashed: larger than any that was trained",
            "expected loss when the whole budget goes to one size, nats per masked token")  # fmt: skip
    axes.legend(fontsize=8.5, frameon=False, title="budget", title_fontsize=8.5)
    return figure


def claims(found: dict) -> Figure | None:
    """Predicted and measured gain of every claim that has both, with their intervals."""
    shown = [claim for claim in found["claims"] if claim.get("predicted") and claim.get("measured")]
    if not shown:
        return None
    figure = Figure(figsize=(9.4, 1.2 + 0.42 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for key, colour, place in (("predicted", BLUE, 0.13), ("measured", RED, -0.13)):
        value, low, high = np.array([claim[key] for claim in shown], float).T
        y = np.arange(len(shown))[::-1] + place
        axes.errorbar(value, y, xerr=(np.maximum(0, value - low), np.maximum(0, high - value)), fmt="o", color=colour,
                      markersize=4.5, capsize=2.5, linewidth=1.4, label=key)  # fmt: skip
    axes.axvline(0, color="black", linewidth=0.8)
    prepare(axes, "gain in held-out loss, nats", "what the law predicts and what the runs show", log_x=False)
    axes.set_yticks(range(len(shown))[::-1], [f"{c['name']}  ({c['verdict']})" for c in shown])
    span = [x for claim in shown for key in ("predicted", "measured") for x in claim[key]]
    if math.isfinite(width := max(span) - min(span)) and width > 0:
        axes.set_xlim(min(0, min(span)) - 0.05 * width, max(0, max(span)) + 0.05 * width)
    axes.legend(fontsize=8.5, frameon=False)
    return figure
