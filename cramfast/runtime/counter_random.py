"""Random numbers by place: the same for a seed and a counter, whoever draws them, in whatever order."""

import numba
import numpy as np


@numba.njit(cache=True, nogil=True)
def mix(x):
    """The finaliser of SplitMix64 (Steele, Lea, Flood, 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
