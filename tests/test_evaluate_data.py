"""The rows of GLUE, BLiMP and scores, without a model: layouts, faults named by line, what counts as official."""

import os
from pathlib import Path

import pytest

from cramfast.errors import UserError
from cramfast.evaluate import blimp, examples, scores
from cramfast.evaluate.tasks import NUMBERS, TASKS, find_task

DATA = Path(os.environ.get("CRAMFAST_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no such folder: {DATA} (CRAMFAST_TEST_DATA names it)")

ROWS = {
    "cola": 'gj04\t1\t\tThe sailors rode the breeze.\ngj04\t0\t*\tThey "made him to leave.\n',
    "mrpc": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\tone thing\tthe other\n0\t3\t4\ta\tb\n",
    "sts-b": "index\tsentence1\tsentence2\tscore\n0\ta man\ta woman\t2.500\n1\ta\tb\t5.0\n",
    "rte": "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n1\tc\td\tnot_entailment\n",
}


@pytest.mark.parametrize("name", ROWS)
def test_files_in_the_original_layout(tmp_path, name):
    (tmp_path / "train.tsv").write_text(ROWS[name])
    found = examples.read_glue(tmp_path / "train.tsv", TASKS[name])
    assert found.labels == {"cola": [1, 0], "mrpc": [1, 0], "sts-b": [2.5, 5], "rte": [0, 1]}[name]
    assert {len(text) for text in found.texts} == {1 if name == "cola" else 2}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("cola", "gj04\t2\t\tA sentence.", r"train\.tsv:3: label '2' is none of 0, 1"),
        ("cola", "gj04\t1\tA sentence.", "tsv:3: 3 columns where 4"),
        ("cola", "gj04\t1\t\t ", "tsv:3: no text"),
        ("sts-b", "9\ta\tb\t5.5", r"tsv:4: label '5\.5' is outside 0 to 5"),
        ("sts-b", "9\ta\tb\tnan", "tsv:4: label 'nan' is outside"),
        ("sts-b", "9\ta\tb\tgood", "tsv:4: label 'good' is no number"),
        ("rte", "9\ta\tb\tneutral", "tsv:4: label 'neutral'"),
        ("rte", "9\ta", "tsv:4: 2 columns where 4"),
    ],
)
def test_rows_that_are_refused(tmp_path, name, row, message):
    path = tmp_path / "train.tsv"
    path.write_text(ROWS[name] + row + "\n")
    with pytest.raises(UserError, match=message):
        examples.read_glue(path, TASKS[name])
    assert examples.read_glue(path, TASKS[name], skip_malformed=True).left_out == 1


def test_files_that_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"train\.tsv: no such file"):
        examples.load_glue(TASKS["rte"], tmp_path, False)
    path = tmp_path / "train.tsv"
    path.write_text("index\tsentence1\tlabel\n")
    with pytest.raises(UserError, match=r"train\.tsv:1: no column 'sentence2'"):
        examples.read_glue(path, TASKS["rte"])
    path.write_text("index\tsentence1\tsentence2\tlabel\n")
    with pytest.raises(UserError, match="holds no examples"):
        examples.read_glue(path, TASKS["rte"])


def test_stand_ins_are_never_official():
    assert NUMBERS == 9
    for name, folder, dev_folder in (("QNLI-nqg", "QNLI-nqg", "QNLI"), ("mnli-lite", "MNLI-lite", None)):
        task = find_task(name)
        assert (task.folder, task.dev_folder, task.official) == (folder, dev_folder, False)
    assert len(find_task("mnli-lite").dev) == 1 and find_task("SST2") is TASKS["sst-2"]
    with pytest.raises(UserError, match="does not exist"):
        find_task("rte-small")


def test_part_of_the_data_is_not_official():
    part = examples.Examples([("a",)], [0.0])
    whole = examples.Examples([("a",)] * 8551, [0.0] * 8551)
    dev = examples.Examples([("a",)] * 1043, [0.0] * 1043)
    assert examples.is_official(TASKS["cola"], whole, [dev])
    assert not examples.is_official(TASKS["cola"], whole, [part])


def test_scores():
    truth, guess = [1, 0, 1, 1, 0], [1, 0, 0, 1, 1]
    assert scores.accuracy(truth, guess) == 0.6
    assert scores.f1(truth, guess) == pytest.approx(2 / 3)
    assert scores.matthews(truth, guess) == pytest.approx(1 / 6)
    assert scores.f1([0, 1, 2], [0, 1, 1]) == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert scores.pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1) and scores.pearson([1, 2], [3, 3]) == 0
    assert scores.spearman([1, 2, 3], [1, 10, 11]) == pytest.approx(1)


# The real files


@needs_data
@pytest.mark.parametrize("name", ["cola", "sst-2", "mrpc", "sts-b", "rte"])
def test_whole_tasks_are_official(name):
    train, dev = examples.load_glue(TASKS[name], DATA / "glue", False)
    assert examples.is_official(TASKS[name], train, dev)


@needs_data
@pytest.mark.parametrize("name", ["mnli-lite", "qqp-lite", "qnli-lite", "qnli-nqg"])
def test_stand_ins_can_be_read(name):
    task = find_task(name)
    train, dev = examples.load_glue(task, DATA / "glue", False)
    assert not examples.is_official(task, train, dev) and len(dev) == 1
    assert set(train.labels) == set(dev[0].labels) == set(range(len(task.classes)))


@needs_data
def test_whole_blimp():
    paradigms = blimp.read_blimp(DATA / "blimp" / "blimp.jsonl.xz")
    assert [len(p.pairs) for p in paradigms] == [blimp.PAIRS] * blimp.PARADIGMS
