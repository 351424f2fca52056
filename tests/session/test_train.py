"""The loop: it learns, it records what it did, a record repeats it, and what is not finite is left out."""

import ast
import inspect
import json
import math
import os
import shutil
from itertools import pairwise
from pathlib import Path

import fake_loader
import pytest
import torch
from fake_loader import rows, run, same_bits, small_config, weights

from cramfast import commandline, stages, train
from cramfast import config as config_module
from cramfast.batches import feed
from cramfast.config import config_hash, differing_key, from_json, to_json
from cramfast.errors import UserError
from cramfast.model.encoder import Encoder
from cramfast.recipes import resolve
from cramfast.session import checkpoint, runfolder
from cramfast.session.budget import Progress, read_replay
from cramfast.text.prepared import MANIFEST_KEYS
from cramfast.train import advance

pytestmark = pytest.mark.usefixtures("fake_text")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of 40 updates, evaluated about every fifth of its time."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        fake_loader.install(patch.setattr)
        torch.set_num_threads(1)  # as the fixture one_thread, which only lives as long as a test
        yield run(tmp_path_factory.mktemp("runs") / "whole", "40steps", eval_interval=0.05)
    torch.set_num_threads(threads)


def test_learns_and_records(finished):
    steps, evaluations = rows(finished), rows(finished, "heldout_loss")
    assert [row["step"] for row in steps] == list(range(1, 41))
    assert set(steps[0]) == {
        "step", "tokens", "flops", "seconds", "fraction", "microbatches", "lr", "loss", "grad_norm", "skipped",
        "tokens_per_s", "mfu",
    }  # fmt: skip
    assert [row["fraction"] for row in steps] == [index / 40 for index in range(40)]
    assert [steps[index]["microbatches"] for index in (0, 24, 39)] == [1, 4, 4]
    assert all(a["tokens"] < b["tokens"] and a["seconds"] < b["seconds"] for a, b in pairwise(steps))
    assert evaluations[0]["step"] == 0 and evaluations[-1]["step"] == 40 and len(evaluations) >= 2
    assert evaluations[0]["heldout_loss"] == pytest.approx(math.log(64), abs=0.1)
    assert evaluations[-1]["heldout_loss"] < evaluations[0]["heldout_loss"] - 0.2
    header = json.loads((finished / "metrics.jsonl").read_text().splitlines()[0])["run"]
    assert header["matmul_peak_flops"] > 0 and {k["op"] for k in header["kernels"]} >= {"attention", "adamw"}
    assert list((finished / "tensorboard").iterdir())


def test_replay_repeats_the_run(finished, tmp_path):
    """Another lr schedule position or batch size anywhere would show in the weights."""
    again = run(tmp_path / "again", read_replay(finished / "metrics.jsonl"), eval_interval=0.05)
    assert same_bits(weights(finished), weights(again))
    assert [row["loss"] for row in rows(again)] == [row["loss"] for row in rows(finished)]


def test_two_seeds_differ(finished, tmp_path):
    assert not same_bits(weights(finished), weights(run(tmp_path / "other", "40steps", seed=1)))


def test_bfloat16_learns_as_float32_does(finished, tmp_path):
    other = run(tmp_path / "half", "40steps", dtype="bfloat16")
    last = rows(finished, "heldout_loss")[-1]["heldout_loss"]
    assert rows(other, "heldout_loss")[-1]["heldout_loss"] == pytest.approx(last, abs=0.1)


def test_budgets_end_where_they_should(tmp_path):
    steps = rows(run(tmp_path / "tokens", "5000tokens"))
    assert steps[-2]["tokens"] < 5000 <= steps[-1]["tokens"]
    steps = rows(run(tmp_path / "flops", "2e9flops"))
    assert steps[-2]["flops"] < 2e9 <= steps[-1]["flops"]
    steps = rows(run(tmp_path / "seconds", "0.3s"))
    assert steps[-2]["seconds"] < 0.3 <= steps[-1]["seconds"]


def spoil(monkeypatch, when) -> None:
    """Multiply the loss of some microbatches by infinity."""
    plain, calls = Encoder.loss, iter(range(10**6))
    monkeypatch.setattr(
        Encoder, "loss", lambda self, batch: plain(self, batch) * (math.inf if when(next(calls)) else 1)
    )


def test_non_finite_update_is_skipped(monkeypatch, tmp_path):
    spoil(monkeypatch, lambda call: call in (3, 4))  # call 0 is the warm-up
    steps = rows(run(tmp_path / "run", "8steps", batch_tokens=256))
    assert [row["skipped"] for row in steps] == [0, 0, 1, 1, 0, 0, 0, 0]
    assert [row["loss"] is None for row in steps] == [False, False, True, True, False, False, False, False]
    saved = weights(tmp_path / "run")
    assert saved["updates"].item() == 6
    assert all(tensor.isfinite().all() for tensor in saved.values())


