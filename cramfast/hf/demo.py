"""What the model has learned, shown: it fills a masked word of held-out sentences."""

import re
from collections.abc import Iterable

import torch
from tokenizers import Encoding, Tokenizer

from cramfast.errors import printable
from cramfast.model.encoder import Encoder

LONGEST = 128  # tokens shown of one sentence
# Words of four letters or more that say little about whether a model understands the sentence.
COMMON = frozenset(
    re.findall(
        "[a-z]+",
        """about after also because been before being both could does each ever every from have having here into just
        like made make many more most much must none only other over same shall should since some such than that their
        them then there these they this those through under until upon very well were what when where which while will
        with within without would your""",
    )
)

Guess = tuple[str, float]


def fill_mask(
    model: Encoder, tokenizer: Tokenizer, sentences: Iterable[str], count: int = 5, top: int = 5
) -> list[tuple[str, list[Guess], str]]:
    """Hide one word of each of the first `count` sentences that hold a suitable one, and let the model fill it in.

    Args:
        model: any device and dtype.
        tokenizer: the one it was trained with.
        sentences: raw text; those without a token that holds a letter are passed over.
        count: how many to fill.
        top: how many guesses for each.

    Returns:
        One (sentence with [MASK], [(token, probability), ...] best first, hidden word) for each.
    """
    limit = min(LONGEST, model.config.max_len)
    hidden = []
    for sentence in sentences:
        if len(hidden) == count:
            break
        encoding = tokenizer.encode(sentence)
        place = masked_place(encoding, sentence, limit)
        if place is not None:
            hidden.append((sentence, encoding, place))
    if not hidden:
        return []
    probabilities_SV = _predict(model, tokenizer, [(encoding.ids[:limit], place) for _, encoding, place in hidden])
    shown = []
    for (sentence, encoding, place), row_V in zip(hidden, probabilities_SV, strict=True):
        start, end = _span(encoding, sentence, place)
        stop = encoding.offsets[limit - 1][1] if len(encoding.ids) > limit else len(sentence)
        rest = sentence[end:stop] + (" …" if stop < len(sentence) else "")
        best = row_V.topk(top)
        guesses = [
            (_word(tokenizer, token), probability)
            for token, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        shown.append((f"{sentence[:start]}[MASK]{rest}", guesses, sentence[start:end]))
    return shown


def masked_place(encoding: Encoding, sentence: str, limit: int) -> int | None:
    """Which token to hide: one that is a whole word of four letters or more, no common one if possible; where no token
    is, as in scripts without spaces, one that holds a letter and no part of one. Of these the nearest to the middle,
    where there is context on both sides. None when there is none."""
    length = min(limit, len(encoding.ids))
    candidates = []
    for place in range(length):
        start, end = _span(encoding, sentence, place)
        word = sentence[start:end]
        known = not encoding.special_tokens_mask[place] and encoding.ids[place] > 4
        if known and any(map(str.isalpha, word)) and not _shares_a_character(encoding, place):
            whole = not (sentence[start - 1 : start].isalnum() or sentence[end : end + 1].isalnum())
            rank = word.lower() in COMMON if whole and len(word) >= 4 and word.isalpha() else 2
            candidates.append((rank, abs(place - length / 2), place))
    return min(candidates)[2] if candidates else None


def _shares_a_character(encoding: Encoding, place: int) -> bool:
    # Byte-level tokens may hold a part of a character: beside the rest of it, the mask would hide nothing.
    start, end = encoding.offsets[place]
    neighbours = encoding.offsets[max(0, place - 1) : place] + encoding.offsets[place + 1 : place + 2]
    return any(a < end and start < b for a, b in neighbours)


def show(console, results: list[tuple[str, list[Guess], str]]) -> None:
    """Print the results of `fill_mask` on a rich console."""
    from rich.markup import escape
    from rich.text import Text

    for sentence, guesses, truth in results:
        before, after = printable(sentence).split("[MASK]", 1)
        console.print(Text.assemble(before, ("[MASK]", "bold reverse"), after))
        parts = []
        for word, probability in guesses:
            style = "bold green" if word.lower() == truth.lower() else "default"
            parts.append(f"[{style}]{escape(printable(word))}[/] [dim]{probability:.0%}[/]")
        console.print("   " + "  ".join(parts) + f"   [dim]truth:[/] {escape(printable(truth))}\n", highlight=False)


def _span(encoding: Encoding, sentence: str, place: int) -> tuple[int, int]:
    # Byte-level tokens hold the space before the word.
    start, end = encoding.offsets[place]
    return end - len(sentence[start:end].lstrip()), end


def _predict(model: Encoder, tokenizer: Tokenizer, rows: list[tuple[list[int], int]]) -> torch.Tensor:
    """(S, V) float32 probabilities at the hidden place of each row of ids."""
    device = model.embeddings.tok_embeddings.weight.device
    mask = tokenizer.token_to_id("[MASK]")
    flat, places, offsets = [], [], [0]
    for ids, place in rows:
        places.append(len(flat) + place)
        flat += [*ids[:place], mask, *ids[place + 1 :]]
        offsets.append(len(flat))
    longest = max(len(ids) for ids, _ in rows)
    with torch.no_grad():
        ids_N, cu_seqlens = (torch.tensor(x, dtype=torch.int32, device=device) for x in (flat, offsets))
        hidden_SD = model(ids_N, cu_seqlens, longest)[torch.tensor(places, device=device)]
        return model.logits(hidden_SD).float().softmax(-1).cpu()


def _word(tokenizer: Tokenizer, token: int) -> str:
    name = tokenizer.id_to_token(token) or f"<{token}>"
    if name.startswith(("##", "[")):  # a piece of a word, or a special token: decoding would hide which
        return name
    return tokenizer.decode([token]).strip() or name
