"""First pass over the text: which documents stay, a sample for the tokenizer, and the sides of the split."""

import hashlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from cramfast.errors import UserError
from cramfast.text.corpus import Corpus
from cramfast.text.curation import KEPT, Curator
from cramfast.text.units import fingerprints, units

Report = Callable[[str, int, int], None]  # stage, done, total (0: unknown)

SAMPLE_CHARACTERS = 16_000_000  # for the tokenizer; a uniform draw, so more changes little but the time
SAMPLE_PIECE = 20_000  # characters drawn together, so that no huge document is the whole sample
# A small text holds out more than the fraction asked for, up to a share of LARGEST_HELDOUT: a loss over fewer tokens
# (about 4.5 characters each) is too noisy to compare runs by.
LEAST_HELDOUT_CHARACTERS = 200_000
LARGEST_HELDOUT = 0.05
BINS = 1 << 16  # of texts, by their hash: a bin is on one side
SLACK = 0.1  # of the characters to hold out: within it the split is taken, else long documents are cut
# Where a few documents are most of the text, they are cut so that the held-out side has about so many units.
HELDOUT_UNITS = 16
LEAST_UNIT = 200  # characters


def digest(text: str, seed: int) -> int:
    """64 bits that depend on the text alone: the same text always lands on the same side."""
    key = hashlib.blake2b(
        text.encode("utf-8", "surrogatepass"), digest_size=8, salt=seed.to_bytes(8, "little"), person=b"heldout"
    )
    return int.from_bytes(key.digest(), "little")


