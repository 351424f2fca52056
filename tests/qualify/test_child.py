"""What the child says and when, how long its parent waits for it, and whom a failure is blamed on."""

import os
import subprocess
import time
from types import SimpleNamespace

import made_up
import pytest
import stand_in
import torch
from fake_loader import small_config

from cramfast.errors import UserError
from cramfast.kernels import cuda_build, dispatch, extension, linear
from cramfast.qualify import agreement, candidates, child, judge, process, trial
from cramfast.qualify.judge import CaptureError, Judge
from cramfast.qualify.process import Child, Ended
from cramfast.qualify.regime import MASKED_FLOAT32, regime_of, situations
from cramfast.qualify.trial import Trial
from cramfast.qualify.verdict import Verdict

CONFIG = small_config()
REGIME = regime_of(CONFIG, tokens=64, masked=16)
TASK = candidates.Task("attention", False, "reference", ("right", "slow"))
CHOSEN = Verdict("attention", False, "reference", "right", "qualified")


class Heard(child.Speaker):
    """A speaker whose messages are kept."""

    def __init__(self):
        super().__init__(None)
        self.said = []

    def __call__(self, **message):
        self.said.append(message)

    def stages(self):
        return [message["begin"] for message in self.said if "begin" in message]


@pytest.fixture
def heard(monkeypatch, one_thread):
    made_up.install(monkeypatch.setattr)
    return Heard()


def try_operators(heard, until=float("inf"), **known):
    tasks = [vars(TASK) | {"tried": ["right"]}]
    content = {"tasks": tasks, "regime": vars(REGIME), "repeats": 2, "until": until, "known": known, "done": []}
    child.try_operators(content, heard)
    return heard.said


# The truth


def test_the_truth_is_a_stage_of_its_own_before_any_candidate(monkeypatch, heard):
    made, plain = [], judge.Truth.__init__

    def counted(self, *arguments):
        made.append(len(heard.stages()))
        plain(self, *arguments)

    monkeypatch.setattr(judge.Truth, "__init__", counted)
    said = try_operators(heard)
    assert heard.stages()[:2] == [("attention", "", child.TRUTH), ("attention", "right", "edges")]
    assert set(made) == {1}, "one was computed in a candidate's stage"
    assert {"judged": ["attention", "right"], "problem": "", "final": True} in said


def test_what_is_known_needs_no_truth(monkeypatch, heard):
    monkeypatch.setattr(judge.Truth, "__init__", lambda *arguments: pytest.fail("computed for nothing"))
    said = try_operators(heard, attention={"right": ""})
    assert set(said[-1]["seconds"]) == {"reference", "right"}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("CUDA error: out of memory")])
def test_a_truth_without_room_is_blamed_on_nobody(monkeypatch, heard, error):
    def full(self):
        raise error

    monkeypatch.setattr(Judge, "prepare", full)
    said = try_operators(heard)
    assert said[-1] == {"unjudged": "attention", "problem": "needs more memory than there is"}
    with Trial(CONFIG, [TASK], REGIME, 60, lambda *stage: None) as tried:
        tried.note(said[-1])
    verdict = tried.decided(TASK, "")
    why = "was not tried: it could not be judged: what it is compared with needs more memory than there is"
    assert verdict.reason == f"right {why}; slow {why}" and verdict.open and not verdict.problems


def test_the_loss_of_half_precision_is_judged_by_float32_and_of_float32_by_fewer_rows():
    for dtype, wide in (("bfloat16", torch.float32), ("float16", torch.float32), ("float32", torch.float64)):
        case = situations("cross_entropy", regime_of(small_config(dtype=dtype), masked=80))[0]
        truth = judge.Truth("cross_entropy", case.make(0), case.cotangent)
        assert truth.true["dhidden"].dtype == wide, dtype
    assert regime_of(small_config()).masked == MASKED_FLOAT32
    norm = situations("layernorm", regime_of(small_config(dtype="bfloat16"), tokens=64))[0]
    assert judge.Truth("layernorm", norm.make(0), 1.0).true["y"].dtype == torch.float64


