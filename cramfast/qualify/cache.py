"""Verdicts from one run to the next: a file a card, software and regime, under XDG_CACHE_HOME/cramfast/qualified."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch

import cramfast.kernels
from cramfast.config import TrainConfig
from cramfast.errors import UserError
from cramfast.kernels import dispatch, emulated, extension
from cramfast.qualify.candidates import Task
from cramfast.qualify.regime import Regime
from cramfast.qualify.verdict import Verdict
from cramfast.runtime import atomic
from cramfast.runtime.jsonfile import read_json

DRIVER = Path("/proc/driver/nvidia/version")
REMEDY = "remove it; the kernels are qualified anew"
MARGIN_S = 15.0  # beyond the time that another run's trial may take
LONGEST_S = 3600.0  # that another run is waited for, whatever its lock says
POLL_S = 0.2
OWN = "module"  # in a place: the compiled module's bytes, which differ from one build to the next of the same sources


@dataclass(frozen=True)
class Outcome:
    """What is known of this card.

    Attributes:
        place: where and in what regime, as place_of() says it.
        verdicts: of every operator that nothing was asked for; in a cache without, in a run's record with what a whole
            microbatch has shown.
        whole: whole microbatches that were compared, as microbatch() names them, with the operators that failed there
            and why.
    """

    place: dict[str, Any]
    verdicts: tuple[Verdict, ...]
    whole: dict[str, dict[str, str]] = field(default_factory=dict)


def microbatch(config: TrainConfig, text: bool, verdicts: list[Verdict]) -> str:
    """All that the comparison of a whole microbatch depends on besides its place."""
    words = "text" if text else "random words"
    chosen = [f"{v.name}={v.implementation}" for v in verdicts if v.replaces_floor]
    size = f"{config.objective}, {config.model.layers} layers, {config.microbatch_tokens} tokens of {words}"
    return " ".join([size, *config.kernels, *chosen])


def place_of(regime: Regime) -> dict[str, Any]:
    """All that a verdict depends on besides what was tried: card, software and regime."""
    return {**card(regime.device), **software(), "regime": asdict(regime)}


def card(device: str) -> dict[str, str]:
    """Name, capability and driver of the device."""
    if device != "cuda":
        return {"card": device, "capability": extension.cpu_isa, "driver": ""}
    major, minor = torch.cuda.get_device_capability()
    return {"card": torch.cuda.get_device_name(), "capability": f"sm_{major}{minor}", "driver": driver()}


def driver() -> str:
    """The driver's version, or "unknown"."""
    try:
        if found := re.search(r"Kernel Module[^\n]*?\s(\d+\.\d[\d.]*)", DRIVER.read_text(encoding="utf-8")):
            return found[1]
    except OSError:  # not everywhere is there such a file
        pass
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.split("\n")[0] or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def software() -> dict[str, str]:
    """Versions of others' kernels, hashes of ours and of what tries them."""
    others = {package.replace("-", "_"): version(package) for package in ("triton", "flash-attn", "apex")}
    compiled = getattr(sys.modules.get("cramfast._C"), "__file__", None)
    module = hash_of([Path(compiled)]) if compiled else ""
    return {"torch": torch.__version__, **others, "kernels": our_hash(), OWN: module}


def version(package: str) -> str:
    """Its version, or "" where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def our_hash() -> str:
    """12 hex digits of the sources of csrc/ (in a checkout), kernels/ and qualify/ and of how the module was built: the
    same wherever the same was built in the same way."""
    kernels = Path(cramfast.kernels.__file__).parent
    sources = [*kernels.glob("*.py"), *Path(__file__).parent.glob("*.py"), *emulated.CSRC.glob("*.*")]
    module = extension.module
    built = [module.cuda_toolkit, *module.cuda_architectures] if module is not None and module.cuda else []
    return hash_of(sorted(path for path in sources if path.is_file()), *built)


def hash_of(paths: list[Path], *words: str) -> str:
    """12 hex digits of the contents of files and of words."""
    digest = hashlib.sha256("\n".join(words).encode())
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def path_of(place: dict[str, Any], tasks: list[Task]) -> Path | None:
    """The file of a place and of what was to be tried there; None where there is no home for it."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without HOME and without an entry in the system's list
        return None
    key = json.dumps([place, [asdict(task) for task in tasks]], sort_keys=True)
    return home / "cramfast" / "qualified" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


@contextlib.contextmanager
def locked(path: Path | None, seconds: float) -> Iterator[None]:
    """Inside, no other process tries what this file is about: it waits here, and then reads.

    Where the file system has no locks, and where the other one takes longer than it may, both try.

    Args:
        seconds: what this process may take.
    """
    with contextlib.ExitStack() as stack:
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                wait_for(stack.enter_context(path.with_suffix(".lock").open("a+")), path, seconds)
        except OSError as error:
            print(
                f"note: {path} cannot be locked ({error.strerror or error}): another run may try the same beside this"
            )
        yield


def wait_for(lock: IO[str], path: Path, seconds: float) -> None:
    """Hold the lock, or give up when the one that has it should be done; says in it how long this one may take.

    Raises:
        OSError: there are no locks here.
    """
    until = None
    while not held(lock):
        if until is None:
            lock.seek(0)
            others = re.fullmatch(r"\d+(\.\d+)?", lock.read(32))
            patience = min(float(others[0]) if others else seconds, LONGEST_S) + MARGIN_S
            print(f"another run tries kernels on this card; waiting for it, {patience:g} s at most", flush=True)
            until = time.monotonic() + patience
        if time.monotonic() > until:
            print(f"note: {path}: the other run takes longer than it may; this one tries the kernels itself")
            return
        time.sleep(POLL_S)
    lock.seek(0)
    lock.truncate()
    lock.write(f"{seconds:.1f}")
    lock.flush()


def held(lock: IO[str]) -> bool:
    """Take the lock if nobody has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def read(path: Path) -> Outcome | None:
    """The outcome in a file, None where there is none.

    Raises:
        UserError: it is damaged, or may not be read.
    """
    try:
        values = read_json(path, REMEDY)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}) — make it readable, or {REMEDY}") from None
    if not values:
        return None
    try:
        verdicts = tuple(Verdict(**each) for each in values["verdicts"])
        for each in verdicts:
            dispatch.IMPLEMENTATIONS[each.op][each.implementation], dispatch.IMPLEMENTATIONS[each.op][each.floor]
        whole = {name: dict(failed) for name, failed in values["whole"].items()}
        return Outcome(dict(values["place"]), verdicts, whole)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: no outcome of a qualification ({error!r}) — {REMEDY}") from None


def write(path: Path, outcome: Outcome) -> None:
    """Raises OSError where the disk refuses."""
    values = {"place": outcome.place, "whole": outcome.whole, "verdicts": [each.json() for each in outcome.verdicts]}
    atomic.write_text(path, json.dumps(values, indent=1))
