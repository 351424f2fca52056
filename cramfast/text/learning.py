"""What a tokenizer learns from: prose, and not the keys, dumps and genomes among it, which hold no words."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# One base64 attachment in ten documents would fill the vocabulary with its chance pairs of letters.
HEX_FROM, BASE64_FROM = 32, 40  # characters: an MD5 sum; less than a line of base64, more than words of a language
DUMP = re.compile(
    f"(?<![A-Za-z0-9+/_=-])[A-Za-z0-9+/_-]{{{HEX_FROM},}}={{0,2}}(?:\\r?\\n[A-Za-z0-9+/]{{2,}}={{1,2}}(?![^\\s]))?\\s*"
)
HEX = re.compile("[0-9a-fA-F]*")
RUN_FROM = 101  # letters: no word of a language, but a genome, a protein
RUN = re.compile(f"[A-Za-z]{{{RUN_FROM},}}")
LEARNED_FROM = 2_000_000  # characters of such runs; the same pieces come again and again
LEAST_PROSE = 0.1  # where less is left than this share, the dumps are the text


@dataclass
class Learned:
    """What was read for learning, in characters.

    Attributes:
        read: of all texts.
        dumps, stretches: base64 and hexadecimal left out, and how many stretches of it.
        runs: letters without a break left out, those beyond the first LEARNED_FROM.
    """

    read: int = 0
    dumps: int = 0
    stretches: int = 0
    runs: int = 0

    def forget(self) -> None:
        """Nothing was left out after all."""
        self.dumps = self.stretches = self.runs = 0

    def note(self) -> str:
        """What was left out, as shares of the characters, in words; "" where nothing was."""
        parts = []
        if self.dumps:
            parts.append(f"{self.dumps / self.read:.1%} ({self.stretches:,} stretches of base64 or hex)")
        if self.runs:
            runs = f"runs of over {RUN_FROM - 1} letters, past the first {LEARNED_FROM:,} characters of them"
            parts.append(f"{self.runs / self.read:.1%} ({runs})")
        return " and ".join(parts)


def to_learn_from(texts: Iterable[str], learned: Learned) -> Iterator[str]:
    """The texts without dumps, and with runs of letters up to LEARNED_FROM characters in all; `learned` counts."""

    def drop(found: re.Match) -> str:
        if not is_dump(found[0]):
            return found[0]
        learned.dumps += len(found[0].rstrip())
        learned.stretches += 1
        return ""

    left = LEARNED_FROM

    def spend(found: re.Match) -> str:
        nonlocal left
        kept = found[0][:left]
        left -= len(kept)
        learned.runs += len(found[0]) - len(kept)
        return kept

    for text in texts:
        learned.read += len(text)
        longest = longest_word(text)
        if longest >= HEX_FROM:
            text = DUMP.sub(drop, text)
        if longest >= RUN_FROM:
            text = RUN.sub(spend, text)
        yield text


def longest_word(text: str) -> int:
    """Characters of the longest stretch without white space."""
    return max(map(len, text.split()), default=0)


def is_dump(stretch: str) -> bool:
    """Whether a stretch of base64's letters is that, or hexadecimal: digits and letters mixed as chance mixes them."""
    body = stretch.split()[0].rstrip("=")
    digits = sum(map(body.count, "0123456789"))
    if HEX.fullmatch(body):
        return 0.1 < digits / len(body) < 1
    upper, lower = (sum(map(kind, body)) for kind in (str.isupper, str.islower))
    return len(body) >= BASE64_FROM and digits >= 0.025 * len(body) and min(upper, lower) >= 0.16 * len(body)