def test_sums_in_half_precision_are_compared_with_such_sums(monkeypatch, one_thread):
    used = []
    floor = judge.stock_operators.layernorm_glu
    monkeypatch.setattr(judge.stock_operators, "layernorm_glu", lambda *a, **k: used.append(1) or floor(*a, **k))
    case = situations("layernorm_glu", regime_of(small_config(dtype="bfloat16"), tokens=64))[0]
    for half_sums in (False, True):
        judge.Truth("layernorm_glu", case.make(0), case.cotangent, half_sums)
        assert bool(used) is half_sums


# Memory, captures, PTX


def test_a_candidate_without_room_was_not_judged(monkeypatch, heard):
    def full(self, implementation, tell):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(Judge, "problem", full)
    problem = {"judged": ["attention", "right"], "problem": "needs more memory than there is", "final": False}
    assert problem in try_operators(heard)
    with Trial(CONFIG, [TASK], REGIME, 60, lambda *stage: None) as tried:
        tried.note(problem)
        tried.note({"judged": ["attention", "slow"], "problem": "failed: no", "final": True})
        tried.note({"timed": "attention", "seconds": {}})
    verdict = tried.decided(TASK, "")
    assert verdict.reason == "slow failed: no; right was not tried: needs more memory than there is"
    assert verdict.open and verdict.problems == {"slow": "failed: no"}


def test_after_a_failed_capture_the_child_leaves(monkeypatch, heard):
    class Left(BaseException):
        pass

    def leave():
        raise Left

    def refused(work):
        raise UserError("the CUDA graph cannot be captured (sync)")

    monkeypatch.setattr(judge, "capture_graph", refused)
    monkeypatch.setattr(child, "leave", leave)
    plain = Judge.replayed

    def on_a_card(self, *arguments):
        self.device, self.graph = SimpleNamespace(type="cuda"), True
        return plain(self, *arguments)

    monkeypatch.setattr(Judge, "replayed", on_a_card)
    with pytest.raises(Left):
        try_operators(heard)
    found = "failed: the CUDA graph cannot be captured (sync)"
    assert heard.said[-1] == {"judged": ["attention", "right"], "problem": found, "final": True}
    assert child.word(lambda: (_ for _ in ()).throw(CaptureError())).lost


def test_ptx_is_compiled_in_a_stage_of_its_own(monkeypatch, heard):
    monkeypatch.setattr(child, "from_ptx", lambda implementation, device: True)
    try_operators(heard)
    assert heard.stages()[1:3] == [("attention", "right", child.LOAD), ("attention", "right", "edges")]
    assert process.STAGE_S < process.LONG_S[child.LOAD] < 60


def test_only_ours_on_a_card_without_machine_code_is_compiled_first(monkeypatch):
    monkeypatch.undo()
    module = SimpleNamespace(cuda_architectures=["sm_75", "sm_90a", "compute_90"])
    monkeypatch.setattr(extension, "module", module)
    for chip, ptx in (("sm_75", False), ("sm_90", False), ("sm_120", True)):
        monkeypatch.setattr(dispatch, "architecture", lambda device, chip=chip: chip)
        assert child.from_ptx("cpp_fused", "cuda") is ptx and not child.from_ptx("triton", "cuda")
    assert not child.from_ptx("cpp", "cpu")
    assert cuda_build.machine_code("sm_86", ["sm_80", "compute_80"]) == [80]


# Time


def test_the_child_stops_by_itself_when_the_time_for_operators_is_up(heard):
    assert try_operators(heard, until=time.monotonic() - 1) == [{"late": True}]
    heard.begin("microbatch", "", "model")  # what comes then has the rest of the time