def test_twenty_in_a_row_end_the_run(monkeypatch, tmp_path):
    spoil(monkeypatch, lambda call: call > 5)
    with pytest.raises(UserError, match=r"20 times in a row.*is kept.*--lr"):
        run(tmp_path / "run", "100steps", batch_tokens=256, checkpoint_interval=1e-9)
    assert len(rows(tmp_path / "run")) == 25
    assert weights(tmp_path / "run")["updates"].item() == 5
    # Of before the first that was skipped: none of the twenty replaced it.
    assert [path.name for path in checkpoint.complete(tmp_path / "run")] == ["step-00000004", "step-00000005"]


def test_finite_gradient_with_non_finite_loss_is_skipped(monkeypatch, tmp_path):
    plain = Encoder.loss
    monkeypatch.setattr(Encoder, "loss", lambda self, batch: plain(self, batch) + math.nan)
    with pytest.raises(UserError, match="20 times in a row"):
        run(tmp_path / "run", "100steps")


def test_loss_scale_halves_and_doubles():
    before = Progress(loss_scale=1024.0, steady_steps=5)
    after = advance(before, (0, 1), 10, 1.0, 1.0, True, True)
    assert (after.loss_scale, after.steady_steps, after.skipped, after.skipped_in_row) == (512.0, 0, 1, 1)
    steady = advance(Progress(loss_scale=1024.0, steady_steps=1999), (0, 1), 10, 1.0, 1.0, False, True)
    assert (steady.loss_scale, steady.steady_steps) == (2048.0, 0)
    assert advance(before, (0, 1), 10, 1.0, 1.0, True, False).loss_scale == 1024.0


def test_evaluation_is_the_loss_kernels_mean():
    """evaluate() scores in plain PyTorch; the training loss must agree with it."""
    torch.manual_seed(0)
    config = small_config()
    model = Encoder(config.model)
    batches = feed.heldout_batches(config, None, torch.device("cpu"))
    expected = sum(model.loss(batch).item() for batch in batches) / len(batches)
    assert feed.evaluate(model, batches)[0] == pytest.approx(expected, rel=1e-5)


def test_config_round_trip_and_hash():
    config = small_config(data=("a.txt", "b.txt"))
    assert from_json(type(config), to_json(config)) == config
    assert config_hash(config) == config_hash(small_config(data=("moved/a.txt", "b.txt"), budget="1h"))
    assert config_hash(config) != config_hash(small_config(data=("a.txt", "b.txt"), seed=1))
    assert differing_key(config, small_config(data=("a.txt", "b.txt"), lr=1.0)) == "lr"
    with pytest.raises(UserError, match="unknown key 'colour'"):
        from_json(type(config), {"colour": 1})


def parsed(*args: str):
    return commandline.parse(list(args))


def test_command_line_overrides_a_recipe():
    request = parsed("--preset", "tiny", "--lr", "0.5", "--model.layers", "3", "--data", "a", "b", "--device", "cpu")
    config = request.config
    assert (config.preset, config.lr, config.model.layers) == ("tiny", 0.5, 3)
    assert config.data == (os.path.abspath("a"), os.path.abspath("b"))
    assert config.dtype in ("float32", "bfloat16") and str(request.run_dir).endswith("-tiny")
    config = parsed("--preset", "tiny", "--data", "hf:wikitext", "--tokenizer", "own.json", "--device", "cpu").config
    assert (config.data, config.tokenizer) == (("hf:wikitext",), os.path.abspath("own.json"))


def test_command_line_takes_a_recipe():
    config = parsed("--preset", "mini", "--recipe", "crammed", "--lr", "0.5", "--device", "cpu").config
    assert (config.recipe, config.schedule, config.lr, config.model.positions) == (
        "crammed",
        "triangle",
        0.5,
        "sinusoidal",
    )
    assert parsed("--preset", "mini", "--optimizer", "muon", "--device", "cpu").config.optimizer == "muon"


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--preset", "huge"], "huge.*tiny, mini"),
        (["--recipe", "slow"], "slow.*cramfast, crammed"),
        (["--ema-decay", "1"], "ema_decay=1"),
        (["--z-loss", "-0.1"], "z_loss=-0.1"),
        (["--mask-fraction", "1.5"], "mask_fraction=1.5"),
        (["--sequence-len", "4096"], "sequence_len=4096"),
        (["--device", "cpu", "--dtype", "float16"], "float16"),
        (["--resume", "nowhere"], "nowhere"),
        (["--resume", "a", "--replay", "b"], "one of them"),
        (["--model.heads", "5"], "heads"),
        (["--model.pad-id", "99999"], "model.pad_id=99999"),
    ],
)
def test_values_that_cannot_work_are_named(args, word):
    with pytest.raises(UserError, match=word):
        parsed(*args)


def test_only_missing_text_is_called_docstrings(capsys):
    commandline.print_config(small_config())
    output = capsys.readouterr().out
    assert "data=(docstrings)" in output and "kernels=()" in output


def test_every_key_has_a_text():
    """--help shows it: each field of a config is followed by its docstring, but for those that are configs."""
    for node in ast.parse(inspect.getsource(config_module)).body:
        body = node.body if isinstance(node, ast.ClassDef) else []
        for field, after in pairwise([*body, None]):
            if isinstance(field, ast.AnnAssign) and not isinstance(field.value, ast.Call):
                assert isinstance(after, ast.Expr), f"{node.name}.{field.target.id}"


