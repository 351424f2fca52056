"""Encoding at the speed of a hash table: each distinct word goes through the tokenizer once, its ids are kept.

Text is cut only where both of our tokenizers cut anyway, so the ids are exactly those of `Tokenizer.encode`:
after an ASCII letter or digit that a printable ASCII sign or a line break follows, and before a single space between
two printable ASCII characters. Bytes of other characters never touch a cut, so normalisation cannot reach across; and
no word but a document's first begins with a letter, which byte-level BPE gives a space.
"""

import itertools
import json
from dataclasses import dataclass

import numba
import numpy as np
from tokenizers import Tokenizer

from cramfast.text.bytebpe import byte_level
from cramfast.text.kmers import Kmers
from cramfast.text.specials import SEP
from cramfast.text.spelling import ascii_of
from cramfast.text.tokenizer import for_text, wordpiece
from cramfast.text.wordpieces import KINDS, LETTER, OTHER, SIGN, SPACE, Pieces

SLOTS = 1 << 23  # of the hash table; 32 MB, touched only where used
MOST_WORDS = 3 << 20  # known at once; then the table starts afresh, which bounds memory (about 200 MB) and its load
WORDS_AT_ONCE = 1000
MOST_BYTES = 64 << 20  # spelling of the known words


@dataclass(frozen=True)
class Found:
    """Documents as numbers of words.

    Attributes:
        words: (words of all documents,) int32, from 1 on.
        counts: (documents,) int64, words of each.
        known: number of the last word that was known before; the new ones follow it.
        spelling: (bytes,) uint8, UTF-8 of the new words end to end.
        ends: (new words,) int64, where each ends therein.
    """

    words: np.ndarray
    counts: np.ndarray
    known: int
    spelling: np.ndarray
    ends: np.ndarray


