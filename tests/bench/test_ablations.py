"""bench.ablations: pairs by seed, the second run at equal time, a file that is gone on with, and the table."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from fake_loader import small_config

from bench import ablations
from bench.ablations import DEFAULT, OPTIONS, TIME, TOKENS, Options, Plan, Run
from cramfast.config import TrainConfig
from cramfast.errors import UserError
from cramfast.recipes import PRESETS
from cramfast.session.budget import Budget

PLAN = Plan(1000, 10.0, "tiny", "abc", "cpu", "float32", 1, 1)


def row(option: str, seed: int, loss: float, seconds: float, equal: str = TOKENS) -> dict:
    return {"option": option, "seed": seed, "equal": equal, "heldout_loss": loss, "seconds": seconds}


ROWS = [
    row(DEFAULT, 0, 4.0, 10.0), row("Muon", 0, 3.5, 20.0), row("cosine", 0, 4.25, 10.1),
    row(DEFAULT, 1, 4.2, 10.0), row("Muon", 1, 3.9, 19.0), row("cosine", 1, 4.25, 10.0),
    row(DEFAULT, 2, 4.4, 10.0), row("Muon", 2, 3.9, 21.0),
    row("Muon", 0, 4.5, 10.0, TIME), row("Muon", 1, 4.5, 10.0, TIME),
]  # fmt: skip


def test_every_option_is_a_config_and_the_default_comes_first():
    base = dataclasses.replace(PRESETS["tiny"]("cpu"), device="cpu", dtype="float32")
    made = {name: option(base) for name, option in OPTIONS.items()}
    assert next(iter(made)) == DEFAULT and made[DEFAULT] == base
    assert len({dataclasses.astuple(config) for config in made.values()}) == len(made)
    assert all(isinstance(config, TrainConfig) for config in made.values())


def test_table_pairs_by_seed():
    cells = {line[0]: line[1:] for line in ablations.table(ROWS, PLAN).rows}
    assert list(cells) == [DEFAULT, "cosine", "Muon"]
    assert cells[DEFAULT] == ["4.200 ± 0.200", "", "", "1.00×", "3"]
    # differences -0.5, -0.3, -0.5; at equal time +0.5 and +0.3
    assert cells["Muon"] == ["3.767 ± 0.231", "-0.433 ± 0.115", "+0.400 ± 0.141", "0.50×", "3"]
    # as fast as the default, so that one run serves both; the seed without a partner counts nowhere
    assert cells["cosine"] == ["4.250 ± 0.000", "+0.150 ± 0.141", "+0.150 ± 0.141", "1.00×", "2"]


def test_a_table_is_shown_from_its_file_alone(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.jsonl"
    ablations.append(path, {"plan": vars(PLAN)})
    for found in ROWS:
        ablations.append(path, found)
    monkeypatch.setattr("sys.argv", ["ablations", "--show", "--results", str(path)])
    ablations.main()
    assert ablations.table(ROWS, PLAN).markdown() in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["ablations", "--show", "--results", str(tmp_path / "none.jsonl")])
    with pytest.raises(UserError, match=r"none\.jsonl: unreadable .* — give the file that a benchmark wrote"):
        ablations.main()


def test_only_another_speed_is_run_again_for_as_many_tokens_as_fit():
    runs = list(ablations.equal_time([DEFAULT, "cosine", "Muon"], PLAN, 3, ROWS))
    assert runs == [Run("Muon", seed, TIME, 500) for seed in range(3)]
    assert list(ablations.equal_tokens([DEFAULT, "Muon"], PLAN, 2))[1:3] == [
        Run("Muon", 0, TOKENS, 1000),
        Run(DEFAULT, 1, TOKENS, 1000),
    ]


@pytest.fixture
def pool():
    with ThreadPoolExecutor(1) as pool:  # in this process, where train_once() is another
        yield pool


@pytest.fixture
def trained(monkeypatch):
    """(config, budget) of every run; none is made."""
    made = []

    def train_once(config, prepared, budget):
        made.append((config, budget))
        return {"heldout_loss": 4.0, "heldout_accuracy": 0.1, "tokens": 600, "seconds": 2.0, "steps": 3, "skipped": 0}

    monkeypatch.setattr(ablations, "train_once", train_once)
    return made


def test_a_file_is_gone_on_with(trained, tmp_path, pool):
    config, options = small_config(), Options(results=tmp_path / "a" / "rows.jsonl", minutes_per_run=0.5, preset="tiny")
    plan, rows = ablations.open_results(options, config, tmp_path, pool)
    assert (plan.tokens, plan.seconds, rows) == (9000, 30.0, []) and trained == [(config, Budget("seconds", 20.0))]
    runs = [Run(DEFAULT, 0, TOKENS, 9000), Run("Muon", 0, TOKENS, 9000), Run("Muon", 1, TOKENS, 9000)]
    ablations.run_missing(iter(runs[:2]), rows, options, config, tmp_path, pool)
    assert [(made.optimizer, made.seed, budget.amount) for made, budget in trained[1:]] == [
        ("adamw", 0, 9000),
        ("muon", 0, 9000),
    ]
    again, found = ablations.open_results(options, config, tmp_path, pool)
    assert again == plan and found == rows and len(found) == 2
    ablations.run_missing(iter(runs), found, options, config, tmp_path, pool)
    assert len(trained) == 4 and (trained[-1][0].optimizer, trained[-1][0].seed) == ("muon", 1)
    assert len(options.results.read_text().splitlines()) == 4
    text = ablations.estimate(options, plan, found, [DEFAULT, "Muon"])
    assert text.startswith("3 runs of 9,000 tokens are missing, about 6 s of training; then up to 3 at equal time")


@pytest.mark.parametrize(
    ("options", "config", "word"),
    [
        ({"tokens": 8000}, {}, "tokens=9000, not 8000"),
        ({"preset": "mini"}, {}, "preset='tiny', not 'mini'"),
        ({"jobs": 2}, {}, "jobs=1, not 2"),
        ({}, {"lr": 1.0}, "config="),
        ({}, {"dtype": "bfloat16"}, "begun with config"),
    ],
)
def test_rows_of_other_runs_are_not_mixed(trained, tmp_path, pool, options, config, word):
    before = Options(results=tmp_path / "rows.jsonl", minutes_per_run=0.5, preset="tiny")
    ablations.open_results(before, small_config(), tmp_path, pool)
    with pytest.raises(UserError, match=word):
        ablations.open_results(dataclasses.replace(before, **options), small_config(**config), tmp_path, pool)


def test_names_are_checked():
    assert ablations.chosen(Options(only=("cosine",))) == [DEFAULT, "cosine"]
    assert ablations.chosen(Options()) == list(OPTIONS)
    with pytest.raises(UserError, match=r"--only 'sine'.*cosine"):
        ablations.chosen(Options(only=("sine",)))


@pytest.mark.parametrize(
    "words", ["--seeds 0", "--jobs 0", "--tokens -1", "--threads -1", "--minutes-per-run -1", "--minutes-per-run nan"]
)
def test_ranges_are_checked_before_anything_is_prepared(monkeypatch, words):
    monkeypatch.setattr(ablations.stages, "prepare_text", lambda config: pytest.fail("prepared"))
    monkeypatch.setattr("sys.argv", ["ablations", *words.split()])
    with pytest.raises(UserError, match=rf"^{words}(\.0)? is not possible — use "):
        ablations.main()


def test_a_foreign_file_is_refused(tmp_path, pool):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"op": "glu"}) + "\n")
    with pytest.raises(UserError, match="does not begin with a plan"):
        ablations.open_results(Options(results=tmp_path / "rows.jsonl"), small_config(), tmp_path, pool)


def test_a_run_leaves_its_figures_and_nothing_else(fake_text, tmp_path, monkeypatch):
    monkeypatch.setattr(ablations.tempfile, "tempdir", str(tmp_path))
    done = ablations.train_once(small_config(), tmp_path, Budget("tokens", 5000))
    assert set(done) == {"heldout_loss", "heldout_accuracy", "tokens", "seconds", "steps", "skipped"}
    assert done["tokens"] >= 5000 and 3 < done["heldout_loss"] < 4.5 and done["steps"] > 1 and done["skipped"] == 0
    assert not list(tmp_path.iterdir())


def test_runs_at_the_same_time_each_leave_a_row(trained, tmp_path):
    options = Options(results=tmp_path / "rows.jsonl", jobs=3)
    runs, rows = [Run(DEFAULT, seed, TOKENS, 600) for seed in range(7)], []
    with ThreadPoolExecutor(options.jobs) as pool:
        ablations.run_missing(iter(runs), rows, options, small_config(), tmp_path, pool)
    assert sorted(row["seed"] for row in rows) == list(range(7)) == sorted(config.seed for config, _ in trained)
    assert [json.loads(line) for line in options.results.read_text().splitlines()] == rows


def test_a_run_that_a_signal_ended_leaves_no_row(monkeypatch, tmp_path, pool):
    monkeypatch.setattr(ablations, "train", lambda *arguments: False)
    options, rows = Options(results=tmp_path / "rows.jsonl"), []
    with pytest.raises(KeyboardInterrupt):
        ablations.run_missing(iter([Run(DEFAULT, 0, TOKENS, 600)]), rows, options, small_config(), tmp_path, pool)
    assert not rows and not options.results.exists()


INTERRUPTED = """
import os, sys, tempfile, time
from pathlib import Path

