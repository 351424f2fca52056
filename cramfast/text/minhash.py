"""Near-duplicates by MinHash: documents whose sets of short windows overlap. No random state: same text, same answer.

A document stands for the set of its windows of WINDOW_BYTES bytes, lower-cased and with all ASCII punctuation and space
as one space: about four English words, eight Chinese characters, so that no language's idea of a word is needed. The
share of equal entries of two signatures estimates the Jaccard similarity of the sets (Broder, 1997), with a standard
deviation of at most 0.044; a table of bands of the signatures finds the documents worth comparing (Leskovec,
Rajaraman, Ullman: Mining of Massive Datasets, ch. 3).
"""

from collections.abc import Sequence

import numba
import numpy as np

from cramfast.runtime.counter_random import mix

WINDOW_BYTES = 24
HASHES = 128
RECALL = 0.99  # least probability that two documents of exactly the wanted similarity are compared
# A window of boilerplate puts any number of documents into one bucket of the table; the first few are compared.
BUCKET = 32
CHANCE = 1 / 256  # that two bytes of different windows are equal


def banding(similarity: float) -> tuple[int, int]:
    """(bands, rows) of the table: as many rows a band, and so as few false candidates, as RECALL allows."""
    rows = HASHES
    while 1 - (1 - similarity**rows) ** (HASHES // rows) < RECALL:
        rows -= 1
    return HASHES // rows, rows


class NearDuplicates:
    """Tells of each document, in the order of the text, whether one kept before is similar.

    Args:
        similarity: least estimated Jaccard similarity of a duplicate, 0.5 to 1.

    Memory is about 0.4 kB for each document kept, whatever its length.
    """

    def __init__(self, similarity: float):
        self.bands, self.rows = banding(similarity)
        self.least_equal = int(np.ceil(HASHES * (similarity + (1 - similarity) * CHANCE) - 1e-9))
        self.kept = 0
        self.signatures = np.empty((1 << 10, HASHES), np.uint8)
        self.numbers = np.empty(1 << 10, np.int64)
        self.slots = np.zeros(1 << 16, np.uint64)

    def find(self, texts: Sequence[str], numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Look up documents and remember those that are new.

        Args:
            texts: some megabytes at a time; working memory is about 3 bytes a character.
            numbers: what the caller calls them by, ascending and from 0 on.

        Returns:
            (matches, similarities): for each text the number of the most similar document kept before, the earliest
            of equals, or -1 where the text is kept, int64; and the estimated similarity to it, float64.
        """
        data = [text.encode("utf-8", "replace") for text in texts]  # lone surrogates cannot be encoded: "?"
        sizes = np.array([len(d) for d in data], np.int64)
        signatures = np.empty((len(data), HASHES), np.uint8)
        sign(np.frombuffer(b"".join(data), np.uint8), sizes, np.empty(sizes.max(initial=0) + 2, np.uint8), signatures)
        self._reserve(self.kept + len(data))
        matches, equal = np.empty(len(data), np.int64), np.empty(len(data), np.int64)
        self.kept = look_up(
            signatures, np.array(numbers, np.int64), self.least_equal, self.bands, self.rows,
            self.signatures, self.numbers, self.kept, self.slots, matches, equal,
        )  # fmt: skip
        return matches, np.clip((equal / HASHES - CHANCE) / (1 - CHANCE), 0, 1)

    def _reserve(self, documents: int) -> None:
        """Room for so many kept documents, with at most half of the table's slots taken."""
        if documents > len(self.numbers):
            room = max(documents, 2 * len(self.numbers))
            self.signatures = np.resize(self.signatures, (room, HASHES))
            self.numbers = np.resize(self.numbers, room)
        if 2 * self.bands * documents > len(self.slots):
            slots = len(self.slots)
            while 2 * self.bands * documents > slots:
                slots *= 2
            self.slots = np.zeros(slots, np.uint64)
            for number in range(self.kept):
                insert(self.signatures[number], number, self.bands, self.rows, self.slots)


@numba.njit(cache=True, nogil=True)
def _normalize(text, out):
    """Copy letters, digits and non-ASCII bytes, lower-cased, everything between them as one space; returns the size."""
    size = 0
    out[0] = 32
    for byte in text:
        if 65 <= byte <= 90:
            byte += 32
        if 97 <= byte <= 122 or 48 <= byte <= 57 or byte >= 128:
            size += 1
            out[size] = byte
        elif out[size] != 32:
            size += 1
            out[size] = 32
    return size if size > 0 and out[size] == 32 else size + 1


@numba.njit(cache=True, nogil=True)
def sign(text, sizes, scratch, signatures):
    """Signatures of documents.

    Args:
        text: (bytes,) uint8, UTF-8 of all documents end to end.
        sizes: (documents,) int64, bytes of each.
        scratch: (longest + 2,) uint8.
        signatures: (documents, HASHES) uint8, receives the lowest byte of the smallest value of each hash function.
    """
    # Hash function k maps a window's 32-bit hash x to a_k x + b_k, a_k odd: a permutation of the 32-bit numbers.
    factors, terms = np.empty(HASHES, np.uint32), np.empty(HASHES, np.uint32)
    for k in range(HASHES):
        drawn = mix(np.uint64(k + 1) * np.uint64(0x9E3779B97F4A7C15))
        factors[k], terms[k] = np.uint32(drawn) | np.uint32(1), np.uint32(drawn >> np.uint64(32))
    base = np.uint64(0x100000001B3)  # FNV's prime; the rolling hash is a polynomial in it
    leaving = np.uint64(1)
    for _ in range(WINDOW_BYTES):
        leaving *= base
    least = np.empty(HASHES, np.uint32)
    begin = 0
    for d in range(len(sizes)):
        size = _normalize(text[begin : begin + sizes[d]], scratch)
        begin += sizes[d]
        least[:] = np.uint32(0xFFFFFFFF)
        rolling = np.uint64(0)
        for i in range(size):
            rolling = rolling * base + np.uint64(scratch[i]) + np.uint64(1)
            if i >= WINDOW_BYTES:
                rolling -= leaving * (np.uint64(scratch[i - WINDOW_BYTES]) + np.uint64(1))
            if i >= WINDOW_BYTES - 1 or i == size - 1:  # a shorter document is one window
                x = np.uint32(mix(rolling))
                for k in range(HASHES):
                    value = np.uint32(factors[k] * x + terms[k])
                    least[k] = min(least[k], value)
        for k in range(HASHES):
            signatures[d, k] = np.uint8(least[k] & np.uint32(0xFF))


@numba.njit(cache=True, nogil=True)
def _band(signature, band, rows):
    """64-bit hash of one band of a signature."""
    hashed = np.uint64(band + 1)
    for i in range(band * rows, (band + 1) * rows):
        hashed = mix(hashed + np.uint64(signature[i]) * np.uint64(0x9E3779B97F4A7C15))
    return hashed


@numba.njit(cache=True, nogil=True)
def insert(signature, number, bands, rows, slots):
    """Enter the kept document `number` under each of its bands, but not into buckets that are full."""
    mask, low = np.uint64(len(slots) - 1), np.uint64(0xFFFFFFFF)
    for band in range(bands):
        hashed = _band(signature, band, rows)
        place, tag, found = hashed & mask, hashed & ~low, 0
        while slots[place] != 0 and found < BUCKET:
            found += (slots[place] & ~low) == tag
            place = (place + np.uint64(1)) & mask
        if found < BUCKET:
            slots[place] = tag | np.uint64(number + 1)


@numba.njit(cache=True, nogil=True)
def look_up(
    signatures, numbers, least_equal, bands, rows, kept_signatures, kept_numbers, kept, slots, matches, equal
):  # fmt: skip
    """Compare each document with the kept ones that share a band with it; enter those that are new.

    Args:
        signatures, numbers: (documents, HASHES) uint8 and (documents,) int64 of the new documents.
        least_equal: entries that the signatures of duplicates share.
        kept_signatures, kept_numbers: (room, HASHES) and (room,), filled up to `kept`.
        slots: (2^n,) uint64, open addressing: upper half of a band's hash, number of the kept document plus one.
        matches, equal: (documents,) to write: number of the most similar document or -1, entries they share.

    Returns:
        How many documents are kept now.
    """
    mask, low = np.uint64(len(slots) - 1), np.uint64(0xFFFFFFFF)
    for d in range(len(signatures)):
        best, most = np.int64(-1), least_equal - 1
        for band in range(bands):
            hashed = _band(signatures[d], band, rows)
            place, tag = hashed & mask, hashed & ~low
            while slots[place] != 0:
                if (slots[place] & ~low) == tag:
                    candidate = np.int64(slots[place] & low) - 1
                    same = 0
                    for k in range(HASHES):
                        same += signatures[d, k] == kept_signatures[candidate, k]
                    if same > most or (same == most and candidate < best):
                        best, most = candidate, same
                place = (place + np.uint64(1)) & mask
        matches[d] = -1 if best < 0 else kept_numbers[best]
        equal[d] = most if best >= 0 else 0
        if best < 0:
            kept_signatures[kept] = signatures[d]
            kept_numbers[kept] = numbers[d]
            insert(signatures[d], kept, bands, rows, slots)
            kept += 1
    return kept
