"""Made-up implementations, each wrong in one way, are found out in the child and demoted with the right line."""

import os
import time
from dataclasses import replace

import made_up
import psutil
import pytest
from fake_loader import small_config

from cramfast.qualify import candidates
from cramfast.qualify.regime import regime_of
from cramfast.qualify.trial import Trial
from cramfast.qualify.verdict import decide

CONFIG = small_config(model=replace(small_config().model, max_len=192), sequence_len=160)
STAGE_S = 8.0


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """(trial, its verdicts, seconds) of all of them in turn; three children, as one aborts and one hangs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("MADE_UP", ",".join(made_up.MADE_UP))
        patch.setattr(made_up, "CANDIDATES", {"attention": tuple(made_up.MADE_UP)})
        made_up.install(patch.setattr)
        shown, regime = [], regime_of(CONFIG, tokens=512, masked=64)
        tasks = [task for task in candidates.tasks(CONFIG) if task.op in ("attention", "glu")]
        began = time.monotonic()
        before = children()
        with Trial(CONFIG, tasks, regime, 300, lambda *stage: shown.append(stage), (), STAGE_S, 30) as trial:
            verdicts = trial.operators()
        assert children() == before, "a child is left"
        yield trial, verdicts, shown, time.monotonic() - began


WORDS = {
    "one_row": "failed dqkv at length 129 (",
    "aborts": "crashed (SIGABRT) in edges",
    "hangs": "hung: no answer within 8 s in edges",
    "raises": "failed: no such luck",
    "leaves_nan": "left NaN in out in rows of no sequence",
    "outside": "wrote outside its scratch of shape (",
    "unsteady": "gave two results of ",
    "into_input": "wrote into its input qkv",
    "remembers": "when replayed on new inputs",
}


@pytest.mark.parametrize("name", WORDS)
def test_each_is_demoted_with_its_line(tried, name):
    trial, _, _, _ = tried
    assert WORDS[name] in trial.problems["attention"][name]
    (task,) = (task for task in trial.tasks if task.op == "attention")
    verdict = decide(replace(task, tried=(name,)), {name: trial.problems["attention"][name]}, {})
    assert verdict.line.startswith(f"attention reference: {name} {trial.problems['attention'][name]}")


def test_what_is_right_but_slow_stays_behind(tried):
    trial, _, _, _ = tried
    (task,) = (task for task in trial.tasks if task.op == "attention")
    seconds = trial.times["attention"]
    assert trial.problems["attention"]["slow"] == "" and seconds["slow"] > 5 * seconds["reference"]
    verdict = decide(replace(task, tried=("slow",)), {"slow": ""}, seconds)
    assert not verdict.replaces_floor and "slow is right, but 0." in verdict.line


def test_what_is_right_and_faster_is_taken(tried):
    trial, verdicts, _, _ = tried
    attention = next(verdict for verdict in verdicts if verdict.op == "attention")
    assert trial.problems["attention"]["right"] == ""
    assert attention.implementation == "right" and attention.replaces_floor
    today = time.strftime("%Y-%m-%d")
    assert attention.line.startswith(f"attention right: qualified on this card {today}, ")
    assert "x reference; " in attention.line and "one_row failed dqkv at length 129" in attention.line


def test_an_operator_without_candidates_keeps_the_floor(tried):
    glu = next(verdict for verdict in tried[1] if verdict.op == "glu")
    assert glu.line == "glu reference: stock PyTorch; nothing else can run here"


def test_progress_is_shown(tried):
    stages = [(stage, total) for stage, _, total in tried[2]]
    assert set(stages) == {("qualifying attention", len(made_up.MADE_UP))}
    done = [done for _, done, _ in tried[2]]
    assert done == sorted(done) and done[-1] == len(made_up.MADE_UP)


def test_a_margin_of_five_percent_is_needed():
    task = candidates.Task("glu", False, "stock", ("cpp",))
    near = decide(task, {"cpp": ""}, {"stock": 1.04, "cpp": 1.0})
    assert near.line == "glu stock: cpp is right, but 1.04x as fast"
    assert decide(task, {"cpp": ""}, {"stock": 1.06, "cpp": 1.0}).implementation == "cpp"


def test_what_the_time_did_not_reach_stays_on_the_floor_and_says_so(monkeypatch):
    made_up.install(monkeypatch.setattr)
    monkeypatch.setenv("MADE_UP", "hangs")
    monkeypatch.setattr(made_up, "CANDIDATES", {"attention": ("hangs",)})
    tasks = [task for task in candidates.tasks(CONFIG) if task.op == "attention"]
    before = children()
    with Trial(CONFIG, tasks, regime_of(CONFIG, 256, 64), 1.0, lambda *stage: None) as trial:
        (verdict,) = trial.operators()
    assert children() == before
    assert verdict.line.startswith("attention reference: hangs was not tried: the 1 s were up; ")


def test_the_child_dies_with_its_parent():
    """A killed parent leaves no child: it is started by a process that is killed at once."""
    code = (
        "import time\nfrom cramfast.qualify.process import Child\n"
        "child = Child(0, time.monotonic() + 60)\n"
        "try:\n    list(child.ask('nothing'))\nexcept Exception:\n    pass\n"
        "child = Child(0, time.monotonic() + 60)\nprint(child.process.pid, flush=True)\ntime.sleep(60)"
    )
    import subprocess
    import sys

    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ)
    pid = int(parent.stdout.readline())
    time.sleep(1.0)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "the child outlives its parent"
        time.sleep(0.1)
