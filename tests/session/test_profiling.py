"""Profiles of chosen steps, on any machine; the calls to NVIDIA's tools are faked."""

import gzip
import json
import re
from collections import Counter

import pytest
import torch
from fake_loader import rows, run, same_bits, small_config, weights

from cramfast.config import profiled_steps
from cramfast.errors import UserError
from cramfast.model.encoder import Encoder
from cramfast.recipes import resolve
from cramfast.runtime import ranges
from cramfast.session import profiling
from cramfast.session.profiling import Profile

pytestmark = pytest.mark.usefixtures("fake_text")
PHASES = ("data", "forward", "backward", "optimizer")


@pytest.fixture
def diary(monkeypatch):
    """NVTX calls as they come."""
    calls = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", calls.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append(None))
    return calls


def traced(path) -> Counter:
    with gzip.open(path) as file:
        return Counter(
            event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"
        )


def test_a_trace_holds_the_chosen_steps_and_their_phases(tmp_path):
    plain = run(tmp_path / "plain", "6steps")
    folder = run(tmp_path / "run", "6steps", profile_steps="2:5")
    passes = sum(row["microbatches"] for row in rows(folder)[1:4])
    names = traced(folder / "trace-2-4.json.gz")
    assert {name: names[name] for name in PHASES} == {
        "data": passes,
        "forward": passes,
        "backward": passes,
        "optimizer": 3,
    }
    assert not ranges.markers and same_bits(weights(plain), weights(folder))
    assert not list((tmp_path / "plain").glob("trace*"))


def test_a_run_that_ends_early_still_writes_its_trace(tmp_path):
    assert traced(run(tmp_path / "run", "3steps", profile_steps="3:100") / "trace-3-99.json.gz")["optimizer"] == 1
    assert not list(run(tmp_path / "short", "3steps", profile_steps="50:60").glob("trace*"))


def test_the_bracket_for_nsys_and_ncu(monkeypatch, tmp_path):
    """Under such a tool there is no trace of torch's: only one can listen to the driver."""
    calls = []
    for module, name in ((torch.cuda.profiler, "start"), (torch.cuda.profiler, "stop"), (torch.cuda, "synchronize")):
        monkeypatch.setattr(module, name, lambda *_, name=name: calls.append(name))
    monkeypatch.setenv("NSYS_PROFILING_SESSION_ID", "1")
    config = small_config(device="cuda", profile_steps="3:5")
    with Profile(config, Encoder(config.model), tmp_path) as profile:
        for step in range(1, 8):
            profile.before(step)
            calls.append(step)
    assert calls == [1, 2, "synchronize", "start", 3, 4, "synchronize", "stop", 5, 6, 7]
    assert not list(tmp_path.iterdir())
    assert all(re.fullmatch("[A-Z0-9_]+", name) for name in profiling.NVIDIA_TOOLS)


def test_phases(diary, tmp_path):
    folder = run(tmp_path / "run", "2steps", nvtx="phases", batch_tokens=256)
    assert len(rows(folder)) == 2
    assert diary == 2 * [call for name in PHASES for call in (name, None)]
    assert not ranges.markers


def test_layers_nest_inside_the_phases(diary, tmp_path):
    plain = run(tmp_path / "plain", "2steps", batch_tokens=256)
    diary.clear()
    folder = run(tmp_path / "run", "2steps", nvtx="layers", batch_tokens=256)
    assert same_bits(weights(plain), weights(folder))
    expected = ["data", None, "forward", "layer 0", None, "layer 1", None, None]
    expected += ["backward", "layer 1 backward", None, "layer 0 backward", None, None, "optimizer", None]
    evaluation = ["layer 0", None, "layer 1", None] * 2
    assert diary == evaluation + 2 * expected + evaluation


def test_a_trace_that_the_disk_refuses_is_named(monkeypatch, tmp_path):
    (tmp_path / "run" / "trace-2-2.json.gz").mkdir(parents=True)  # a file cannot take its place
    with pytest.raises(UserError, match=r"trace-2-2\.json\.gz: the trace cannot be written \(.*free disk space"):
        run(tmp_path / "run", "3steps", profile_steps="2:3", batch_tokens=256)


def test_off_is_free(diary, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.profiler, "record_function", None)
    run(tmp_path / "run", "2steps")
    assert not diary


def test_nvtx_needs_a_torch_that_has_it(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match=r"built without CUDA — use --profile-steps"):
        resolve(small_config(nvtx="phases"))


@pytest.mark.parametrize("text", ["10", "5:5", "7:3", "0:4", "a:b", "1:2:3", ":4", "-1:3"])
def test_steps_that_mean_nothing_are_named(text):
    assert profiled_steps(text) is None
    with pytest.raises(UserError, match=r"profile_steps=.*A:B"):
        small_config(profile_steps=text)
    assert list(profiled_steps("10:13")) == [10, 11, 12]
