"""Tokenizers trained on the run's own text, the same for the same text on every machine and in every process."""

import functools
import re
import string
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from cramfast.errors import UserError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, SEP, MASK = range(5)
FIRST_WORD = len(SPECIAL_TOKENS)
SPACES = dict.fromkeys([*range(32), 127], " ")
FOREIGN = re.compile("[^\\x00-\\x7F]")
VOCAB_MULTIPLE = 64  # rows of the decoder matrix, so that its matmul tiles are full
# A longer word is no word of a language but a genome, a protein, a key: it is cut into pieces of six, the k-mers of the
# Nucleotide Transformer (Dalla-Torre et al., 2023), so few in DNA that each is a token. docs/decisions/0013.
LONGEST_WORD = 100  # characters; at most 4 bytes each and the space before them in byte-level BPE
LONGEST_BYTES = 4 * LONGEST_WORD + 1
PIECE = 6
LONG = re.compile(f"(?<![a-z0-9])[a-z0-9]{{{LONGEST_WORD + 1},}}")  # a word of normalised text that is cut
LONG_OF_WORDPIECE = re.compile(f"[A-Za-z0-9]{{{LONGEST_WORD + 1},}}")  # words that the pre-tokenizers cut, in ASCII
LONG_OF_BPE = re.compile(f"[A-Za-z]{{{LONGEST_BYTES + 1},}}|[0-9]{{{LONGEST_BYTES + 1},}}")
LEARNED_FROM = 2_000_000  # characters of such words; the same pieces come again and again


def train_tokenizer(texts: Iterable[str], kind: str, vocab_size: int) -> Tokenizer:
    """Train a tokenizer and pad its vocabulary to a multiple of 64 with [unusedN].

    Args:
        texts: the sample to learn from.
        kind: "wordpiece" (lower-cased ASCII, as in the paper) or "bpe" (byte-level: case and all of Unicode kept).
        vocab_size: most entries in all, a multiple of 64.

    Raises:
        UserError: another kind, or a vocabulary too small for the alphabet.
    """
    check_vocab_size(vocab_size)
    if kind == "wordpiece":
        tokenizer = _train_wordpiece(_without_excess(texts, LONG_OF_WORDPIECE), vocab_size)
    elif kind == "bpe":
        tokenizer = _train_bpe(_without_excess(texts, LONG_OF_BPE), vocab_size)
    else:
        raise UserError(f"tokenizer={kind!r} is neither wordpiece, bpe, nor a file — check the path")
    return _finish(tokenizer)


def _without_excess(texts: Iterable[str], words: re.Pattern) -> Iterator[str]:
    """The texts, but of these words, which will be cut into pieces, only the first LEARNED_FROM characters."""
    left = LEARNED_FROM

    def spend(match: re.Match) -> str:
        nonlocal left
        word = match[0][:left]
        left -= len(word)
        return word

    for text in texts:
        yield words.sub(spend, text)


def check_vocab_size(vocab_size: int) -> None:
    """Raise UserError unless a tokenizer can be trained to this many entries."""
    if vocab_size % VOCAB_MULTIPLE or vocab_size < 512:
        raise UserError(f"vocab_size={vocab_size} is not possible — use a multiple of {VOCAB_MULTIPLE} from 512 on")


def lost_share(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """Share of the texts' characters, spaces apart, that no token but [UNK] stands for: dropped by the normaliser, or
    part of what the vocabulary cannot spell. 0 where there is nothing but spaces."""
    lost = total = 0
    for text in texts:
        covered = np.zeros(len(text), bool)
        encoding = tokenizer.encode(text, add_special_tokens=False)
        for token, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token != UNK:
                covered[begin:end] = True
        visible = np.array([not character.isspace() for character in text], bool)
        lost += int((visible & ~covered).sum())
        total += int(visible.sum())
    return lost / total if total else 0.0


def wordpiece(vocabulary: dict[str, int]) -> Tokenizer:
    """Lower-cased ASCII WordPiece over a vocabulary: accents stripped, every other character dropped."""
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD))
    tokenizer.normalizer = _wordpiece_normalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), _pieces(LONGEST_WORD)])
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


