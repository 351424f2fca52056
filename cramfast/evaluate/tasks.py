"""GLUE as data: where each task's columns are, what its labels are called, and which number it is scored by.

Source: Wang et al., arXiv:1804.07461; metrics as Geiping and Goldstein, arXiv:2212.14034, report them.
"""

from dataclasses import dataclass, replace

from cramfast.errors import UserError

# Folders of a task's data that are not the official split; their scores are nobody else's.
UNOFFICIAL = ("lite", "nqg")


@dataclass(frozen=True)
class Split:
    """One development set: its file without ending, its name in the `datasets` package, rows of the official one."""

    file: str
    hf_split: str
    rows: int
    suffix: str = ""
    """Added to the task's name in tables."""


@dataclass(frozen=True)
class Task:
    """Attributes:
    name: on the command line.
    folder: in the original layout.
    texts: one or two columns, by their names in the header; by number where a file has none.
    label: the column of the label, likewise.
    classes: the labels in the order of their numbers in `datasets`; empty for regression.
    metric: a key of scores.METRICS.
    train_rows: of the official training set.
    dev: development sets, each of which gives one score.
    hf_name, hf_texts: configuration and columns in the `datasets` package (nyu-mll/glue).
    hf_classes: names of the classes there; empty where they are those of `classes`.
    lowest, highest: range of a regression label.
    dev_folder: where the development set is, if not in `folder`.
    official: False for a part or a stand-in of the task's data.
    may_lack_one: whether rows with one text of a pair missing belong to the official data.
    """

    name: str
    folder: str
    texts: tuple[str, ...] | tuple[int, ...]
    label: str | int
    classes: tuple[str, ...]
    metric: str
    train_rows: int
    dev: tuple[Split, ...]
    hf_name: str
    hf_texts: tuple[str, ...]
    hf_classes: tuple[str, ...] = ()
    lowest: float = 0.0
    highest: float = 0.0
    dev_folder: str | None = None
    official: bool = True
    may_lack_one: bool = False

    @property
    def header(self) -> bool:
        """Whether the first line names the columns; only CoLA has none."""
        return isinstance(self.label, str)


def dev(rows: int) -> tuple[Split, ...]:
    """The one development set that most tasks have, of so many official rows."""
    return (Split("dev", "validation", rows),)


PAIR = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
MNLI_DEV = (
    Split("dev_matched", "validation_matched", 9815, "-m"),
    Split("dev_mismatched", "validation_mismatched", 9832, "-mm"),
)
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "cola", "CoLA", (3,), 1, ("0", "1"), "matthews", 8551,
            dev(1043), "cola", ("sentence",), ("unacceptable", "acceptable"),
        ),
        Task(
            "sst-2", "SST-2", ("sentence",), "label", ("0", "1"), "accuracy", 67349,
            dev(872), "sst2", ("sentence",), ("negative", "positive"),
        ),
        Task(
            "mrpc", "MRPC", ("#1 String", "#2 String"), "Quality", ("0", "1"), "f1", 3668,
            dev(408), "mrpc", PAIR, ("not_equivalent", "equivalent"),
        ),
        Task("sts-b", "STS-B", PAIR, "score", (), "pearson", 5749, dev(1500), "stsb", PAIR, highest=5.0),
        Task(
            "qqp", "QQP", ("question1", "question2"), "is_duplicate", ("0", "1"), "f1", 363846, dev(40430), "qqp",
            ("question1", "question2"), ("not_duplicate", "duplicate"), may_lack_one=True,
        ),
        Task(
            "mnli", "MNLI", PAIR, "gold_label", ("entailment", "neutral", "contradiction"), "accuracy", 392702,
            MNLI_DEV, "mnli", ("premise", "hypothesis"),
        ),
        Task(
            "qnli", "QNLI", ("question", "sentence"), "label", ENTAILMENT, "accuracy", 104743, dev(5463), "qnli",
            ("question", "sentence"),
        ),
        Task("rte", "RTE", PAIR, "label", ENTAILMENT, "accuracy", 2490, dev(277), "rte", PAIR),
    )
}  # fmt: skip
NUMBERS = sum(len(task.dev) for task in TASKS.values())  # nine: MNLI counts twice, WNLI is left out
ALIASES = {"sst2": "sst-2", "stsb": "sts-b"}


def find_task(name: str) -> Task:
    """The task of that name; NAME-lite and NAME-nqg are its stand-ins with data from a folder so called.

    Raises:
        UserError: no such task.
    """
    name = ALIASES.get(name.lower(), name.lower())
    if name in TASKS:
        return TASKS[name]
    base, _, suffix = name.rpartition("-")
    if suffix not in UNOFFICIAL or base not in TASKS:
        raise UserError(f"task {name!r} does not exist — choose from {', '.join(TASKS)}, or add -lite or -nqg to one")
    task = TASKS[base]
    if suffix == "nqg":  # a training set alone, made to be scored on the official development set
        return replace(task, name=name, folder=f"{task.folder}-{suffix}", dev_folder=task.folder, official=False)
    rows = task.dev[0].rows
    return replace(task, name=name, folder=f"{task.folder}-{suffix}", dev=dev(rows), official=False)
