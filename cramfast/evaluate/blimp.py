"""BLiMP: does the model find the grammatical sentence of a minimal pair more probable?

A sentence scores the sum of log p of each of its tokens when that token alone is hidden (pseudo-log-likelihood).
Source: Warstadt et al., arXiv:1912.00582 (the pairs); Salazar et al., arXiv:1910.14659 (the score).
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Annotated

import numpy as np
import tyro
from rich.progress import track

from cramfast.config import require
from cramfast.errors import UserError
from cramfast.evaluate import results
from cramfast.evaluate.machine import Machine
from cramfast.evaluate.masked import Hidden, MaskedModel, log_probabilities
from cramfast.evaluate.stock import load_masked
from cramfast.pages.scoretable import ScoreTable
from cramfast.runtime.jsonfile import read_json
from cramfast.session.record import SCORES_REMEDY
from cramfast.text.files import file_format
from cramfast.text.lines import read_lines

PARADIGMS = 67  # of the whole set
PAIRS = 1000  # of each
KEYS = ("sentence_good", "sentence_bad", "UID", "linguistics_term", "field")


@dataclass(frozen=True)
class Paradigm:
    """Attributes:
    category: the linguistic phenomenon, as the data name it.
    field: syntax, semantics, morphology or their border.
    pairs: (good, bad) sentences.
    """

    name: str
    category: str
    field: str
    pairs: list[tuple[str, str]]


@dataclass(frozen=True)
class ParadigmScore:
    """Attributes:
    accuracy: share of pairs in which the good sentence scored higher; a tie is an error.
    ties: pairs with equal scores: the tokenizer made both sentences the same, as a rule.
    """

    category: str
    field: str
    pairs: int
    accuracy: float
    ties: int


def read_blimp(path: Path, limit: int = 0) -> list[Paradigm]:
    """Every paradigm in a file, or in the files of a folder, with its first `limit` pairs (0: all).

    Raises:
        UserError: no such file, a line that is no pair, named by file and line; no pairs at all.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file — give BLiMP as one .jsonl or a folder of them, plain or compressed")
    files = sorted(p for p in path.iterdir() if file_format(p) == "jsonl") if path.is_dir() else [path]
    found: dict[str, Paradigm] = {}
    for file in files:
        for number, line in read_lines(file):
            if line.strip():
                paradigm, pair = _read_pair(line, f"{file}:{number}")
                pairs = found.setdefault(paradigm.name, paradigm).pairs
                if not limit or len(pairs) < limit:
                    pairs.append(pair)
    if not found:
        raise UserError(f"{path}: holds no pairs — fetch BLiMP again; its lines are JSON, its files end in .jsonl")
    return list(found.values())


def _read_pair(line: str, where: str) -> tuple[Paradigm, tuple[str, str]]:
    """(a paradigm without pairs yet, the pair) of a line."""
    try:
        row = json.loads(line)
        good, bad, name, category, kind = (row[key] for key in KEYS)
    except (ValueError, TypeError):
        raise UserError(f"{where}: no JSON object — each line holds one pair") from None
    except KeyError as error:
        raise UserError(f"{where}: no key {error.args[0]!r} — each line needs {', '.join(KEYS)}") from None
    if not (isinstance(good, str) and isinstance(bad, str) and good.strip() and bad.strip()):
        raise UserError(f"{where}: a sentence is empty or no text — fetch the file again")
    return Paradigm(name, category, kind, []), (good, bad)


def pseudo_log_likelihoods(model: MaskedModel, sentences: Iterable[str]) -> dict[str, float]:
    """Score of every sentence, in nats.

    Two sentences that differ in one token are the same text once it is hidden; such copies are encoded once.

    Raises:
        UserError: a sentence longer than the model takes.
    """
    distinct = list(dict.fromkeys(sentences))
    encodings = model.tokenizer.encode_batch(distinct, add_special_tokens=False)
    copies: dict[bytes, tuple[int, list[int], list[int]]] = {}  # hidden ids -> place, targets, their sentences
    for owner, (sentence, encoding) in enumerate(zip(distinct, encodings, strict=True)):
        if len(encoding.ids) + 2 > model.max_len:
            raise UserError(
                f"{model.name} takes {model.max_len} tokens, too few for {sentence[:60]!r} — leave the pair out, or "
                "train with a larger --model.max-len"
            )
        ids = np.array([model.cls, *encoding.ids, model.sep], np.int32)
        for place, target in enumerate(encoding.ids, 1):
            ids[place] = model.mask
            _, targets, owners = copies.setdefault(ids.tobytes(), (place, [], []))
            targets.append(target)
            owners.append(owner)
            ids[place] = target
    hidden = [
        Hidden(np.frombuffer(key, np.int32), [place] * len(targets), targets)
        for key, (place, targets, _) in copies.items()
    ]
    found, _ = log_probabilities(model, hidden)
    owners = np.array([owner for _, _, owners in copies.values() for owner in owners], np.int64)
    return dict(zip(distinct, np.bincount(owners, weights=found, minlength=len(distinct)).tolist(), strict=True))


