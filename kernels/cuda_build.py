"""What the compiled module has for a GPU: the architectures it was built for, and whose code runs on the card here."""

import functools
import os
import re
import shutil

import torch

from cramfast.kernels import extension

# The first driver for each major version of CUDA: CUDA Toolkit release notes, "Minor version compatibility".
FIRST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}


def code_path(architecture: str) -> tuple[int, str]:
    """(the architecture whose code runs on a card, 860 for that of sm_86; why none does, with the remedy, or "").

    On the card itself the module is asked, once; a card that is not here gets what CUDA's rule gives it.
    """
    if torch.cuda.is_available():
        return _asked(architecture)
    return predicted(architecture, extension.module.cuda_architectures)


@functools.cache
def _asked(architecture: str) -> tuple[int, str]:
    module = extension.module
    try:
        return module.cuda_code_path(), ""
    except RuntimeError as error:
        return 0, driver_problem() or f"{error}; {_no_code(architecture, module.cuda_architectures)}"


def predicted(architecture: str, built: list[str]) -> tuple[int, str]:
    """The same by CUDA's rule: machine code of the same major version and no higher minor one, else PTX of no higher
    version (CUDA C++ programming guide, "Binary Compatibility" and "PTX Compatibility")."""
    fits = machine_code(architecture, built) or [
        _number(name) for name in _possible(architecture, built)
        if name.startswith("compute_") and _number(name) <= _number(architecture)
    ]  # fmt: skip
    return (10 * max(fits), "") if fits else (0, _no_code(architecture, built))


def machine_code(architecture: str, built: list[str]) -> list[int]:
    """What a card runs as it is, 86 for sm_86; where there is none, the driver first compiles PTX, at its first use."""
    card = _number(architecture)
    found = [_number(name) for name in _possible(architecture, built) if name.startswith("sm_")]
    return [number for number in found if number // 10 == card // 10 and number <= card]


def _possible(architecture: str, built: list[str]) -> list[str]:
    """Without what is for one card alone, and not for this: sm_90a is for sm_90."""
    return [name for name in built if not name.endswith("a") or _number(name) == _number(architecture)]


def _number(name: str) -> int:
    return int(re.search(r"\d+", name)[0])


def _no_code(architecture: str, built: list[str]) -> str:
    number = _number(architecture)
    return f"the module has code for {summary(built)}, not for sm_{number}; CUDAARCHS={number} pip install -e ."


def summary(built: list[str]) -> str:
    """ "sm_75, sm_86 and PTX of compute_86"."""
    machine_code = ", ".join(name for name in built if name.startswith("sm_"))
    ptx = ", ".join(name for name in built if name.startswith("compute_"))
    return " and ".join(part for part in (machine_code, ptx and f"PTX of {ptx}") if part) or "no card"


def bfloat16_obstacle(architecture: str) -> str:
    """Why the tensor-core kernels take no bfloat16 on a card, with the remedy if there is one; "" when they do."""
    path, why = code_path(architecture)
    if why or path >= 800:
        return why
    number = _number(architecture)
    if number < 80:
        return "bfloat16 needs sm_80 or later; float16 runs here"
    return f"the module runs the code of sm_{path // 10} here, without bfloat16; CUDAARCHS={number} pip install -e ."


def versions() -> tuple[int, int] | None:
    """CUDA versions as 13000 for 13.0: what the driver takes (0 without a driver) and the module's runtime; None where
    the module has no CUDA operators."""
    module = extension.module
    if module is None or not module.cuda:
        return None
    return module.cuda_versions()


def driver_problem() -> str:
    """What to do where a driver is there and too old for the toolkit that built the module; "" otherwise."""
    found = versions()
    if not found or not found[0] or found[0] // 1000 >= found[1] // 1000:
        return ""  # a driver runs every runtime of its own major version
    driver, runtime = found
    first = FIRST_DRIVER.get(runtime // 1000)
    newer = f"driver {first} or later" if first else "newer driver"
    return (
        f"the NVIDIA driver takes CUDA {written(driver)}, the module was built with {written(runtime)}; install "
        f"{newer}, or build with an older toolkit: CUDA_HOME=(that of CUDA {driver // 1000}) pip install -e ."
    )


def written(version: int) -> str:
    """13000 is 13.0."""
    return f"{version // 1000}.{version % 1000 // 10}"


def nvcc() -> str | None:
    """The CUDA compiler that an install takes, as csrc/cuda.cmake finds it; None without one.

    CUDACXX names it, else it is that of CUDA_HOME or CUDA_PATH, else of PATH, else of /usr/local/cuda.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = (home and os.path.join(home, "bin"), os.environ.get("PATH"), not home and "/usr/local/cuda/bin")
    path = os.pathsep.join(filter(None, folders))
    named = os.environ.get("CUDACXX")
    return (named and shutil.which(named, path=path)) or shutil.which("nvcc", path=path)
