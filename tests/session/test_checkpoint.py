"""Checkpoints: what goes in comes out, damage is named, a disk that refuses costs nothing that was there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_loader import small_config, weights
from safetensors.torch import load_file, save_file

from cramfast.config import to_json
from cramfast.errors import UserError
from cramfast.model.encoder import Encoder
from cramfast.optim.adamw import AdamW, FlatParameters
from cramfast.session import checkpoint
from cramfast.train import latest

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = small_config().model


def make(dtype=torch.bfloat16, seed=0) -> AdamW:
    torch.manual_seed(seed)
    optimizer = AdamW(
        FlatParameters(Encoder(CONFIG), dtype), beta1=0.9, beta2=0.98, eps=1e-8, weight_decay=0.0, max_norm=0.0
    )
    optimizer.exp_avg.normal_()
    optimizer.exp_avg_sq.uniform_()
    optimizer.scalars[1] = 7.0
    return optimizer


def state(step: int) -> dict:
    return {"progress": {"step": step, "tokens": 5}, "model": to_json(CONFIG)}


def test_round_trip(tmp_path):
    before, after = make(), make(seed=1)
    saved = checkpoint.save(tmp_path, before, state(3))
    assert sorted(path.name for path in saved.iterdir()) == [
        "model.safetensors", "optimizer.safetensors", "state.json"
    ]  # fmt: skip
    assert checkpoint.restore(saved, after) == state(3)
    for (name, a), (_, b) in zip(
        before.flat.views(before.flat.master), after.flat.views(after.flat.master), strict=True
    ):
        assert torch.equal(a, b), name
    assert torch.equal(before.flat.half, after.flat.half)
    for name, tensor in before.state().items():
        assert torch.equal(tensor, after.state()[name]), name


def test_loaded_model_is_the_float32_master(tmp_path):
    optimizer = make()
    saved = checkpoint.save(tmp_path, optimizer, state(3))
    for place in (tmp_path, saved):
        model, config = checkpoint.load_model(place)
        assert config == CONFIG
        master = dict(optimizer.flat.views(optimizer.flat.master))
        assert all(torch.equal(p, master[name]) for name, p in model.named_parameters())
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.load_model(tmp_path / "elsewhere")


def test_the_last_two_are_kept_and_leftovers_swept(tmp_path):
    optimizer = make()
    for step in (1, 2, 10, 11):
        checkpoint.save(tmp_path, optimizer, state(step))
    folder = tmp_path / "checkpoints"
    (folder / "unfinished-step-00000012").mkdir()
    (folder / "unfinished-step-00000012" / "model.safetensors").write_bytes(b"half")
    assert checkpoint.newest(tmp_path).name == "step-00000011"
    checkpoint.sweep(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000010", "step-00000011"]


def test_what_is_not_finite_is_not_written_and_replaces_nothing(tmp_path):
    optimizer = make()
    for step in (1, 2):
        checkpoint.save(tmp_path, optimizer, state(step))
    for values in (optimizer.flat.master, optimizer.exp_avg):
        before = values[10].item()
        values[10] = float("nan")
        with pytest.raises(UserError, match=r"step-00000003: .* not finite, so nothing is written; step-00000002"):
            checkpoint.save(tmp_path, optimizer, state(3))
        values[10] = before
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000001", "step-00000002"]
    optimizer.flat.master[10] = float("inf")
    with pytest.raises(UserError, match="no earlier checkpoint exists"):
        checkpoint.save(tmp_path / "other", optimizer, state(3))


def test_weights_that_are_not_finite_are_not_taken_up(tmp_path):
    saved = checkpoint.save(tmp_path, make(), state(3))
    tensors = load_file(saved / "model.safetensors")
    next(iter(tensors.values())).flatten()[0] = float("nan")
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: .* is not finite — it is the run's only one"):
        checkpoint.restore(saved, make())


def test_older_ones_stay_where_they_must(tmp_path):
    optimizer = make()
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, optimizer, state(step), prune=False)
    assert len(checkpoint.complete(tmp_path)) == 3
    checkpoint.save(tmp_path, optimizer, state(4))
    assert [path.name[-1] for path in checkpoint.complete(tmp_path)] == ["3", "4"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_damage_is_named(tmp_path, name):
    saved = checkpoint.save(tmp_path, make(), state(3))
    damaged = saved / name
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    with pytest.raises(UserError, match=f"{name}.*it is the run's only one: restore it"):
        checkpoint.restore(saved, make())
    checkpoint.save(tmp_path, make(), state(2))
    with pytest.raises(UserError, match=f"{name}.*remove .*step-00000003 to go on from step-00000002"):
        checkpoint.restore(saved, make())
    damaged.unlink()
    with pytest.raises(UserError, match=name):
        checkpoint.restore(saved, make())


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("progress", None, "no key 'progress'"),
        ("progress", {"colour": 1}, "progress: unknown key 'colour'"),
        ("progress", {"step": "three"}, "progress: step='three' has the wrong type"),
        ("progress", [3], "progress: no JSON object"),
        ("model", None, "no key 'model'"),
        ("model", {"layers": "two"}, "model: layers='two' has the wrong type"),
        ("model", {"head": 1}, "model: head=1 has the wrong type"),
        ("model", {"activation": "tanh"}, "model: activation='tanh' has the wrong type"),
    ],
)
def test_a_damaged_key_is_named(tmp_path, key, value, named):
    saved = checkpoint.save(tmp_path, make(), state(3))
    written = state(3) | {key: value}
    (saved / "state.json").write_text(json.dumps({k: v for k, v in written.items() if v is not None}))
    with pytest.raises(UserError, match=rf"step-00000003/state\.json: {named}"):
        checkpoint.load_model(tmp_path) if key == "model" else latest(small_config(), tmp_path)


FILL = """
import resource, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_checkpoint import checkpoint, make, state
optimizer = make()
checkpoint.save(Path(sys.argv[1]), optimizer, state(1))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write past the limit fails, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
from cramfast.errors import command
command(lambda: checkpoint.save(Path(sys.argv[1]), optimizer, state(2)))
"""


def test_a_disk_that_refuses(tmp_path):
    """A real failed write, by a limit on file size."""
    here = Path(__file__).resolve().parent
    arguments = [sys.executable, "-c", FILL, str(tmp_path), str(here), str(here.parent)]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert "step-00000002: cannot be written" in result.stderr and "step-00000001 is intact" in result.stderr
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    checkpoint.restore(checkpoint.newest(tmp_path), make())
    assert weights(tmp_path)["updates"].item() == 7.0
