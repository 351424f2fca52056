"""Second pass over the text: the ids of every document that stays, in the files of its split."""

import concurrent.futures
import os
import re
from pathlib import Path

import numba
import numpy as np
from tokenizers import Tokenizer

from cramfast.corpus import Corpus
from cramfast.curation import KEPT, MANY_TOKENS, Curator, batches
from cramfast.errors import UserError
from cramfast.survey import Report, Survey
from cramfast.wordcache import WordCache

DEMO_LINES = 400
SPLITS = ("train", "heldout")
OFFSETS_HEADER_BYTES = 128


class SplitWriter:
    """Ids and offsets of one split, appended as they come; counts on the way."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, vocab_size: int):
        self.name, self.dtype = name, dtype
        self.offsets_path = folder / f"{name}.offsets.npy"
        self.file, self.offsets_file = (folder / f"{name}.ids").open("wb"), self.offsets_path.open("wb")
        self.offsets_file.write(bytes(OFFSETS_HEADER_BYTES))  # the number of documents is known at the end
        self.offsets_file.write(np.zeros(1, np.int64))
        self.documents = self.tokens = self.characters = self.words = 0
        self.histogram = np.zeros(vocab_size, np.int64)

    def append(self, ids: np.ndarray, lengths: np.ndarray, texts: list[str]) -> None:
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


class SplitEncoder:
    """Sends batches of documents to the writers of their splits.

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
        self.done = 0

    def store(self, texts: list[str]) -> None:
        """The next documents; those that the first pass dropped are passed over."""
        first, self.done = self.done, self.done + len(texts)
        for number in (n for n in self.wanted if first <= n < self.done):
            self.originals[number] = texts[number - first]
        kept = [i for i, verdict in enumerate(self.curator.verdicts[first : self.done]) if verdict == KEPT]
        held = {i for i in kept if self.survey.is_heldout(texts[i])}
        for name, heldout in (("train", False), ("heldout", True)):
            numbers = [i for i in kept if (i in held) == heldout]
            if numbers:
                self._store_split(name, [first + i for i in numbers], [texts[i] for i in numbers])

    def _store_split(self, name: str, numbers: list[int], texts: list[str]) -> None:
        ids, lengths = self.words.encode(texts)
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
    with concurrent.futures.ThreadPoolExecutor(1) as beside:  # one batch is encoded while the next is read
        stored = beside.submit(encoder.store, [])
        for texts in batches(corpus):
            stored.result()
            report("writing ids", encoder.done, total)
            stored = beside.submit(encoder.store, texts)
        stored.result()
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
    return int(_words(np.frombuffer("\n".join(texts).encode("utf-8", "replace"), np.uint8)))


@numba.njit(cache=True, nogil=True)
def _words(text):
    count, before = 0, True
    for byte in text:
        space = byte == 32 or 9 <= byte <= 13
        count += before and not space
        before = space
    return count
