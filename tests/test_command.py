"""python -m cramfast.train from text to report and export, as a user starts it."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_loader import rows, same_bits, weights

from cramfast import errors
from cramfast import train as loop
from cramfast.session import checkpoint

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


def command(folder: Path, *arguments: str) -> dict:
    """What subprocess needs to train there."""
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return {
        "args": [sys.executable, "-m", "cramfast.train", *arguments],
        "cwd": folder,
        "env": environment,
        "text": True,
    }


def train(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(**command(folder, *arguments), capture_output=True, timeout=150)


@contextlib.contextmanager
def training(folder: Path, *arguments: str) -> Iterator[subprocess.Popen]:
    """A process that trains beside the test, dead at the end."""
    with (folder / "output.txt").open("w") as output:
        with subprocess.Popen(**command(folder, *arguments), stdout=output, stderr=output) as process:
            try:
                yield process
            finally:
                process.kill()


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    """Until the process has saved this step or a later one."""
    while process.poll() is None and saved_step(run) < step:
        time.sleep(0.01)
    assert saved_step(run) >= step, (run.parent / "output.txt").read_text()


def saved_step(run: Path) -> int:
    newest = checkpoint.newest(run)
    return int(newest.name[-8:]) if newest else 0


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_output_that_cannot_be_written_costs_nothing(trained):
    """A log on a full disk; a pipe whose reader is gone."""
    folder = trained[0]
    with open("/dev/full", "w") as full:
        arguments = command(folder, "--data", "text.txt", "--run-dir", "unlogged", *SMALL, *SHORT)
        assert subprocess.run(**arguments, stdout=full, stderr=full, timeout=150).returncode == 0
    assert same_bits(weights(folder / "first"), weights(folder / "unlogged")) or saved_step(folder / "first") > 12
    assert (folder / "unlogged" / "hf" / "config.json").exists()
    reader, writer = os.pipe()
    os.close(reader)
    arguments = command(folder, "--data", "text.txt", "--run-dir", "unread", *SMALL, *SHORT)
    assert subprocess.run(**arguments, stdout=writer, stderr=subprocess.DEVNULL, timeout=150).returncode == 0
    os.close(writer)
    assert same_bits(weights(folder / "unlogged"), weights(folder / "unread"))


def test_under_nohup_a_hangup_is_ignored(trained):
    folder, run = trained[0], trained[0] / "nohup"
    arguments = command(folder, "--data", "text.txt", "--run-dir", "nohup", *SMALL, *SHORT[:-2], "--budget", "60steps")
    arguments["args"] = ["nohup", *arguments["args"]]
    with subprocess.Popen(**arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 100
        while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGHUP)
        assert process.wait(150) == 0
    assert saved_step(run) == 60


def test_a_raised_budget_says_what_the_rate_does(trained):
    folder, _ = trained
    run = folder / "raised"
    shutil.copytree(folder / "first", run)
    before = saved_step(run)
    result = train(folder, "--resume", "raised", "--budget", f"{2 * before}steps")
    assert result.returncode == 0, result.stderr
    assert "50% of it is spent; the learning rate goes from 0 to 0.003 with the next update" in result.stderr
    assert "--schedule-from-here" in result.stderr
    result = train(folder, "--resume", "raised", "--budget", f"{3 * before}steps", "--schedule-from-here", "True")
    assert result.returncode == 0, result.stderr
    assert "67% of it is spent; the learning rate goes from 0 to 0.0003 with the next update" in result.stderr
    assert "over what is left" in result.stderr and "--schedule-from-here" not in result.stderr
    result = train(folder, "--resume", "raised", "--budget", "5steps")
    assert result.returncode == 0 and "so the run ends here" in result.stderr


def test_a_config_that_was_edited_is_no_history(trained):
    folder, run = trained[0], trained[0] / "edited"
    shutil.copytree(folder / "first", run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"lr": 0.3}))
    result = train(folder, "--resume", "edited", "--budget", "40steps")
    assert result.returncode == 2 and "was trained with 0.003" in result.stderr and "lr=0.3" in result.stderr


def test_a_run_whose_checkpoints_are_gone_says_that_it_begins_anew(trained):
    folder, run = trained[0], trained[0] / "emptied"
    shutil.copytree(folder / "first", run)
    shutil.rmtree(run / "checkpoints")
    result = train(folder, "--resume", "emptied")
    assert result.returncode == 0 and "begins anew at its first step" in result.stderr


def test_a_replay_has_no_other_budget(trained):
    folder = trained[0]
    assert train(folder, "--replay", "first", "--run-dir", "again").returncode == 0
    result = train(folder, "--resume", "again", "--budget", "90steps")
    assert result.returncode == 2 and "repeats another run step by step" in result.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_output_that_was_closed_before_the_start_costs_nothing(trained, closed):
    folder = trained[0]
    words = command(folder, "--resume", "first")
    script = " ".join(["exec", *words.pop("args"), closed])
    assert subprocess.run(["sh", "-c", script], **words, timeout=150).returncode == 0


def test_a_text_that_names_special_tokens_is_trained_and_exported(trained):
    folder = trained[0]
    text = (folder / "text.txt").read_text().replace(" cat ", " [MASK] and [SEP] ")
    (folder / "names.txt").write_text(text)
    result = train(folder, "--data", "names.txt", "--run-dir", "names", *SMALL, *SHORT)
    assert result.returncode == 0, result.stderr


def test_a_refused_second_process_leaves_the_first_alone(trained):
    folder, run = trained[0], trained[0] / "busy"
    always = ["--budget", "100000steps", "--checkpoint-interval", "1e-9"]
    with training(folder, "--data", "text.txt", "--run-dir", "busy", *SMALL, *SHORT[:-2], *always) as first:
        wait_for_step(first, run, 1)
        config = (run / "config.json").read_bytes()
        second = train(folder, "--resume", "busy", "--budget", "7steps")
        assert second.returncode == 2 and "another process is training here" in second.stderr
        assert (run / "config.json").read_bytes() == config
        wait_for_step(first, run, saved_step(run) + 2)
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 130
    assert "go on with: python -m cramfast.train --resume busy" in (folder / "output.txt").read_text()


def test_kill_9_of_the_command_at_any_moment_costs_no_bit(trained):
    """Each life ends where chance has it, the last one after its last step; nothing of the run is a stand-in."""
    folder, chance = trained[0], random.Random(1)
    arguments = ["--data", "text.txt", *SMALL, *SHORT[:-2], "--budget", "150steps"]
    with training(folder, *arguments, "--run-dir", "whole") as process:
        wait_for_step(process, folder / "whole", 150)
    run = folder / "killed"
    for life in range(3):
        begun = saved_step(run)
        how = ["--resume", "killed"] if life else [*arguments, "--run-dir", "killed", "--checkpoint-interval", "1e-9"]
        with training(folder, *how) as process:
            wait_for_step(process, run, begun + 1 if life < 2 else 150)
            time.sleep(chance.uniform(0.0, 0.15) if life < 2 else 0.0)
            process.kill()
            assert process.wait() == -signal.SIGKILL
        assert life == 2 or begun < saved_step(run) < 150
    assert same_bits(weights(folder / "whole"), weights(run))
    assert [row["loss"] for row in rows(folder / "whole")] == [row["loss"] for row in rows(run)]


def test_a_mistake_ends_with_one_line(tmp_path):
    result = train(tmp_path, "--data", "nowhere.txt", "--preset", "tiny", "--device", "cpu")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr and "nowhere.txt" in result.stderr.splitlines()[-1]


def test_a_file_name_that_is_no_unicode_is_printed_all_the_same():
    code = "import os; from cramfast.errors import command; command(lambda: print(os.fsdecode(b'caf\\xe9.txt')))"
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}  # strict, as in every locale but C
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("caf\\udce9.txt\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budget", "3"], "24h, 90m"),
        (["--bugdet", "3h"], "--budget"),
        (["--data", "several.txt " * 50], "cannot be read (File name too long)"),
        (["--replay", __file__], "cannot be read (Not a directory) — give a run folder"),
    ],
    ids=["budget", "flag", "data", "replay"],
)
def test_other_mistakes_end_the_same_way(monkeypatch, capsys, arguments, words):
    """In this process, which has torch already."""
    monkeypatch.setattr(sys, "argv", ["train", *arguments, "--preset", "tiny", "--device", "cpu"])
    with pytest.raises(SystemExit) as end:
        errors.command(loop.main)
    assert end.value.code == 2 and words in "".join(capsys.readouterr())
