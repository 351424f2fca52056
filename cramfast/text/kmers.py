"""Tokens of k letters, for sequences: DNA, RNA, proteins (Ji et al., DNABERT, 2021; Dalla-Torre et al., 2023).

White space is no part of a sequence and case means nothing, so that neither the width of lines nor soft masking changes
a token; U is T among nucleotides. Every other sign, and what is left of less than k letters, is a token alone.
"""

import json
import re
import string
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import numba
import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from cramfast.errors import UserError
from cramfast.text.specials import FIRST_WORD, SPECIAL_TOKENS, UNK

NUCLEOTIDES, AMINO_ACIDS = "acgt", "acdefghiklmnpqrstvwy"
SINGLE = string.ascii_lowercase + "*-."  # letters that stand alone where they are in no k-mer; stop, gap
DEFAULT = {NUCLEOTIDES: 6, AMINO_ACIDS: 1}  # k
MOST_ENTRIES = 400_000  # 20**4 and 4**9 fit
NUCLEOTIDE_SHARE = 0.9  # of all letters, from where on a text is of nucleotides
SPACES = " \t\n\r\x0b\x0c"
SPELLED = "kmer[:K][:overlapping]"
START = 0xE000  # private characters: the places of a k-mer


@dataclass(frozen=True)
class Kmers:
    """How a sequence is cut: `alphabet` of which k-mers are made; overlapping ones begin at each letter."""

    alphabet: str
    k: int
    overlapping: bool

    @staticmethod
    def named(name: str, texts: Iterable[str]) -> "Kmers":
        """What "kmer", "kmer:5" or "kmer:6:overlapping" means for texts, whose letters tell the alphabet.

        Raises:
            UserError: another name, or more k-mers than a vocabulary can hold.
        """
        asked, overlapping = read_name(name)
        alphabet = _alphabet_of(texts)
        k = asked or DEFAULT[alphabet]
        if len(alphabet) ** k > MOST_ENTRIES:
            most = next(i for i in range(k, 0, -1) if len(alphabet) ** i <= MOST_ENTRIES)
            raise UserError(
                f"tokenizer={name!r} has {len(alphabet) ** k:,} entries for {len(alphabet)} letters — use kmer:{most} "
                "or less, or --tokenizer bpe"
            )
        return Kmers(alphabet, k, overlapping and k > 1)

    @staticmethod
    def of(tokenizer: Tokenizer) -> "Kmers | None":
        """How a tokenizer made by tokenizer() cuts; None for any other."""
        return cutting(json.loads(tokenizer.to_str()))

    def vocabulary(self) -> dict[str, int]:
        """The special tokens, every k-mer in the order of the alphabet, then single letters and signs."""
        kmers = map("".join, product(self.alphabet, repeat=self.k))
        entries = dict.fromkeys([*SPECIAL_TOKENS, *kmers, *SINGLE])
        return {entry: index for index, entry in enumerate(entries)}

    def tokenizer(self) -> Tokenizer:
        """As stock tokenizers read it: the steps of tokenizer.json do all of the cutting."""
        # Each word is an entry or unknown: a WordLevel model would do, but its JavaScript port has no [UNK].
        tokenizer = Tokenizer(models.WordPiece(self.vocabulary(), unk_token="[UNK]"))
        joined = [normalizers.Replace(Regex(f"[{SPACES}]+"), ""), normalizers.Lowercase()]
        if self.alphabet == NUCLEOTIDES:
            joined.append(normalizers.Replace("u", "t"))
        tokenizer.normalizer = normalizers.Sequence([*joined, *self._spread()])
        kmer = f"[{self.alphabet}]{{{self.k}}}"
        whole = f"{kmer}|[^ ]" if self.overlapping else f"{kmer}|[\\s\\S]"
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(whole), "removed", invert=True)
        if not self.overlapping:
            tokenizer.decoder = decoders.Fuse()
        return tokenizer

    def _spread(self) -> list[normalizers.Normalizer]:
        """Steps that write a sequence as its overlapping k-mers, a space after each.

        No step of a tokenizer copies letters. So each letter that begins a k-mer gets k - 1 places, and each place the
        letter that it looks ahead to, in upper case at first to tell the two apart. The last k - 1 letters of a run
        begin none and are taken away.
        """
        if not self.overlapping:
            return []
        one, more = f"[{self.alphabet}]", self.k - 1
        places = "".join(chr(START + i) for i in range(more))
        filled = f"[A-Z{places}]"
        rest = f"(?:{one}(?:{filled}{{{more}}} )?)"  # of a run: a letter, whether it begins a k-mer or not
        steps = [(f"{letter}(?={rest}{{{more}}})", f"{letter}{places} ") for letter in self.alphabet]
        steps += [
            (f"{place}(?={filled}{{{more - 1 - i}}} {rest}{{{i}}}{letter})", letter.upper())
            for i, place in enumerate(places)
            for letter in self.alphabet
        ]
        return [
            *(normalizers.Replace(Regex(pattern), content) for pattern, content in steps),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(f"(?<={one}{{{self.k}}} ){one}{{{more}}}(?!{one} )"), ""),
        ]

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts end to end, int32, and the number in each, int64: what tokenizer() gives, without it."""
        data = [text.encode("utf-8", "replace") for text in texts]
        sizes = np.array([len(each) for each in data], np.int64)
        ids, lengths = np.empty(int(sizes.sum()), np.int32), np.empty(len(sizes), np.int64)
        codes, singles = np.full(256, -1, np.int32), np.full(256, UNK, np.int32)
        vocabulary = self.vocabulary()
        for letter in map(chr, range(128)):
            lower = letter.lower()
            if self.alphabet == NUCLEOTIDES and lower == "u":
                lower = "t"
            codes[ord(letter)] = self.alphabet.find(lower)
            singles[ord(letter)] = vocabulary.get(lower, UNK)
        singles[[ord(space) for space in SPACES]] = -1
        singles[0x80:0xC0] = -1  # the rest of a character; its first byte stands for it
        text = np.frombuffer(b"".join(data), np.uint8)
        written = _encode(text, sizes, codes, singles, len(self.alphabet), self.k, self.overlapping, ids, lengths)
        return ids[:written].copy(), lengths


def is_kmer_name(name: str) -> bool:
    """Whether a tokenizer's name asks for k-mers."""
    return name.partition(":")[0] == "kmer"


