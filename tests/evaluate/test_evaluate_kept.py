"""Where scores go: two evaluations do not overwrite each other, a cut-off one goes on, what was measured is kept."""

import json
import math
from pathlib import Path

import pytest
from test_evaluate import command, pairs_file, write_glue
from tiny_run import SENTENCES, make_run, tiny_config

from cramfast.errors import UserError
from cramfast.evaluate import blimp, checkpoints, examples, glue, jobs, owntask, perplexity
from cramfast.evaluate.finetune import Protocol
from cramfast.evaluate.tasks import TASKS
from cramfast.export import export

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("file", "name"),
    [("mood.tsv", "mood"), ("mood.tsv.xz", "mood"), ("mood/train.tsv", "mood"), ("mood/train.tsv.gz", "mood"),
     ("train.tsv", "here"), ("/train.tsv", "train")],
)  # fmt: skip
def test_names_of_own_tasks(tmp_path, monkeypatch, file, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert owntask.default_name(Path(file)) == name


def test_own_tasks_lie_beside_each_other(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "run", tiny_config())
    rows = "text\tlabel\n" + "".join(f"{SENTENCES[i]}\t{i % 2}\n" for i in range(8))
    for task in ("mood", "topic"):
        (tmp_path / task).mkdir()
        for part in ("train", "dev"):
            (tmp_path / task / f"{part}.tsv").write_text(rows)

    def evaluate(task, *words):
        files = (tmp_path / task / "train.tsv", tmp_path / task / "dev.tsv")
        common = ("--metric", "accuracy", "--seeds", 1, "--epochs", 1, "--threads", 1, "--dtype", "float32")
        command(monkeypatch, capsys, "task", run, "--task-file", *files, *common, *words)

    evaluate("mood")
    evaluate("topic")
    evaluate("topic", "--name", "short")
    written = {path.stem: json.loads(path.read_text())["tasks"] for path in (run / "evaluations").iterdir()}
    assert {stem: list(tasks) for stem, tasks in written.items()} == {
        f"task-{name}": [name] for name in ("mood", "topic", "short")
    }
    for name in ("", "a/b"):
        with pytest.raises(UserError, match=f"name='{name}' is not possible"):
            evaluate("mood", "--name", name)


def test_scores_of_two_exports_lie_beside_each_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pairs = pairs_file(tmp_path / "b.jsonl")
    for parent in ("a", "b"):
        export(make_run(tmp_path / parent, tiny_config()), tmp_path / parent / "hf", check=False)
        command(monkeypatch, capsys, "blimp", f"{parent}/hf", "--data", pairs, "--threads", 1)
    models = {path.name: json.loads(path.read_text())["model"]["name"] for path in tmp_path.glob("*.json")}
    assert models == {"a-hf.blimp.json": "a/hf", "b-hf.blimp.json": "b/hf"}


@pytest.mark.parametrize(("seeds", "cut"), [(3, 4), (2, 4), (1, 2)])
def test_a_cut_off_evaluation_goes_on(tmp_path, monkeypatch, capsys, seeds, cut):
    """From the fit of two tasks in which it was cut off; what comes out is what an evaluation in one go gives."""
    run, data = make_run(tmp_path / "run", tiny_config()), write_glue(tmp_path / "glue")
    common = ("--data", data, "--tasks", "cola", "rte", "--seeds", seeds, "--threads", 1, "--dtype", "float32")
    command(monkeypatch, capsys, "glue", run, *common, "--out", tmp_path / "whole.json")
    plain, fits = jobs.fit, []

    def cut_off(*args):
        fits.append(args)
        if len(fits) == cut:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(jobs, "fit", cut_off)
    with pytest.raises(KeyboardInterrupt):
        command(monkeypatch, capsys, "glue", run, *common, "--out", tmp_path / "cut.json")
    command(monkeypatch, capsys, "glue", run, *common, "--out", tmp_path / "cut.json")
    assert len(fits) == 2 * seeds + 1
    whole, cut = (json.loads((tmp_path / name).read_text())["tasks"] for name in ("whole.json", "cut.json"))
    for entry in (*whole.values(), *cut.values()):
        entry.pop("seconds")
    assert whole == cut
    command(monkeypatch, capsys, "glue", run, *common, "--out", tmp_path / "cut.json")
    assert len(fits) == 4 * seeds + 1  # a finished one is made anew


def test_scores_of_other_tasks_stay(tmp_path, monkeypatch, capsys):
    """Under the same protocol with any number of seeds; of another protocol or precision they go, and not unsaid."""
    run, data, out = make_run(tmp_path / "run", tiny_config()), write_glue(tmp_path / "glue"), tmp_path / "glue.json"

    def evaluate(task, seeds, dtype="float32"):
        words = ("--data", data, "--tasks", task, "--seeds", seeds, "--threads", 1, "--dtype", dtype, "--out", out)
        return command(monkeypatch, capsys, "glue", run, *words)

    def stored():
        return json.loads(out.read_text())

    evaluate("cola", 2)
    cola = stored()["tasks"]["cola"]
    out.write_text(json.dumps(stored() | {"settings": stored()["settings"] | {"seeds": 2}}))  # once noted
    said = evaluate("rte", 1)
    assert "puts aside" not in said and "The tasks have unequal numbers of seeds." in said
    assert stored()["tasks"]["cola"] == cola and stored()["tasks"]["rte"]["seeds"] == [0]
    said = evaluate("rte", 2)
    assert "unequal" not in said and "seed 1:" in said and "seed 0:" not in said
    said = evaluate("rte", 1, "bfloat16")
    note = "puts aside the scores of cola, rte (dtype=torch.float32, now torch.bfloat16) — another --out keeps them"
    assert said.count(note) == 1 and said.index(note) < said.index("seed 0") and set(stored()["tasks"]) == {"rte"}
    out.write_text(json.dumps(stored() | {"settings": stored()["settings"] | {"epochs": 9}}))
    assert "scores of rte (epochs=9, now 5)" in evaluate("cola", 1, "bfloat16")
    assert set(stored()["tasks"]) == {"cola"}


def test_fewer_seeds_do_not_replace_more(tmp_path, monkeypatch, capsys):
    run, data, out = make_run(tmp_path / "run", tiny_config()), write_glue(tmp_path / "glue"), tmp_path / "glue.json"
    words = ("glue", run, "--data", data, "--tasks", "rte", "--threads", 1, "--dtype", "float32", "--out", out)
    command(monkeypatch, capsys, *words, "--seeds", 2)
    before = out.read_text()
    with pytest.raises(UserError, match=r"glue\.json: has 2 seeds of rte, which 1 would replace — ask for more"):
        command(monkeypatch, capsys, *words, "--seeds", 1)
    assert out.read_text() == before


def test_a_look_at_some_pairs_does_not_replace_all(tmp_path, monkeypatch, capsys):
    run, pairs = make_run(tmp_path / "run", tiny_config()), pairs_file(tmp_path / "b.jsonl")
    words = ("blimp", run, "--data", pairs, "--threads", 1)
    command(monkeypatch, capsys, *words, "--limit-per-paradigm", 1)
    command(monkeypatch, capsys, *words)  # more pairs may
    before = (run / "evaluations" / "blimp.json").read_text()
    with pytest.raises(UserError, match=r"blimp\.json: holds scores on 3 pairs, these are 2 — .*--out"):
        command(monkeypatch, capsys, *words, "--limit-per-paradigm", 1)
    assert (run / "evaluations" / "blimp.json").read_text() == before
    command(monkeypatch, capsys, *words)  # and as many again


@pytest.mark.parametrize("kind", ["blimp", "glue", "perplexity", "task"])
def test_a_folder_for_the_result_is_refused_before_any_work(tmp_path, monkeypatch, capsys, kind):
    run, pairs = make_run(tmp_path / "run", tiny_config()), pairs_file(tmp_path / "b.jsonl")
    files = [tmp_path / f"{part}.tsv" for part in ("train", "dev")]
    text = tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES))
    for file in files:
        file.write_text("text\tlabel\n" + "".join(f"{SENTENCES[i]}\t{i % 2}\n" for i in range(8)))
    words = {
        "blimp": ("--data", pairs),
        "glue": ("--data", write_glue(tmp_path / "glue"), "--tasks", "rte"),
        "perplexity": ("--data", text),
        "task": ("--task-file", *files, "--metric", "accuracy"),
    }[kind]
    for module, work in ((jobs, "fit"), (blimp, "score"), (perplexity, "measure")):
        monkeypatch.setattr(module, work, None)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"--out .*out: a folder — name a file"):
        command(monkeypatch, capsys, kind, run, *words, "--threads", 1, "--out", tmp_path / "out")


