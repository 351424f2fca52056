"""GLUE through the `datasets` package, from a folder that is laid out as nyu-mll/glue on the hub; faults are named."""

import sys

import pytest

from cramfast.errors import UserError
from cramfast.evaluate import examples
from cramfast.evaluate.tasks import TASKS, find_task
from cramfast.text.tally import Tally

datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")

PAIRS = {"sentence1": ["a man", "a"], "sentence2": ["a woman", "b"]}
LABELS = {
    "cola": ["unacceptable", "acceptable"],
    "sst2": ["negative", "positive"],
    "mrpc": ["not_equivalent", "equivalent"],
    "qqp": ["not_duplicate", "duplicate"],
    "mnli": ["entailment", "neutral", "contradiction"],
    "qnli": ["entailment", "not_entailment"],
    "rte": ["entailment", "not_entailment"],
}
COLUMNS = {
    "cola": {"sentence": ["One.", "Two."]},
    "sst2": {"sentence": ["fine", "poor"]},
    "mrpc": PAIRS,
    "stsb": PAIRS,
    "qqp": {"question1": ["who?", "why?"], "question2": ["what?", "how?"]},
    "mnli": {"premise": ["light", "sound"], "hypothesis": ["dark", "silence"]},
    "qnli": {"question": ["who?", "why?"], "sentence": ["he", "she"]},
    "rte": PAIRS,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def write(folder, config, splits=("train", "validation"), labels=(1, 0), names=None, **columns):
    """One configuration as parquet files, and the card that says where they are."""
    columns = (columns or COLUMNS[config]) | {"idx": [0, 1]}
    kinds = {name: datasets.Value("int32" if name == "idx" else "string") for name in columns}
    names = names or LABELS.get(config)
    kinds["label"] = datasets.ClassLabel(names=names) if names else datasets.Value("float32")
    rows = datasets.Dataset.from_dict(columns | {"label": list(labels)}, datasets.Features(kinds))
    (folder / config).mkdir(parents=True)
    lines = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    for split in splits:
        rows.to_parquet(str(folder / config / f"{split}-00000-of-00001.parquet"))
        lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return f"hf:{folder}"


@pytest.mark.parametrize("name", TASKS)
def test_every_task(tmp_path, name):
    task = TASKS[name]
    values = (4.5, 0.0) if name == "sts-b" else (1, 0)
    data = write(tmp_path / "glue", task.hf_name, ("train", *(split.hf_split for split in task.dev)), values)
    train, dev = examples.load_glue(task, data, Tally())
    assert train.labels == list(values) and len(dev) == len(task.dev) and dev[-1] == train
    assert train.texts == list(zip(*COLUMNS[task.hf_name].values(), strict=True))
    assert not examples.is_official(task, train, dev)


def test_labels_mean_the_same_as_in_the_files(tmp_path):
    """Class 1 of the hub is the class that the original files call so."""
    original = {
        "cola": "gj04\t1\t\tOne.\ngj04\t0\t*\tTwo.\n",
        "rte": "index\tsentence1\tsentence2\tlabel\n0\ta man\ta woman\tnot_entailment\n1\ta\tb\tentailment\n",
    }
    for name, text in original.items():
        (tmp_path / f"{name}.tsv").write_text(text)
        data = write(tmp_path / name, name)
        assert examples.load_glue(TASKS[name], data, Tally())[0] == examples.read_glue(
            tmp_path / f"{name}.tsv", TASKS[name]
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ["acceptable", "unacceptable"]}, "labels acceptable, unacceptable, not unacceptable, acceptable"),
        ({"labels": [1, -1]}, "cola train, row 1: label -1 is outside 0 to 1"),
        ({"labels": [1, None]}, "row 1: label None is outside"),
        ({"sentence": ["One.", None]}, "row 1: no text"),
        ({"sentence": [" ", "Two."]}, "row 0: no text"),
        ({"text": ["One.", "Two."]}, r"no column 'sentence' \(there: text, idx, label\)"),
        ({"splits": ["train"]}, "cola validation: could not be opened .*--data"),
    ],
    ids=str,
)
def test_faults_are_named(tmp_path, changes, message):
    data = write(tmp_path / "glue", "cola", **changes)
    with pytest.raises(UserError, match=message) as raised:
        examples.load_glue(TASKS["cola"], data, Tally())
    assert "\n" not in str(raised.value)


def test_malformed_rows_are_left_out_on_request(tmp_path):
    data = write(tmp_path / "glue", "cola", labels=[1, -1])
    train, _ = examples.load_glue(TASKS["cola"], data, Tally(1))
    assert (train.labels, train.left_out) == ([1.0], 1)


def test_what_cannot_be_opened(tmp_path, monkeypatch):
    data = write(tmp_path / "glue", "cola")
    with pytest.raises(UserError, match=r"rte train: could not be opened .*'rte'"):
        examples.load_glue(TASKS["rte"], data, Tally())
    (tmp_path / "glue" / "cola" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match="cola train: could not be opened"):
        examples.load_glue(TASKS["cola"], data, Tally())
    with pytest.raises(UserError, match="only in a folder of yours"):
        examples.load_glue(find_task("mnli-lite"), data, Tally())

    def unreachable(*args, **kwargs):
        raise RuntimeError("Couldn't reach the Hub\n(no network)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        UserError, match=r"^nyu-mll/glue rte train: could not be opened \(Couldn't reach the Hub \(no net"
    ):
        examples.load_glue(TASKS["rte"], "hf:nyu-mll/glue", Tally())
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UserError, match=r"--data hf:nyu-mll/glue needs the datasets package — pip install 'cramfast\[hf\]'"
    ):
        examples.load_glue(TASKS["rte"], "hf:nyu-mll/glue", Tally())
