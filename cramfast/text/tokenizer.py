"""Tokenizers trained on the run's own text, the same for the same text on every machine and in every process."""

import json
import re
import string
from collections.abc import Callable, Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from cramfast.errors import UserError
from cramfast.text import bytebpe
from cramfast.text.bytebpe import LONGEST_WORD
from cramfast.text.kmers import Kmers, is_kmer_name
from cramfast.text.learning import LEAST_PROSE, Learned, longest_word, to_learn_from
from cramfast.text.specials import CLS, FIRST_WORD, SEP, SPECIAL_TOKENS
from cramfast.text.spelling import KEPT, ascii_of, normalizer

KINDS = ("auto", "wordpiece", "bpe")  # and kmer with its numbers; anything else is the name of a file
SPACES = dict.fromkeys([*range(32), 127], " ")
VOCAB_MULTIPLE = 64  # rows of the decoder matrix, so that its matmul tiles are full
# A longer word is no word of a language but a genome, a protein, a key: it is cut. Its pieces are learned like any
# others, so that a run of 70 letters and one of 7,000 are made of the same. docs/decisions/0017.
LONG = re.compile(f"[a-z0-9]{{{LONGEST_WORD + 1},}}")
INNER = tuple("##" + letter for letter in string.digits + string.ascii_lowercase)  # each letter inside a word
SIGN = re.compile(f"[{KEPT}]")
UNUSED = re.compile(r"\[unused\d+\]")


def is_trained(kind: str) -> bool:
    """Whether a tokenizer of this name is made of the text; otherwise it is a file."""
    return kind in KINDS or is_kmer_name(kind)


def train_tokenizer(texts: Iterable[str], kind: str, vocab_size: int, learned: Learned | None = None) -> Tokenizer:
    """Train a tokenizer and pad its vocabulary to a multiple of 64 with [unusedN].

    Args:
        texts: the sample to learn from; read again where it is nearly all base64.
        kind: "wordpiece" (lower-cased ASCII, as in the paper), "bpe" (byte-level: case and all of Unicode kept), or
            "kmer" with its numbers (see cramfast.text.kmers).
        vocab_size: most entries in all, a multiple of 64; k-mers are as many as they are.
        learned: receives what was read and left out.

    Raises:
        UserError: another kind, or a vocabulary too small for the alphabet.
    """
    if is_kmer_name(kind):
        return _finish(Kmers.named(kind, texts).tokenizer())
    check_vocab_size(vocab_size)
    if kind not in ("wordpiece", "bpe"):
        raise UserError(f"tokenizer={kind!r} is neither auto, wordpiece, bpe, kmer, nor a file — check the path")
    learned, texts = Learned() if learned is None else learned, list(texts)

    def train(learn_from: Callable[[], Iterable[str]]) -> Tokenizer:
        if kind == "bpe":
            return bytebpe.train(texts, learn_from, vocab_size)
        return _train_wordpiece(learn_from(), vocab_size)

    tokenizer = train(lambda: to_learn_from(texts, learned))
    if learned.dumps > (1 - LEAST_PROSE) * learned.read:
        learned.forget()
        tokenizer = train(lambda: texts)
    return _finish(tokenizer)


def check_vocab_size(vocab_size: int) -> None:
    """Raise UserError unless a tokenizer can be trained to this many entries."""
    if vocab_size % VOCAB_MULTIPLE or vocab_size < 512:
        raise UserError(f"vocab_size={vocab_size} is not possible — use a multiple of {VOCAB_MULTIPLE} from 512 on")


def wordpiece(vocabulary: dict[str, int]) -> Tokenizer:
    """Lower-cased ASCII WordPiece over a vocabulary; every other character as cramfast.text.spelling spells it."""
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD))
    tokenizer.normalizer = normalizer()
    words = Regex(f"[a-z0-9]{{1,{LONGEST_WORD}}}|[^a-z0-9 ]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(words, "removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def _alphabet() -> list[str]:
    return sorted((set(map(chr, range(33, 127))) - set(string.ascii_uppercase)) | set(KEPT))


def is_own_wordpiece(parts: dict) -> bool:
    """Whether a tokenizer.json is one of wordpiece() that has a token for every character it can meet."""
    own, vocabulary = json.loads(wordpiece({}).to_str()), parts["model"]["vocab"]
    return (
        parts["model"]["type"] == "WordPiece"
        and all(parts[part] == own[part] for part in ("normalizer", "pre_tokenizer"))
        and all(entry in vocabulary for entry in (*_alphabet(), *INNER))
    )


def _train_wordpiece(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    # The trainer numbers ##-pieces in the order of a randomly seeded hash map, and breaks ties between merges by those
    # numbers. Handing it every ##-letter as a leading "special" token fixes them; signs never continue a word.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *INNER],
        initial_alphabet=_alphabet(),
        show_progress=False,
    )
    learner = wordpiece({})
    learner.normalizer, learner.pre_tokenizer = None, pre_tokenizers.BertPreTokenizer()
    learner.train_from_iterator(map(_words_to_learn, texts), trainer)
    return wordpiece(learner.get_vocab())


def _words_to_learn(text: str) -> str:
    """The text as wordpiece() normalises it, and with spaces where that cuts, several times as fast."""
    text = ascii_of(text).lower().translate(SPACES)
    if not text.isascii():
        text = SIGN.sub(lambda sign: f" {sign[0]} ", text)
    if longest_word(text) > LONGEST_WORD:
        text = LONG.sub(lambda word: " ".join(re.findall(f".{{1,{LONGEST_WORD}}}", word[0])), text)
    return text


def _finish(tokenizer: Tokenizer) -> Tokenizer:
    # A mask takes the space before it, as the word did whose place it has.
    tokenizer.add_special_tokens([AddedToken(name, special=True, lstrip=name == "[MASK]") for name in SPECIAL_TOKENS])
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
        raise UserError(f"tokenizer {path}: no such file — give auto, wordpiece, bpe, kmer or a tokenizer.json")
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


def for_text(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that reads a text as training does. Our special tokens written in it are text; those that a tokenizer
    brought itself, as [NAME] where a name was removed, are themselves, as they are for the model that is exported."""
    parts = json.loads(tokenizer.to_str())
    if tuple(map(tokenizer.id_to_token, range(FIRST_WORD))) == SPECIAL_TOKENS:
        for token in parts["added_tokens"]:
            token["special"] &= token["content"] in SPECIAL_TOKENS or UNUSED.fullmatch(token["content"]) is not None
    reader = Tokenizer.from_str(json.dumps(parts))
    reader.encode_special_tokens = True
    reader.no_truncation()
    reader.no_padding()
    return reader


def word_count(tokenizer: Tokenizer) -> int:
    """Entries before the [unusedN] padding; random replacements are drawn from [FIRST_WORD, this)."""
    size = tokenizer.get_vocab_size()
    while size > FIRST_WORD and (tokenizer.id_to_token(size - 1) or "").startswith("[unused"):
        size -= 1
    return size
