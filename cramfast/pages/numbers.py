"""Numbers as people read them."""

import math


def short(value: float, unit: str = "") -> str:
    """A number for reading: three digits and a magnitude (45.6 M, 7.89 B, 1.20e15); – for NaN."""
    if not math.isfinite(value):
        return "–"
    for limit, scale, letter in ((1e12, None, ""), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            text = f"{value:.2e}".replace("e+", "e") if scale is None else f"{value / scale:.3g} {letter}"
            return f"{text} {unit}".strip()
    text = f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.4g}"
    return f"{text} {unit}".strip()


def span(seconds: float) -> str:
    """A duration for reading: 45 s, 12.3 min, 4.56 h; – for NaN."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.2f} h"
