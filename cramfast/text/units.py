"""Cuts in long documents where their contents say so: what is the same in two places is cut alike in both."""

import itertools

import numba
import numpy as np

LOOKED_BACK = 32  # bytes before a cut that decide on it
STRETCH = 64  # bytes: texts that share so many share text


def units(text: str, size: int) -> list[str]:
    """The document in stretches of about `size` bytes of UTF-8, half to twice as many; end to end they are the text.

    Content-defined chunking (Muthitacharoen et al., 2001): of all places in reach, ends of lines where there are any,
    else spaces, the one with the least hash of what stands before it.
    """
    if len(text) <= size:
        return [text]
    data = text.encode("utf-8", "surrogatepass")
    borders = [0, *_borders(np.frombuffer(data, np.uint8), size).tolist(), len(data)]
    return [data[a:b].decode("utf-8", "surrogatepass") for a, b in itertools.pairwise(borders)]


@numba.njit(cache=True, nogil=True)
def _borders(data, size):
    found = []
    start = 0
    while len(data) - start > 2 * size:
        best, place, tier = np.uint64(0), 0, 3
        for i in range(start + max(1, size // 2), start + 2 * size + 1):
            before = data[i - 1]
            if data[i] & 0xC0 == 0x80:  # within a character
                continue
            kind = 0 if before == 10 else 1 if before == 32 else 2
            if kind > tier:
                continue
            hashed = np.uint64(0xCBF29CE484222325)  # FNV-1a
            for j in range(max(0, i - LOOKED_BACK), i):
                hashed = (hashed ^ np.uint64(data[j])) * np.uint64(0x100000001B3)
            hashed ^= hashed >> np.uint64(32)
            if kind < tier or hashed < best:
                best, place, tier = hashed, i, kind
        found.append(place)
        start = place
    return np.array(found, np.int64)


def fingerprints(text: str) -> np.ndarray:
    """(about bytes / 16,) uint64: hashes of stretches of 64 bytes, chosen by their contents wherever they stand."""
    return _fingerprints(np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8))


@numba.njit(cache=True, nogil=True)
def _fingerprints(data):
    base, last = np.uint64(0x100000001B3), np.uint64(1)
    for _ in range(STRETCH):
        last *= base
    found = np.empty(len(data), np.uint64)
    count, rolled = 0, np.uint64(0)
    for i in range(len(data)):  # Rabin and Karp (1987): each hash from the one before
        rolled = rolled * base + np.uint64(data[i])
        if i >= STRETCH:
            rolled -= last * np.uint64(data[i - STRETCH])
        whole = (rolled ^ (rolled >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        if i >= STRETCH - 1 and whole >> np.uint64(60) == 0:
            found[count] = whole
            count += 1
    return found[:count].copy()
