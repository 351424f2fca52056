"""Where a run's kernels come from: a trial once, the cache, the run's own record; and what leaves it out."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import made_up
import pytest
import torch
from fake_loader import small_config

from cramfast import commandline, doctor, stages
from cramfast.config import to_json
from cramfast.errors import UserError
from cramfast.kernels import dispatch
from cramfast.qualify import cache, candidates, regime, resolve
from cramfast.qualify.regime import regime_of
from cramfast.qualify.trial import Trial
from cramfast.qualify.verdict import Verdict, as_flags, in_force, settle
from cramfast.runtime.distributed import ALONE
from cramfast.session import kernelchoice

HERE = Path(__file__).resolve().parent
CARD = {"card": "RTX 2080 Ti", "capability": "sm_75", "driver": "550.1"}


class FakeTrial:
    """Finds what `chosen` says right and fast, and says in `tried` what it was asked; the child is another test's.

    Where `open`, something was not tried; `whole` is what a whole microbatch shows: nothing, a failure, or None where
    none was compared.
    """

    chosen, open, whole, tried, compared = "right", False, "", [], []

    def __init__(self, config, tasks, regime, seconds, show, known=()):
        self.tasks, self.known = tasks, known

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def operators(self):
        if self.known and not any(verdict.open for verdict in self.known):
            return list(self.known)
        self.tried.append([task.op for task in self.tasks])
        return [self.verdict(task) for task in self.tasks]

    def verdict(self, task):
        if task.op != "attention" or self.chosen == task.floor:
            return Verdict(
                task.op, task.windowed, task.floor, task.floor, "right failed dqkv", {"right": "failed dqkv"}
            )
        return Verdict(task.op, task.windowed, task.floor, self.chosen, "qualified", {self.chosen: ""}, open=self.open)

    def microbatch(self, verdicts, prepared):
        self.compared.append(prepared)
        if self.whole is None:
            return [verdict.on_floor("not compared") for verdict in verdicts], False
        return [verdict.failed(self.whole) if self.whole else verdict for verdict in verdicts], True


@pytest.fixture(autouse=True)
def card(monkeypatch, tmp_path):
    made_up.install(monkeypatch.setattr)
    monkeypatch.setattr(made_up, "CANDIDATES", {"attention": ("right", "slow")})
    monkeypatch.setattr(resolve, "Trial", FakeTrial)
    monkeypatch.setattr(cache, "card", lambda device: dict(CARD))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    FakeTrial.chosen, FakeTrial.open, FakeTrial.whole = "right", False, ""
    FakeTrial.tried[:], FakeTrial.compared[:] = [], []
    yield
    dispatch.override("all", "auto")
    settle([], "cpu", torch.float32)


def resolved(folder: Path, config=None, followed=None) -> dispatch.Choice:
    folder.mkdir(exist_ok=True)
    resolve.resolve(config or small_config(), folder, folder, followed)
    return dispatch.choose("attention", "cpu", torch.float32)


def test_a_first_run_pays_and_later_ones_do_not(tmp_path, capsys):
    choice = resolved(tmp_path / "first")
    assert (choice.implementation, choice.reason) == ("right", "qualified")
    assert "kernels are tried on this card, once, in 60 s at most" in capsys.readouterr().out
    assert resolved(tmp_path / "second") == choice and len(FakeTrial.tried) == 1
    assert capsys.readouterr().out == ""
    assert cache.read(tmp_path / "second" / "kernels.json").verdicts == tuple(in_force())


@pytest.mark.parametrize(
    "change",
    [
        {"card": "RTX 3090"}, {"capability": "sm_86"}, {"driver": "551"}, {"torch": "3"}, {"triton": "9"},
        {"kernels": "0" * 12}, {"module": "0" * 12}, {"flash_attn": "3"}, {"apex": "2"}, {"dtype": "bfloat16"},
        {"z_loss": 1e-4}, {"sequence_len": 32}, {"graph": "off"}, {"dtype": "float16", "half_accumulation": True},
    ],
    ids=str,
)  # fmt: skip
def test_another_card_software_or_regime_is_tried_anew(monkeypatch, tmp_path, change):
    first = {"dtype": "float16"} if "half_accumulation" in change else {}
    resolved(tmp_path / "first", small_config(**first))
    key = next(iter(change))
    for name in ("card", "software"):
        before = getattr(cache, name)
        if key in (before("cpu") if name == "card" else before()):
            monkeypatch.setattr(cache, name, lambda *device, before=before: before(*device) | change)
    resolved(tmp_path / "second", small_config(**change) if hasattr(small_config(), key) else None)
    assert len(FakeTrial.tried) == 2


def test_what_was_not_tried_is_tried_by_the_next_run(tmp_path, capsys):
    FakeTrial.open = True
    assert resolved(tmp_path / "first").implementation == "right"
    said = capsys.readouterr().out
    (file,) = (tmp_path / "cache" / "cramfast" / "qualified").glob("*.json")
    assert f"what is known is in {file}, and the next new run goes on from there" in said
    assert f"python -m cramfast.doctor --qualify --run-dir {tmp_path / 'first'} may take longer" in said
    FakeTrial.open = False
    resolved(tmp_path / "second")
    assert len(FakeTrial.tried) == 2 and "what is left is tried" in capsys.readouterr().out
    resolved(tmp_path / "third")
    assert len(FakeTrial.tried) == 2 and not capsys.readouterr().out


def test_a_microbatch_that_was_not_compared_is_compared_by_the_next_run(tmp_path, capsys):
    FakeTrial.whole = None
    assert resolved(tmp_path / "first").implementation == "reference"
    assert "not all could be tried" in capsys.readouterr().out
    FakeTrial.whole = ""
    assert resolved(tmp_path / "second").implementation == "right"
    resolved(tmp_path / "third")
    assert len(FakeTrial.tried) == 1 and len(FakeTrial.compared) == 2


def test_what_failed_a_whole_microbatch_is_not_compared_again(tmp_path):
    FakeTrial.whole = "failed a whole microbatch: loss"
    for name in ("first", "second"):
        choice = resolved(tmp_path / name)
        assert (choice.implementation, choice.reason) == ("reference", "right failed a whole microbatch: loss")
    assert len(FakeTrial.compared) == 1


@pytest.mark.parametrize(
    "change", [{"microbatch_tokens": 512}, {"layers": 3}, {"objective": "rtd"}, {"kernels": ("glu=cpp",)}], ids=str
)
def test_another_microbatch_is_compared_anew(monkeypatch, tmp_path, change):
    monkeypatch.setattr(regime, "MOST_PARAMETERS", 64)  # of a large model, another layer changes nothing there
    resolved(tmp_path / "first")
    model = replace(small_config().model, layers=change.get("layers", 2))
    other = {key: value for key, value in change.items() if key != "layers"}
    for name in ("second", "third"):
        resolved(tmp_path / name, small_config(model=model, **other))
    assert len(FakeTrial.tried) == 1 and len(FakeTrial.compared) == 2


def test_what_departed_in_a_run_is_taken_neither_there_nor_by_the_next(tmp_path):
    resolved(tmp_path / "run")
    departed = [(verdict, "departed at step 100: loss") for verdict in in_force() if verdict.op == "attention"]
    resolve.remember(small_config(), tmp_path / "run", departed)
    for name in ("run", "new"):
        choice = resolved(tmp_path / name)
        assert (choice.implementation, choice.reason) == ("reference", "right departed at step 100: loss")
    assert len(FakeTrial.tried) == 1
    verdict = replace(departed[0][0], implementation="slow")
    assert resolve.marked(verdict, departed[0][0], "departed").problems["right"] == "departed"


def differing(outcome, **place):
    return replace(outcome, place=outcome.place | place)


def test_another_build_of_the_same_sources_and_stock_pytorch_anywhere_are_no_difference(tmp_path):
    outcome = resolve.of_run(small_config(), tmp_path, tmp_path, None)
    resolve.check(differing(outcome, module="0"), small_config(), ALONE)
    with pytest.raises(UserError, match="use equal cards and software"):
        resolve.check(differing(outcome, torch="3"), small_config(), ALONE)
    stock = replace(outcome, verdicts=tuple(verdict.on_floor("") for verdict in outcome.verdicts))
    resolve.check(differing(stock, torch="3"), small_config(), ALONE)


def test_the_advised_pair_is_one_that_both_forms_of_attention_can_take():
    whole, local = (Verdict("attention", w, f, "cpp", "") for w, f in ((False, "torch_efficient"), (True, "padded")))
    glu = Verdict("glu", False, "stock", "cpp", "")
    assert as_flags([whole, glu], [whole, local, glu], ("adamw=cpp",)) == (
        "--kernels adamw=cpp attention=padded glu=stock"
    )
    assert as_flags([whole, local], [whole, local]) == "--kernels attention=padded"
    assert as_flags([whole], [whole, glu]) == "--kernels attention=torch_efficient"
    for number in range(20):  # names in any order
        one = replace(whole, floor=f"torch_{number}")
        assert as_flags([one], [one, local]) == "--kernels attention=padded"


def test_a_damaged_cache_is_told_of_and_made_anew(tmp_path, capsys):
    resolved(tmp_path / "first")
    (file,) = (tmp_path / "cache" / "cramfast" / "qualified").glob("*.json")
    for text in ("{", '{"verdicts": [{"op": "attention"}], "place": {}, "whole": true}'):
        file.write_text(text)
        resolved(tmp_path / "second")
        (tmp_path / "second" / "kernels.json").unlink()
        assert f"note: {file}" in capsys.readouterr().out
    assert len(FakeTrial.tried) == 3


def test_a_cache_that_cannot_be_written_stops_nothing(monkeypatch, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert resolved(tmp_path / "run").implementation == "right"
    assert "cannot be written" in capsys.readouterr().out


def test_a_resumed_run_and_a_replay_keep_theirs_when_the_cache_changes(tmp_path):
    resolved(tmp_path / "run")
    FakeTrial.chosen = "slow"
    resolve.of_card(small_config(), tmp_path, anew=True)
    assert resolved(tmp_path / "new").implementation == "slow"
    assert resolved(tmp_path / "run").implementation == "right"
    assert resolved(tmp_path / "replay", followed=tmp_path / "run").implementation == "right"
    assert cache.read(tmp_path / "replay" / "kernels.json") == cache.read(tmp_path / "run" / "kernels.json")


def test_a_run_moved_to_another_card_keeps_only_what_qualifies_there(monkeypatch, tmp_path):
    resolved(tmp_path / "run")
    monkeypatch.setattr(cache, "card", lambda device: CARD | {"card": "RTX 3090"})
    FakeTrial.chosen = "reference"
    choice = resolved(tmp_path / "run")
    assert choice.implementation == "reference"
    assert choice.reason == "right failed dqkv; this run began on right"


def test_what_was_slower_but_right_elsewhere_stays(monkeypatch, tmp_path):
    FakeTrial.chosen = "reference"
    resolved(tmp_path / "run")
    monkeypatch.setattr(cache, "card", lambda device: CARD | {"card": "RTX 3090"})
    FakeTrial.chosen = "right"
    choice = resolved(tmp_path / "run")
    assert choice.implementation == "reference" and choice.reason == "as this run began; here, qualified"


def test_stock_alone_is_never_tried_and_what_is_asked_for_never_replaced(tmp_path):
    assert resolved(tmp_path / "stock", small_config(kernels=("auto=stock",))).implementation == "reference"
    assert not FakeTrial.tried and not (tmp_path / "stock" / "kernels.json").exists()
    with pytest.raises(UserError, match="auto=stock: on a CPU nothing is tried"):
        kernelchoice.override(("auto=stock",), "cpu")
    kernelchoice.override(("auto=stock",), "cuda")
    kernelchoice.override(("attention=slow",), "cpu")
    choice = resolved(tmp_path / "asked")
    assert (choice.implementation, choice.reason) == ("slow", "asked for")
    assert "attention" not in FakeTrial.tried[0] and "glu" in FakeTrial.tried[0]


def test_a_trial_without_text_is_completed_by_the_first_run(tmp_path):
    resolve.of_card(small_config(), None)
    resolved(tmp_path / "run")
    resolved(tmp_path / "next")
    assert len(FakeTrial.tried) == 1 and FakeTrial.compared == [None, tmp_path / "run"]


def test_local_attention_is_settled_beside_the_global(tmp_path):
    local = replace(small_config().model, global_every=2)
    resolved(tmp_path / "run", small_config(model=local))
    assert FakeTrial.tried[0].count("attention") == 2
    assert dispatch.choose("attention", "cpu", torch.float32, windowed=True).implementation == "right"


def test_a_cpu_is_never_qualified(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr(resolve, "of_run", lambda *arguments: pytest.fail("a trial on a CPU"))
    assert resolved(tmp_path).implementation == "cpp" and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("departs_whole", "departs_whole failed a whole microbatch: "),
        ("aborts_whole", "aborts_whole crashed (SIGABRT) in a whole microbatch"),
    ],
)
def test_what_only_a_whole_microbatch_shows_goes_back_to_the_floor(monkeypatch, name, words):
    """By the real child, on the fake text."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = small_config()
    tasks = [task for task in candidates.tasks(config) if task.op in ("attention", "layernorm_glu")]
    chosen = [
        Verdict("attention", False, "reference", name, "qualified"),
        Verdict("layernorm_glu", False, "reference", "cpp", "qualified"),
    ]
    with Trial(config, tasks, regime_of(config), 120, lambda *stage: None) as trial:
        (attention, glu), whole = trial.microbatch(chosen, Path("."))
    assert whole and not attention.replaces_floor and attention.reason.startswith(words)
    assert glu == chosen[1]


