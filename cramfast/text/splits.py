"""Second pass over the text: the ids of every document that stays, in the files of its split."""

import os
import re
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numba
import numpy as np
from tokenizers import Tokenizer

from cramfast.errors import UserError
from cramfast.text.corpus import Corpus
from cramfast.text.curation import KEPT, MANY_TOKENS, Curator, ahead, batches
from cramfast.text.survey import Report, Survey
from cramfast.text.wordcache import Found, WordCache

DEMO_LINES = 400
SPLITS = ("train", "heldout")
OFFSETS_HEADER_BYTES = 128


class SplitWriter:
    """Ids and offsets of one split, appended as they come; counts on the way.

    Attributes:
        empty: documents that have no token, and are none of those counted.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype, vocab_size: int):
        self.name, self.dtype = name, dtype
        self.offsets_path = folder / f"{name}.offsets.npy"
        self.file, self.offsets_file = (folder / f"{name}.ids").open("wb"), self.offsets_path.open("wb")
        self.offsets_file.write(bytes(OFFSETS_HEADER_BYTES))  # the number of documents is known at the end
        self.offsets_file.write(np.zeros(1, np.int64))
        self.documents = self.tokens = self.characters = self.words = self.empty = 0
        self.histogram = np.zeros(vocab_size, np.int64)

    def append(self, ids: np.ndarray, lengths: np.ndarray, texts: list[str]) -> None:
        if not lengths.all():
            self.empty += int((lengths == 0).sum())
            texts = [text for text, length in zip(texts, lengths, strict=True) if length]
            lengths = lengths[lengths > 0]
        self.file.write(ids.astype(self.dtype))
        self.offsets_file.write(self.tokens + np.cumsum(lengths))
        self.documents += len(lengths)
        self.tokens += len(ids)
        self.characters += sum(map(len, texts))
        self.words += words_in(texts)
        self.histogram += np.bincount(ids, minlength=len(self.histogram))

    def close(self) -> dict:
        # The .npy format, version 1: magic, length of the description, description filled up with spaces.
        described = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({self.documents + 1},), }}".encode()
        filled = described.ljust(OFFSETS_HEADER_BYTES - 11) + b"\n"
        self.offsets_file.seek(0)
        self.offsets_file.write(b"\x93NUMPY\x01\x00" + len(filled).to_bytes(2, "little") + filled)
        for file in (self.file, self.offsets_file):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        return {name: getattr(self, name) for name in ("documents", "words", "tokens", "characters")}


@dataclass(frozen=True)
class Batch:
    """Documents that the first pass kept, or parts of them, those of the training split first.

    Attributes:
        train: how many belong to the training split.
        numbers: of each one's document among all.
        found: words of the texts.
    """

    train: int
    numbers: list[int]
    texts: list[str]
    found: Found | list[str]


class SplitEncoder:
    """Sends batches of documents to the writers of their splits, in two steps that may run beside each other.

    Attributes:
        demo: sentences of held-out documents.
        originals: text of the documents that curator.originals() names, by number.
    """

    def __init__(self, tokenizer: Tokenizer, survey: Survey, curator: Curator, writers: dict[str, SplitWriter]):
        self.words, self.survey, self.curator, self.writers = WordCache(tokenizer), survey, curator, writers
        self.most = curator.curation.max_tokens_per_char
        self.wanted = curator.originals()
        self.originals: dict[int, str] = {}
        self.demo: list[str] = []
        self.done = self.kept = 0

    def find(self, texts: list[str]) -> Batch:
        """The next documents, looked up; those that the first pass dropped are passed over."""
        first, self.done = self.done, self.done + len(texts)
        for number in (n for n in self.wanted if first <= n < self.done):
            self.originals[number] = texts[number - first]
        sides: tuple[list[tuple[int, str]], list[tuple[int, str]]] = [], []
        for i, verdict in enumerate(self.curator.verdicts[first : self.done]):
            if verdict == KEPT:
                for heldout, part in self.survey.parts(self.kept, texts[i]):
                    sides[heldout].append((first + i, part))
                self.kept += 1
        numbers, parts = [number for number, _ in chain(*sides)], [part for _, part in chain(*sides)]
        return Batch(len(sides[0]), numbers, parts, self.words.find(parts))

    def store(self, batch: Batch) -> None:
        """Write the ids of a batch; batches come in the order of find()."""
        ids, lengths = self.words.ids_of(batch.found)
        documents, tokens = batch.train, lengths[: batch.train].sum()
        for name, part, own in (
            ("train", slice(documents), ids[:tokens]),
            ("heldout", slice(documents, None), ids[tokens:]),
        ):
            self._store_split(name, batch.numbers[part], batch.texts[part], own, lengths[part])

    def _store_split(
        self, name: str, numbers: list[int], texts: list[str], ids: np.ndarray, lengths: np.ndarray
    ) -> None:
        if self.most > 0:
            stays = self._compressible(numbers, texts, lengths)
            ids, lengths = ids[np.repeat(stays, lengths)], lengths[stays]
            texts = [text for text, stay in zip(texts, stays, strict=True) if stay]
        self.writers[name].append(ids, lengths, texts)
        if name == "heldout" and len(self.demo) < DEMO_LINES:
            self.demo.extend(line for text in texts for line in sentences(text))

    def _compressible(self, numbers: list[int], texts: list[str], lengths: np.ndarray) -> np.ndarray:
        """Which documents have fewer than `most` tokens a character (Geiping and Goldstein, arXiv:2212.14034, §4.4)."""
        stays = lengths < self.most * np.array([len(text) for text in texts])
        for i in np.flatnonzero(~stays).tolist():
            measure = f"{lengths[i] / len(texts[i]):.2f} tokens a character"
            self.curator.dropped[MANY_TOKENS].add(numbers[i], texts[i], measure)
        return stays


def encode(
    folder: Path, corpus: Corpus, tokenizer: Tokenizer, survey: Survey, curator: Curator, report: Report
) -> tuple[dict[str, SplitWriter], SplitEncoder]:
    """Write ids and offsets of both splits.

    Returns:
        The writers, still open, and the encoder with what it noted on the way.

    Raises:
        UserError: the text is not what it was in the first pass.
    """
    size = tokenizer.get_vocab_size()
    dtype = np.dtype(np.uint16 if size <= 65536 else np.uint32)
    writers = {name: SplitWriter(folder, name, dtype, size) for name in SPLITS}
    encoder, total = SplitEncoder(tokenizer, survey, curator, writers), len(curator.verdicts)
    for batch in ahead(map(encoder.find, ahead(batches(corpus)))):  # one is read, one looked up, one written
        encoder.store(batch)
        report("writing ids", min(encoder.done, total), total)
    if encoder.done != total:
        raise UserError(f"{corpus}: {encoder.done:,} documents where there were {total:,} a moment ago — run it again")
    report("writing ids", total, total)
    return writers, encoder


def sentences(text: str) -> list[str]:
    """Up to three sentences of five to forty words; the start of the text where it has none."""
    flat = " ".join(text.split())
    found = [s for s in re.split(r"(?<=[.!?])\s+", flat) if 5 <= len(s.split()) <= 40][:3]
    return found or [flat[:300]]


def words_in(texts: list[str]) -> int:
    """Stretches between white space."""
    return int(_words(np.frombuffer("\n".join(["", *texts]).encode("utf-8", "replace"), np.uint8)))


@numba.njit(inline="always")
def _is_space(byte):
    return np.uint8(byte == 32) | np.uint8(np.uint8(byte - np.uint8(9)) < 5)


@numba.njit(cache=True, nogil=True)
def _words(text):
    count = 0
    for i in range(1, len(text)):  # no step depends on the one before it, so that a compiler makes vectors of them
        count += _is_space(text[i - 1]) & (1 - _is_space(text[i]))
    return count
