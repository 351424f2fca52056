"""First pass over the text: which documents stay, a sample for the tokenizer, and where the held-out split begins."""

import hashlib
from collections.abc import Callable, Iterator

import numpy as np

from cramfast.errors import UserError
from cramfast.text.corpus import Corpus
from cramfast.text.curation import Curator

Report = Callable[[str, int, int], None]  # stage, done, total (0: unknown)

SAMPLE_CHARACTERS = 16_000_000  # for the tokenizer; a uniform draw, so more changes little but the time
SAMPLE_PIECE = 20_000  # characters drawn together, so that no huge document is the whole sample
# A small text holds out more than the fraction asked for, up to a share of LARGEST_HELDOUT: a loss over fewer tokens
# (about 4.5 characters each) is too noisy to compare runs by.
LEAST_HELDOUT_CHARACTERS = 200_000
LARGEST_HELDOUT = 0.05


def fraction(text: str, seed: int, purpose: bytes) -> float:
    """A number in [0, 1) that depends on the text alone: the same document always lands on the same side."""
    key = hashlib.blake2b(
        text.encode("utf-8", "surrogatepass"), digest_size=8, salt=seed.to_bytes(8, "little"), person=purpose
    )
    return int.from_bytes(key.digest(), "little") / 2**64


class Survey:
    """What the first pass learns from the documents that the curator keeps.

    Duplicates are gone before the split is made, so that no held-out document has one in training.

    Attributes:
        documents, characters: of those kept.
        heldout_below: documents whose fraction() is below are held out.

    Raises:
        UserError: fewer than two documents are left.
    """

    def __init__(self, corpus: Corpus, curator: Curator, seed: int, heldout_fraction: float, report: Report):
        self.seed = seed
        self.sample: list[tuple[float, str]] = []
        self.sides = bytearray()  # of each document kept: fraction(), cut to a byte
        self.documents = self.characters = 0
        self.least_side, self.greatest_side = 1.0, 0.0
        self.sample_characters, self.sample_below = 0, 1.0
        for text in curator.kept(corpus):
            self.documents += 1
            self.characters += len(text)
            side = fraction(text, seed, b"heldout")
            self.sides.append(int(256 * side))
            self.least_side, self.greatest_side = min(self.least_side, side), max(self.greatest_side, side)
            self._draw(text)
            if self.documents % 5000 == 0:
                report("reading text", len(curator.verdicts), 0)
        if self.documents < 2:
            what = "no text" if self.documents == 0 else "a single document"
            read = len(curator.verdicts)
            left = f"{what} of {read:,} documents left by --curation" if read > self.documents else f"{what} found"
            raise UserError(
                f"{corpus}: {left} — cramfast needs at least two documents, one to hold out; "
                "--documents lines takes every line of a .txt file as one"
            )
        enough = min(LARGEST_HELDOUT, LEAST_HELDOUT_CHARACTERS / self.characters)
        wanted = max(heldout_fraction, enough)
        # At least one document on either side, however few there are.
        self.heldout_below = min(max(wanted, float(np.nextafter(self.least_side, 1.0))), self.greatest_side)
        report("reading text", len(curator.verdicts), len(curator.verdicts))

    def is_heldout(self, index: int, text: str) -> bool:
        """Which side of the split a document is on.

        Args:
            index: of the document among those kept; its text is hashed again only where a byte does not decide.
        """
        side, border = self.sides[index], int(256 * self.heldout_below)
        return side < border or (side == border and fraction(text, self.seed, b"heldout") < self.heldout_below)

    def _draw(self, text: str) -> None:
        """Perhaps add pieces of the document to the sample; halve the sample when it has grown to twice its size."""
        for start in range(0, len(text), SAMPLE_PIECE):
            piece = text[start : start + SAMPLE_PIECE]
            draw = fraction(piece[:256], self.seed, b"sample")
            if draw >= self.sample_below:
                continue
            self.sample.append((draw, piece))
            self.sample_characters += len(piece)
            while self.sample_characters > 2 * SAMPLE_CHARACTERS:
                self.sample_below /= 2
                self.sample = [item for item in self.sample if item[0] < self.sample_below]
                self.sample_characters = sum(len(t) for _, t in self.sample)

    def texts(self) -> Iterator[str]:
        """The sample, cut to its size."""
        left = SAMPLE_CHARACTERS
        for _, text in sorted(self.sample, key=lambda item: item[0]):
            if left <= 0:
                return
            yield text
            left -= len(text)