def test_process_0_decides_and_the_others_check(tmp_path):
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, str(HERE / "team_worker.py"), str(tmp_path)]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "statuses.txt").read_text() == "[[0, 0], [2, 2]]"
    assert [(tmp_path / "same" / f"{rank}.txt").read_text() for rank in (0, 1)] == ["right 1", "right 0"]
    said = "".join((tmp_path / f"other.{rank}.txt").read_text() for rank in (0, 1))
    assert said.count("error:") == 1 and "use equal cards and software, or --kernels auto=stock" in said
    assert not (tmp_path / "other" / "0.txt").exists()


def test_the_doctor_tries_anew_and_keeps_what_it_finds(monkeypatch, tmp_path, capsys):
    arguments = doctor.Arguments(preset="tiny", dtype="float32", seconds=200)
    doctor.qualify(arguments, "cpu")
    doctor.qualify(arguments, "cpu")
    said = capsys.readouterr().out
    assert len(FakeTrial.tried) == 2 and "in 200 s at most" in said
    assert "qualified for preset tiny in float32:" in said and "  attention right: qualified\n" in said
    with pytest.raises(UserError, match="--run-dir with --preset, --dtype or --kernels"):
        doctor.qualify(replace(arguments, run_dir=tmp_path), "cpu")
    monkeypatch.undo()
    with pytest.raises(UserError, match="--qualify: a CPU runs our C"):
        doctor.qualify(arguments, "cpu")