class Scripted:
    """A child that says what its script holds, a list for every question; an exception ends it."""

    scripts, asked, made = [], [], []

    def __init__(self, device, end, stage_s):
        self.made.append(end)

    def ask(self, kind, **content):
        self.asked.append((kind, content))
        for message in self.scripts.pop(0):
            if isinstance(message, Exception):
                raise message
            yield message

    def __exit__(self, *exception):
        pass


@pytest.fixture
def scripted(monkeypatch):
    Scripted.scripts, Scripted.asked[:], Scripted.made[:] = [], [], []
    monkeypatch.setattr(trial, "Child", Scripted)
    return Scripted


def tried(config=CONFIG, known=(), seconds=60.0) -> Trial:
    return Trial(config, [TASK], REGIME, seconds, lambda *stage: None, known)


def test_the_process_of_late_operators_compares_the_microbatch(scripted):
    scripted.scripts = [
        [{"judged": ["attention", "right"], "problem": "", "final": True}, {"late": True}],
        [{"departed": {}}],
    ]
    with tried() as found:
        (verdict,) = found.operators()
        assert found.microbatch([CHOSEN], None) == ([CHOSEN], True)
    assert len(scripted.made) == 1, "a second process was started"
    up = "the 60 s were up; the next run goes on with it"
    assert verdict.reason == f"right is right, but was not timed: {up}; slow was not tried: {up}"
    assert verdict.open and verdict.problems == {"right": ""}
    operators = scripted.asked[0][1]
    assert operators["until"] == pytest.approx(found.began + 42.0) and scripted.made == [found.began + 60.0]


def test_only_what_is_open_is_tried_again(scripted):
    scripted.scripts = [[{"timed": "attention", "seconds": {"reference": 2.0, "right": 1.0}}]]
    before = [Verdict("attention", False, "reference", "reference", "", {"right": "", "slow": "failed"}, open=True)]
    with tried(known=before) as found:
        (verdict,) = found.operators()
    assert scripted.asked[0][1]["known"] == {"attention": {"right": "", "slow": "failed"}}
    assert verdict.implementation == "right" and not verdict.open
    with tried(known=[verdict]) as found:
        assert found.operators() == [verdict] and len(scripted.asked) == 1


def test_a_truth_that_ends_the_child_ends_its_task_alone(scripted):
    other = candidates.Task("glu", False, "reference", ("cpp",))
    scripted.scripts = [
        [Ended(("attention", "", child.TRUTH), "hung: no answer within 60 s")],
        [{"judged": ["glu", "cpp"], "problem": "wrong", "final": True}, {"timed": "glu", "seconds": {}}],
    ]
    with Trial(CONFIG, [TASK, other], REGIME, 60, lambda *stage: None) as found:
        attention, glu = found.operators()
    assert scripted.asked[1][1]["done"] == ["attention"]
    assert "it could not be judged: computing what it is compared with hung" in attention.reason
    assert attention.open and not attention.problems and glu.reason == "cpp wrong" and not glu.open


def test_a_child_that_cannot_start_leaves_all_open(scripted):
    scripted.scripts = [[Ended((), "ended (no device)")]]
    with tried() as found:
        (verdict,) = found.operators()
    assert "right was not tried: the process for it ended (no device)" in verdict.reason and verdict.open


@pytest.mark.parametrize("stage", agreement.PARTS)
def test_no_operator_is_blamed_for_what_is_not_its_pass(scripted, stage):
    scripted.scripts = [[Ended(("microbatch", "", stage), "hung: no answer within 60 s")]]
    with tried() as found:
        (verdict,), compared = found.microbatch([CHOSEN], None)
    assert not compared and not verdict.problems and "could be compared: the process for it hung" in verdict.reason
    assert process.LONG_S[stage] > process.STAGE_S


