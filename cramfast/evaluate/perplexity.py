"""Held-out masked-language-model loss and accuracy of any checkpoint on any text, under masks that never change.

Which units are hidden is a hash of (seed, number of the unit in the text): the same for every model, batch size and
sequence length. A unit is a token, or a word between spaces, which models with other tokenizers share too.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from tokenizers import Encoding

from cramfast.batches import pack
from cramfast.config import require
from cramfast.errors import UserError, note
from cramfast.evaluate import results
from cramfast.evaluate.machine import Machine
from cramfast.evaluate.masked import Hidden, MaskedModel, log_probabilities
from cramfast.evaluate.stock import load_masked
from cramfast.pages.scoretable import ScoreTable
from cramfast.text.corpus import Corpus, Documents
from cramfast.text.files import Format

ENCODED_AT_ONCE = 256  # documents; the tokenizer splits them over the cores


@dataclass(frozen=True)
class Masks:
    """What is hidden: a share of the units, chosen by the seed."""

    unit: Literal["tokens", "words"] = "tokens"
    fraction: float = 0.15
    seed: int = 0
    sequence_len: int = 128

    def __post_init__(self):
        require(0 < self.fraction < 1, f"fraction={self.fraction}", "use a value between 0 and 1, such as 0.15")
        require(0 <= self.seed < 2**63, f"seed={self.seed}", "use 0 or more")
        require(self.sequence_len >= 8, f"sequence_len={self.sequence_len}", "use 8 or more")

    def chosen(self, unit_N: np.ndarray, eligible_N: np.ndarray) -> np.ndarray:
        """Ascending positions of the tokens to hide; unit_N int64, eligible_N bool."""
        keys, positions = np.empty(len(unit_N), np.uint64), np.empty(len(unit_N), np.int64)
        # Epoch 1: under seed 0 and epoch 0 the first unit's key is 0, so that it would be hidden for certain.
        count = pack.mask_keys(unit_N, eligible_N, self.seed, 1, keys, positions)
        return positions[:count][keys[:count] < np.uint64(self.fraction * 2.0**64)]


@dataclass(frozen=True)
class Perplexity:
    """Attributes:
    tokens: of the text, without special tokens.
    hidden: how many of them were predicted.
    loss: mean cross-entropy over them, nats per token.
    accuracy: share of them that was the model's first guess.
    characters, bytes: of the text that was hidden.
    masks: fingerprint of tokens and masks; results compare token by token exactly when it is equal.
    """

    tokens: int
    hidden: int
    loss: float
    accuracy: float
    characters: int
    bytes: int
    masks: str

    @property
    def nats_per_character(self) -> float:
        return self.loss * self.hidden / self.characters

    @property
    def nats_per_byte(self) -> float:
        return self.loss * self.hidden / self.bytes


def measure(model: MaskedModel, documents: Iterable[str], masks: Masks) -> Perplexity:
    """Hide, predict, compare.

    Raises:
        UserError: sequences longer than the model takes, or text in which nothing can be hidden.
    """
    limit = model.max_len
    if masks.sequence_len > limit:
        raise UserError(f"sequence_len={masks.sequence_len}: {model.name} takes {limit} tokens — use at most that")
    fingerprint = hashlib.sha256()
    sequences: list[Hidden] = []
    tokens = characters = size = 0
    for encoding, chosen, text in hide(model, documents, masks):
        ids = np.array(encoding.ids, np.int32)
        tokens += len(ids)
        characters, size = characters + len(text), size + len(text.encode())
        for array in (ids, chosen):
            fingerprint.update(array.tobytes())
        sequences += cut(model, ids, chosen, masks.sequence_len - pack.SPECIALS_PER_SEQUENCE)
    if not sequences or not characters:
        raise UserError("the text is too short: none of its units was hidden — give more text or a larger --fraction")
    found, best = log_probabilities(model, sequences)
    return Perplexity(
        tokens, len(found), float(-found.mean()), float(best.mean()), characters, size, fingerprint.hexdigest()[:12]
    )


def hide(model: MaskedModel, documents: Iterable[str], masks: Masks) -> Iterator[tuple[Encoding, np.ndarray, str]]:
    """(tokens, places of those to hide, the hidden text run together) of every document."""
    units = 0
    remaining = iter(documents)
    while texts := list(islice(remaining, ENCODED_AT_ONCE)):
        encodings = model.tokenizer.encode_batch(texts, add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            known_N = np.array(encoding.ids, np.int64) != model.unk
            if masks.unit == "tokens":
                chosen = masks.chosen(units + np.arange(len(known_N)), known_N)
                spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)[chosen]
                units += len(known_N)
            else:
                words = [match.span() for match in re.finditer(r"\S+", text)]
                chosen, spans = whole_words(encoding, np.array(words, np.int64).reshape(-1, 2), known_N, units, masks)
                units += len(words)
            yield encoding, chosen, "".join(text[start:end].strip() for start, end in spans)


def whole_words(
    encoding: Encoding, words_W2: np.ndarray, known_N: np.ndarray, before: int, masks: Masks
) -> tuple[np.ndarray, np.ndarray]:
    """(places of the tokens of the chosen words, spans of those words); a word with an [UNK] in it is never chosen."""
    ends_N = np.array(encoding.offsets, np.int64).reshape(-1, 2)[:, 1]
    # By its last character: a byte-level token holds the space before its word.
    word_N = np.searchsorted(words_W2[:, 1], ends_N - 1, side="right").clip(max=max(len(words_W2) - 1, 0))
    known_W = np.ones(len(words_W2), bool)
    known_W[word_N[~known_N]] = False
    places = masks.chosen(before + word_N, known_W[word_N])
    return places, words_W2[np.unique(word_N[places])]


def cut(model: MaskedModel, ids: np.ndarray, chosen: np.ndarray, body: int) -> Iterator[Hidden]:
    """[CLS] chunk [SEP] for every chunk of `body` tokens in which something is hidden."""
    masked = ids.copy()
    masked[chosen] = model.mask
    for begin in range(0, len(ids), body):
        inside = chosen[(chosen >= begin) & (chosen < begin + body)]
        if len(inside):
            framed = np.concatenate([[model.cls], masked[begin : begin + body], [model.sep]])
            yield Hidden(framed, inside - begin + 1, ids[inside])


def table(results: dict[str, Perplexity], masks: Masks) -> ScoreTable:
    """One row for each model, and what of it may be compared."""
    rows = [
        [
            name, f"{r.hidden:,} of {r.tokens:,}", f"{r.loss:.4f}", f"{math.exp(min(r.loss, 700)):,.2f}",
            f"{100 * r.accuracy:.2f}", f"{r.nats_per_character:.4f}", f"{r.nats_per_byte:.4f}", r.masks,
        ]
        for name, r in results.items()
    ]  # fmt: skip
    columns = ["model", "hidden tokens", "loss, nats/token", "perplexity", "accuracy, %"]
    columns += ["nats/character", "nats/byte", "masks"]
    title = f"Masked-language-model loss: {masks.fraction:.0%} of the {masks.unit}, [MASK] always"
    return ScoreTable(title, columns, rows, [_comparable(list(results.values()), masks)])


def _comparable(results: list[Perplexity], masks: Masks) -> str:
    if len({r.masks for r in results}) == 1:
        return "Results with the same masks (last column) saw the same tokens hidden: every column compares."
    if masks.unit == "tokens":
        return (
            "The models split text differently, so other tokens were hidden and no column compares strictly; "
            "use --unit words, which hides the same words from all."
        )
    same = len({r.characters for r in results}) == 1
    nearly = "" if same else " nearly (words with an unknown token are left out, so not quite the same words)"
    return (
        "The models split text differently: loss and accuracy per token do not compare. Nats per character and byte "
        f"do{nearly}: the same words were hidden from all. Two things still favour a tokenizer: more, shorter pieces "
        "tell more about the length of a word, and what its normalizer drops (case, accents) is never predicted."
    )


def to_json(result: Perplexity) -> dict:
    """The result with its derived figures."""
    return asdict(result) | {"nats_per_character": result.nats_per_character, "nats_per_byte": result.nats_per_byte}


def shortened(documents: Iterable[str], characters: int) -> Iterator[str]:
    """Whole documents until that many characters are reached; 0 passes everything."""
    total = 0
    for document in documents:
        yield document
        total += len(document)
        if 0 < characters <= total:
            return


@dataclass(frozen=True)
class Arguments:
    """Held-out loss and accuracy of checkpoints on a text, all under the same masks."""

    models: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders and Hugging Face folders of masked-language models: BERT, RoBERTa, ModernBERT and others."""
    data: tuple[str, ...]
    """Text: files, folders, globs, hf:NAME; nothing that a model was trained on."""
    masks: Annotated[Masks, tyro.conf.arg(name="")] = field(default_factory=Masks)
    characters: int = 1_000_000
    """Read whole documents until there are so many characters; 0 reads everything."""
    documents: Documents = "blocks"
    text_key: str = "text"
    format: Format = "auto"
    """What all files are, whatever their names; auto goes by these."""
    encoding: str = "utf-8"
    """Of text files and rows in them, such as latin-1 or utf-16."""
    skip_malformed: int = 0
    """Rows that may be left out where they cannot be read; one more is an error."""
    machine: Annotated[Machine, tyro.conf.arg(name="")] = field(default_factory=Machine)
    out: Path | None = None
    """JSON to write; by default evaluations/perplexity.json in every run folder given, and for a Hugging Face folder
    FOLDER.perplexity.json here."""

    def run(self, console) -> None:
        """Measure, print, write.

        Raises:
            UserError: no model, no text, or something wrong with one of them.
        """
        if not self.models:
            raise UserError("no model given — name run folders or Hugging Face folders")
        require(self.characters >= 0, f"characters={self.characters}", "use 0 or more")
        require(self.skip_malformed >= 0, f"skip_malformed={self.skip_malformed}", "use 0 or more")
        reading = (self.documents, self.text_key, self.format, self.encoding, self.skip_malformed)
        corpus = Corpus(self.data, *reading)
        texts = list(shortened(corpus, self.characters))
        for line in corpus.notes():
            note(line)
        models = [load_masked(path) for path in self.models]
        paths = [results.path_of(model, "perplexity", self.out) for model in models]
        measured = {}
        for model in models:
            self.machine.place(model.module)
            measured[model.name if model.name not in measured else str(model.folder)] = measure(
                model, texts, self.masks
            )
        shown = table(measured, self.masks)
        shown.show(console)
        figures = {name: to_json(result) for name, result in measured.items()}
        settings = {"data": [Path(source).name for source in self.data], "characters": self.characters}
        result = {"kind": "perplexity", "settings": settings | asdict(self.masks), "results": figures}
        for model, path in list(zip(models, paths, strict=True))[: 1 if self.out else None]:
            results.write(path, result, shown)
            results.announce(console, path, model, self.out)
