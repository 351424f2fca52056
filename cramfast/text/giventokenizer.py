"""A tokenizer.json of one's own, tried before training as the export tries it afterwards: framed texts and pairs."""

import json
from pathlib import Path

from tokenizers import Tokenizer

from cramfast.errors import UserError
from cramfast.text.specials import CLS, FIRST_WORD, MASK, SEP
from cramfast.text.tokenizer import framing, load_tokenizer

WORDS_TRIED = 2000  # entries of the vocabulary
TRIED = ("a word, another word and a number: 12", "a")  # a text, and the second of a pair


def given_tokenizer(path: Path) -> tuple[Tokenizer, list[str]]:
    """load_tokenizer(), mended where it would make something else of a text than training does; and what was mended.

    Raises:
        UserError: as load_tokenizer(), or a tokenizer that still gives other ids.
    """
    tokenizer, changes = mended(load_tokenizer(path))
    first, second = (tokenizer.encode(text, add_special_tokens=False).ids for text in TRIED)
    if reason := _framed_otherwise(tokenizer):
        raise UserError(f"tokenizer {path}: {reason} — save it without a post-processor")
    again = Tokenizer.from_str(tokenizer.to_str())
    if [again.encode(text, add_special_tokens=False).ids for text in TRIED] != [first, second]:
        raise UserError(f"tokenizer {path}: gives other ids each time — make one without chance in it")
    return tokenizer, [f"tokenizer {path}: {what}" for what in changes]


def mended(tokenizer: Tokenizer) -> tuple[Tokenizer, list[str]]:
    """A tokenizer without dropout, that frames texts and pairs as training does and whose mask takes the place of a
    word and its space; and what of that is new."""
    changes = []
    if getattr(tokenizer.model, "dropout", None):
        changes.append(f"its BPE dropout of {tokenizer.model.dropout:.2g} is switched off: the same text, the same ids")
        tokenizer.model.dropout = None
    if _framed_otherwise(tokenizer):
        changes.append("its template is replaced by [CLS] A [SEP] and [CLS] A [SEP] B [SEP]")
        tokenizer.post_processor = framing()
    if _mask_leaves_its_space(tokenizer):
        parts = json.loads(tokenizer.to_str())
        for token in parts["added_tokens"]:
            token["lstrip"] |= token["id"] == MASK
        tokenizer = Tokenizer.from_str(json.dumps(parts))
        changes.append("its [MASK] takes the space before it, as the word did whose place it has")
    return tokenizer, changes


def _mask_leaves_its_space(tokenizer: Tokenizer) -> bool:
    """Whether the space before a masked word becomes a token of its own, though words have theirs in their token."""
    for entry in range(FIRST_WORD, min(FIRST_WORD + WORDS_TRIED, tokenizer.get_vocab_size())):
        if not (word := tokenizer.decode([entry]).strip()).isalpha():
            continue
        encoding = tokenizer.encode(f"a {word} a", add_special_tokens=False)
        places = [i for i, span in enumerate(encoding.offsets) if span == (1, 2 + len(word))]
        if places:  # the word and the space before it, in one token
            ids = [*encoding.ids[: places[0]], MASK, *encoding.ids[places[0] + 1 :]]
            return tokenizer.encode("a [MASK] a", add_special_tokens=False).ids != ids
    return False


def _framed_otherwise(tokenizer: Tokenizer) -> str:
    """What is wrong with the framing of a text or a pair; nothing where it is as in training."""
    first, second = (tokenizer.encode(text, add_special_tokens=False).ids for text in TRIED)
    if {CLS, SEP, MASK} & {*first, *second}:
        return "its normaliser or pre-tokenizer adds special tokens to plain text"
    if tokenizer.encode(TRIED[0]).ids != [CLS, *first, SEP]:
        return "a text is not [CLS] A [SEP]"
    pair = tokenizer.encode(*TRIED)
    if pair.ids != [CLS, *first, SEP, *second, SEP]:
        return "a pair is not [CLS] A [SEP] B [SEP]"
    return ""
