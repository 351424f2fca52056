"""Characters that a tokenizer loses: how many, which, and the kind of tokenizer that loses none."""

import functools
import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import Tokenizer, pre_tokenizers

from cramfast.text.census import Census, is_visible
from cramfast.text.kmers import cutting
from cramfast.text.learning import RUN_FROM
from cramfast.text.spelling import GREEK, STROKES, spelling
from cramfast.text.tokenizer import is_own_wordpiece

UNKNOWN_READ = 2_000_000  # characters in which [UNK] is looked for, where a tokenizer that is given can make it
COMMONEST = 10
ACCENTS = "\u0300-\u036f\u20d0-\u20ff"
STRUCK = re.compile(f"([^{ACCENTS}]?)[{ACCENTS}]*?([{STROKES}])")  # a sign, and the stroke among its accents
# Above these shares, WordPiece in lower-cased ASCII would be a model of another text. Accents tell words apart where
# they are many: without them, six tones of Vietnamese are one.
MOST_LOST, MOST_ACCENTS, MOST_RUNS = 0.02, 0.10, 0.5


@dataclass(frozen=True)
class Lost:
    """Characters that no token stands for.

    Attributes:
        total: visible characters looked at.
        counts: how often each lost one came.
    """

    total: int
    counts: dict[str, int]

    @property
    def share(self) -> float:
        """Of all visible characters; 0 where there are none."""
        return sum(self.counts.values()) / self.total if self.total else 0.0

    def commonest(self, most: int = COMMONEST) -> list[tuple[str, float]]:
        """(character, its share of all visible ones) of those lost, the commonest first."""
        ranked = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return [(character, count / self.total) for character, count in ranked[:most]]


def lost_characters(tokenizer: Tokenizer, texts: Iterable[str], census: Census | None = None) -> Lost:
    """The visible characters of the texts that the normalizer drops, or that [UNK] stands for.

    What the normalizer drops is counted in all of the texts. Where [UNK] depends on the word, as in a tokenizer that
    was given, both are counted in the first UNKNOWN_READ characters.

    Args:
        texts: to be read once; in random order, if they are more than UNKNOWN_READ characters.
        census: of the texts, where it is known.
    """
    parts = json.loads(tokenizer.to_str())
    if parts["model"]["type"] == "BPE" and _has_all_bytes(parts):
        unknown = None
    else:
        unknown = tokenizer.token_to_id(parts["model"].get("unk_token") or "[UNK]")
    if unknown is not None and not _spells_each(parts):
        return _by_word(tokenizer, texts, unknown)
    if census is None:
        texts = list(texts)
        census = Census.of(texts)
    visible = census.visible()
    if is_own_wordpiece(parts) and any(census.counts[ord(stroke)] for stroke in STROKES):
        return _with_strokes(tokenizer, texts, visible)
    dropped = {character: n for character, n in visible.items() if _is_dropped(tokenizer, character)}
    if unknown is not None:
        dropped |= {c: n for c, n in visible.items() if c not in dropped and _is_unknown(tokenizer, c, unknown)}
    return Lost(sum(visible.values()), dropped)


def _has_all_bytes(parts: dict) -> bool:
    vocabulary = parts["model"]["vocab"]
    return all(letter in vocabulary for letter in pre_tokenizers.ByteLevel.alphabet())


def _spells_each(parts: dict) -> bool:
    """Whether [UNK] is a matter of single characters: k-mers, or WordPiece that has each of its own."""
    return is_own_wordpiece(parts) or cutting(parts) is not None


def _with_strokes(tokenizer: Tokenizer, texts: Iterable[str], visible: dict[str, int]) -> Lost:
    """Of our WordPiece: a stroke is spelled with the sign before it, or lost; of a letter it is an accent."""
    visible = {character: n for character, n in visible.items() if character not in STROKES}
    counts = {character: n for character, n in visible.items() if _is_dropped(tokenizer, character)}
    strokes = dict[str, int]()
    for sign, stroke in (found.groups() for text in texts for found in STRUCK.finditer(text)):
        if not sign.isalpha() and spelling(sign + stroke) == spelling(sign):
            strokes[stroke] = strokes.get(stroke, 0) + 1
    return Lost(sum(visible.values()) + sum(strokes.values()), counts | strokes)


def _is_dropped(tokenizer: Tokenizer, character: str) -> bool:
    if tokenizer.normalizer is None:
        return False
    before, after = (tokenizer.normalizer.normalize_str(text) for text in ("aa", f"a{character}a"))
    return "".join(after.split()) == "".join(before.split())


def _is_unknown(tokenizer: Tokenizer, character: str, unknown: int) -> bool:
    return unknown in tokenizer.encode(character, add_special_tokens=False).ids


def _by_word(tokenizer: Tokenizer, texts: Iterable[str], unknown: int) -> Lost:
    total, counts, left = 0, dict[str, int](), UNKNOWN_READ
    dropped = functools.lru_cache(maxsize=1 << 17)(functools.partial(_is_dropped, tokenizer))
    for text in texts:
        text = text[:left]
        left -= len(text)
        covered = bytearray(len(text))
        encoding = tokenizer.encode(text, add_special_tokens=False)
        for token, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token != unknown:
                covered[begin:end] = bytes([1]) * (end - begin)
        for character, has_token in zip(text, covered, strict=True):
            if is_visible(character):
                total += 1
                if not has_token or dropped(character):
                    counts[character] = counts.get(character, 0) + 1
        if left <= 0:
            break
    return Lost(total, counts)


def described(character: str, share: float) -> str:
    """A lost character for a terminal: itself where that is safe, its code point, its share."""
    shown = f"{character} " if character.isprintable() and not unicodedata.combining(character) else ""
    return f"{shown}U+{ord(character):04X} {percent(share)}"


def percent(share: float) -> str:
    """A share with two digits behind the point; "under 0.01%" where these are 0."""
    return f"{share:.2%}" if share >= 0.0001 or share == 0 else "under 0.01%"


def suitable(census: Census) -> tuple[str, str]:
    """(wordpiece or bpe, why): what --tokenizer auto takes for a text."""
    visible = census.visible()
    total = max(1, sum(visible.values()))
    named = frozenset("".join(GREEK.values())) - {"μ"}
    lost = accented = letters = 0
    for character, count in visible.items():
        kind = unicodedata.category(character)
        if kind[0] == "L":
            letters += count
        if character.isascii():
            continue
        spelled = spelling(character).strip()
        if not spelled or (character.lower() in named):
            lost += count
        elif kind[0] == "L" and len(spelled) == 1:
            accented += count
    marks = int(census.counts[0x300:0x370].sum())
    if census.in_runs > MOST_RUNS * total:
        return "bpe", f"{census.in_runs / total:.0%} of the characters stand in runs of over {RUN_FROM - 1} letters"
    if lost > MOST_LOST * total:
        return "bpe", f"{lost / total:.1%} of the characters have no spelling in ASCII"
    if letters and accented + marks > MOST_ACCENTS * letters:
        return "bpe", f"{(accented + marks) / letters:.0%} of the letters would lose an accent"
    return "wordpiece", "nearly all characters have a spelling in ASCII"
