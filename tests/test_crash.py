"""kill -9 at random moments, also inside saves: the run goes on and ends with the bits of one left alone."""

import json
import subprocess
import sys
from pathlib import Path

from fake_loader import rows, same_bits, weights

from cramfast import checkpoint

WORKER = Path(__file__).parent / "crash_worker.py"


def work(folder: Path, what: str) -> dict:
    arguments = [sys.executable, str(WORKER), str(folder), what]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=150)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_kill_9_loses_nothing_that_was_saved(tmp_path):
    result = work(tmp_path, "kill")
    assert result["whole"] == 0 and result["status"] == 0
    assert len(result["steps"]) - result["early"] >= 20, "too few lives were really killed"
    assert result["steps"] == sorted(result["steps"]), "a checkpoint was lost"
    assert result["in_save"] >= 3, "no kill fell inside a save"
    assert result["steps"][-1] < 60
    assert same_bits(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    whole, killed = rows(tmp_path / "whole"), rows(tmp_path / "killed")
    timeless = [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s", "mfu")} for row in killed]
    assert timeless == [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s", "mfu")} for row in whole]
    assert not list((tmp_path / "killed" / "checkpoints").glob(checkpoint.UNFINISHED + "*"))


def test_sigint_and_sigterm_save_and_leave(tmp_path):
    assert work(tmp_path, "signals") == {"SIGINT": 3, "SIGTERM": 3}
    for name in ("SIGINT", "SIGTERM"):
        newest = checkpoint.newest(tmp_path / name)
        assert int(newest.name[-8:]) == rows(tmp_path / name)[-1]["step"] >= 3
