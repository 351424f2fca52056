"""Dropout at the price of the multiplication: on a CPU, torch draws one random number after the other for it."""

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cramfast.runtime.counter_random import mix

UNSIGNED = {2: torch.uint16, 4: torch.uint32, 8: torch.uint64}  # by the bytes of an element
STEPS = 1 << 16  # a rate is rounded to a multiple of 1 / STEPS, so that four elements share a random number of 64 bits


def dropout(x: Tensor, rate: float) -> Tensor:
    """x with each element zeroed with probability `rate`, the others divided by 1 - rate; always on.

    Draws from torch's generator of the device, once. Differentiable in x.

    Args:
        x: any shape, floating point.
        rate: 0 <= rate < 1; on a CPU rounded to a multiple of 2^-16.
    """
    if x.device.type != "cpu":
        return F.dropout(x, rate)
    dropped = min(round(rate * STEPS), STEPS - 1)
    factor = torch.tensor(STEPS / (STEPS - dropped), dtype=x.dtype)
    kind = UNSIGNED[x.element_size()]
    factor_N = torch.empty(x.shape, dtype=x.dtype)
    seed = torch.empty((), dtype=torch.int64).random_()
    _draw(factor_N.view(kind).numpy().reshape(-1), np.uint64(seed.item()), dropped, factor.view(kind).item())
    return x * factor_N


@numba.njit(cache=True, nogil=True)
def _draw(out, seed, dropped, kept):
    """Write `kept`, or 0 with probability dropped / STEPS: a function of the seed and the element's place.

    Four elements take a number of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), read at any place as it only counts up;
    written out, because a loop over them does not vectorise.
    """
    quarter, threshold, low, zero = len(out) // 4, np.uint64(dropped), np.uint64(0xFFFF), out.dtype.type(0)
    kept = out.dtype.type(kept)
    for i in range(quarter):
        bits = mix(seed + np.uint64(i + 1) * np.uint64(0x9E3779B97F4A7C15))
        out[4 * i] = kept if (bits & low) >= threshold else zero
        out[4 * i + 1] = kept if ((bits >> np.uint64(16)) & low) >= threshold else zero
        out[4 * i + 2] = kept if ((bits >> np.uint64(32)) & low) >= threshold else zero
        out[4 * i + 3] = kept if (bits >> np.uint64(48)) >= threshold else zero
    bits = mix(seed + np.uint64(quarter + 1) * np.uint64(0x9E3779B97F4A7C15))
    for i in range(4 * quarter, len(out)):
        out[i] = kept if (bits & low) >= threshold else zero
        bits >>= np.uint64(16)
