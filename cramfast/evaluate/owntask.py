"""A task of your own: python -m cramfast.evaluate task MODEL --task-file train.tsv dev.tsv --metric accuracy."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cramfast.config import require
from cramfast.errors import UserError, note
from cramfast.evaluate import jobs, results
from cramfast.evaluate.checkpoints import load
from cramfast.evaluate.examples import (
    Columns,
    Examples,
    class_reader,
    column_of,
    number_reader,
    read_rows,
    read_tsv,
    same_label,
)
from cramfast.evaluate.finetune import Protocol
from cramfast.evaluate.machine import Machine
from cramfast.evaluate.scores import REGRESSION
from cramfast.pages.scoretable import ScoreTable
from cramfast.text.tally import Tally


def find_columns(path: Path, header: list[str], text: tuple[str, ...], label: str) -> tuple[tuple[int, ...], int]:
    """(numbers of the one or two text columns, number of the label column).

    Raises:
        UserError: the header does not name them, or does not say which of several columns are texts; the label is
            one of them.
    """
    place = column_of(path, header, label)
    if label in text:
        raise UserError(f"--text {label}: the column of the label — name others, or another --label")
    texts = tuple(column_of(path, header, name) for name in text)
    texts = texts or tuple(number for number in range(len(header)) if number != place)
    if not 1 <= len(texts) <= 2:
        raise UserError(f"{path}:1: {len(texts)} columns beside the label — name one or two with --text")
    return texts, place


def in_order(
    path: Path, header: list[str], texts: tuple[int, ...], train: Path, named: tuple[str, ...]
) -> tuple[int, ...]:
    """The text columns of a development file in the order in which the training file names them.

    Raises:
        UserError: it names others.
    """
    names = [header[number].strip() for number in texts]
    if sorted(names) != sorted(named):
        raise UserError(
            f"{path}:1: text columns {', '.join(names)}, but {', '.join(named)} in {train} — name them alike, or "
            "choose with --text"
        )
    return tuple(sorted(texts, key=lambda number: named.index(header[number].strip())))


def find_classes(path: Path, label: int) -> tuple[str, ...]:
    """The labels of a training file without blanks around them, sorted; no label is found when the rows are read.

    Raises:
        UserError: a single one, nearly as many as there are rows, or two that look alike.
    """
    rows = (row for number, row in read_rows(path) if number > 1 and len(row) > label)
    cells = [cell for row in rows if (cell := row[label].strip())]
    classes = tuple(sorted(set(cells)))
    if alike := same_label(classes):
        raise UserError(f"{path}: labels {alike[0]!r} and {alike[1]!r} look like one class — write one of them only")
    if len(classes) < 2:
        raise UserError(f"{path}: {len(classes)} different labels — a classifier needs two or more")
    if len(classes) > max(2, len(cells) // 2):
        raise UserError(
            f"{path}: {len(classes)} different labels in {len(cells)} rows — "
            "for numbers use --metric pearson or spearman"
        )
    return classes


def read_pair(
    train: Path, dev: Path, text: tuple[str, ...], label: str, regression: bool, tally: Tally
) -> tuple[Examples, Examples, tuple[str, ...]]:
    """(training set, development set, classes); a row whose label the training file lacks is malformed.

    Raises:
        UserError: named by file and line.
    """
    classes: tuple[str, ...] = ()
    found, named = [], ()
    for path in (train, dev):
        if not path.is_file():
            raise UserError(f"{path}: no such file — --task-file takes a training and a development file")
        rows = read_rows(path)
        header = next(rows, (1, [""]))[1]
        texts, place = find_columns(path, header, text, label)
        named = named or tuple(header[number].strip() for number in texts)
        texts = in_order(path, header, texts, train, named)
        if not regression and not classes:
            classes = find_classes(path, place)
        reader = number_reader() if regression else class_reader(classes)
        found.append(read_tsv(path, rows, Columns(len(header), texts, place, reader), tally))
    return found[0], found[1], classes


def default_name(train: Path) -> str:
    """What a task is called: as its training file without endings, or as the folder of one that is called train."""
    stem = train.name.split(".")[0]
    return stem if stem != "train" else train.resolve().parent.name or stem


@dataclass(frozen=True)
class Arguments:
    """Fine-tune on tab-separated files of yours and score the second.

    The first line of each file names its columns; quotes are ordinary characters.
    """

    model: tyro.conf.Positional[Path]
    """Run folder, or a Hugging Face ModernBERT folder."""
    task_file: tuple[Path, Path]
    """Training and development file, plain or compressed."""
    metric: Literal["accuracy", "f1", "matthews", "pearson", "spearman"]
    """pearson and spearman: regression, the label is a number; f1: of --positive where there are two classes, else the
    mean over all."""
    positive: str | None = None
    """The label whose F1 is meant, of two; by default the second in sorted order. Table and JSON name it."""
    name: str | None = None
    """What tables and files call the task, whose earlier scores are overwritten; by default as the training file, or as
    its folder where the file is called train."""
    text: tuple[str, ...] = ()
    """One or two text columns; by default all but the label's, in the order of the training file."""
    label: str = "label"
    """Column of the label."""
    seeds: int = 3
    """Fits, with seeds 0, 1, ..."""
    protocol: Annotated[Protocol, tyro.conf.arg(name="")] = field(default_factory=Protocol)
    skip_malformed: int = 0
    """Rows that may be left out where they cannot be used, of both files together; one more is an error."""
    machine: Annotated[Machine, tyro.conf.arg(name="")] = field(default_factory=lambda: Machine(dtype="auto"))
    out: Path | None = None
    """JSON to write; by default evaluations/task-NAME.json in the run folder, or for a Hugging Face folder
    FOLDER.task-NAME.json here."""

    def run(self, console) -> None:
        """Fine-tune, print, write.

        Raises:
            UserError: bad data or model.
        """
        require(self.seeds >= 1, f"seeds={self.seeds}", "use 1 or more")
        require(self.skip_malformed >= 0, f"skip_malformed={self.skip_malformed}", "use 0 or more")
        name = default_name(self.task_file[0]) if self.name is None else self.name
        require(name != "" and "/" not in name, f"name={name!r}", "use a --name without slashes")
        regression, tally = self.metric in REGRESSION, Tally(self.skip_malformed)
        train, dev, classes = read_pair(*self.task_file, self.text, self.label, regression, tally)
        for line in tally.notes():
            note(line)
        model = load(self.model)
        path = results.path_of(model, f"task-{name}", self.out)
        protocol = self.protocol.at(model.encoder.config.max_len)
        require(
            self.positive is None or (self.metric == "f1" and len(classes) == 2 and self.positive in classes),
            f"positive={self.positive!r}", f"give it with --metric f1 and one of two labels ({', '.join(classes)})",
        )  # fmt: skip
        positive = classes.index(self.positive) if self.positive is not None else 1
        job = jobs.make_job(model, protocol, name, classes, self.metric, train, {name: dev}, "own task", positive)
        for line in job.class_lines():
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        device, dtype = self.machine.resolve()
        stored: dict[str, dict] = {}
        for seed in range(self.seeds):
            jobs.run(job, model.encoder, protocol, seed, device, dtype, console, stored)
        shown = ScoreTable(f"Own task {name}: {model.name}", jobs.COLUMNS, jobs.table_rows(stored), protocol.notes())
        shown.show(console)
        settings = {"files": [file.name for file in self.task_file], "classes": classes, "dtype": str(dtype)}
        result = {"kind": "task", "model": model.description(), "settings": settings | asdict(protocol)}
        results.write(path, result | {"tasks": stored}, shown)
        results.announce(console, path, model, self.out)