@functools.cache
def _wordpiece_normalizer() -> normalizers.Normalizer:
    # Typographic quotes and dashes become their ASCII relatives instead of vanishing with the rest of Unicode.
    return normalizers.Sequence(
        [
            normalizers.Replace(Regex("[‘’‛′]"), "'"),
            normalizers.Replace(Regex("[“”„″]"), '"'),
            normalizers.Replace(Regex("[‐-―−]"), "-"),
            normalizers.NFKD(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex("[\\s\\x00-\\x1F\\x7F]"), " "),
            normalizers.Replace(Regex("[^\\x20-\\x7E]+"), ""),
        ]
    )


def _pieces(longest: int) -> pre_tokenizers.Split:
    """Leaves a word of up to `longest` letters whole and cuts any other into pieces."""
    return pre_tokenizers.Split(Regex(rf"\A.{{1,{longest}}}\z|.{{1,{PIECE}}}"), "isolated")


def _train_wordpiece(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    # The trainer numbers ##-pieces in the order of a randomly seeded hash map, and breaks ties between merges by those
    # numbers. Handing it every ##-letter as a leading "special" token fixes them; signs never continue a word.
    alphabet = sorted(set(map(chr, range(33, 127))) - set(string.ascii_uppercase))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *("##" + letter for letter in alphabet if letter.isalnum())],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    learner = wordpiece({})
    learner.normalizer, learner.pre_tokenizer = None, pre_tokenizers.BertPreTokenizer()
    learner.train_from_iterator(map(_words_to_learn, texts), trainer)
    return wordpiece(learner.get_vocab())


def _words_to_learn(text: str) -> str:
    """The text as wordpiece() normalises it, and with spaces where that cuts long words, several times as fast."""
    return LONG.sub(
        lambda word: " ".join(re.findall(f".{{1,{PIECE}}}", word[0])), ascii_of(text).lower().translate(SPACES)
    )


def ascii_of(text: str) -> str:
    """The text with every other character spelled as the normalizer of wordpiece() does, ten times as fast.

    What that makes of a character does not depend on its neighbours. On the result, only lower case and spaces for
    control characters are left to do.
    """
    return FOREIGN.sub(lambda character: _ascii_of_one(character[0]), text)


@functools.cache
def _ascii_of_one(character: str) -> str:
    return _wordpiece_normalizer().normalize_str(character)


def byte_level() -> Tokenizer:
    """Byte-level BPE without merges yet: case and all of Unicode kept."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, _pieces(LONGEST_BYTES)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = byte_level()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _finish(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    missing = -tokenizer.get_vocab_size() % VOCAB_MULTIPLE
    tokenizer.add_special_tokens([f"[unused{i}]" for i in range(missing)])
    tokenizer.post_processor = framing()
    return tokenizer


def framing() -> processors.PostProcessor:
    """[CLS] A [SEP], and [CLS] A [SEP] B [SEP] of a pair."""
    return processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json and see that it has our special tokens at their fixed ids, and no gaps between ids.

    Raises:
        UserError: no such file, not a tokenizer, other special tokens, or ids and entries that no embedding fits.
    """
    if not path.is_file():
        raise UserError(f"tokenizer {path}: no such file — give wordpiece, bpe or a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises the base class itself
        raise UserError(
            f"tokenizer {path}: not a tokenizer.json ({error}) — name one of the tokenizers library, or leave it out "
            "for one of your text"
        ) from error
    for index, token in enumerate(SPECIAL_TOKENS):
        if tokenizer.token_to_id(token) != index:
            raise UserError(
                f"tokenizer {path}: {token} has id {tokenizer.token_to_id(token)}, not {index} — "
                f"the first {FIRST_WORD} ids must be {' '.join(SPECIAL_TOKENS)}"
            )
    size = tokenizer.get_vocab_size()
    token, last = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if last >= size:  # the embedding has a row for each entry
        raise UserError(
            f"tokenizer {path}: {token!r} has id {last}, of {size} entries — number them from 0 on without gaps"
        )
    if size % VOCAB_MULTIPLE:
        raise UserError(f"tokenizer {path}: {size} entries — pad them to a multiple of {VOCAB_MULTIPLE} with [unusedN]")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def word_count(tokenizer: Tokenizer) -> int:
    """Entries before the [unusedN] padding; random replacements are drawn from [FIRST_WORD, this)."""
    size = tokenizer.get_vocab_size()
    while size > FIRST_WORD and (tokenizer.id_to_token(size - 1) or "").startswith("[unused"):
        size -= 1
    return size
