"""docs/results.md from real runs: the figures of the run folders, drawn again from results.json alone."""

import json
import os
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from tiny_run import make_run, tiny_config

from bench import runs
from cramfast.errors import UserError

SCRIPT = Path(runs.__file__).resolve().parent.parent / "scripts" / "real_run.sh"


def trained(folder, recipe, text="a", scored=True):
    """A run folder as training and evaluation leave it."""
    make_run(folder, tiny_config())
    config = json.loads((folder / "config.json").read_text()) | {"recipe": recipe, "preset": "mini"}
    (folder / "config.json").write_text(json.dumps(config))
    manifest = json.loads((folder / "manifest.json").read_text())
    curation = {"duplicates": "near", "max_tokens_per_char": 0.3, "similarity": 0.8, "dropped": {"near": 2}}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"files": {"train.ids": text}, "curation": curation}))
    if scored:
        (folder / "evaluations").mkdir()
        paradigms = {f"p{i}": {"accuracy": i / 4, "pairs": 1000} for i in range(4)}
        tasks = {
            "cola": {"metric": "matthews", "remark": "", "scores": {"cola": [0.1, 0.3, 0.2]}},
            "wnli": {"metric": "accuracy", "remark": "unofficial (3 rows)", "scores": {"wnli": [0.5]}},
        }
        for name, result in (("blimp", {"paradigms": paradigms}), ("glue-cramming", {"tasks": tasks})):
            table = {"title": name, "columns": [], "rows": [], "notes": []}
            (folder / "evaluations" / f"{name}.json").write_text(json.dumps(result | {"table": table}))
    return folder


def written(monkeypatch, out, *words):
    monkeypatch.setattr("sys.argv", ["runs", "--out", str(out), *map(str, words)])
    runs.main()
    return {name: (out / name).read_text() for name in (runs.JSON, runs.PAGE, runs.PICTURE)}