def test_a_damaged_result_may_be_removed(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "run", tiny_config())
    (run / "evaluations").mkdir()
    (run / "evaluations" / "blimp.json").write_text("{")
    with pytest.raises(UserError, match=r"blimp\.json: not readable as JSON .* — remove the file and evaluate again"):
        command(monkeypatch, capsys, "blimp", run, "--data", pairs_file(tmp_path / "b.jsonl"), "--threads", 1)


def test_a_mean_of_some_tasks_is_called_partial(tmp_path):
    model = checkpoints.load(make_run(tmp_path / "run", tiny_config()))

    def shown(*names):
        tasks = [TASKS[name] for name in names]
        entries = {
            task.name: {
                "metric": task.metric, "remark": "", "left_out_rows": 0, "seeds": [0, 1, 2],
                "scores": {examples.dev_name(task, split): [0.5, 0.6, 0.7] for split in task.dev},
            }
            for task in tasks
        }  # fmt: skip
        entries[names[0]]["seeds"] = [0]
        return glue.glue_table(model, "cramming", entries, Protocol())

    some, every = shown("cola", "mnli"), shown(*TASKS)
    assert some.rows[-1][:3] == ["partial mean, 3 of the 9 numbers", "", "60.00"]
    assert every.rows[-1][0] == "mean of the 9 numbers" and "The tasks have unequal numbers of seeds." in every.notes


def test_a_seed_without_finite_predictions_is_said_and_left_out(tmp_path):
    labels = examples.Examples([("light",), ("sound",), ("time",)], [0.0, 1.0, 2.0])
    model = checkpoints.load(make_run(tmp_path / "run", tiny_config()))
    job = jobs.make_job(model, Protocol(), "own", (), "pearson", labels, {"own": labels}, "own task")
    assert job.score([0.0, 1.0, 2.0], [1.0, 2.0, 3.0]) == pytest.approx(1)
    assert math.isnan(job.score([0.0, 1.0, 2.0], [1.0, math.nan, 3.0]))
    entry = {"metric": "pearson", "remark": "own task", "left_out_rows": 0, "scores": {"own": [0.5, None, 0.7]}}
    (row,) = jobs.table_rows({"own": entry})
    assert row == [
        "own", "pearson", "60.00", "50.00", "70.00", "14.14", "2", "own task, 1 more seed without a finite prediction"
    ]  # fmt: skip
    (row,) = jobs.table_rows({"own": entry | {"scores": {"own": [None]}}})
    assert row[2:7] == ["–", "–", "–", "–", "0"]
