"""Which documents are worth training on: plain rules and duplicates, decided in the order of the text, and counted."""

import functools
import hashlib
import heapq
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from cramfast.config import Curation
from cramfast.text.minhash import NearDuplicates

# In the order in which a document meets them; the last, which needs the tokenizer, in the second pass.
STEPS = ("few letters", "repeated lines", "exact duplicates", "near-duplicates", "many tokens")
FEW_LETTERS, REPEATED_LINES, EXACT, NEAR, MANY_TOKENS = range(1, len(STEPS) + 1)
KEPT = 0
BATCH_CHARACTERS = 4_000_000  # judged, or encoded, at one time; bounds the memory
EXAMPLES = 5  # shown of each step
EXCERPT = 300  # characters of an example
SIMILARITY_BINS = 50
T = TypeVar("T")


@dataclass
class Dropped:
    """What one step left out.

    Attributes:
        examples: [(draw, number, text, measure, original)], those with the smallest draws: a hash of the text, so that
            they are a fair sample and the same at every preparation. `original` is the number of the similar document
            that stays, or -1.
    """

    documents: int = 0
    characters: int = 0
    examples: list[tuple[int, int, str, str, int]] = field(default_factory=list)

    def add(self, number: int, text: str, measure: str, original: int = -1) -> None:
        self.documents += 1
        self.characters += len(text)
        draw = int.from_bytes(_digest(text)[:8], "little")
        if len(self.examples) < EXAMPLES or draw < self.examples[-1][0]:
            example = (draw, number, text, measure, original)
            self.examples = heapq.nsmallest(EXAMPLES, [*self.examples, example])


class Curator:
    """Judges documents one after the other; the same text gets the same verdicts in every process.

    Attributes:
        verdicts: one byte a document so far, KEPT or the number of the step that dropped it.
        dropped: by step.
        copies: how many later documents repeat the one of this number.
        similarities: (SIMILARITY_BINS,) near-duplicates by estimated similarity, 0 to 1.
    """

    def __init__(self, curation: Curation):
        self.curation = curation
        self.verdicts = bytearray()
        self.dropped = {step: Dropped() for step in range(1, len(STEPS) + 1)}
        self.copies: Counter[int] = Counter()
        self.similarities = np.zeros(SIMILARITY_BINS, np.int64)
        self.first: dict[bytes, int] = {}  # number of the first document with this digest
        self.near = NearDuplicates(curation.similarity) if curation.duplicates == "near" else None

    @property
    def active(self) -> bool:
        """Whether any step of the first pass is on."""
        c = self.curation
        return c.min_letters > 0 or c.max_repeated_lines < 1 or c.duplicates != "keep"

    def kept(self, documents: Iterable[str]) -> Iterator[str]:
        """The documents that stay; the next batch is read and judged while one is used."""
        judged = ((texts, self.judge(texts)) for texts in ahead(batches(documents)))
        for texts, verdicts in ahead(judged) if self.active else judged:
            yield from (text for text, verdict in zip(texts, verdicts, strict=True) if verdict == KEPT)

    def judge(self, texts: list[str]) -> bytearray:
        """Verdicts on the next documents."""
        start = len(self.verdicts)
        verdicts = bytearray(self._judge_alone(start + i, text) for i, text in enumerate(texts))
        if self.near is not None:
            self._judge_near(start, texts, verdicts)
        self.verdicts += verdicts
        return verdicts

    def _judge_alone(self, number: int, text: str) -> int:
        """Plain rules and exact duplicates."""
        c = self.curation
        if c.min_letters > 0 and (share := letter_share(text)) < c.min_letters:
            self.dropped[FEW_LETTERS].add(number, text, f"{100 * share:.0f} % letters")
            return FEW_LETTERS
        if c.max_repeated_lines < 1 and (share := repeated_share(text)) > c.max_repeated_lines:
            self.dropped[REPEATED_LINES].add(number, text, f"{100 * share:.0f} % in repeated lines")
            return REPEATED_LINES
        if c.duplicates != "keep" and (first := self.first.setdefault(_digest(text), number)) != number:
            self.dropped[EXACT].add(number, text, f"document {number + 1:,} is document {first + 1:,}")
            self.copies[first] += 1
            return EXACT
        return KEPT

    def _judge_near(self, start: int, texts: list[str], verdicts: bytearray) -> None:
        left = [i for i, verdict in enumerate(verdicts) if verdict == KEPT]
        matches, similarities = self.near.find([texts[i] for i in left], [start + i for i in left])
        for i, original, similarity in zip(left, matches.tolist(), similarities.tolist(), strict=True):
            if original >= 0:
                verdicts[i] = NEAR
                self.dropped[NEAR].add(start + i, texts[i], f"similarity {similarity:.2f}", original)
                self.copies[original] += 1
                self.similarities[min(int(similarity * SIMILARITY_BINS), SIMILARITY_BINS - 1)] += 1

    def finish(self) -> None:
        """Give back the memory that only further verdicts would need."""
        self.first.clear()
        self.near = None

    def originals(self) -> set[int]:
        """Numbers of the documents that examples are shown beside."""
        shown = {original for each in self.dropped.values() for *_, original in each.examples if original >= 0}
        return shown | {number for number, _ in self.most_copied()}

    def most_copied(self) -> list[tuple[int, int]]:
        """(number, copies) of the documents that two or more others repeat: those with most, then the earliest."""
        several = (item for item in self.copies.items() if item[1] > 1)
        return heapq.nsmallest(EXAMPLES, several, key=lambda item: (-item[1], item[0]))

    def counts(self) -> dict:
        """For manifest.json: documents and characters that each step dropped."""
        return {
            STEPS[step - 1]: {"documents": each.documents, "characters": each.characters}
            for step, each in self.dropped.items()
            if self.is_on(step)
        }

    def is_on(self, step: int) -> bool:
        c = self.curation
        return {
            FEW_LETTERS: c.min_letters > 0,
            REPEATED_LINES: c.max_repeated_lines < 1,
            EXACT: c.duplicates != "keep",
            NEAR: c.duplicates == "near",
            MANY_TOKENS: c.max_tokens_per_char > 0,
        }[step]

    def findings(self, originals: dict[int, str]) -> dict:
        """For curation.json: examples of what was dropped, most copied documents, near-duplicates by similarity.

        Args:
            originals: text of the documents that originals() names, by number.
        """
        examples = {
            STEPS[step - 1]: [
                {"measure": measure} | _shown(text, originals.get(original))
                for *_, text, measure, original in each.examples
            ]
            for step, each in self.dropped.items()
            if self.is_on(step)
        }
        copied = [{"copies": copies, "text": excerpt(originals[number])} for number, copies in self.most_copied()]
        return {"examples": examples, "most_copied": copied, "similarities": self.similarities.tolist()}