def score(model: MaskedModel, paradigm: Paradigm) -> ParadigmScore:
    """Judge every pair of a paradigm."""
    scores = pseudo_log_likelihoods(model, (sentence for pair in paradigm.pairs for sentence in pair))
    margins = [scores[good] - scores[bad] for good, bad in paradigm.pairs]
    accuracy = sum(margin > 0 for margin in margins) / len(margins)
    ties = sum(margin == 0 for margin in margins)
    return ParadigmScore(paradigm.category, paradigm.field, len(margins), accuracy, ties)


def by_category(scores: dict[str, ParadigmScore]) -> dict[str, list[ParadigmScore]]:
    """The paradigms' scores grouped by phenomenon, in alphabetical order."""
    groups: dict[str, list[ParadigmScore]] = {}
    for name in sorted(scores, key=lambda name: (scores[name].category, name)):
        groups.setdefault(scores[name].category, []).append(scores[name])
    return groups


def table(model: MaskedModel, scores: dict[str, ParadigmScore]) -> ScoreTable:
    """Accuracy by phenomenon and the mean over paradigms."""
    rows = []
    for category, members in by_category(scores).items():
        low, high = (100 * bound(m.accuracy for m in members) for bound in (min, max))
        mean = 100 * fmean(m.accuracy for m in members)
        rows.append([category, f"{mean:.2f}", f"{low:.1f}", f"{high:.1f}", str(len(members))])
    mean = 100 * fmean(s.accuracy for s in scores.values())
    whole = len(scores) == PARADIGMS and all(s.pairs == PAIRS for s in scores.values())
    rows.append([f"mean of {'the ' if whole else ''}{len(scores)} paradigms", f"{mean:.2f}", "", "", str(len(scores))])
    pairs, ties = (sum(getattr(s, key) for s in scores.values()) for key in ("pairs", "ties"))
    notes = [f"Pairs whose good sentence has the higher pseudo-log-likelihood, %, of {pairs:,}; chance is 50."]
    if not whole:
        notes.append(f"Not the whole set ({PARADIGMS} paradigms of {PAIRS:,} pairs): for a first look only.")
    if ties:
        notes.append(f"{ties:,} pairs tied (both sentences are the same tokens) and count as errors.")
    return ScoreTable(
        f"BLiMP: {model.name}", ["phenomenon", "accuracy, %", "lowest", "highest", "paradigms"], rows, notes
    )


def keep_fuller(path: Path, model: MaskedModel, paradigms: list[Paradigm]) -> None:
    """Raise UserError where `path` holds scores of this model on more pairs than these."""
    stored = read_json(path, SCORES_REMEDY)
    there = sum(entry["pairs"] for entry in stored.get("paradigms", {}).values())
    asked = sum(len(paradigm.pairs) for paradigm in paradigms)
    if there > asked and stored.get("model") == model.description():
        raise UserError(f"{path}: holds scores on {there:,} pairs, these are {asked:,} — name another file with --out")


@dataclass(frozen=True)
class Arguments:
    """Judge BLiMP's minimal pairs by pseudo-log-likelihood."""

    model: tyro.conf.Positional[Path]
    """Run folder, or the Hugging Face folder of any masked-language model."""
    data: Path
    """BLiMP as one .jsonl or a folder of them, plain or compressed."""
    limit_per_paradigm: int = 0
    """Take the first so many pairs of each paradigm; 0 takes all."""
    machine: Annotated[Machine, tyro.conf.arg(name="")] = field(default_factory=lambda: Machine(dtype="auto"))
    out: Path | None = None
    """JSON to write; by default evaluations/blimp.json in the run folder, or for a Hugging Face folder
    FOLDER.blimp.json here."""

    def run(self, console) -> None:
        """Judge, print, write.

        Raises:
            UserError: bad data or model.
        """
        require(self.limit_per_paradigm >= 0, f"limit_per_paradigm={self.limit_per_paradigm}", "use 0 or more")
        paradigms = read_blimp(self.data, self.limit_per_paradigm)
        model = load_masked(self.model)
        path = results.path_of(model, "blimp", self.out)
        keep_fuller(path, model, paradigms)
        self.machine.place(model.module)
        shown_progress = track(paradigms, "BLiMP", console=console, transient=True, disable=not console.is_terminal)
        scores = {paradigm.name: score(model, paradigm) for paradigm in shown_progress}
        shown = table(model, scores)
        shown.show(console)
        settings = {"limit_per_paradigm": self.limit_per_paradigm, "dtype": str(self.machine.resolve()[1])}
        paradigm_scores = {name: asdict(s) for name, s in scores.items()}
        result = {"kind": "blimp", "model": model.description(), "settings": settings, "paradigms": paradigm_scores}
        results.write(path, result, shown)
        results.announce(console, path, model, self.out)
