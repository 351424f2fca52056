"""Checkpoints that survive a kill at any moment: safetensors and JSON in a folder that appears by one rename."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cramfast.config import ModelConfig, from_json
from cramfast.errors import UserError
from cramfast.model.encoder import Encoder
from cramfast.optim.adamw import AdamW
from cramfast.optim.sharding import Part

KEPT = 2
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
AVERAGE = "ema.safetensors"  # only in runs that average their weights
UNFINISHED = "unfinished-"  # prefix of folders being written or removed; swept at the next start


def save(run_dir: Path, optimizer: AdamW, state: dict[str, Any], prune: bool = True) -> Path:
    """Write checkpoints/step-XXXXXXXX and remove all but the last two; whole tensors, however many processes there are.

    Args:
        run_dir: the run's folder.
        optimizer: holds master weights, moments and, if there is one, the average of the weights; of all processes,
            which all call this: process 0 writes.
        state: JSON values: `progress` (its `step` names the folder) and `model`, which load_model() needs.
        prune: whether older ones may go; not where this one may be the beginning of the end.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: the disk refused, or a number is not finite; earlier checkpoints are untouched.
    """
    tensors = {MODEL: optimizer.weights(), OPTIMIZER: optimizer.state()}
    if optimizer.average is not None:
        tensors[AVERAGE] = optimizer.averages()
    return optimizer.team.first(lambda: write(run_dir, tensors, state, prune))


def write(run_dir: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], prune: bool = True) -> Path:
    """save() of tensors by file and name."""
    folder = run_dir / "checkpoints"
    target = folder / f"step-{state['progress']['step']:08d}"
    if target.exists():  # the same step of the same run: already complete
        return target
    partial = folder / (UNFINISHED + target.name)
    for name, tensor in (pair for of_file in tensors.values() for pair in of_file.items()):
        if not tensor.isfinite().all():
            raise UserError(
                f"{target}: {name} is not finite, so nothing is written; {kept(run_dir)} — start anew with a lower "
                "--lr, a smaller --max-norm or --dtype float32"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name, of_file in tensors.items():
            save_file(of_file, partial / name, None if name == OPTIMIZER else {"format": "pt"})
        (partial / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            flush_to_disk(path)
        partial.rename(target)
        flush_to_disk(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{target}: cannot be written ({error}); {kept(run_dir)} — free disk space, then --resume"
        ) from None
    for old in complete(run_dir)[:-KEPT] if prune else ():
        discarded = folder / (UNFINISHED + old.name)
        old.rename(discarded)  # first the name: a kill inside rmtree must not leave half a checkpoint under a good name
        shutil.rmtree(discarded)
    return target


def instead(damaged: Path) -> str:
    """What to do where a checkpoint is damaged, in words."""
    others = [path.name for path in complete(damaged.parent.parent) if path.name < damaged.name]
    if others:
        return f"remove {damaged} to go on from {others[-1]}"
    return "it is the run's only one: restore it from a copy, or begin a new run"


def kept(run_dir: Path) -> str:
    """What of a run is there when something goes wrong, in words."""
    previous = newest(run_dir)
    return f"{previous.name} is intact" if previous else "no earlier checkpoint exists"


def flush_to_disk(path: Path) -> None:
    """fsync one file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def complete(run_dir: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-????????"))


def newest(run_dir: Path) -> Path | None:
    """The checkpoint a resume starts from, or None."""
    return next(reversed(complete(run_dir)), None)


def sweep(run_dir: Path) -> None:
    """Remove what a killed save left behind."""
    for leftover in (run_dir / "checkpoints").glob(UNFINISHED + "*"):
        shutil.rmtree(leftover)


@torch.no_grad()
def restore(checkpoint: Path, optimizer: AdamW) -> dict[str, Any]:
    """Load weights, moments and average in place; return the saved state.

    Raises:
        UserError: a damaged file, or shapes of another model.
    """
    flat = optimizer.flat
    stored = copy_into(dict(flat.views(flat.master)), checkpoint / MODEL)
    if spoiled := next((name for name, tensor in stored.items() if not tensor.isfinite().all()), None):
        raise UserError(f"{checkpoint / MODEL}: {spoiled} is not finite — {instead(checkpoint)}")
    stored = copy_into({"updates": optimizer.updates}, checkpoint / OPTIMIZER)
    for kind, (values, parts) in optimizer.buffers().items():
        copy_own(optimizer, values, parts, stored, kind + ".", checkpoint / OPTIMIZER)
    if optimizer.average is not None:
        parts, path = optimizer.sharding.parts, checkpoint / AVERAGE
        copy_own(optimizer, optimizer.average.values, parts, read_tensors(path), "", path)
    flat.refresh_half()
    return read_state(checkpoint)


def copy_own(
    optimizer: AdamW, values: Tensor, parts: list[Part], stored: dict[str, Tensor], prefix: str, path: Path
) -> None:
    """Fill this process's entries of a buffer from whole tensors; `prefix` and a parameter's name are their names.

    Raises:
        UserError: a tensor that is missing or of another shape.
    """
    for name, first, piece in optimizer.sharding.pieces(values, parts):
        tensor = fitting(stored, prefix + name, optimizer.flat.places[name][1], path)
        piece.copy_(tensor.flatten()[first : first + len(piece)])


def copy_into(targets: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Fill the targets from a safetensors file; all that it holds.

    Raises:
        UserError: a damaged file, a tensor that is missing or of another shape.
    """
    stored = read_tensors(path)
    for name, target in targets.items():
        target.copy_(fitting(stored, name, target.shape, path))
    return stored


def fitting(stored: dict[str, Tensor], name: str, shape: torch.Size, path: Path) -> Tensor:
    """One of the tensors read from a file.

    Raises:
        UserError: it is missing or has another shape.
    """
    if name not in stored or stored[name].shape != shape:
        raise UserError(f"{path}: {name} is missing or has another shape — the file belongs to another model")
    return stored[name]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        UserError: missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: unreadable ({error}) — {instead(path.parent)}") from None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint.

    Raises:
        UserError: missing or damaged.
    """
    path = checkpoint / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError("no JSON object")
        return state
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: unreadable ({error}) — {instead(checkpoint)}") from None


def read_part(checkpoint: Path, key: str, cls: type) -> Any:
    """One key of state.json as a dataclass: `model` as ModelConfig, `progress` as Progress.

    Raises:
        UserError: state.json or the key in it is missing or damaged.
    """
    path, state = checkpoint / "state.json", read_state(checkpoint)
    if key not in state:
        raise UserError(f"{path}: no key {key!r} — {instead(checkpoint)}")
    return from_json(cls, state[key], f"{path}: {key}")


def load_model(path: str | Path) -> tuple[Encoder, ModelConfig]:
    """Rebuild the encoder of a run folder (its newest checkpoint) or of one checkpoint folder; float32, on the CPU.

    A run that averages its weights (ema_decay) gives the average; one of replaced-token detection the encoder without
    its generator, and `fills_masks` is False.

    Raises:
        UserError: no checkpoint there, or a damaged one.
    """
    path = Path(path)
    checkpoint = path if (path / "state.json").exists() else newest(path)
    if checkpoint is None:
        raise UserError(f"{path}: no checkpoint there — give a run folder made by python -m cramfast.train")
    config = read_part(checkpoint, "model", ModelConfig)
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are overwritten; the caller's generator stays put
        model = Encoder(config)
    with torch.no_grad():
        averaged = (checkpoint / AVERAGE).exists()
        stored = copy_into(dict(model.named_parameters()), checkpoint / (AVERAGE if averaged else MODEL))
    model.fills_masks = "detector.weight" not in stored
    return model.eval(), config
