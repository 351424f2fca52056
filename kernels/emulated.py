"""Builds the CUDA operators for csrc/emulator with a host compiler, on request, and loads them: a tool of the tests.

Needs a checkout, a C++ compiler and pybind11; nothing at run time asks for it. The result is kept in the user's cache
folder under a hash of all sources, so that one change compiles one file.
"""

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

CSRC = Path(__file__).resolve().parent.parent / "csrc"
ARCHITECTURES = (750, 860)
# Each library keeps its own emulator: hidden symbols, and no "unique" ones, which the loader would share.
_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique")
_WARNINGS_OFF = ("-w",)  # another compiler may warn of something else; CI compiles the same files with nvcc


def missing_reason() -> str:
    """Why the emulated operators cannot be built on this machine; empty when they can."""
    if not CSRC.is_dir():
        return "no checkout: the sources in csrc/ are not installed with the package"
    if compiler() is None:
        return "no C++ compiler (CXX, g++, c++ or clang++)"
    if importlib.util.find_spec("pybind11") is None:
        return "no pybind11; pip install pybind11"
    return ""


def compiler() -> str | None:
    """The host compiler: CXX, or the first one found."""
    return next(
        (found for name in (os.environ.get("CXX"), "g++", "c++", "clang++") if name and (found := shutil.which(name))),
        None,
    )


def cache_folder() -> Path:
    """Where builds are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "cramfast" / "emulator"


def build(name: str, sources: Iterable[Path], architecture: int, includes: Iterable[str] = ()) -> Path:
    """Compile .cu and .cpp sources and the emulator into one shared library; return its path.

    Raises:
        RuntimeError: the compiler refused, with its message.
    """
    sources = [*sources, *sorted((CSRC / "emulator").glob("*.cpp"))]
    headers = sorted([*CSRC.glob("*.h"), *(CSRC / "emulator").glob("*.h")])
    common = hashlib.sha256("\n".join([*_FLAGS, compiler() or "", sys.version, *includes]).encode())
    for header in headers:
        common.update(header.read_bytes())
    flags = [*_FLAGS, *_WARNINGS_OFF, f"-DCRAMFAST_EMULATED={architecture}", f"-I{CSRC}", *includes]
    cache_folder().mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        key = common.copy()
        key.update(f"{source.name} {architecture}".encode() + source.read_bytes())
        target = cache_folder() / f"{source.stem}-{key.hexdigest()[:16]}.o"
        if not target.exists():
            _run([*flags, "-c", "-x", "c++", str(source), "-o"], target)
        return target

    with (cache_folder() / f"sm{architecture // 10}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes of one test run wait for each other's objects
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
    key = hashlib.sha256("\n".join(o.name for o in objects).encode()).hexdigest()[:16]
    library = cache_folder() / f"{name}-sm{architecture // 10}-{key}.so"
    if not library.exists():
        _run(["-shared", *map(str, objects), "-o"], library)
    return library


def _run(arguments: list[str], target: Path) -> None:
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    result = subprocess.run([compiler() or "g++", *arguments, str(partial)], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"emulator: {target.name} does not compile:\n{result.stderr}")
    partial.replace(target)  # another process may be building the same file


_modules: dict[int, ModuleType] = {}


def load(architecture: int) -> ModuleType:
    """The module of all CUDA operators on the emulator, taking the code path of this architecture (750 or 860)."""
    if architecture not in _modules:
        import pybind11

        includes = (f"-I{pybind11.get_include()}", f"-I{_python_include()}")
        sources = [CSRC / "bindings.cpp", *sorted(CSRC.glob("*_cuda.cu"))]
        path = build("_emulated", sources, architecture, includes)
        # pybind11 gives back the module that it made first under a full name, whatever the file.
        spec = importlib.util.spec_from_file_location(f"sm{architecture // 10}._emulated", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        _modules[architecture] = module
    return _modules[architecture]


def _python_include() -> str:
    return sysconfig.get_paths()["include"]
