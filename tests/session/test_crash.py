"""kill -9 at random moments, also inside saves: the run goes on and ends with the bits of one left alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fake_loader import rows, same_bits, weights

from cramfast.session import checkpoint

WORKER = Path(__file__).resolve().parents[1] / "crash_worker.py"


OPTIONS = {"plain": {}, "rtd, Muon, average": {"objective": "rtd", "optimizer": "muon", "ema_decay": 0.9}}


def work(folder: Path, what: str, lives: int = 0, **options) -> dict:
    arguments = [sys.executable, str(WORKER), str(folder), what, str(lives), json.dumps(options)]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=150)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(("lives", "options"), [*zip((24, 10), OPTIONS.values(), strict=True)], ids=OPTIONS)
def test_kill_9_loses_nothing_that_was_saved(tmp_path, lives, options):
    result = work(tmp_path, "kill", lives, **options)
    assert result["whole"] == 0 and result["status"] == 0
    assert len(result["steps"]) - result["early"] >= 0.8 * lives, "too few lives were really killed"
    assert result["steps"] == sorted(result["steps"]), "a checkpoint was lost"
    assert result["in_save"] >= lives // 8, "no kill fell inside a save"
    assert result["steps"][-1] < 200
    assert same_bits(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    whole, killed = rows(tmp_path / "whole"), rows(tmp_path / "killed")
    timeless = [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s", "mfu")} for row in killed]
    assert timeless == [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s", "mfu")} for row in whole]
    assert not list((tmp_path / "killed" / "checkpoints").glob(checkpoint.UNFINISHED + "*"))


def test_signals_save_and_leave(tmp_path):
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    assert work(tmp_path, "signals") == dict.fromkeys(names, 3)
    for name in names:
        newest = checkpoint.newest(tmp_path / name)
        assert int(newest.name[-8:]) == rows(tmp_path / name)[-1]["step"] >= 3


FULL = """
import json, resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import fake_loader, torch
from cramfast.errors import command
torch.set_num_threads(1)
fake_loader.install(setattr)
folder = Path(sys.argv[1])
options = json.loads(sys.argv[3])
fake_loader.run(folder, "3steps", **options)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write past the limit fails, as on a full disk
limit = (folder / "metrics.jsonl").stat().st_size + 1500
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
command(lambda: fake_loader.run(folder, "100steps", **options))
"""


FULL_AT_ONCE = FULL.replace('fake_loader.run(folder, "3steps", **options)\n', "").replace(
    '(folder / "metrics.jsonl").stat().st_size + 1500', "4096  # the config fits"
)


def test_a_disk_that_is_full_before_the_first_checkpoint(tmp_path):
    """TensorBoard's thread meets it first; it says nothing of its own, and no checkpoint is promised."""
    arguments = [sys.executable, "-c", FULL_AT_ONCE, str(tmp_path / "run"), str(WORKER.parent), "{}"]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=100)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr and "Exception in thread" not in result.stderr
    assert "no earlier checkpoint exists" in result.stderr and "intact" not in result.stderr


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_disk_that_fills_while_metrics_are_written(tmp_path, options):
    """A real failed write, by a limit on file size; what is there can be resumed."""
    arguments = [sys.executable, "-c", FULL, str(tmp_path), str(WORKER.parent), json.dumps(options)]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=100)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert "metrics cannot be written" in result.stderr and "--resume" in result.stderr
    assert checkpoint.newest(tmp_path).name == "step-00000003"