def test_unknown_flag_gets_a_suggestion(capsys):
    with pytest.raises(SystemExit) as stop:
        parsed("--learning-rate", "1")
    assert stop.value.code == 2
    with pytest.raises(SystemExit):
        parsed("--mask-fracton", "0.2")
    assert "--mask-fraction" in capsys.readouterr().err


def test_a_folder_in_use_is_refused(finished, tmp_path):
    with pytest.raises(UserError, match="--resume"):
        parsed("--run-dir", str(finished))
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"), runfolder.locked(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("place", ["/proc/cannot", "/dev/null", "/dev/null/below"])
def test_a_folder_that_cannot_be_made_is_named(place):
    with pytest.raises(UserError, match=rf"^{place}: cannot be written .*--run-dir"), runfolder.locked(Path(place)):
        pass


def test_a_run_in_the_current_folder_after_a_kill_before_its_config(tmp_path, monkeypatch):
    run, text = tmp_path / "run", tmp_path / "text"
    for folder in (run, text):
        folder.mkdir()
    for name in (".lock", ".config.json.17-0123abcd.partial"):
        (run / name).touch()
    for name in runfolder.COPIED:
        (text / name).touch()
    monkeypatch.chdir(run)
    with runfolder.locked(Path(".")):
        runfolder.create(Path("."), small_config(), text)
    assert {path.name for path in run.iterdir()} == {".lock", "config.json", *runfolder.COPIED}


def manifest_of(sha256: str) -> str:
    """As much of a prepared folder's manifest.json as a run folder looks at."""
    files = {"train.ids": {"bytes": 1, "sha256": sha256}}
    return json.dumps(dict.fromkeys(MANIFEST_KEYS, 1) | {"version": 1, "files": files})


def test_resume_keeps_the_values_of_its_run(finished, tmp_path):
    request = parsed("--resume", str(finished), "--budget", "9h")
    assert request.resuming and request.run_dir == finished and request.config.budget == "9h"
    for name in runfolder.COPIED:
        (tmp_path / name).write_text(manifest_of("a"))
    runfolder.create(finished, request.config, tmp_path)
    with pytest.raises(UserError, match=r"lr=0\.7 but the run began with 0\.003"):
        runfolder.create(finished, parsed("--resume", str(finished), "--lr", "0.7").config, tmp_path)
    (tmp_path / "manifest.json").write_text(manifest_of("b"))
    with pytest.raises(UserError, match="not the one"):
        runfolder.create(finished, request.config, tmp_path)
    with pytest.raises(UserError, match="not the one"):
        runfolder.create(tmp_path / "again", request.config, tmp_path, replay=finished)


def test_a_kill_while_the_text_is_described_again_costs_nothing(tmp_path, monkeypatch):
    run, text = tmp_path / "run", tmp_path / "text"
    for folder in (run, text):
        folder.mkdir()
    for name in runfolder.COPIED:
        (text / name).write_text(manifest_of("a"))
    runfolder.create(run, small_config(), text)

    def killed(source, target):
        Path(target).write_bytes(b"")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runfolder, "COPIED", ("manifest.json",))
        patch.setattr(shutil, "copyfile", killed)
        with pytest.raises(KeyboardInterrupt):
            runfolder.create(run, small_config(), text)
    runfolder.create(run, small_config(), text)
    assert {path.name for path in run.iterdir()} == {"config.json", *runfolder.COPIED}


def test_a_run_on_little_text_is_resumed_from_another_folder(tmp_path, monkeypatch):
    """Two lines yield fewer entries than were asked for, and are named as they lie in the first folder."""
    (tmp_path / "two.txt").write_text("one line of text\n\nand another line of it\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sizes = []
    monkeypatch.setattr(train, "train", lambda config, *_: sizes.append(config.model.vocab_size) or True)
    monkeypatch.setattr(stages, "publish", lambda run_dir: None)
    first = ["--preset", "tiny", "--data", "two.txt", "--run-dir", "run", "--device", "cpu"]
    for folder, arguments in ((tmp_path, first), (tmp_path / "elsewhere", ["--resume", "../run"])):
        monkeypatch.chdir(folder)
        monkeypatch.setattr("sys.argv", ["train", *arguments])
        train.main()
    assert sizes[0] == sizes[1] < 512
    assert len(list((tmp_path / "cache" / "cramfast" / "prepared").iterdir())) == 1


def test_auto_resumes_what_is_there(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not parsed("--resume", "auto", "--preset", "tiny").resuming
    assert not parsed("--resume", "auto", "--run-dir", str(tmp_path / "new"), "--preset", "tiny").resuming
    assert parsed("--resume", "auto", "--run-dir", str(finished)).resuming
    (tmp_path / "runs").symlink_to(finished.parent)
    assert parsed("--resume", "auto").run_dir.name == "whole"


def test_auto_is_resolved_for_this_machine():
    config = resolve(small_config(device="auto", dtype="auto"))
    assert config.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert config.dtype in ("float32", "bfloat16", "float16")
