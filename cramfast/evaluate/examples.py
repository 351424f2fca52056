"""Labelled texts from GLUE's tab-separated files, own files or the `datasets` package; nothing odd gets through."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cramfast.corpus import COMPRESSIONS, read_lines
from cramfast.errors import UserError
from cramfast.evaluate.tasks import Split, Task


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

    `read_label` raises ValueError with the reason when a cell is no label.
    """

    count: int
    texts: tuple[int, ...]
    label: int
    read_label: Callable[[str], float]


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
    """(line number, cells) of a tab-separated file; quotes are ordinary characters."""
    for number, line in read_lines(path):
        yield number, line.rstrip("\r\n").split("\t")


def read_tsv(path: Path, rows: Iterator[tuple[int, list[str]]], columns: Columns, skip_malformed: bool) -> Examples:
    """The examples in what is left of a file's rows.

    Args:
        path: for messages.
        rows: from `read_rows`, the header taken off.
        skip_malformed: count rows that cannot be used instead of refusing them.

    Raises:
        UserError: a row with missing cells, without text or with an unknown label, named by file and line; no rows.
    """
    texts, labels, left_out = [], [], 0
    for number, cells in rows:
        try:
            text, label = _example(cells, columns)
        except ValueError as error:
            if not skip_malformed:
                raise UserError(f"{path}:{number}: {error} — mend the row, or use --skip-malformed") from None
            left_out += 1
            continue
        texts.append(text)
        labels.append(label)
    if not texts:
        raise UserError(f"{path}: holds no examples — fetch the file again")
    return Examples(texts, labels, left_out)


def _example(cells: list[str], columns: Columns) -> tuple[tuple[str, ...], float]:
    if len(cells) != columns.count:
        raise ValueError(f"{len(cells)} columns where {columns.count} are expected")
    text = tuple(cells[place] for place in columns.texts)
    if not any(part.strip() for part in text):
        raise ValueError("no text")
    return text, columns.read_label(cells[columns.label])


def column_of(path: Path, header: list[str], name: str) -> int:
    """The number of a column.

    Raises:
        UserError: the header does not name it.
    """
    if name not in header:
        raise UserError(
            f"{path}:1: no column {name!r} (there: {', '.join(header)}) — the first line must name the columns"
        )
    return header.index(name)


def read_glue(path: Path, task: Task, skip_malformed: bool = False) -> Examples:
    """One file of a GLUE task in its original layout.

    Raises:
        UserError: as `read_tsv`, or a header without the task's columns.
    """
    rows = read_rows(path)
    if not task.header:
        columns = Columns(4, task.texts, task.label, label_reader(task))  # CoLA: source, label, mark, sentence
        return read_tsv(path, rows, columns, skip_malformed)
    header = next(rows, (1, [""]))[1]
    texts = tuple(column_of(path, header, name) for name in task.texts)
    columns = Columns(len(header), texts, column_of(path, header, task.label), label_reader(task))
    return read_tsv(path, rows, columns, skip_malformed)


def load_glue(task: Task, data: Path | None, skip_malformed: bool) -> tuple[Examples, list[Examples]]:
    """The training set and every development set of a task.

    Args:
        data: a folder in the original layout; None asks the `datasets` package.

    Raises:
        UserError: something is missing or malformed.
    """
    if data is None:
        return from_datasets(task, "train"), [from_datasets(task, split.hf_split) for split in task.dev]
    train = read_glue(find_file(data / task.folder / "train"), task, skip_malformed)
    dev_folder = data / (task.dev_folder or task.folder)
    return train, [read_glue(find_file(dev_folder / split.file), task, skip_malformed) for split in task.dev]


def from_datasets(task: Task, split: str) -> Examples:
    """One split from the Hugging Face hub.

    Raises:
        UserError: the package is missing, the hub did not answer, the task is no official one.
    """
    if not task.official:
        raise UserError(f"task {task.name}: only in a folder of yours — give it with --data")
    try:
        import datasets
    except ImportError:
        raise UserError("GLUE without --data needs the datasets package — pip install 'cramfast[hf]'") from None
    try:
        rows = datasets.load_dataset("nyu-mll/glue", task.hf_name, split=split)
    except (OSError, ValueError) as error:  # no network, no such name; datasets' own errors derive from these
        raise UserError(f"nyu-mll/glue {task.hf_name} {split}: could not be opened ({error})") from None
    texts, labels = [], []
    for number, row in enumerate(rows):
        label = float(row["label"])
        if not (0 <= label < len(task.classes) if task.classes else task.lowest <= label <= task.highest):
            raise UserError(f"nyu-mll/glue {task.hf_name} {split}, row {number}: label {label:g} — is it a test set?")
        texts.append(tuple(row[name] for name in task.hf_texts))
        labels.append(label)
    return Examples(texts, labels)


def is_official(task: Task, train: Examples, dev: list[Examples]) -> bool:
    """Whether the rows are as many as the official ones; a part of the data must not pass for the whole."""
    expected = [task.train_rows, *(split.rows for split in task.dev)]
    return task.official and [len(part.labels) for part in (train, *dev)] == expected


def dev_name(task: Task, split: Split) -> str:
    """Name of a development set in the score table: mnli-m and mnli-mm, or the task's own."""
    return f"{task.name}{split.suffix}"
