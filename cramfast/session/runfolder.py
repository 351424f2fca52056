"""The folder of a run: runs/NAME with config.json, the prepared text's description, metrics and checkpoints."""

import contextlib
import fcntl
import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cramfast.config import HARMLESS_KEYS, TrainConfig, config_hash, differing_key, flatten, read_config, to_json
from cramfast.errors import UserError
from cramfast.model.encoder import Encoder
from cramfast.runtime import atomic
from cramfast.session import checkpoint, kernelchoice
from cramfast.session.metrics import measure_matmul_peak
from cramfast.text.prepared import read_manifest

COPIED = ("tokenizer.json", "manifest.json", "heldout.txt")
REPLAYED = "replay.jsonl"  # record of the run that this one repeats
DEFAULT_PARENT = Path("runs")


def new_name(preset: str) -> Path:
    """runs/<local time>-<preset>, made different where that second is taken."""
    base = DEFAULT_PARENT / f"{time.strftime('%Y%m%d-%H%M%S')}-{preset}"
    candidates = (base, *(base.with_name(f"{base.name}-{number}") for number in range(2, 100)))
    return next(path for path in candidates if not path.exists())


def newest_run(parent: Path = DEFAULT_PARENT) -> Path | None:
    """The run folder that was checkpointed last, or None."""
    runs = [path for path in parent.glob("*") if checkpoint.newest(path)]
    return max(runs, key=lambda path: checkpoint.newest(path).stat().st_mtime, default=None)


def find_resumed(resume: str, run_dir: Path | None) -> Path | None:
    """The folder `--resume` means; "auto" is run_dir, or else the newest run, if it has a config.

    Raises:
        UserError: a named folder that holds no run, or two different folders.
    """
    if resume == "auto":
        folder = run_dir or newest_run()
        return folder if folder and (folder / "config.json").exists() else None
    if run_dir is not None and run_dir.resolve() != Path(resume).resolve():
        raise UserError(f"--resume {resume} with --run-dir {run_dir}: two folders — a resumed run stays in its own")
    if not (Path(resume) / "config.json").exists():
        raise UserError(f"--resume {resume}: no run there (config.json is missing) — see the folders under runs/")
    return Path(resume)


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Make the folder where it is missing, and keep a second process out of it from create() to the last file.

    Raises:
        UserError: another process is there, or something that is no run, or the disk refuses.
    """
    lock, stored = run_dir / ".lock", run_dir / "config.json"
    with refusals_named(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        # A process killed before its config.json leaves a lock and a part of that file, and no more.
        others = (path for path in run_dir.iterdir() if path.name != lock.name and not atomic.is_partial(path))
        if not stored.exists() and any(others):
            raise UserError(f"{run_dir}: not empty and no run — choose another --run-dir")
        file = lock.open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run_dir}: another process is training here — wait for it, or stop it first") from None
        yield


@contextlib.contextmanager
def refusals_named(run_dir: Path) -> Iterator[None]:
    """Turns an OSError into a UserError that names the run's folder."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{run_dir}: cannot be written ({error.strerror or error}) — free disk space, make it writable, "
            "or choose another --run-dir"
        ) from None


def create(run_dir: Path, config: TrainConfig, prepared: Path, replay: Path | None = None) -> None:
    """Fill a new run's folder, or go on with its own: same config but for harmless keys, same prepared text.

    The caller holds its lock. `replay` is the run whose record this one follows; the record is copied, so that a
    resume follows it too.

    Raises:
        UserError: config or text changed since the run (or the replayed one) began, or the disk refuses.
    """
    stored = run_dir / "config.json"
    if stored.exists():
        old = read_config(stored)
        key = differing_key(old, replace(config, kernels=old.kernels))  # others give other bits, as is told
        if key:
            raise UserError(
                f"{run_dir}: {key}={flatten(config)[key]!r} but the run began with {flatten(old)[key]!r} — "
                "a resumed run keeps its values; start a new run to change them"
            )
        check_unedited(run_dir, old)
    for run in filter(None, (run_dir, replay)):
        if (run / "manifest.json").exists() and read_manifest(run)["files"] != read_manifest(prepared)["files"]:
            raise UserError(f"{run}: the text in {prepared} is not the one the run began with — start a new run")
    with refusals_named(run_dir):
        atomic.sweep(run_dir)
        atomic.write_text(stored, json.dumps(to_json(config), indent=1))
        checkpoint.sweep(run_dir)
        for name in COPIED:
            atomic.copy_file(prepared / name, run_dir / name)
        if replay:
            atomic.copy_file(replay / "metrics.jsonl", run_dir / REPLAYED)


def asked_for(run_dir: Path) -> dict[str, Any]:
    """The config of a run's folder as JSON; empty where train() was called on a folder without one."""
    stored = run_dir / "config.json"
    return to_json(read_config(stored)) if stored.exists() else {}


def check_unedited(run_dir: Path, config: TrainConfig) -> None:
    """Raise UserError where config.json says of a run what its newest checkpoint does not: it was edited by hand."""
    newest = checkpoint.newest(run_dir)
    trained = checkpoint.read_state(newest).get("config", {}) if newest else {}
    now, then = flat_json(to_json(config)), flat_json(trained)
    for key in then.keys() & now.keys() - {*HARMLESS_KEYS, "kernels"}:
        if then[key] != now[key]:
            raise UserError(
                f"{run_dir / 'config.json'}: {key}={now[key]!r}, but {newest.name} was trained with {then[key]!r} — "
                "restore the value; a resumed run keeps it"
            )


def flat_json(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model.width": 768, ...} of a config's JSON."""
    flat = {}
    for key, value in values.items():
        flat.update(flat_json(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def describe(config: TrainConfig, model: Encoder, world: int = 1) -> dict[str, Any]:
    """What the record says once per session: device, versions, the implementation of each op, the matmul peak; of
    `world` processes like this one together, threads aside."""
    device, dtype = torch.device(config.device), getattr(torch, config.dtype)
    peak = measure_matmul_peak(dtype, device)
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": config.dtype,
        "parameters": sum(p.numel() for p in model.parameters()),
        "config_hash": config_hash(config),
        "versions": {name: version(name) for name in ("cramfast", "torch", "numpy")}
        | {"python": sys.version.split()[0]},
        "kernels": [asdict(choice) for choice in kernelchoice.choices(config)],
        "processes": world,
        "matmul_peak_flops": peak.flops * world,
        "matmul_peak_busy": peak.busy,
    }


def cpu_name() -> str:
    """The processor's name as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