from bench import ablations
from bench.ablations import DEFAULT, TOKENS, Options, Run
from cramfast.errors import command
from fake_loader import small_config

def train_once(config, prepared, budget):
    with tempfile.TemporaryDirectory() as scratch:
        Path(prepared, str(os.getpid())).touch()
        while config.seed or len(list(Path(prepared).iterdir())) < 2:
            time.sleep(0.01)  # seed 0 ends when both have begun, and leaves its process without work
    return {"seconds": 1.0}

def main():
    options = Options(results=Path(sys.argv[1]), jobs=2)
    runs = [Run(DEFAULT, seed, TOKENS, 600) for seed in range(2)]
    with ablations.workers(options) as pool:
        ablations.run_missing(iter(runs), [], options, small_config(), Path(sys.argv[2]), pool)

ablations.train_once = train_once
if __name__ == "__main__":
    command(main)
"""


@pytest.mark.parametrize("end", ["SIGINT", "SIGTERM"])
def test_signals_end_it_at_once(tmp_path, end):
    """Ctrl-C, which a terminal sends to every process, and SIGTERM to the first: one busy worker, one idle one."""
    script, results, begun, scratch = (tmp_path / name for name in ("script.py", "rows.jsonl", "begun", "scratch"))
    script.write_text(INTERRUPTED)
    begun.mkdir()
    scratch.mkdir()
    root = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join([str(root.parent), str(root), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, script, results, begun], env=os.environ | {"PYTHONPATH": paths, "TMPDIR": str(scratch)},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        while process.poll() is None and not results.exists():
            time.sleep(0.05)
        time.sleep(0.2)  # until the first worker waits for more
        if end == "SIGINT":
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.terminate()
        said = process.communicate(timeout=20)[1]
        assert (process.returncode, said) == (130, "interrupted\n")
        assert [json.loads(line)["seed"] for line in results.read_text().splitlines()] == [0]
        assert len(list(begun.iterdir())) == 2 and not list(scratch.iterdir())
        for worker in begun.iterdir():
            assert not Path("/proc", worker.name).exists()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