@dataclass(frozen=True)
class DroppedStep:
    """One step of a prepared folder's curation; shares are of all that was read."""

    name: str
    documents: int
    characters: int
    document_share: float
    character_share: float


def dropped_steps(manifest: dict) -> list[DroppedStep]:
    """What each step dropped that was on, in their order."""
    dropped = manifest.get("curation", {}).get("dropped", {})
    counted = (*manifest["splits"].values(), *dropped.values())
    documents, characters = (sum(counts[key] for counts in counted) for key in ("documents", "characters"))
    return [
        DroppedStep(name, *(n := (c["documents"], c["characters"])), n[0] / documents, n[1] / characters)
        for name, c in dropped.items()
    ]


def summary(manifest: dict) -> list[str]:
    """One line for each step that was on: what it dropped."""
    return [
        f"{step.name}: {step.documents:,} documents dropped ({step.document_share:.2%}; "
        f"{step.character_share:.2%} of the characters)"
        for step in dropped_steps(manifest)
    ]


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The items, each made in a thread of its own while the one before is used."""
    made = iter(items)
    following = _beside(lambda: next(made, None))
    while (item := following.result()) is not None:
        following = _beside(lambda: next(made, None))
        yield item


def _beside(work: Callable[[], T]) -> Future[T]:
    """The work's result, from a thread that nothing waits for but the result: Ctrl-C ends a process whose slow source,
    a dataset over the network, has a thread waiting. An executor would join it."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """The documents in lists of BATCH_CHARACTERS or a little more."""
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _shown(text: str, original: str | None) -> dict[str, str]:
    """Excerpts: of the start, or of both documents from shortly before the place where they differ."""
    if original is None:
        return {"text": excerpt(text)}
    same = next((i for i, (a, b) in enumerate(zip(text, original, strict=False)) if a != b), 0)
    start = max(0, same - EXCERPT // 4)
    return {"text": excerpt(text, start), "original": excerpt(original, start)}


def excerpt(text: str, start: int = 0) -> str:
    """Some characters of a document on one line."""
    # Thrice as many before white space is joined, which indented text has most of.
    line = " ".join(text[start : start + 3 * EXCERPT].split())
    cut = len(line) > EXCERPT or start + 3 * EXCERPT < len(text)
    return "… " * (start > 0) + line[:EXCERPT].rstrip() + " …" * cut


@functools.lru_cache(maxsize=1 << 16)
def _is_letter(character: str) -> bool:
    return unicodedata.category(character)[0] in "LM"  # marks too: Indic vowel signs, accents written apart


def letter_share(text: str) -> float:
    """Letters of any script among the characters that are not white space."""
    counts = Counter(text)
    inked = sum(n for character, n in counts.items() if not character.isspace())
    return sum(n for character, n in counts.items() if _is_letter(character)) / max(1, inked)


def repeated_share(text: str) -> float:
    """Characters in lines that stood in the document before, among all in lines; white space at their ends aside."""
    lines = [line for raw in text.split("\n") if (line := raw.strip())]
    return 1 - sum(map(len, set(lines))) / max(1, sum(map(len, lines)))
