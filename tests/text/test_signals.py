"""Ctrl-C and SIGTERM outside the training loop: quiet, and nothing half-written stays."""

import os
import signal
import subprocess
import sys
import time

import pytest

from cramfast.errors import UserError
from cramfast.text import docstrings

STOPPED = """
import os, signal, sys, time
from pathlib import Path
from cramfast.errors import command

def main():
    partial = Path(sys.argv[1])
    try:
        partial.touch()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)
    finally:
        partial.unlink()

command(main)
"""


def test_sigterm_lets_a_command_clean_up(tmp_path):
    arguments = [sys.executable, "-c", STOPPED, str(tmp_path / "partial")]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr.strip()) == (130, "interrupted")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_imports_leaves_no_traceback(tmp_path, number):
    """A torch that is sent the signal while it is imported, and turns exceptions into others as C extensions do."""
    interrupted = (
        f"try:\n    os.kill(os.getpid(), {int(number)})\n    time.sleep(20)\nexcept BaseException:\n    1 / 0\n"
    )
    (tmp_path / "torch.py").write_text("import os, time\n" + interrupted)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    arguments = [sys.executable, "-m", "cramfast.train"]
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (130, "interrupted\n")


def test_docstrings_that_a_killed_process_left_are_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(docstrings, "source_files", lambda: [])
    abandoned, busy = tmp_path / "docstrings.1.partial", tmp_path / "docstrings.2.partial"
    for path in (abandoned, busy):
        path.touch()
    os.utime(abandoned, (0, time.time() - 2 * docstrings.ABANDONED_S))
    with pytest.raises(UserError, match="only 0 words"):
        docstrings.write_docstrings(tmp_path / "docstrings.txt")
    assert list(tmp_path.iterdir()) == [busy]


def test_a_worker_whose_reader_died_says_nothing():
    arguments = [sys.executable, "-m", "cramfast.text.docstrings"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(arguments, **pipes) as worker:
        worker.stdout.close()
        worker.stdin.write(b"[]")
        worker.stdin.close()
        assert worker.wait(60) == -signal.SIGPIPE
        assert worker.stderr.read() == b""
