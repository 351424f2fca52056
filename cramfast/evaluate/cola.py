"""A page about CoLA: which sentences a fine-tuned model misjudges, by phenomenon or source, with BLiMP beside it.

Phenomena need annotations (Warstadt and Bowman, arXiv:1901.03438, published some for the development set); without
them sentences are grouped by the publication that they come from.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Annotated

import tyro

from cramfast.errors import UserError
from cramfast.evaluate import results
from cramfast.evaluate.blimp import ParadigmScore, by_category
from cramfast.evaluate.examples import HUB, column_of, find_file, read_glue, read_rows
from cramfast.evaluate.machine import Machine
from cramfast.evaluate.scores import accuracy, matthews
from cramfast.evaluate.tasks import TASKS
from cramfast.pages.page import document
from cramfast.runtime.arguments import program
from cramfast.runtime.jsonfile import read_json
from cramfast.session.record import EVALUATIONS, SCORES_REMEDY

HARDEST = 30  # sentences shown that every seed misjudged
PAGE_STYLE = """
.beside { display: grid; grid-template-columns: 3fr 2fr; gap: 2rem; align-items: start; }
.bar { background: var(--one); height: .7rem; border-radius: 2px; min-width: 1px; }
td.wide { width: 38%; } @media (max-width: 44rem) { .beside { grid-template-columns: 1fr; } }
"""


@dataclass(frozen=True)
class Group:
    """One group of development sentences.

    Attributes:
        sentences, acceptable: how many, and how many of them are labelled acceptable.
        accuracy, matthews: for each seed; `matthews` is empty where all labels are the same, which defines none.
    """

    name: str
    sentences: int
    acceptable: int
    accuracy: list[float]
    matthews: list[float]


def group(name: str, members: list[int], truth: list[int], seeds: list[list[int]]) -> Group:
    """Score the sentences with these numbers."""
    labels = [truth[i] for i in members]
    chosen = [[predicted[i] for i in members] for predicted in seeds]

    def scores(metric: Callable) -> list[float]:
        return [metric(labels, predicted) for predicted in chosen]

    defined = len(set(labels)) > 1
    return Group(name, len(members), sum(labels), scores(accuracy), scores(matthews) if defined else [])


def read_sources(path: Path) -> dict[str, list[int]]:
    """Sentence numbers by the publication they are quoted from: CoLA's first column."""
    members: dict[str, list[int]] = {}
    for number, cells in read_rows(path):
        members.setdefault(cells[0], []).append(number - 1)
    return members