def test_a_microbatch_without_room_blames_nobody(monkeypatch, heard, scripted):
    def full(config, prepared, verdicts, one_by_one, tell):
        tell("attention", agreement.RUN)
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(agreement, "of_new_model", full)
    content = {"config": trial.to_json(CONFIG), "prepared": None, "verdicts": [CHOSEN.json()], "one_by_one": False}
    child.try_microbatch(content, heard)
    scripted.scripts = [heard.said]
    with tried() as found:
        (verdict,), compared = found.microbatch([CHOSEN], None)
    assert not compared and not verdict.problems
    why = "no whole microbatch could be compared: it needs more memory than there is"
    assert verdict.reason == f"right qualified, but {why}"


def test_the_parts_of_a_microbatch_are_told(monkeypatch, heard, fake_text):
    stages = []
    agreement.of_new_model(CONFIG, None, [CHOSEN], False, lambda *stage: stages.append(stage))
    assert stages == [*(("", part) for part in agreement.PARTS), ("", agreement.RUN)]


# The process


@pytest.fixture
def stood_in(monkeypatch):
    monkeypatch.setattr(process, "child", SimpleNamespace(__name__=stand_in.NAME))


def test_a_long_stage_has_its_own_limit(monkeypatch, stood_in):
    """Two seconds are the limit of an ordinary one here, in which the stand-in answers at once."""
    truth, ordinary = (["attention", "", child.TRUTH], ["attention", "right", "edges"])
    script = [({"begin": truth}, 4), ({"begin": ordinary}, 0), ({"done": True}, 0)]
    with Child(0, time.monotonic() + 300, stage_s=2.0) as started:
        assert [m["begin"] for m in started.ask("x", script=script)] == [truth, ordinary]
        with pytest.raises(Ended, match=r"hung: no answer within 2 s") as ended:
            list(started.ask("x", script=[({"begin": ordinary}, 1000)]))
    assert ended.value.stage == tuple(ordinary) and not ended.value.late
    monkeypatch.setitem(process.LONG_S, child.TRUTH, 0.5)
    with Child(0, time.monotonic() + 300) as started, pytest.raises(Ended, match=r"no answer within 0\.5 s"):
        list(started.ask("x", script=[({"begin": truth}, 1000)]))


def test_a_child_that_does_not_die_is_left(monkeypatch, stood_in):
    signals, killed, plain = [], os.killpg, subprocess.Popen.wait

    def wait(self, timeout=None):
        assert timeout is not None, "waits for ever"
        raise subprocess.TimeoutExpired("child", timeout)

    started = Child(0, time.monotonic() + 300)
    monkeypatch.setattr(os, "killpg", lambda *arguments: signals.append(arguments))
    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    started.__exit__()
    started.kill()
    assert len(signals) == 1
    monkeypatch.undo()
    killed(started.process.pid, 9)
    plain(started.process)


def test_a_child_that_closes_its_output_and_stays_is_left(monkeypatch, stood_in):
    monkeypatch.setattr(process, "KILL_S", 0.1)
    with Child(0, time.monotonic() + 300) as started:
        monkeypatch.setattr(os, "waitid", lambda *arguments: None)
        assert started.ended(("x", "y", "z")).why == "closed its output and did not end"


def test_the_child_computes_as_the_run_will(monkeypatch, heard, stood_in):
    monkeypatch.undo()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(process, "MODULES", [stand_in.NAME])
    config = small_config(kernels=("glu=reference",))
    with Trial(config, [TASK], REGIME, 300, lambda *stage: None) as found:
        (said,) = found.ask("probe")
        assert said == {"glu": "asked for", "half_sums": False}
        monkeypatch.setattr(found, "config", SimpleNamespace(kernels=(), half_accumulation=True))
        assert next(found.ask("probe"))["half_sums"] is True
    assert not linear._allowed and dispatch.choose("glu", "cpu", torch.float32).reason != "asked for"


def test_what_adds_up_in_any_order_promises_no_equal_bits():
    assert not candidates.promises_equal_bits("padded") and not candidates.promises_equal_bits("torch_efficient")
    assert candidates.promises_equal_bits("cpp") and candidates.promises_equal_bits("flash_attn")
