"""A tokenizer.json of one's own, tried before training as the export tries it afterwards: framed texts and pairs."""

from pathlib import Path

from tokenizers import Tokenizer

from cramfast.errors import UserError
from cramfast.text.specials import CLS, MASK, SEP
from cramfast.text.tokenizer import framing, load_tokenizer

TRIED = ("a word, another word and a number: 12", "a")  # a text, and the second of a pair


def given_tokenizer(path: Path) -> tuple[Tokenizer, list[str]]:
    """load_tokenizer(), mended where it would make something else of a text than training does; and what was mended.

    Raises:
        UserError: as load_tokenizer(), or a tokenizer that still gives other ids.
    """
    tokenizer, mended = load_tokenizer(path), []
    if getattr(tokenizer.model, "dropout", None):
        mended.append(f"its BPE dropout of {tokenizer.model.dropout:.2g} is switched off: the same text, the same ids")
        tokenizer.model.dropout = None
    if _framed_otherwise(tokenizer):
        mended.append("its template is replaced by [CLS] A [SEP] and [CLS] A [SEP] B [SEP]")
        tokenizer.post_processor = framing()
    first, second = (tokenizer.encode(text, add_special_tokens=False).ids for text in TRIED)
    if reason := _framed_otherwise(tokenizer):
        raise UserError(f"tokenizer {path}: {reason} — save it without a post-processor")
    again = Tokenizer.from_str(tokenizer.to_str())
    if [again.encode(text, add_special_tokens=False).ids for text in TRIED] != [first, second]:
        raise UserError(f"tokenizer {path}: gives other ids each time — make one without chance in it")
    return tokenizer, [f"tokenizer {path}: {what}" for what in mended]


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