def read_name(name: str) -> tuple[int, bool]:
    """(k or 0 for the usual one, whether they overlap) of "kmer[:K][:overlapping]".

    Raises:
        UserError: another name.
    """
    found = re.fullmatch(r"kmer(?::([1-9]))?(:overlapping)?", name)
    if found is None:
        raise UserError(f"tokenizer={name!r} is no k-mer tokenizer — give {SPELLED} with K from 1 to 9")
    return int(found[1] or 0), bool(found[2])


def cutting(parts: dict) -> Kmers | None:
    """The k-mers of a tokenizer.json; None where it is no such tokenizer."""
    if parts["model"]["type"] != "WordPiece" or parts["model"]["vocab"].get("[UNK]") != UNK:
        return None
    names = sorted(parts["model"]["vocab"].items(), key=lambda item: item[1])[FIRST_WORD:]
    if not names:
        return None
    k, overlapping = len(names[0][0]), parts["decoder"] is None
    for alphabet in (NUCLEOTIDES, AMINO_ACIDS):
        kmers = Kmers(alphabet, k, overlapping)
        if len(alphabet) ** k <= min(len(names), MOST_ENTRIES):
            own = json.loads(kmers.tokenizer().to_str())
            if all(parts[part] == own[part] for part in ("normalizer", "pre_tokenizer", "model")):
                return kmers
    return None


def _alphabet_of(texts: Iterable[str]) -> str:
    nucleotides = letters = 0
    for text in texts:
        lower = text.lower()
        counts = {letter: lower.count(letter) for letter in string.ascii_lowercase}
        letters += sum(counts.values())
        nucleotides += sum(counts[letter] for letter in "acgtun")
    return NUCLEOTIDES if nucleotides >= NUCLEOTIDE_SHARE * letters else AMINO_ACIDS


@numba.njit(cache=True, nogil=True)
def _encode(text, sizes, codes, singles, letters, k, overlapping, ids, lengths):
    """Fill ids and lengths; the number of ids. singles: (256,) id of a byte alone, -1 where it is no token."""
    written = begin = 0
    for d in range(len(sizes)):
        end, before = begin + sizes[d], written
        run, value, top = 0, 0, letters ** (k - 1)  # letters of the k-mer so far, or of the run where they overlap
        for place in range(begin, end):
            byte = text[place]
            if singles[byte] < 0:
                continue
            code = codes[byte]
            if code < 0:
                run = value = 0
                ids[written] = singles[byte]
                written += 1
                continue
            if overlapping and run >= k:
                value = (value % top) * letters + code
                ids[written] = FIRST_WORD + value
                written += 1
                run += 1
                continue
            run += 1
            value = value * letters + code
            ids[written] = singles[byte]  # alone, unless it completes a k-mer
            written += 1
            if run == k:
                written -= k
                ids[written] = FIRST_WORD + value
                written += 1
                if not overlapping:
                    run = value = 0
        begin = end
        lengths[d] = written - before
    return written
