"""Does AutoTokenizer make of a text what training made of it? Asked of every export, and before a run begins."""

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import Tokenizer

from cramfast.errors import UserError
from cramfast.text.specials import CLS, MASK, SEP, SPECIAL_TOKENS
from cramfast.text.tokenizer import UNUSED, for_text
from cramfast.text.wordcache import WordCache

SAMPLE = 64  # sentences
WORD = re.compile(r"(?<!\S)[^\W_]+(?!\S)")  # between spaces, without signs


def compare_tokens(folder: Path, tokenizer: Tokenizer, sentences: list[str]) -> None:
    """Sentences, pairs, sentences with a masked word, and with a tokenizer's own special tokens, through AutoTokenizer.

    Args:
        folder: an exported folder; its tokenizer files suffice.
        tokenizer: the one of the training.
        sentences: held-out text.

    Raises:
        UserError: other ids than training makes of the same, or other outputs than ids and attention mask.
    """
    stock, sample = _load(folder), sentences[:SAMPLE]
    if set(stock(sample)) != {"input_ids", "attention_mask"}:
        raise UserError(f"export check: the tokenizer returns {sorted(stock(sample))} — the export was not kept")
    for what, texts, expected in _cases(tokenizer, sample):
        if (found := stock(*texts)["input_ids"]) != expected:
            raise UserError(
                f"export check: AutoTokenizer splits {what} {texts[0][:60]!r} differently: "
                f"{_difference(tokenizer, found, expected)} — the export was not kept; use a tokenizer of "
                "cramfast.prepare, or mend the one that was given"
            )


def words_alone_are_those_of_a_text(folder: Path, sentences: list[str]) -> bool:
    """Whether words that are given one by one (is_split_into_words) are the tokens that they are in a sentence."""
    stock = _load(folder)
    cut = [words for sentence in sentences[:SAMPLE] if len(words := WORD.findall(sentence)) > 1]
    return all(stock(words, is_split_into_words=True) == stock(" ".join(words)) for words in cut)


def _difference(tokenizer: Tokenizer, found: list[int], expected: list[int]) -> str:
    """The first tokens that differ."""
    same = [a == b for a, b in zip(found, expected, strict=False)]
    place = same.index(False) if False in same else len(same)
    theirs, ours = (" ".join(map(str, map(tokenizer.id_to_token, ids[place : place + 4]))) for ids in (found, expected))
    return f"{theirs or 'nothing more'!r} where training has {ours or 'nothing more'!r}"


def _load(folder: Path) -> Callable:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _cases(tokenizer: Tokenizer, sentences: list[str]) -> Iterator[tuple[str, tuple[str, ...], list[int]]]:
    """What to try: in words, the texts, and the ids that training makes of them."""
    reader, trained = for_text(tokenizer), WordCache(tokenizer)

    def ids(text: str) -> list[int]:
        return trained.encode([text])[0].tolist()

    # Written in a text our special tokens are text; whoever hands them to stock transformers means the tokens.
    sentences = [sentence for sentence in sentences if not any(name in sentence for name in SPECIAL_TOKENS)]
    for sentence in sentences:
        yield "the sentence", (sentence,), [CLS, *ids(sentence), SEP]
    for first, second in itertools.pairwise(sentences[:8]):
        yield "the pair of", (first, second), [CLS, *ids(first), SEP, *ids(second), SEP]
    for sentence in sentences:
        encoding = reader.encode(sentence, add_special_tokens=False)
        for word in [*WORD.finditer(sentence)][1:4]:  # not the first, which has no space before it
            begin, end = word.span()
            places = [i for i, (a, b) in enumerate(encoding.offsets) if a < end and b > begin]
            reach = {encoding.offsets[places[0]][0], encoding.offsets[places[-1]][1]} if places else set()
            # Only words that the tokenizer cuts out, and with their space, where spaces are in tokens.
            if not reach or min(reach) < begin - 1 or max(reach) > end or (begin - 1, begin) in encoding.offsets:
                continue
            hidden = [*encoding.ids[: places[0]], MASK, *encoding.ids[places[-1] + 1 :]]
            yield "the masked", (f"{sentence[:begin]}[MASK]{sentence[end:]}",), [CLS, *hidden, SEP]
    for token in own_special_tokens(tokenizer)[:SAMPLE]:
        for sentence in sentences[:4]:
            text = sentence.replace(" ", f" {token} ", 1)
            yield f"{token} in", (text,), [CLS, *ids(text), SEP]


def own_special_tokens(tokenizer: Tokenizer) -> list[str]:
    """Special tokens that a tokenizer has besides those of every tokenizer here."""
    added = (token for token in tokenizer.get_added_tokens_decoder().values() if token.special)
    return sorted(t.content for t in added if t.content not in SPECIAL_TOKENS and not UNUSED.fullmatch(t.content))
