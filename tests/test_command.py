"""python -m cramfast.train from text to report and export, as a user starts it."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_loader import rows, same_bits, weights

from cramfast import checkpoint

TEXT = "the cat saw a dog near the old house while rain fell on every quiet street of that small town"
SMALL = [
    "--preset",
    "tiny",
    "--model.layers",
    "1",
    "--model.width",
    "64",
    "--model.vocab-size",
    "512",
    "--device",
    "cpu",
]
SHORT = ["--microbatch-tokens", "1024", "--batch-tokens", "1024", "--heldout-tokens", "2048", "--budget", "12steps"]


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [sys.executable, "-m", "cramfast.train", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def train(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    process = start(folder, *arguments)
    output, errors = process.communicate(timeout=150)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def wait_for_checkpoint(process: subprocess.Popen, run: Path, step: int) -> None:
    """Until the process has saved a step beyond this one."""
    while process.poll() is None and (checkpoint.newest(run) is None or saved_step(run) <= step):
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()[1]


def saved_step(run: Path) -> int:
    return int(checkpoint.newest(run).name[-8:])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    words = TEXT.split()
    blocks = (" ".join(words[(i * k + k) % len(words)] for k in range(1, 30)) + "." for i in range(400))
    (folder / "text.txt").write_text("\n\n".join(f"Part {i}. {block}" for i, block in enumerate(blocks)))
    result = train(folder, "--data", "text.txt", "--run-dir", "first", *SMALL, *SHORT)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_from_text_to_export(trained):
    folder, output = trained
    assert "attention" in output and "config " in output, "the ops that run and the resolved config come first"
    for word in ("held-out loss", "tokens/s", "[MASK]", "first/report.html", "first/hf"):
        assert word in output
    for name in ("config.json", "metrics.jsonl", "tokenizer.json", "manifest.json", "report.html", "hf/config.json"):
        assert (folder / "first" / name).stat().st_size > 0
    config = json.loads((folder / "first" / "config.json").read_text())
    assert config["model"]["layers"] == 1 and config["device"] == "cpu" and config["dtype"] != "auto"


def test_resumed_with_a_larger_budget(trained):
    folder, _ = trained
    result = train(folder, "--resume", "first", "--budget", "15steps")
    assert result.returncode == 0, result.stderr
    checkpoints = sorted(path.name for path in (folder / "first" / "checkpoints").iterdir())
    assert checkpoints == ["step-00000012", "step-00000015"]


def test_a_refused_second_process_leaves_the_first_alone(trained):
    folder, run = trained[0], trained[0] / "busy"
    always = ["--budget", "100000steps", "--checkpoint-interval", "0.001"]
    first = start(folder, "--data", "text.txt", "--run-dir", "busy", *SMALL, *SHORT[:-2], *always)
    wait_for_checkpoint(first, run, 0)
    config = (run / "config.json").read_bytes()
    second = train(folder, "--resume", "busy", "--budget", "7steps")
    assert second.returncode == 2 and "another process is training here" in second.stderr
    assert (run / "config.json").read_bytes() == config
    wait_for_checkpoint(first, run, saved_step(run) + 1)
    first.send_signal(signal.SIGTERM)
    output, errors = first.communicate(timeout=60)
    assert first.returncode == 130 and "--resume busy" in output, errors


def test_kill_9_of_the_command_at_any_moment_costs_no_bit(trained):
    """Five lives, killed where chance has it; lock, create and the reading thread are the real ones."""
    folder, chance, step = trained[0], random.Random(1), 0
    arguments = ["--data", "text.txt", *SMALL, *SHORT[:-2], "--budget", "600steps"]
    whole = start(folder, *arguments, "--run-dir", "whole")
    for life in range(5):
        run = ["--resume", "killed"] if life else [*arguments, "--run-dir", "killed", "--checkpoint-interval", "1e-9"]
        process = start(folder, *run)
        wait_for_checkpoint(process, folder / "killed", step)
        time.sleep(chance.uniform(0.0, 0.3))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.communicate()
        step = saved_step(folder / "killed")
    last = train(folder, "--resume", "killed")
    assert last.returncode == 0, last.stderr
    assert whole.wait() == 0, whole.communicate()[1]
    assert step < 600 == saved_step(folder / "killed")
    assert same_bits(weights(folder / "whole"), weights(folder / "killed"))
    assert [row["loss"] for row in rows(folder / "whole")] == [row["loss"] for row in rows(folder / "killed")]


def test_a_run_on_little_text_is_resumed_from_anywhere(tmp_path):
    """Two lines yield fewer entries than were asked for, and they are named from another folder."""
    (tmp_path / "two.txt").write_text(f"{TEXT}\n\n{TEXT[::-1]}\n")
    budget = ["--microbatch-tokens", "512", "--batch-tokens", "512", "--heldout-tokens", "512", "--budget", "3steps"]
    result = train(tmp_path, "--data", "two.txt", "--run-dir", "run", *SMALL, *budget)
    assert result.returncode == 0, result.stderr
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "cache", tmp_path / "elsewhere" / "cache")
    result = train(tmp_path / "elsewhere", "--resume", "../run", "--budget", "5steps")
    assert result.returncode == 0, result.stderr
    assert saved_step(tmp_path / "run") == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--budget", "3"], "24h, 90m"),
        (["--bugdet", "3h"], "--budget"),
    ],
)
def test_mistakes_end_with_one_line(trained, arguments, words):
    result = train(trained[0], *arguments, "--preset", "tiny", "--device", "cpu")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr and words in result.stderr + result.stdout
