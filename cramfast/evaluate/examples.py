"""Labelled texts from GLUE's tab-separated files, own files or the `datasets` package; nothing odd gets through."""

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cramfast.errors import UserError
from cramfast.evaluate.tasks import Split, Task
from cramfast.text.compressed import COMPRESSIONS
from cramfast.text.lines import LONGEST_PIECE, read_lines
from cramfast.text.tally import Tally

Row = TypeVar("Row")
HUB = "hf:"  # before the name of a dataset, where a folder could stand


@dataclass(frozen=True)
class Examples:
    """Attributes:
    texts: one or two strings for each example.
    labels: the number of the class, or the value to predict.
    left_out: malformed rows that were passed over on request.
    """

    texts: list[tuple[str, ...]]
    labels: list[float]
    left_out: int = 0


@dataclass(frozen=True)
class Columns:
    """Which cells of a row are texts and which is the label, and how a label is read; cells by number.

    `read_label` gets the label's cell without the blanks around it, and raises ValueError with the reason when that is
    no label.
    """

    count: int
    texts: tuple[int, ...]
    label: int
    read_label: Callable[[str], float]
    may_lack_one: bool = False
    """Whether one text of a pair may be missing."""


def same_label(cells: Iterable[str]) -> tuple[str, str] | None:
    """Two labels that people take for one and a classifier for two: 1 and 1.0, or a word in two cases or Unicode
    forms."""
    seen: dict[object, str] = {}
    for cell in sorted(set(cells)):
        try:
            value: object = float(cell)
        except ValueError:
            value = math.nan
        if value != value:  # a word, nan among them, which as a number would differ from itself
            value = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", cell).casefold())
        if value in seen:
            return seen[value], cell
        seen[value] = cell
    return None


def class_counts(classes: tuple[str, ...], examples: Examples) -> dict[str, int]:
    """How many examples each class has."""
    counts = Counter(examples.labels)
    return {name: counts[float(number)] for number, name in enumerate(classes)}


def class_reader(classes: tuple[str, ...]) -> Callable[[str], float]:
    """Reads a label that is one of `classes` as its number."""
    numbers = {name: float(number) for number, name in enumerate(classes)}

    def read(cell: str) -> float:
        if cell not in numbers:
            raise ValueError(f"label {cell!r} is none of {', '.join(classes)}")
        return numbers[cell]

    return read


def number_reader(lowest: float = -math.inf, highest: float = math.inf) -> Callable[[str], float]:
    """Reads a label that is a number of a range."""

    def read(cell: str) -> float:
        try:
            value = float(cell)
        except ValueError:
            raise ValueError(f"label {cell!r} is no number") from None
        if not lowest <= value <= highest or not math.isfinite(value):
            raise ValueError(f"label {cell!r} is outside {lowest:g} to {highest:g}")
        return value

    return read


def label_reader(task: Task) -> Callable[[str], float]:
    """What turns a label cell of the task into a number: class index or score; ValueError for any other."""
    return class_reader(task.classes) if task.classes else number_reader(task.lowest, task.highest)


def find_file(stem: Path) -> Path:
    """STEM.tsv, plain or compressed.

    Raises:
        UserError: none of them is there.
    """
    candidates = [stem.with_name(f"{stem.name}.tsv{ending}") for ending in ("", *COMPRESSIONS)]
    for path in candidates:
        if path.is_file():
            return path
    raise UserError(
        f"{candidates[0]}: no such file, nor with {', '.join(COMPRESSIONS)} — GLUE's layout is TASK/train.tsv"
    )


