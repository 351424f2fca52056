"""The characters of a text, counted."""

import functools
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cramfast.text.learning import RUN, RUN_FROM, longest_word

CHARACTERS = 0x110000
COUNTED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Census:
    """Characters of some texts.

    Attributes:
        counts: (0x110000,) int64, how often each comes.
        in_runs: how many stand in runs of over a hundred ASCII letters.
    """

    counts: np.ndarray
    in_runs: int

    @staticmethod
    def of(texts: Iterable[str]) -> "Census":
        counts, in_runs, waiting, size = np.zeros(CHARACTERS, np.int64), 0, [], 0
        for text in texts:
            if longest_word(text) >= RUN_FROM:
                in_runs += sum(len(run) for run in RUN.findall(text))
            waiting.append(text)
            size += len(text)
            if size >= COUNTED_AT_ONCE:
                _count("".join(waiting), counts)
                waiting, size = [], 0
        _count("".join(waiting), counts)
        return Census(counts, in_runs)

    def visible(self) -> dict[str, int]:
        """How often each character comes that is there to be seen."""
        return {chr(c): int(self.counts[c]) for c in np.flatnonzero(self.counts).tolist() if is_visible(chr(c))}


def _count(text: str, counts: np.ndarray) -> None:
    if text.isascii():
        counts[:128] += np.bincount(np.frombuffer(text.encode(), np.uint8), minlength=128)
        return
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    found = np.bincount(points)
    counts[: len(found)] += found


@functools.lru_cache(maxsize=1 << 17)
def is_visible(character: str) -> bool:
    """Neither a space, nor a control or format character, nor an accent, which is part of the letter before it."""
    kind = unicodedata.category(character)
    accent = "\u0300" <= character <= "\u036f" or "\ufe00" <= character <= "\ufe0f"
    return not (character.isspace() or kind in ("Cc", "Cf", "Cs", "Zs", "Zl", "Zp") or accent)