def mixed(value: int) -> float:
    """A number in [0, 1) from 64 bits, all of which matter (Steele et al., 2014: SplitMix64)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return (value ^ (value >> 31)) / 2**64


def choose(weights: np.ndarray, wanted: float) -> np.ndarray:
    """Which bins are held out, (BINS,) bool: one after the other until they hold about `wanted` characters. Those that
    alone are too heavy, a text that is repeated over and over, stay in training; each side gets something.

    Args:
        weights: (BINS,) characters in each; at least two bins have some.
    """
    heldout, held = np.zeros(len(weights), bool), 0
    filled = np.flatnonzero(weights)
    most = min((1 + SLACK) * wanted, int(weights.sum() - weights[filled].min()))
    for i in filled.tolist():
        if held >= wanted:
            break
        if held + weights[i] <= most:
            heldout[i], held = True, held + int(weights[i])
    if not held:
        heldout[filled[weights[filled].argmin()]] = True
    return heldout


class Survey:
    """What the first pass learns from the documents that the curator keeps.

    Duplicates are gone before the split is made, so that no held-out document has one in training; equal ones that
    stay are on one side.

    Attributes:
        documents, characters: of those kept.
        heldout: (BINS,) which bins of texts are held out.
        wanted: share of the text to hold out: the fraction asked for, or more of a small text.
        unit: characters of the units that long documents are cut into, each on its own side; 0: none is cut.
        shares_text: whether what is held out stands in training too: a long text that is the same over and over.
        repeated: share of the text that is one text, as often as it comes.

    Raises:
        UserError: fewer than two different documents, and none that can be cut.
    """

    def __init__(self, corpus: Corpus, curator: Curator, seed: int, heldout_fraction: float, report: Report):
        self.seed = seed
        self.sample: list[tuple[float, str]] = []
        self.sides = bytearray()  # of each document kept: the first byte of its digest
        self.documents = self.characters = self.pieces = 0
        self.sample_characters, self.sample_below = 0, 1.0
        weights, copies = [0] * BINS, [0] * BINS
        for text in curator.kept(corpus):
            self.documents += 1
            self.characters += len(text)
            key = digest(text, seed)
            self.sides.append(key >> 56)
            weights[key >> 48] += len(text)
            copies[key >> 48] += 1
            self._draw(text, key)
            if self.documents % 5000 == 0:
                report("reading text", len(curator.verdicts), 0)
        if self.documents == 0:
            reasons = f" ({'; '.join(line.split(' — ')[0] for line in corpus.notes())})" if corpus.notes() else ""
            raise UserError(f"{corpus}: {self._left('no text', curator)}{reasons} — name files with text in them")
        self.wanted = max(heldout_fraction, min(LARGEST_HELDOUT, LEAST_HELDOUT_CHARACTERS / self.characters))
        self.unit = 0
        self._split(np.array(weights), np.array(copies), corpus, curator)
        report("reading text", len(curator.verdicts), len(curator.verdicts))

    def _split(self, weights: np.ndarray, copies: np.ndarray, corpus: Corpus, curator: Curator) -> None:
        """Choose the bins that are held out; cut long documents where whole ones come to another share."""
        wanted = self.wanted * self.characters
        whole = self._off(weights)
        if whole > SLACK:
            self.unit = max(LEAST_UNIT, int(wanted / HELDOUT_UNITS))
            smaller, number = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
            for place, unit in self._units(corpus, curator):
                smaller[place] += len(unit)
                number[place] += 1
            if self._off(smaller) < whole:
                weights, copies = smaller, number
            else:
                self.unit = 0
        if np.count_nonzero(weights) < 2:
            alone = self._left("a single document", curator)
            what = alone if self.documents == 1 else f"all {self.documents:,} documents are equal"
            remedy = "" if corpus.documents == "lines" else "; --documents lines takes every line of a .txt file as one"
            raise UserError(
                f"{corpus}: {what}, too short to cut — cramfast needs two different texts, one to hold out{remedy}"
            )
        self.heldout = choose(weights, wanted)
        self.shares_text = self.unit > 0 and not self._withdraw(corpus, curator)
        some, every = (bins.reshape(256, -1) for bins in (self.heldout, self.heldout | (weights == 0)))
        # By the first byte of a digest: whether all such texts are held out, or -1 where further bits decide.
        self.groups = np.where(every.all(1), 1, np.where(some.any(1), -1, 0)).tolist()
        self.repeated = float(weights[copies > 1].max(initial=0) / weights.sum())

    def _units(self, corpus: Corpus, curator: Curator) -> Iterator[tuple[int, str]]:
        """(bin, unit) of the documents kept, read once more."""
        kept = (text for text, v in zip(corpus, curator.verdicts, strict=True) if v == KEPT)
        return ((digest(unit, self.seed) >> 48, unit) for text in kept for unit in units(text, self.unit))

    def _withdraw(self, corpus: Corpus, curator: Curator) -> bool:
        """Give to training the bins whose text is for the most part found there too: a passage that comes again may be
        cut at other places at its ends. Whether anything remains; else all stays as it was."""
        own: dict[int, list[np.ndarray]] = {}
        for place, unit in self._units(corpus, curator):
            if self.heldout[place]:
                own.setdefault(place, []).append(fingerprints(unit))
        there = np.unique(np.concatenate([prints for each in own.values() for prints in each]))
        if len(there) == 0:
            return True  # too short to tell
        found = np.zeros(len(there), bool)
        for place, unit in self._units(corpus, curator):
            if not self.heldout[place]:
                prints = fingerprints(unit)
                at = np.searchsorted(there, prints).clip(max=len(there) - 1)
                found[at[there[at] == prints]] = True
        several = {place: np.concatenate(prints) for place, prints in own.items()}
        shared = [
            p for p, prints in several.items() if len(prints) and found[np.searchsorted(there, prints)].mean() > 0.5
        ]
        if len(shared) == len(own):
            return False
        self.heldout[shared] = False
        return True

    def _left(self, what: str, curator: Curator) -> str:
        read = len(curator.verdicts)
        return f"{what} of {read:,} documents left by --curation" if read > self.documents else f"{what} found"

    def _off(self, weights: np.ndarray) -> float:
        """How far the best split of these bins is from the share to hold out, as a part of it."""
        if np.count_nonzero(weights) < 2:
            return float("inf")
        return abs(weights[choose(weights, self.wanted * self.characters)].sum() / self.characters / self.wanted - 1)

    def parts(self, index: int, text: str) -> list[tuple[bool, str]]:
        """(whether it is held out, text) of a document: all of it, or, where documents are cut, the stretches of units
        on the same side.

        Args:
            index: of the document among those kept; its text is hashed again only where a byte does not decide.
        """
        if self.unit == 0:
            side = self.groups[self.sides[index]]
            return [(bool(side) if side >= 0 else self._is_heldout(text), text)]
        stretches: list[tuple[bool, list[str]]] = []
        for unit in units(text, self.unit):
            side = self._is_heldout(unit)
            if not stretches or stretches[-1][0] != side:
                stretches.append((side, []))
            stretches[-1][1].append(unit)
        joined = ((side, "".join(parts).strip()) for side, parts in stretches)
        return [(side, part) for side, part in joined if part]

    def _is_heldout(self, text: str) -> bool:
        return bool(self.heldout[digest(text, self.seed) >> 48])

    def _draw(self, text: str, key: int) -> None:
        """Perhaps add pieces of the document to the sample; halve the sample when it has grown to twice its size. The
        draw is a hash of all of the text and the number of the piece: equal beginnings and equal texts are as likely
        to come as any others."""
        for start in range(0, len(text), SAMPLE_PIECE):
            self.pieces += 1
            draw = mixed((key + self.pieces * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF)
            if draw >= self.sample_below:
                continue
            piece = text[start : start + SAMPLE_PIECE]
            self.sample.append((draw, piece))
            self.sample_characters += len(piece)
            while self.sample_characters > 2 * SAMPLE_CHARACTERS:
                self.sample_below /= 2
                self.sample = [item for item in self.sample if item[0] < self.sample_below]
                self.sample_characters = sum(len(t) for _, t in self.sample)

    def texts(self) -> Iterator[str]:
        """The sample, cut to its size.

        Raises:
            UserError: it is empty: a tokenizer would be made of nothing.
        """
        if not self.sample:
            raise UserError("no text was drawn to learn the tokenizer from — use another --seed")
        return self._texts()

    def _texts(self) -> Iterable[str]:
        left = SAMPLE_CHARACTERS
        for _, text in sorted(self.sample, key=lambda item: item[0]):
            if left <= 0:
                return
            yield text
            left -= len(text)
