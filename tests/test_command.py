"""python -m cramfast.train from text to report and export, as a user starts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def train(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [sys.executable, "-m", "cramfast.train", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=150)


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
