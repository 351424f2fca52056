"""The command in front of all others, `cramfast COMMAND` or `python -m cramfast COMMAND`."""

import importlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cramfast import __main__ as front_door
from cramfast.config import to_json
from cramfast.recipes import resolve, starting_config
from cramfast.runtime.arguments import program

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "from cramfast.__main__ import main; main()"  # what pip writes into bin/cramfast
HEAVY = ("torch", "numpy", "transformers", "tokenizers", "tyro", "rich")


def front(*words: str, environment: dict | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "cramfast", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
def test_help_names_every_command_with_one_line(words):
    result = front(*words)
    assert (result.returncode, result.stderr) == (0, "")
    lines = [line.split(maxsplit=1) for line in result.stdout.splitlines() if line.startswith("  ")]
    assert [name for name, _ in lines] == [
        "train",
        "prepare",
        "export",
        "evaluate",
        "report",
        "plan",
        "scaling",
        "doctor",
    ]
    assert all(len(line) <= 120 for line in result.stdout.splitlines())


@pytest.mark.parametrize("words", [["--help"], ["prepare", "--help"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_help_that_is_not_read_to_its_end_ends_quietly(words, unbuffered):
    """As in `cramfast --help | head -1`; the reader is gone before the first word."""
    command = [sys.executable, "-m", "cramfast", *words]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode in (-signal.SIGPIPE, 128 + signal.SIGPIPE)


def test_another_broken_pipe_is_no_silence():
    code = "import os\nfrom cramfast.errors import command\nr, w = os.pipe()\nos.close(r)\n"
    code += "command(lambda: os.write(w, b'x'))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "BrokenPipeError" in result.stderr


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_help_imports_nothing_heavy(word):
    code = f"import sys; sys.argv[1:] = [{word!r}]\n{SCRIPT}\nprint(sorted(set(sys.modules) & set({HEAVY!r})))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


def test_version():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert front("--version").stdout == f"cramfast {declared}\n"


def test_a_checkout_that_is_not_installed_has_no_version(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr(front_door.signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(sys, "argv", ["/somewhere/__main__.py", "--version"])
    with pytest.raises(SystemExit, match=r"^cramfast is not installed, and has no version — pip install -e \.$"):
        front_door.main()


@pytest.mark.parametrize(
    ("words", "begins"),
    [
        (("train",), "usage: python -m cramfast train [-h]"),
        (("evaluate", "glue"), "usage: python -m cramfast evaluate glue [-h]"),
        (("prepare",), "usage: python -m cramfast prepare [-h]"),
    ],
)
def test_help_of_a_command_in_two_orders(words, begins):
    first = front("help", *words).stdout
    assert first.startswith(begins) and first == front(*words, "--help").stdout
    assert "python -m cramfast.prepare" not in first  # what it is called behind another front


def test_a_command_is_advised_as_this_one_was_called(monkeypatch):
    for called, front in (("cramfast prepare", "cramfast "), ("python -m cramfast prepare", "python -m cramfast ")):
        monkeypatch.setattr(sys, "argv", [called, "--data", "x"])
        assert program("prepare") == f"{front}prepare" and program("train") == f"{front}train"
    for called in ("/x/cramfast/prepare.py", "/x/bin/cramfast", "/x/a cramfast train"):
        monkeypatch.setattr(sys, "argv", [called])
        assert program("train") == "python -m cramfast.train"


def test_a_damaged_record_is_named_before_anything_is_shown(tmp_path):
    config = resolve(starting_config("tiny", None, "cpu"))
    (tmp_path / "config.json").write_text(json.dumps(to_json(config)))
    (tmp_path / "metrics.jsonl").write_text("{\n")
    result = front("train", "--replay", str(tmp_path), "--run-dir", str(tmp_path / "run"))
    assert (result.returncode, result.stdout) == (2, "") and "metrics.jsonl" in result.stderr


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("trian", "did you mean `python -m cramfast train`?"),
        ("evalute", "did you mean `python -m cramfast evaluate`?"),
        ("--preset", "choose one of train, prepare"),
        ("xyzzy", "choose one of train, prepare"),
    ],
)
def test_an_unknown_command_ends_with_one_line(word, remedy):
    result = front(word, "--data", "text.txt")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2 and repr(word) in line and remedy in line


def test_every_command_has_a_module_with_a_main(monkeypatch):
    """Each is handed to errors.command() under the name that its --help then shows."""
    started = []
    monkeypatch.setattr(front_door, "command", lambda main: started.append((main, *sys.argv)))
    monkeypatch.setattr(front_door.signal, "signal", lambda number, handler: None)
    for name in front_door.COMMANDS:
        monkeypatch.setattr(sys, "argv", ["/usr/bin/cramfast", name, "--some", "words"])
        front_door.main()
        package = name in front_door.PACKAGES
        module = importlib.import_module(f"cramfast.{name}.__main__" if package else f"cramfast.{name}")
        assert started.pop() == (module.main, f"cramfast {name}", "--some", "words")
        assert package == (ROOT / "cramfast" / name).is_dir()


@pytest.mark.parametrize(("called", "name"), [("__main__.py", "python -m cramfast"), ("cramfast", "cramfast")])
def test_help_of_a_command_says_how_it_was_called(monkeypatch, capsys, called, name):
    monkeypatch.setattr(front_door.signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(front_door, "command", lambda main: main())
    for command in ("train", "evaluate"):
        monkeypatch.setattr(sys, "argv", [f"/somewhere/{called}", command, "--help"])
        with pytest.raises(SystemExit):
            front_door.main()
        assert capsys.readouterr().out.startswith(f"usage: {name} {command} [-h]")


def test_help_of_a_module_keeps_its_name(monkeypatch, capsys):
    from cramfast import train

    monkeypatch.setattr(sys, "argv", ["/somewhere/cramfast/train.py", "--help"])
    with pytest.raises(SystemExit):
        train.main()
    assert capsys.readouterr().out.startswith("usage: python -m cramfast.train [-h]")


def test_a_mistake_behind_the_front_door_ends_with_one_line(tmp_path):
    result = front("export", str(tmp_path / "nowhere"), str(tmp_path / "out"))
    assert result.returncode == 2 and "Traceback" not in result.stderr and "nowhere" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("start", [["-m", "cramfast", "train"], ["-c", SCRIPT, "train"]], ids=["module", "script"])
def test_a_signal_during_imports_leaves_no_traceback(tmp_path, number, start):
    """As in tests/text/test_signals.py, where `python -m cramfast.train` is tested."""
    (tmp_path / "torch.py").write_text(
        f"import os, time\ntry:\n    os.kill(os.getpid(), {int(number)})\n    time.sleep(20)\n"
        "except BaseException:\n    1 / 0\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, *start], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (130, "interrupted\n")


def test_the_entry_point_is_declared_and_leads_here():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"cramfast": "cramfast.__main__:main"} and callable(front_door.main)


def test_every_package_is_installed():
    """A room that pyproject.toml forgets is missing from a wheel, but not from an editable install."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    rooms = {f"cramfast.{path.parent.name}" for path in (ROOT / "cramfast").glob("*/__init__.py")}
    assert set(declared) == {"cramfast", "cramfast.kernels"} | rooms