def read_annotations(path: Path, sentences: list[str]) -> dict[str, list[int]]:
    """Sentence numbers by phenomenon.

    Args:
        path: tab-separated; its first line names a column `sentence` and, for each phenomenon, one of 0 and 1.
        sentences: of the development set.

    Raises:
        UserError: no such columns, a row of another length, none of the sentences in it.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file — give a tab-separated file, or leave out --annotations")
    rows = read_rows(path)
    header = [name.strip() for name in next(rows, (1, [""]))[1]]
    lowered = [name.lower() for name in header]
    place = column_of(path, lowered, "sentence")
    annotated: dict[str, list[str]] = {}
    for number, cells in rows:
        if len(cells) != len(header):
            raise UserError(
                f"{path}:{number}: {len(cells)} columns where the first line has {len(header)} — mend the line"
            )
        annotated[cells[place].strip()] = cells
    binary = [
        column
        for column, name in enumerate(lowered)
        if name not in ("sentence", "label") and all(cells[column] in ("0", "1") for cells in annotated.values())
    ]
    if not binary:
        raise UserError(f"{path}: no column of 0 and 1 — each phenomenon needs one")
    known = [i for i, sentence in enumerate(sentences) if sentence.strip() in annotated]
    if not known:
        raise UserError(f"{path}: holds none of the development sentences — is it of another split?")
    members = {
        header[column]: [i for i in known if annotated[sentences[i].strip()][column] == "1"] for column in binary
    }
    return {name: found for name, found in members.items() if found}


def table(groups: list[Group]) -> str:
    """An HTML table, one bar a row for the median Matthews correlation."""
    body = []
    for each in groups:
        if each.matthews:
            middle = 100 * statistics.median(each.matthews)
            low, high = 100 * min(each.matthews), 100 * max(each.matthews)
            figures = f"{middle:.1f} ({low:.1f} to {high:.1f})"
            bar = f'<div class="bar" style="width:{max(0.0, middle):.0f}%"></div>'
        else:
            figures, bar = "–", ""
        right = 100 * statistics.median(each.accuracy)
        cells = [
            escape(each.name),
            f"{each.sentences:,}",
            f"{100 * each.acceptable / each.sentences:.0f}",
            f"{right:.1f}",
        ]
        cells.append(figures)
        body.append(f"<tr>{''.join(f'<td class=n>{cell}</td>' for cell in cells)}<td class=wide>{bar}</td></tr>")
    names = ("group", "sentences", "acceptable, %", "accuracy, %", "Matthews × 100", "")
    return _html_table(names, body)


def _html_table(names: tuple[str, ...], body: list[str]) -> str:
    head = "".join(f"<th>{name}</th>" for name in names)
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def blimp_table(scores: dict[str, ParadigmScore]) -> str:
    """Accuracy by phenomenon as an HTML table with bars."""
    body = []
    for category, members in by_category(scores).items():
        mean = 100 * statistics.fmean(member.accuracy for member in members)
        bar = f'<div class="bar" style="width:{mean:.0f}%"></div>'
        body.append(f"<tr><td class=n>{escape(category)}</td><td class=n>{mean:.1f}</td><td class=wide>{bar}</td></tr>")
    return _html_table(("BLiMP phenomenon", "accuracy, %", ""), body)


def render(
    name: str, kind: str, groups: list[Group], blimp: dict[str, ParadigmScore], hardest: list[tuple[str, int]],
    seeds: int,
) -> str:  # fmt: skip
    """The page; nothing in it points outside it."""
    missing = "<p class=soft>No BLiMP scores in this run: python -m cramfast.evaluate blimp makes them.</p>"
    listed = "".join(
        f"<tr><td class=n>{'acceptable' if label else 'unacceptable'}</td><td>{escape(sentence)}</td></tr>"
        for sentence, label in hardest
    )
    parts = [
        f"<h1>CoLA by {kind}</h1>",
        f"<p class=soft>{escape(name)}, development set, {seeds} seeds. Matthews correlation: median (lowest to "
        "highest seed); – where every sentence of a group has the same label. A small group's figure is mostly "
        "noise.</p>",
        f'<div class="beside"><div><h2>CoLA</h2>{table(groups)}</div>',
        f"<div><h2>BLiMP</h2>{blimp_table(blimp) if blimp else missing}</div></div>",
        f"<h2>Misjudged by every seed</h2>\n{_html_table(('label', 'sentence'), [listed])}",
    ]
    return document(f"CoLA · {name}", parts, PAGE_STYLE)


@dataclass(frozen=True)
class Arguments:
    """Write cola.html about a run that `glue --tasks cola` has scored."""

    run_dir: tyro.conf.Positional[Path]
    """Run folder with evaluations/glue-cramming.json."""
    data: Path
    """The folder in GLUE's original layout that it was scored on, or one of the same sentences where that was hf:NAME,
    which is not read here."""
    annotations: Path | None = None
    """Tab-separated phenomena of the development sentences: a column `sentence` and columns of 0 and 1."""
    machine: Annotated[Machine, tyro.conf.arg(name="")] = field(default_factory=Machine)
    out: Path | None = None
    """HTML to write; by default cola.html in the run folder."""

    def run(self, console) -> None:
        """Group, score, write.

        Raises:
            UserError: no CoLA scores in the run, or of other data.
        """
        if str(self.data).startswith(HUB):
            raise UserError(f"--data {self.data}: not read here — give a folder that holds CoLA/dev.tsv")
        if not (self.run_dir / "config.json").exists() or (self.run_dir / "model.safetensors").exists():
            raise UserError(f"{self.run_dir}: no run folder — name the run that the model comes from")
        scored = self.run_dir / EVALUATIONS / "glue-cramming.json"
        stored = read_json(scored, SCORES_REMEDY)
        if "cola" not in stored.get("tasks", {}):
            glue = f"{program('evaluate')} glue {self.run_dir} --data {self.data} --tasks cola"
            raise UserError(f"{scored}: no CoLA scores — run {glue}")
        seeds = [list(map(int, predicted)) for predicted in stored["tasks"]["cola"]["predictions"]["cola"]]
        path = find_file(self.data / TASKS["cola"].folder / "dev")
        examples = read_glue(path, TASKS["cola"])
        sentences, truth = [text for (text,) in examples.texts], [int(label) for label in examples.labels]
        if len(truth) != len(seeds[0]):
            raise UserError(f"{path}: {len(truth)} sentences where {len(seeds[0])} were scored — give the same --data")
        if self.annotations:
            members, kind = read_annotations(self.annotations, sentences), "phenomenon"
        else:
            members, kind = read_sources(path), "source"
        groups = [group(name, found, truth, seeds) for name, found in members.items()]
        groups.sort(key=lambda each: -each.sentences)
        groups.insert(0, group("all", list(range(len(truth))), truth, seeds))
        blimp = {
            name: ParadigmScore(**entry)
            for name, entry in read_json(self.run_dir / EVALUATIONS / "blimp.json").get("paradigms", {}).items()
        }
        wrong = [i for i, label in enumerate(truth) if all(predicted[i] != label for predicted in seeds)]
        hardest = [(sentences[i], truth[i]) for i in wrong[:HARDEST]]
        page = render(stored["model"]["name"], kind, groups, blimp, hardest, len(seeds))
        target = self.out or self.run_dir / "cola.html"
        results.write_text(target, page)
        console.print(f"written: {target}", markup=False, highlight=False, soft_wrap=True)