def test_the_doctor_tries_what_a_run_could_not_and_new_runs_take_it(monkeypatch, tmp_path, capsys):
    """As the run is: its z-loss, the vocabulary that its text yields, its text."""
    config, text = small_config(z_loss=1e-4, kernels=("glu=cpp",)), tmp_path / "text"
    fitted = replace(config, model=replace(config.model, vocab_size=128))
    monkeypatch.setattr(stages, "prepare_text", lambda config: (text, fitted))
    FakeTrial.open = True
    run = tmp_path / "run"
    kernelchoice.override(config.kernels, "cpu")
    resolved(run, fitted)
    dispatch.override("all", "auto")
    (run / "config.json").write_text(json.dumps(to_json(config)))
    FakeTrial.open = False
    doctor.qualify(doctor.Arguments(run_dir=run, seconds=200), "cpu")
    assert len(FakeTrial.tried) == 2 and FakeTrial.compared[-1] == text
    assert f"qualified for {run} in float32:" in capsys.readouterr().out
    resolved(tmp_path / "new", fitted)
    assert len(FakeTrial.tried) == len(FakeTrial.compared) == 2, "the run's key is another"


def test_a_run_may_ask_for_a_longer_trial(monkeypatch, tmp_path, capsys):
    arguments = ["--qualify-seconds", "90", "--run-dir", str(tmp_path / "run"), "--device", "cpu"]
    request = commandline.parse(arguments)
    monkeypatch.setattr(stages, "print_kernels", lambda *arguments: None)
    request.run_dir.mkdir()
    stages.qualify_kernels(request, small_config(), tmp_path, ALONE)
    assert "in 90 s at most" in capsys.readouterr().out