def read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of a tab-separated file; quotes are ordinary characters, and only \\n ends a row.

    Raises:
        UserError: a row longer than a piece of `read_lines`, whose parts must not pass for rows.
    """
    last = 0
    for number, line in read_lines(path, newline="\n"):
        if number == last:
            raise UserError(f"{path}:{number}: a row of more than {LONGEST_PIECE:,} characters — is it tab-separated?")
        last = number
        yield number, line.removesuffix("\n").removesuffix("\r").split("\t")


def read_tsv(path: Path, rows: Iterator[tuple[int, list[str]]], columns: Columns, tally: Tally) -> Examples:
    """The examples in what is left of a file's rows.

    Args:
        path: for messages.
        rows: from `read_rows`, the header taken off.
        tally: counts the rows that cannot be used, and refuses one more than may be left out.

    Raises:
        UserError: a row with missing cells, without text or with an unknown label, named by file and line; no rows.
    """
    placed = ((f"{path}:{number}", cells) for number, cells in rows)
    return _collected(str(path), placed, lambda cells: _example(cells, columns), tally)


def _collected(
    source: str, rows: Iterable[tuple[str, Row]], read: Callable[[Row], tuple[tuple[str, ...], float]], tally: Tally
) -> Examples:  # fmt: skip
    """The examples in (place, row) pairs.

    Args:
        source: file or dataset, for messages.
        read: (texts, label) of a row; a ValueError says why it is none.

    Raises:
        UserError: a row that is none, named by its place, and the tally leaves out no more; no examples.
    """
    texts, labels, before = [], [], tally.malformed
    for place, row in rows:
        try:
            text, label = read(row)
        except ValueError as error:
            tally.skip(f"{place}: {error}", "mend the row")
            continue
        texts.append(text)
        labels.append(label)
    if not texts:
        raise UserError(f"{source}: holds no examples — fetch it again")
    return Examples(texts, labels, tally.malformed - before)


def _example(cells: list[str], columns: Columns) -> tuple[tuple[str, ...], float]:
    if len(cells) != columns.count:
        raise ValueError(f"{len(cells)} columns where {columns.count} are expected")
    text = tuple(cells[place] for place in columns.texts)
    check_text(text, columns.may_lack_one)
    return text, columns.read_label(cells[columns.label].strip())


def check_text(parts: tuple[str, ...], may_lack_one: bool) -> None:
    """Raise ValueError unless each part, or where one may be missing any, holds more than blanks."""
    there = [bool(part.strip()) for part in parts]
    if not (any(there) if may_lack_one else all(there)):
        raise ValueError("no text" if not any(there) else "one of two texts is missing")


def column_of(path: Path, header: list[str], name: str) -> int:
    """The number of a column, whose name may have blanks around it.

    Raises:
        UserError: the header does not name it, or names it twice.
    """
    header = [cell.strip() for cell in header]
    if header.count(name) > 1:
        raise UserError(f"{path}:1: {header.count(name)} columns {name!r} — give each a name of its own")
    if name not in header:
        raise UserError(
            f"{path}:1: no column {name!r} (there: {', '.join(header)}) — the first line must name the columns"
        )
    return header.index(name)


def read_glue(path: Path, task: Task, tally: Tally | None = None) -> Examples:
    """One file of a GLUE task in its original layout; without a tally no row may be left out.

    Raises:
        UserError: as `read_tsv`, or a header without the task's columns.
    """
    rows, tally = read_rows(path), tally or Tally()
    if not task.header:
        columns = Columns(4, task.texts, task.label, label_reader(task))  # CoLA: source, label, mark, sentence
        return read_tsv(path, rows, columns, tally)
    header = next(rows, (1, [""]))[1]
    texts = tuple(column_of(path, header, name) for name in task.texts)
    label = column_of(path, header, task.label)
    columns = Columns(len(header), texts, label, label_reader(task), task.may_lack_one)
    return read_tsv(path, rows, columns, tally)


def load_glue(task: Task, data: Path | str, tally: Tally) -> tuple[Examples, list[Examples]]:
    """The training set and every development set of a task.

    Args:
        data: a folder in the original layout, or hf:NAME for what the `datasets` package finds under that name.
        tally: as in `read_tsv`, one for all that a command reads.

    Raises:
        UserError: something is missing or malformed.
    """
    if str(data).startswith(HUB):
        name = str(data).removeprefix(HUB)
        train = from_datasets(name, task, "train", tally)
        return train, [from_datasets(name, task, split.hf_split, tally) for split in task.dev]
    folder = Path(data)
    train = read_glue(find_file(folder / task.folder / "train"), task, tally)
    dev_folder = folder / (task.dev_folder or task.folder)
    return train, [read_glue(find_file(dev_folder / split.file), task, tally) for split in task.dev]


def from_datasets(name: str, task: Task, split: str, tally: Tally) -> Examples:
    """One split of a dataset with the columns of nyu-mll/glue.

    Args:
        name: on the Hugging Face hub, or the folder of a clone of it.

    Raises:
        UserError: the package is missing, the hub did not answer, the task is no official one, another dataset's
            columns or labels, a row without text or label.
    """
    if not task.official:
        raise UserError(f"task {task.name}: only in a folder of yours — give it with --data")
    try:
        import datasets
    except ImportError:
        raise UserError(f"--data {HUB}{name} needs the datasets package — pip install 'cramfast[hf]'") from None
    where = f"{name} {task.hf_name} {split}"
    try:
        rows = datasets.load_dataset(name, task.hf_name, split=split)
    except Exception as error:  # of datasets, the hub's client, its HTTP library: they share no other base class
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where}: could not be opened ({reason}) — give a folder of GLUE files with --data") from None
    if missing := [column for column in (*task.hf_texts, "label") if column not in rows.column_names]:
        there = ", ".join(rows.column_names)
        raise UserError(f"{where}: no column {missing[0]!r} (there: {there}) — is it GLUE?")
    names = getattr(rows.features["label"], "names", None)  # of a ClassLabel; the numbers mean nothing else
    if task.classes and names is not None and tuple(names) != (task.hf_classes or task.classes):
        raise UserError(
            f"{where}: labels {', '.join(names)}, not {', '.join(task.hf_classes or task.classes)} — is it GLUE?"
        )
    placed = ((f"{where}, row {number}", row) for number, row in enumerate(rows))
    return _collected(where, placed, lambda row: _hub_example(row, task), tally)


def _hub_example(row: dict, task: Task) -> tuple[tuple[str, ...], float]:
    text, label = tuple(row[column] for column in task.hf_texts), row["label"]
    if not all(isinstance(part, str) for part in text):
        raise ValueError("no text")
    check_text(text, task.may_lack_one)
    lowest, highest = (0, len(task.classes) - 1) if task.classes else (task.lowest, task.highest)
    if label is None or not lowest <= label <= highest:  # also true of NaN, and of the -1 of test sets
        raise ValueError(f"label {label} is outside {lowest:g} to {highest:g}")
    return text, float(label)


def is_official(task: Task, train: Examples, dev: list[Examples]) -> bool:
    """Whether the rows are as many as the official ones; a part of the data must not pass for the whole."""
    expected = [task.train_rows, *(split.rows for split in task.dev)]
    return task.official and [len(part.labels) for part in (train, *dev)] == expected


def dev_name(task: Task, split: Split) -> str:
    """Name of a development set in the score table: mnli-m and mnli-mm, or the task's own."""
    return f"{task.name}{split.suffix}"
