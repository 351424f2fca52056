"""The rows of GLUE, BLiMP and scores, without a model: layouts, faults named by line, what counts as official."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import tyro

from cramfast.errors import UserError
from cramfast.evaluate import blimp, cola, examples, glue, owntask, scores
from cramfast.evaluate.__main__ import COMMANDS
from cramfast.evaluate.finetune import Protocol
from cramfast.evaluate.tasks import NUMBERS, TASKS, find_task
from cramfast.hf.modelcard import with_scores
from cramfast.pages.scoretable import ScoreTable
from cramfast.text.tally import Tally

DATA = Path(os.environ.get("CRAMFAST_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
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
    assert examples.read_glue(path, TASKS[name], Tally(1)).left_out == 1


def test_files_that_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"train\.tsv: no such file"):
        examples.load_glue(TASKS["rte"], tmp_path, Tally())
    path = tmp_path / "train.tsv"
    path.write_text("index\tsentence1\tlabel\n")
    with pytest.raises(UserError, match=r"train\.tsv:1: no column 'sentence2'"):
        examples.read_glue(path, TASKS["rte"])
    path.write_text("index\tsentence1\tsentence2\tlabel\n")
    with pytest.raises(UserError, match="holds no examples"):
        examples.read_glue(path, TASKS["rte"])


def test_as_many_rows_are_left_out_as_a_command_may(tmp_path):
    """Of all its files together, as in cramfast.prepare."""
    train, dev = "text\tmood\na\tpos\nb\tneg\nc\n", "text\tmood\na\tneg\nb\n"
    for most in (0, 1):
        with pytest.raises(UserError, match=r"(train\.tsv:4|dev\.tsv:3): 1 columns where 2 .* — mend the row; --skip-"):
            own_pair(tmp_path, train, dev, skip=most)
    found, other, _ = own_pair(tmp_path, train, dev, skip=2)
    assert (found.left_out, other.left_out) == (1, 1)


@pytest.mark.parametrize("name", ["glue", "task"])
def test_the_rows_that_may_be_left_out_are_a_number(name, capsys):
    words = ["model", "--skip-malformed", "3"]
    words += ["--task-file", "a.tsv", "b.tsv", "--metric", "f1"] if name == "task" else ["--tasks", "rte"]
    arguments = tyro.cli(COMMANDS[name], args=words)
    assert arguments.skip_malformed == 3
    with pytest.raises(UserError, match="skip_malformed=-1 is not possible"):
        replace(arguments, skip_malformed=-1).run(None)
    with pytest.raises(SystemExit):
        tyro.cli(COMMANDS[name], args=[word for word in words if word != "3"])
    assert "--skip-malformed" in capsys.readouterr().err


def test_a_pair_needs_both_its_texts_but_where_the_official_data_lack_one(tmp_path):
    rte, qqp = tmp_path / "rte.tsv", tmp_path / "qqp.tsv"
    rte.write_text("index\tsentence1\tsentence2\tlabel\n1\tone\ttwo\tentailment\n2\tone\t \tentailment\n")
    with pytest.raises(UserError, match=r"rte\.tsv:3: one of two texts is missing — mend the row"):
        examples.read_glue(rte, TASKS["rte"])
    assert examples.read_glue(rte, TASKS["rte"], Tally(1)).left_out == 1
    qqp.write_text("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t1\t2\t\ttwo\t0\n")
    assert examples.read_glue(qqp, TASKS["qqp"]).texts == [("", "two")]
    assert examples.read_glue(qqp, find_task("qqp-lite")).labels == [0.0]


def own_pair(folder, train: str, dev: str, skip: int = 0):
    (folder / "train.tsv").write_bytes(train.encode())
    (folder / "dev.tsv").write_bytes(dev.encode())
    return owntask.read_pair(folder / "train.tsv", folder / "dev.tsv", (), "mood", False, Tally(skip))


def test_blanks_around_labels_and_names_make_no_class(tmp_path):
    rows = " text\tmood \na\tpos\nb\t pos\nc\tneg \nd\tneg\r\n"
    train, dev, classes = own_pair(tmp_path, rows, rows)
    assert classes == ("neg", "pos") and train.labels == dev.labels == [1, 1, 0, 0]
    assert examples.class_counts(classes, train) == {"neg": 2, "pos": 2}


def test_the_texts_of_a_pair_go_by_name_not_by_place(tmp_path):
    rows = "premise\thypothesis\tmood\nA\tB\tpos\nC\tD\tneg\n"
    for other in ("hypothesis\tpremise\tmood\nb\ta\tpos\n", "mood\thypothesis \t premise\npos\tb\ta\n", rows.lower()):
        train, dev, _ = own_pair(tmp_path, rows, other)
        assert train.texts[0] == ("A", "B") and dev.texts[0] == ("a", "b")


@pytest.mark.parametrize("header", ["premise\tclaim", "Premise\thypothesis", "premise\tpremise", "premise"])
def test_text_columns_of_other_names_are_refused(tmp_path, header):
    rows, other = "premise\thypothesis\tmood\nA\tB\tpos\nC\tD\tneg\n", f"{header}\tmood\na\tb\tpos\n"
    names = header.replace("\t", ", ")
    with pytest.raises(UserError, match=rf"dev\.tsv:1: text columns {names}, but premise, hypothesis in .*--text"):
        own_pair(tmp_path, rows, other)


ALIKE = [
    ("1", "1.0"),
    ("caf\u00e9", "cafe\u0301"),
    ("ﬁne", "fine"),
    ("nan", "NaN"),
    ("Pos", "pos"),
    ("É", "é"),
    ("inf", "Infinity"),
]


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_labels_that_look_alike_are_refused(tmp_path, one, other):
    rows = "text\tmood\n" + "".join(f"a{i}\t{(one, other, 'x')[i % 3]}\n" for i in range(9))
    with pytest.raises(UserError, match=r"train\.tsv: labels .* look like one class — write one of them only"):
        own_pair(tmp_path, rows, rows)


def test_a_class_may_be_called_nan(tmp_path):
    rows = "text\tmood\na\tnan\nb\tpos\nc\tnan\nd\tpos\n"
    assert own_pair(tmp_path, rows, rows)[2] == ("nan", "pos")


def test_a_lone_carriage_return_ends_no_row(tmp_path):
    rows = "text\tmood\none\rtwo\tpos\nthree\tneg\nfour\tneg\nfive\tpos\n"
    train, _, _ = own_pair(tmp_path, rows, rows, skip=1)
    assert train.texts[0] == ("one\rtwo",) and (len(train.texts), train.left_out) == (4, 0)


def test_a_row_beyond_a_piece_is_refused_not_split(tmp_path, monkeypatch):
    monkeypatch.setattr("cramfast.text.lines.LONGEST_PIECE", 20)
    rows = "text\tmood\n" + "a\tpos\nb\tneg\nword word\tpos word\tpos\n"
    with pytest.raises(UserError, match=r"train\.tsv:4: a row of more than"):
        own_pair(tmp_path, rows, rows, skip=1)


def test_own_files_that_are_refused(tmp_path):
    train, dev = tmp_path / "train.tsv", tmp_path / "dev.tsv"
    rows = "text\tmood\n" + "".join(f"a{i}\t{('calm', 'wild')[i % 2]}\n" for i in range(6))
    dev.write_text(rows)

    def read(text=(), skip=0):
        return owntask.read_pair(train, dev, text, "mood", False, Tally(skip))

    train.write_text(rows + "a b\t\n")
    with pytest.raises(UserError, match=r"train\.tsv:8: label '' is none of calm, wild"):
        read()
    found, _, classes = read(skip=1)
    assert (found.left_out, classes) == (1, ("calm", "wild"))
    train.write_text(rows.replace("text\tmood", "text\ttext\tmood", 1))
    with pytest.raises(UserError, match=r"train\.tsv:1: 2 columns 'text' — give each a name of its own"):
        read(text=("text",))
    with pytest.raises(UserError, match="--text mood: the column of the label"):
        read(text=("mood",))


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
    assert scores.f1(truth, guess, positive=0) == pytest.approx(1 / 2)
    assert scores.f1([0, 1, 2], [0, 1, 1], positive=None) == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert scores.f1([0, 1, 1], [0, 1, 0], positive=None) == pytest.approx((2 / 3 + 2 / 3) / 2)  # of three, two occur
    assert scores.pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1) and scores.pearson([1, 2], [3, 3]) == 0
    assert scores.spearman([1, 2, 3], [1, 10, 11]) == pytest.approx(1)


# The real files


@needs_data
@pytest.mark.parametrize("name", ["cola", "sst-2", "mrpc", "sts-b", "rte"])
def test_whole_tasks_are_official(name):
    train, dev = examples.load_glue(TASKS[name], DATA / "glue", Tally())
    assert examples.is_official(TASKS[name], train, dev)


@needs_data
@pytest.mark.parametrize("name", ["mnli-lite", "qqp-lite", "qnli-lite", "qnli-nqg"])
def test_stand_ins_can_be_read(name):
    task = find_task(name)
    train, dev = examples.load_glue(task, DATA / "glue", Tally())
    assert not examples.is_official(task, train, dev) and len(dev) == 1
    assert set(train.labels) == set(dev[0].labels) == set(range(len(task.classes)))


@needs_data
def test_whole_blimp():
    paradigms = blimp.read_blimp(DATA / "blimp" / "blimp.jsonl.xz")
    assert [len(p.pairs) for p in paradigms] == [blimp.PAIRS] * blimp.PARADIGMS


def test_the_mean_needs_all_nine():
    def entry(rows, remark=""):
        return {
            "metric": "f1",
            "remark": remark,
            "left_out_rows": 0,
            "seeds": [0, 1, 2],
            "scores": {row: [0.5, 0.7, 0.9] for row in rows},
        }

    class Named:
        name = "m"

    whole = {name: entry([examples.dev_name(t, split) for split in t.dev]) for name, t in TASKS.items()}
    table = glue.glue_table(Named, "cramming", whole, Protocol())
    assert table.rows[0] == ["cola", "f1", "70.00", "50.00", "90.00", "20.00", "3", "official"]
    assert table.rows[-1][:3] == ["mean of the 9 numbers", "", "70.00"] and len(table.notes) == 1
    table = glue.glue_table(Named, "cramming", {**whole, "qqp": entry(["qqp"], "unofficial (3 rows)")}, Protocol())
    assert table.rows[-1][0] == "partial mean, 8 of the 9 numbers"
    assert not any(
        "mean" in row[0] for row in glue.glue_table(Named, "cramming", {"a": entry(["a"], "own")}, Protocol()).rows
    )


def test_cola_by_annotation(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("sentence\tlabel\tquestion\tlong\nOne.\t1\t1\t0\nTwo.\t0\t1\t0\nElse.\t1\t1\t1\n")
    members = cola.read_annotations(path, ["One.", "Two.", "Three."])
    assert members == {"question": [0, 1]}
    found = cola.group("question", [0, 1], [1, 0, 1], [[1, 0, 0], [1, 1, 0]])
    assert found.accuracy == [1.0, 0.5] and found.matthews == [1.0, 0.0]
    assert cola.group("one", [0], [1, 0], [[1, 0]]).matthews == []
    path.write_text("sentence\tquestion\nOne.\tyes\n")
    with pytest.raises(UserError, match="no column of 0 and 1"):
        cola.read_annotations(path, ["One."])


def test_scores_in_a_card_are_replaced():
    table = ScoreTable("T", ["a|b", "c"], [["x", "1"]], ["note"])
    text = "# m\n\n## Figures\n\n## Data\n\nrows\n"
    once = with_scores(text, [table])
    assert "| a\\|b | c |" in once and with_scores(once, [table]) == once
    assert with_scores(once, []) == text
    assert with_scores("# m\n", [table]).startswith("# m\n\n## Scores\n")
