"""scripts/device.sh, rehearsed where there is no GPU: stages, budgets and what is left of a run that goes wrong."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "device.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def rehearse(out: Path, stages: str, **environment: str) -> tuple[int, dict[str, dict], str]:
    """Exit status, stages of summary.json by name, and what was said."""
    answer = subprocess.run(
        ["bash", str(SCRIPT), "--rehearse", "--stages", stages],
        env=os.environ | {"OUT": str(out), "PYTHON": sys.executable, "WHEELS": ""} | environment,
        capture_output=True,
        text=True,
    )
    summary = json.loads((out / "summary.json").read_text())
    assert summary["rehearsal"] and summary["device"] == "cpu"
    return answer.returncode, {stage["stage"]: stage for stage in summary["stages"]}, answer.stdout + answer.stderr


def test_the_budgets_fit_in_eight_minutes_and_the_trial_comes_first():
    text = SCRIPT.read_text()
    budgets = dict(re.findall(r"\[(\w+)\]=(\d+)", text))
    stages = re.search(r"^STAGES=(.*)$", text, flags=re.M)[1].split(",")
    assert set(budgets) == {*stages, "probe", "turing"}
    assert sum(int(budgets[stage]) for stage in stages) <= 480
    assert stages[:3] == ["wheels", "build", "qualify"]


def test_what_needs_a_gpu_is_skipped_with_its_reason_and_tests_run(tmp_path):
    status, stages, said = rehearse(tmp_path, "wheels,build,qualify,tests,probe,turing,choose")
    assert status == 0, said
    assert stages["tests"]["rc"] == 0 and "passed" in (tmp_path / "log.txt").read_text()
    for name in ("build", "qualify", "probe", "turing", "choose"):
        assert stages[name]["rc"] is None and stages[name]["reason"].startswith("rehearsal: ")
    assert "no wheels" in stages["wheels"]["reason"]


def test_a_failing_stage_does_not_stop_the_next(tmp_path):
    status, stages, said = rehearse(tmp_path, "step,probe", DATA=str(tmp_path / "missing.txt"))
    assert status == 1
    assert stages["step"]["rc"] == 2 and "missing.txt" in stages["step"]["reason"]
    assert stages["probe"]["rc"] is None, said


def test_an_unknown_stage_is_refused():
    answer = subprocess.run(["bash", str(SCRIPT), "--stages", "bnech"], capture_output=True, text=True, cwd=ROOT)
    assert answer.returncode == 2 and "bnech: no such stage" in answer.stdout
