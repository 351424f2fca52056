"""Byte-level BPE that keeps characters whole: case and all of Unicode kept, in words with their marks.

Merges are learned over characters and then written over their bytes. Learned over bytes, as is usual, they may begin
and end inside of characters: in Lao, where most letters share their first two bytes, nearly all of them did.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from cramfast.text.census import Census
from cramfast.text.specials import SPECIAL_TOKENS

LONGEST_WORD = 100  # characters; a longer run is cut, so that the pieces of a genome are learned like any others
LONGEST_ENTRY = 32  # characters: the longest words, no sentence that came twice
# A character is an entry from so many on, as rare as the last merges; a rarer one is learned from as a break.
LEAST_COUNT, LEAST_SHARE = 2, 3e-6
# Joiners: zero-width, in words of Persian and of Indian languages, and Tibetan's tsheg, which ends each syllable.
LETTER, JOINER = "\\p{L}\\p{M}", "\u200c\u200d\u2060\u0f0b\u0f0c"
BEFORE = " \u1361\u200b"  # what parts words belongs to the one after it: also Ethiopic's wordspace, Khmer's zero-width
LATIN = "A-Za-z\xaa\xba\xc0-\u02af\u1e00-\u1eff"
# Signs inside of a word: apostrophes of other scripts than Latin, in which they stand for a letter left out between two
# words (don't, l'homme); Hebrew's for abbreviations, a plain quotation mark before the last letter among them;
# Armenian's for questions and stress; Catalan's dot.
INNER = (
    f"(?<![{LATIN}])['’](?![{LATIN}])"
    '|[׳״]|(?<=[א-ת])"(?=[א-ת](?![\\p{L}\\p{M}]))'
    "|[\u055a-\u055f]"
    "|(?<=[lL])·(?=[lL])"
)
# Soft hyphens and marks of direction carry no text: they would cut words.
UNSEEN = "\xad\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
LETTERS = f"[{LETTER}][{LETTER}{JOINER}]{{0,{LONGEST_WORD - 1}}}"
# GPT-2's pattern, but that marks belong to their letters, and numbers are cut into groups of three at most.
WORDS = (
    "'(?:[sdmt]|ll|ve|re)"
    f"|[{BEFORE}]?{LETTERS}(?:(?:{INNER}){LETTERS}){{0,9}}"
    "| ?\\p{N}{1,3}"
    f"| ?[^\\s{LETTER}\\p{{N}}][^\\s\\p{{L}}\\p{{N}}]{{0,{LONGEST_WORD - 1}}}"
    "|\\s+(?!\\S)|\\s+"
)


def byte_level(vocabulary: dict[str, int] | None = None, merges: list[tuple[str, str]] | None = None) -> Tokenizer:
    """Byte-level BPE of these merges, on text in composed form without what is not seen.

    A word at the beginning has the space before it that the others have: words that are given one by one, as in named
    entity recognition, are the same tokens as in a sentence.
    """
    tokenizer = Tokenizer(models.BPE(vocabulary or {}, merges or []))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(f"[{UNSEEN}]"), ""),
            normalizers.NFC(),
            normalizers.Prepend(" "),
            normalizers.Replace(Regex("(?<![\\s\\S]) (?=[^\\p{L}\\p{N}])"), ""),
        ]
    )
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train(texts: Iterable[str], learn_from: Callable[[], Iterable[str]], vocab_size: int) -> Tokenizer:
    """Learn merges.

    Args:
        texts: all of the sample, whose characters are counted.
        learn_from: gives what to learn merges from.
        vocab_size: most entries, the special tokens among them.
    """
    letters = _letters()
    first = [*SPECIAL_TOKENS, *sorted(letters)]
    characters = _frequent(texts, (vocab_size - len(first)) // 2)
    vocabulary = {entry: index for index, entry in enumerate(first)}
    merges: list[tuple[str, str]] = []

    def merge(left: str, right: str) -> None:
        merges.append((left, right))
        vocabulary.setdefault(left + right, len(vocabulary))

    spelled = {character: "".join(letters[byte] for byte in character.encode()) for character in characters}
    for spelling in spelled.values():
        for end in range(2, len(spelling) + 1):
            if spelling[:end] not in vocabulary:
                merge(spelling[: end - 1], spelling[end - 1])
    spelled |= {chr(byte): letters[byte] for byte in range(128)}
    for left, right in _merges(learn_from(), characters, vocab_size - len(vocabulary)):
        merge(*("".join(spelled[character] for character in part) for part in (left, right)))
    return byte_level(vocabulary, merges)


def _letters() -> list[str]:
    """The letter that stands for each byte: itself where it can be printed, as GPT-2 chose them."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _frequent(texts: Iterable[str], most: int) -> list[str]:
    """The characters outside ASCII that are worth entries of their own, the commonest first, for `most` entries."""
    counts = Census.of(map(_composed, texts)).counts
    least = max(LEAST_COUNT, LEAST_SHARE * counts.sum())
    counts[:128] = 0
    counts[0xD800:0xE000] = 0  # halves of surrogate pairs, which no byte spells
    found = np.flatnonzero(counts >= least)
    ranked, entries = found[np.argsort(-counts[found], kind="stable")], set[bytes]()
    chosen = []
    for character in map(chr, ranked.tolist()):
        spelled = character.encode()
        entries |= {spelled[:end] for end in range(2, len(spelled) + 1)}
        if len(entries) > most:
            break
        chosen.append(character)
    return chosen


def _merges(texts: Iterable[str], characters: list[str], most: int) -> list[tuple[str, str]]:
    """Merges of characters, `most` of them; a character that is no entry ends a word."""
    learner = byte_level()
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
    alphabet = [*map(chr, range(128)), *characters]
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + most,
        initial_alphabet=alphabet,
        max_token_length=LONGEST_ENTRY,
        show_progress=False,
    )
    learner.train_from_iterator(_with_breaks(texts, characters), trainer)
    return [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]


def _with_breaks(texts: Iterable[str], characters: list[str]) -> Iterator[str]:
    rare = re.compile(f"[^\\x00-\\x7F{re.escape(''.join(characters))}]+")
    for text in texts:
        yield text if text.isascii() else rare.sub("\n", _composed(text))


def _composed(text: str) -> str:
    """The text as byte_level() normalises it, but for the space before it."""
    if text.isascii():
        return text
    for character in UNSEEN:
        text = text.replace(character, "")
    return unicodedata.normalize("NFC", text)
