"""Learning rate, batch size and mask share as pure functions of the spent fraction f of the budget, 0 <= f <= 1."""

import math

WARM_UP = 0.05  # share of the budget; short, because pre-norm and the batch ramp already calm the start
START = 0.1  # lr at f = 0 as a share of the peak: a first step at zero would be wasted
DECAY = 0.4  # share of the budget in which wsd falls


def triangle(f: float) -> float:
    """From a quarter to one at f = 0.75, then down to zero at the end (Geiping and Goldstein, arXiv:2212.14034)."""
    return max(0.0, min(0.25 + f, 4.0 - 4.0 * f))


def one_cycle(f: float) -> float:
    """Up to one at half the budget, down to zero at its end."""
    return max(0.0, min(START + (1.0 - START) * 2.0 * f, 2.0 - 2.0 * f))


def wsd(f: float) -> float:
    """Warm-up, stable, decay by 1 - sqrt (Hägele et al., arXiv:2405.18392)."""
    fall = max(0.0, (f - (1.0 - DECAY)) / DECAY)
    return warm_up(f) * max(0.0, 1.0 - math.sqrt(fall))


def linear(f: float) -> float:
    """Warm-up, then straight down to zero."""
    return warm_up(f) * max(0.0, min(1.0, (1.0 - f) / (1.0 - WARM_UP)))


def cosine(f: float) -> float:
    """Warm-up, then half a cosine down to zero."""
    return warm_up(f) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, max(0.0, f - WARM_UP) / (1.0 - WARM_UP))))


def warm_up(f: float) -> float:
    """From START to one over the first WARM_UP of the budget, then one."""
    return min(1.0, START + (1.0 - START) * f / WARM_UP)


SHAPES = {shape.__name__: shape for shape in (triangle, one_cycle, wsd, linear, cosine)}
SHAPES["trapezoid"] = wsd  # what the records of earlier runs call it


def microbatches(f: float, microbatch_tokens: int, batch_tokens: int, ramp_fraction: float) -> int:
    """Passes accumulated into one update: from one, linearly, to the full batch at f = ramp_fraction."""
    full = max(1, round(batch_tokens / microbatch_tokens))
    share = 1.0 if f >= ramp_fraction else f / ramp_fraction
    return round(1 + (full - 1) * share)


def mask_fraction(f: float, start: float, end: float) -> float:
    """Linear from start to end, in steps of 0.01 between them: each new value is a new static shape."""
    low, high = sorted((start, end))
    return start if start == end else min(max(round(start + (end - start) * f, 2), low), high)


def lengthened(f: float, short_sequence_len: int, short_fraction: float) -> bool:
    """Whether a run that began with short sequences is through with them."""
    return short_sequence_len > 0 and f >= short_fraction