class WordCache:
    """Encodes documents like `tokenizer.encode_batch_fast(texts, add_special_tokens=False)`, several times faster.

    encode() is find() and then ids_of(); one thread may find words while another asks for the ids of those found
    before.

    A tokenizer whose parts are not the ones of cramfast.text.tokenizer is called for each document instead: it may look
    across words. Special tokens in a document are as for_text() has them.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer = for_text(tokenizer)
        self.splits_at_words = _splits_at_words(tokenizer)
        self.kmers = Kmers.of(tokenizer)
        if self.splits_at_words:
            self.of_words = _of_words(tokenizer)
            self.pieces = Pieces.of(tokenizer)
        self.ids = np.empty(1 << 20, np.int32)
        self.id_ends = np.zeros(1 << 16, np.int64)  # ids of word w are ids[id_ends[w - 1] : id_ends[w]]
        self._forget()

    def _forget(self) -> None:
        self.slots = np.zeros(SLOTS, np.int32)
        self.spelling = np.empty(1 << 20, np.uint8)
        self.word_ends = np.zeros(1 << 16, np.int64)  # word w (from 1 on) is spelling[word_ends[w - 1] : word_ends[w]]
        self.words = 0

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all documents end to end, int32, and the number of them in each, int64.

        Args:
            texts: some megabytes at a time; working memory is about 20 bytes a character.
        """
        return self.ids_of(self.find(texts))

    def find(self, texts: list[str]) -> Found | list[str]:
        """The words of the documents; the texts themselves where only whole documents can be encoded."""
        if not self.splits_at_words:
            return texts
        data = [text.encode("utf-8", "replace") for text in texts]  # lone surrogates cannot be encoded: "?"
        sizes = np.array([len(d) for d in data], np.int64)
        text = np.frombuffer(b"".join(data), np.uint8)
        if self.words > MOST_WORDS or self.word_ends[self.words] > MOST_BYTES:
            self._forget()
        known = self.words
        # At worst every second byte begins a word; room is reserved untouched, then used as far as needed.
        self.word_ends = _grown(self.word_ends, known + 2 + len(text))
        self.spelling = _grown(self.spelling, self.word_ends[known] + len(text))
        words = np.empty(len(text), np.int32)
        counts = np.empty(len(sizes), np.int64)
        self.words = look_up(text, sizes, self.slots, self.spelling, self.word_ends, known, words, counts)
        if self.words < 0:  # more distinct words than the table holds in one call
            self._forget()
            return texts
        begin, ends = self.word_ends[known], self.word_ends[known + 1 : self.words + 1]
        spelling = self.spelling[begin : self.word_ends[self.words]].copy()
        return Found(words[: counts.sum()].copy(), counts, known, spelling, ends - begin)

    def ids_of(self, found: Found | list[str]) -> tuple[np.ndarray, np.ndarray]:
        """What encode() returns, from what find() did; to be called once for each, in that order."""
        if not isinstance(found, Found):
            return self._encode_whole(found)
        self._learn(found)
        words = found.words
        ids = np.empty(int((self.id_ends[words] - self.id_ends[words - 1]).sum()), np.int32)
        lengths = np.empty(len(found.counts), np.int64)
        write_ids(words, found.counts, self.ids, self.id_ends, ids, lengths)
        return ids, lengths

    def _encode_whole(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if self.kmers is not None:
            return self.kmers.encode(texts)
        rows = [e.ids for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        return np.array([i for row in rows for i in row], np.int32), np.array([len(r) for r in rows], np.int64)

    def _learn(self, found: Found) -> None:
        """Note the ids of the new words; those after `known` that an earlier table held are forgotten."""
        if len(found.ends) == 0:
            return
        ids, sizes = self._ask(found)
        begin, words = self.id_ends[found.known], found.known + len(sizes)
        self.id_ends = _grown(self.id_ends, words + 1)
        self.id_ends[found.known + 1 : words + 1] = begin + np.cumsum(sizes)
        self.ids = _grown(self.ids, self.id_ends[words])
        self.ids[begin : self.id_ends[words]] = ids

    def _ask(self, found: Found) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the new words end to end, and the number of them in each: by Pieces where it can, otherwise by the
        tokenizer."""
        if self.pieces is None:
            spelled, sizes = np.empty(0, np.int32), np.full(len(found.ends), -1, np.int64)
        else:
            spelled, sizes = self.pieces.spell(found.spelling, found.ends)
        others = np.flatnonzero(sizes < 0)
        begins = np.concatenate([[0], found.ends[:-1]])
        raw = found.spelling.tobytes()
        borders = zip(begins[others].tolist(), found.ends[others].tolist(), strict=True)
        answers, sizes[others] = self._ask_whole([raw[a:b].decode() for a, b in borders])
        asked = np.zeros(len(sizes), bool)
        asked[others] = True
        asked = np.repeat(asked, sizes)
        ids = np.empty(len(asked), np.int32)
        ids[asked], ids[~asked] = answers, spelled
        return ids, sizes

    def _ask_whole(self, words: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """_ask() for words as they are, of any characters."""
        if self.pieces is not None:
            data = [ascii_of(word).encode() for word in words]
            ends = np.cumsum([len(word) for word in data], dtype=np.int64)
            ids, sizes = self.pieces.spell(np.frombuffer(b"".join(data), np.uint8), ends, spelled=True)
            if (sizes >= 0).all():
                return ids, sizes
        return _ask_each(self.of_words, words)


def _of_words(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that takes [SEP] alone for more than text."""
    parts = json.loads(tokenizer.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["id"] == SEP]
    return Tokenizer.from_str(json.dumps(parts))


def _ask_each(tokenizer: Tokenizer, words: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the words end to end, and the number of them in each, from a tokenizer of _of_words.

    Many go through it as one text, with [SEP] between them, which no word of look_up() contains: an answer for every
    word would take twice as long.
    """
    if not words:
        return np.empty(0, np.int32), np.empty(0, np.int64)
    texts = ["[SEP]".join(words[i : i + WORDS_AT_ONCE]) for i in range(0, len(words), WORDS_AT_ONCE)]
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ids = np.fromiter(itertools.chain.from_iterable((*encoding.ids, SEP) for encoding in encodings), np.int32)
    ends = np.flatnonzero(ids == SEP)
    return ids[ids != SEP], np.diff(ends, prepend=-1) - 1


def _splits_at_words(tokenizer: Tokenizer) -> bool:
    """Whether cuts at word borders are known to leave this tokenizer's ids unchanged."""
    parts = json.loads(tokenizer.to_str())
    ours = (json.loads(own.to_str()) for own in (wordpiece({}), byte_level()))
    return all(token["special"] for token in parts["added_tokens"]) and any(
        parts["normalizer"] == own["normalizer"]
        and parts["pre_tokenizer"] == own["pre_tokenizer"]
        and parts["model"]["type"] == own["model"]["type"]
        for own in ours
    )


def _grown(array: np.ndarray, size: int) -> np.ndarray:
    """The array, or a copy with room for `size` entries and as much again."""
    if size <= len(array):
        return array
    larger = np.zeros(2 * size, array.dtype)
    larger[: len(array)] = array
    return larger


@numba.njit(cache=True, nogil=True)
def look_up(text, sizes, slots, spelling, word_ends, words, found, counts):
    """Cut documents into words and number them; unseen words are added to the table.

    Args:
        text: (bytes,) uint8, UTF-8 of all documents.
        sizes: (documents,) bytes of each.
        slots: open-addressing table of word numbers, 0 where free; a power of two of them.
        words: number of known words.
        found: receives the word numbers in order; counts: (documents,) how many of them belong to each.

    Returns:
        The number of known words afterwards, or -1: the table is full.
    """
    place = total = 0
    mask = np.uint64(len(slots) - 1)
    for d in range(len(sizes)):
        end = place + sizes[d]
        before = total
        while place < end:
            start = place
            hashed = np.uint64(0xCBF29CE484222325)  # FNV-1a
            kind = OTHER
            while place < end:
                following = KINDS[text[place]]
                if kind == LETTER and following >= SIGN:
                    break
                if kind == SIGN and following == SPACE and place + 1 < end:
                    after = KINDS[text[place + 1]]
                    if after in (LETTER, SIGN):
                        break
                hashed = (hashed ^ np.uint64(text[place])) * np.uint64(0x100000001B3)
                kind = following
                place += 1
            size = place - start
            slot = (hashed ^ (hashed >> np.uint64(32))) & mask
            while True:
                word = slots[slot]
                if word == 0:
                    words += 1
                    if 8 * words > 7 * len(slots):
                        return -1
                    begin = word_ends[words - 1]
                    spelling[begin : begin + size] = text[start:place]
                    word_ends[words] = begin + size
                    slots[slot] = word = words
                    break
                begin = word_ends[word - 1]
                if word_ends[word] - begin == size:
                    same = 0
                    while same < size and spelling[begin + same] == text[start + same]:
                        same += 1
                    if same == size:
                        break
                slot = (slot + np.uint64(1)) & mask
            found[total] = word
            total += 1
        counts[d] = total - before
    return words


@numba.njit(cache=True, nogil=True)
def write_ids(words, counts, ids, id_ends, out, lengths):
    """Copy the ids of each word in turn; lengths: (documents,) ids of each."""
    place = written = 0
    for d in range(len(counts)):
        before = written
        for _ in range(counts[d]):
            for i in range(id_ends[words[place] - 1], id_ends[words[place]]):
                out[written] = ids[i]
                written += 1
            place += 1
        lengths[d] = written - before