def test_the_page_holds_the_figures_and_comes_out_again_from_the_json(tmp_path, monkeypatch):
    commands = tmp_path / "commands.txt"
    commands.write_text("python -m cramfast.train --budget 45m\n")
    folders = [trained(tmp_path / "a", "crammed"), trained(tmp_path / "b", "cramfast", scored=False)]
    made = written(monkeypatch, tmp_path / "docs", *folders, "--commands", commands)
    page = made[runs.PAGE]
    row = next(line for line in page.splitlines() if line.startswith("| crammed"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "crammed", "mini", "123 k", "8,192", "2 B", "1 s", f"{100 * 2e9 / 1.859e18:.2g} %", "5.250",
        "37.5 (4,000 pairs)", "20.0 (10.0–30.0)", "–", "–", "–", "–",
    ]  # fmt: skip
    assert "- crammed, wnli (accuracy): 50.0 (50.0–50.0), unofficial (3 rows)" in page
    assert "Curation: duplicates near, max_tokens_per_char 0.3." in page and "train --budget 45m" in page
    assert "a CPU" in page and "do not compare" in page and runs.PICTURE in page
    assert str(tmp_path) not in "".join(made.values())
    root = ElementTree.fromstring(made[runs.PICTURE])
    said = " ".join("".join(node.itertext()) for node in root.iter() if node.tag.endswith("text"))
    assert "training FLOPs" in said and "crammed" in said and "A4000 day: 1.84" in said
    for name in (runs.PAGE, runs.PICTURE):
        (tmp_path / "docs" / name).unlink()
    assert written(monkeypatch, tmp_path / "docs") == made


def test_runs_that_do_not_belong_together(tmp_path, monkeypatch):
    one, other = trained(tmp_path / "a", "crammed"), trained(tmp_path / "b", "cramfast", text="b")
    with pytest.raises(UserError, match="b: another text than a"):
        written(monkeypatch, tmp_path / "docs", one, other)
    same = trained(tmp_path / "c", "cramfast")
    config = json.loads((same / "config.json").read_text())
    (same / "config.json").write_text(json.dumps(config | {"masking": "all_mask"}))
    with pytest.raises(UserError, match=r"c: trained with --masking all_mask, a with bert, .* perplexity"):
        written(monkeypatch, tmp_path / "docs", one, same)
    with pytest.raises(UserError, match=r"results\.json: no results there"):
        written(monkeypatch, tmp_path / "docs")
    lines = [line for line in (one / "metrics.jsonl").read_text().splitlines() if "heldout" not in line]
    (one / "metrics.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match="without a held-out loss"):
        written(monkeypatch, tmp_path / "docs", one)


def test_long_curves_keep_their_ends():
    rows = [{"step": step} for step in range(1000)]
    kept = runs.thinned(rows)
    assert len(kept) <= runs.CURVE_POINTS + 1 and kept[0] == rows[0] and kept[-1] == rows[-1]
    assert runs.thinned(rows[:3]) == rows[:3]


@pytest.fixture
def pretended(tmp_path):
    """A python that notes how it was called, fails on request and answers what the script asks of it."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\n[[ $1 == -c ]] && {{ echo 8192; exit; }}\necho "$*" >>{tmp_path}/calls\n'
        f'[[ "$*" != *"$(cat {tmp_path}/broken 2>/dev/null || echo none)"* ]]\n'
    )
    python.chmod(0o755)
    corpus, glue, blimp = (tmp_path / "data" / name for name in ("corpus", "glue", "blimp"))
    for folder in (corpus, glue / "RTE", blimp):
        folder.mkdir(parents=True)
    for name in ("small.txt.xz", "wiki.txt.xz", "README.md", "BOOKS.txt"):
        (corpus / name).touch()
    (blimp / "blimp.jsonl.xz").touch()

    def run(*words, **settings):
        (tmp_path / "calls").write_text("")
        environment = os.environ | {"PYTHON": str(python), "TASKS": "cola rte", "JOBS": "1"} | settings
        done = subprocess.run([SCRIPT, *words], env=environment, cwd=tmp_path, capture_output=True, text=True)
        run.said = done.stderr
        return done.returncode, (tmp_path / "calls").read_text().splitlines()

    return run


def test_the_script_goes_on_where_it_was_cut_off(tmp_path, pretended):
    (tmp_path / "broken").write_text("--tasks rte")
    rc, calls = pretended("data/corpus", "out")
    assert rc == 1 and not any("bench.runs" in call for call in calls)
    prepare = (
        f"-m cramfast.prepare --data {tmp_path}/data/corpus/wiki.txt.xz --out {tmp_path}/out/text --vocab-size 8192"
    )
    assert calls[0].startswith(prepare)
    trained = [call for call in calls if "cramfast.train" in call]
    assert [call.split("--recipe ")[1].split()[0] for call in trained] == ["crammed", "cramfast"]
    assert all("--budget 45m" in call and "--seed 0" in call and "--resume auto" in call for call in trained)
    (tmp_path / "broken").unlink()
    rc, calls = pretended("data/corpus", "out")
    assert rc == 0 and not any(
        stage in call for call in calls for stage in ("prepare", "cramfast.train", "--tasks cola")
    )
    assert "-m bench.runs" in calls[-1] and sum("--tasks rte" in call for call in calls) == 2
    commands = (tmp_path / "out" / "commands.txt").read_text()
    assert commands.splitlines()[0].startswith("python -m cramfast.prepare --data CORPUS/wiki.txt.xz --out OUT/text")
    assert str(tmp_path) not in commands and commands.count("\n") == 1 + 2 * (1 + 1 + 2)
    assert [call for call in pretended("data/corpus", "out")[1] if "bench.runs" not in call] == []


def test_the_script_does_not_mix_results_of_two_settings(pretended):
    assert pretended("data/corpus", "out")[0] == 0
    for settings, before, now in (
        ({"BUDGET": "20m"}, "crammed-train was made with '--budget 45m'", "not '--budget 20m'"),
        ({"SEED": "1", "PRESET": "tiny"}, "'--preset mini --seed 0'", "not '--preset tiny --seed 1'"),
        ({"SEEDS": "1"}, "crammed-cola was made with '--seeds 3'", "not '--seeds 1'"),
        ({"SETTINGS": "--lr 1"}, "crammed-train was made with ''", "not '--lr 1'"),
    ):
        assert pretended("data/corpus", "out", **settings) == (2, [])
        assert before in pretended.said and now in pretended.said and pretended.said.count("\n") == 1
    assert pretended("data/corpus", "out", JOBS="2")[0] == 0  # the number of threads changes no result


def test_the_script_refuses_other_settings_before_it_trains_the_rest(tmp_path, pretended):
    (tmp_path / "broken").write_text("--recipe cramfast")
    assert pretended("data/corpus", "out")[0] == 1
    (tmp_path / "broken").unlink()
    assert pretended("data/corpus", "out", SEEDS="1") == (2, [])
    assert pretended("data/corpus", "out", RECIPES="cramfast crammed", SEEDS="1") == (2, [])
    assert pretended("data/corpus", "out")[0] == 0


@pytest.mark.parametrize(
    ("corpus", "settings", "said"),
    [
        ("data/corpsu", {}, "CORPUS data/corpsu does not exist"),
        ("data/glue", {}, "no .xz file there"),
        ("data/corpus", {"GLUE": "gleu"}, "set GLUE= to where"),
        ("data/corpus", {"BLIMP": "blimp.xz"}, "set BLIMP= to the file"),
    ],
)
def test_the_script_says_what_is_missing_before_it_makes_anything(tmp_path, pretended, corpus, settings, said):
    assert pretended(corpus, "out", **settings) == (2, [])
    assert said in pretended.said and pretended.said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_the_script_says_that_python_has_no_torch(tmp_path, pretended):
    bare, error = tmp_path / "bare", "ModuleNotFoundError: No module named 'torch'"
    bare.write_text(f'#!/bin/bash\nprintf "Traceback:\\n{error}\\n" >&2; exit 1\n')
    bare.chmod(0o755)
    assert pretended("data/corpus", "out", PYTHON=str(bare)) == (2, [])
    remedy = "set PYTHON= to one that has cramfast, or pip install -e . with it"
    assert pretended.said == f"error: PYTHON={bare}: {error} — {remedy}\n" and not (tmp_path / "out").exists()
