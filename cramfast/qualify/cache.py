"""Verdicts from one run to the next: a file a card, software and regime, under XDG_CACHE_HOME/cramfast/qualified."""

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import cramfast.kernels
from cramfast.errors import UserError
from cramfast.kernels import dispatch, extension
from cramfast.qualify.candidates import Task
from cramfast.qualify.regime import Regime
from cramfast.qualify.verdict import Verdict
from cramfast.runtime import atomic
from cramfast.runtime.jsonfile import read_json

DRIVER = Path("/proc/driver/nvidia/version")
REMEDY = "remove it; the kernels are qualified anew"


@dataclass(frozen=True)
class Outcome:
    """What is known of this card.

    Attributes:
        place: where and in what regime, as place_of() says it.
        verdicts: of every operator that nothing was asked for.
        whole: whether a whole microbatch of real text has agreed, too.
    """

    place: dict[str, Any]
    verdicts: tuple[Verdict, ...]
    whole: bool = False

    def with_verdicts(self, verdicts: list[Verdict], whole: bool) -> "Outcome":
        return replace(self, verdicts=tuple(verdicts), whole=whole)


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
    """Versions of torch and Triton, and a hash of our kernels and of what tries them."""
    return {"torch": torch.__version__, "triton": version("triton"), "kernels": our_hash()}


def version(package: str) -> str:
    """Its version, or "" where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def our_hash() -> str:
    """12 hex digits of the compiled module and of the sources of kernels/ and qualify/."""
    compiled = getattr(sys.modules.get("cramfast._C"), "__file__", None)
    sources = [*Path(cramfast.kernels.__file__).parent.glob("*.py"), *Path(__file__).parent.glob("*.py")]
    digest = hashlib.sha256()
    for path in sorted(filter(None, [compiled and Path(compiled), *sources])):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def path_of(place: dict[str, Any], tasks: list[Task]) -> Path:
    """The file of a place and of what was to be tried there."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = json.dumps([place, [asdict(task) for task in tasks]], sort_keys=True)
    return home / "cramfast" / "qualified" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def read(path: Path) -> Outcome | None:
    """The outcome in a file, None where there is none.

    Raises:
        UserError: it is damaged.
    """
    values = read_json(path, REMEDY)
    if not values:
        return None
    try:
        verdicts = tuple(Verdict(**each) for each in values["verdicts"])
        for each in verdicts:
            dispatch.IMPLEMENTATIONS[each.op][each.implementation], dispatch.IMPLEMENTATIONS[each.op][each.floor]
        return Outcome(dict(values["place"]), verdicts, bool(values["whole"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: no outcome of a qualification ({error!r}) — {REMEDY}") from None


def write(path: Path, outcome: Outcome) -> None:
    """Raises OSError where the disk refuses."""
    values = {"place": outcome.place, "whole": outcome.whole, "verdicts": [each.json() for each in outcome.verdicts]}
    atomic.write_text(path, json.dumps(values, indent=1))
