"""Builds the extension module with CMake; everything else is in pyproject.toml. torch is not needed to build.

CRAMFAST_BUILD=cpu leaves the CUDA operators out; CRAMFAST_BUILD=none compiles nothing: PyTorch's own operators do the
work. pip shows what a build prints only when it fails, and then all of it: so the last line says what to install.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PARTS = ("all", "cpu", "none")
WITHOUT = "or, slower and on PyTorch's own operators alone: CRAMFAST_BUILD=none pip install -e ."
# What the log of a failed build holds, and what to say of it; the first that is found.
CAUSES = (
    (
        r"No CMAKE_CXX_COMPILER could be found|is not a full path to an existing compiler",
        "no C++ compiler — apt install g++, dnf install gcc-c++, conda install gxx or xcode-select --install",
    ),
    (
        r"The C\+\+ compiler\s.*?is not able to compile a simple test program",
        "the C++ compiler cannot make a program — apt install g++, dnf install gcc-c++, or set CXX to another",
    ),
    (
        r"Could NOT find Python ",
        "the headers of Python {python} are missing — apt install python{python}-dev, dnf install "
        "python{python}-devel, or take a Python that has them (conda, uv)",
    ),
    (
        r"Could NOT find OpenMP",
        "the C++ compiler has no OpenMP — CXX=g++ pip install -e ., or apt install libomp-dev, dnf install "
        "libomp-devel or brew install libomp for clang",
    ),
    (r"No space left on device", "no space left on the device — free some, or set TMPDIR to a folder elsewhere"),
    (r"Killed signal|: Killed$", "the compiler was killed, for memory as it seems — CMAKE_BUILD_PARALLEL_LEVEL=1"),
)


class BuildError(Exception):
    """A command of the build failed: its output, and one line of why."""

    def __init__(self, output: str):
        super().__init__(cause(output))


def cause(output: str) -> str:
    """One line that says why a build failed and what to install, from everything it printed."""
    for pattern, said in CAUSES:
        if re.search(pattern, output, flags=re.M | re.S):
            return said.format(python="{}.{}".format(*sys.version_info))
    # A message of our own CMake files, which CMake wraps; else the first error of a compiler; else of CMake itself.
    if match := re.search(r"^CMake Error[^\n]*\n+ +cramfast: (.*?)\n(?:Call Stack|\n)", output, flags=re.M | re.S):
        return " ".join(match[1].split())
    errors = re.findall(r"^.*\berror\b(?: ?:| --).*$|^nvcc fatal.*$|^ptxas fatal.*$", output, flags=re.M)
    errors = errors or re.findall(r"^CMake Error.*\n+ *(.*)$", output, flags=re.M)
    return errors[0].strip() if errors else "the build failed; the lines above say how"


def announce(line: str) -> None:
    """Print a line where the user sees it: in the log, and on the terminal, from which pip hides the log."""
    print(f"cramfast: {line}", flush=True)
    try:
        with open("/dev/tty", "w") as terminal:
            print(f"\ncramfast: {line}", file=terminal)
    except OSError:  # no terminal: a script or CI
        pass


def run(command: list[str]) -> None:
    """Run a command and show what it prints as it comes; lines for the user are announced.

    Raises:
        BuildError: it failed.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("-- cramfast: "):
            announce(line.removeprefix("-- cramfast: ").strip())
        else:
            print(line, end="", flush=True)
    if process.wait():
        raise BuildError("".join(lines))


def need(tool: str, how: str) -> str:
    """The path of a program of the build.

    Raises:
        SystemExit: it is not there.
    """
    found = shutil.which(tool)
    if not found:
        raise SystemExit(f"cramfast: {tool} is missing — {how}, or leave --no-build-isolation out; {WITHOUT}")
    return found


class CMakeBuild(build_ext):
    """Builds the one extension module with CMake and Ninja and puts it where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        cmake, ninja = need("cmake", "pip install cmake"), need("ninja", "pip install ninja")
        try:
            import pybind11
        except ImportError:
            raise SystemExit(f"cramfast: pybind11 is missing — pip install pybind11; {WITHOUT}") from None
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DPYBIND11_FINDPYTHON=ON",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        compile_all = [cmake, "--build", str(build)]
        if PART == "cpu":
            without_cuda(configure, compile_all, "it was built with CRAMFAST_BUILD=cpu")
            return
        try:
            run([*configure, "--fresh"])  # an older cache names programs of an older build environment
            run(compile_all)
        except BuildError as error:
            # Whatever fails in the CUDA part costs the CUDA operators alone; what fails without it, fails again.
            without_cuda(configure, compile_all, f"they did not compile when it was built: {error}")
            announce(f"built for the CPU alone, without the CUDA operators: {error}")


def without_cuda(configure: list[str], compile_all: list[str], why: str) -> None:
    """Build the CPU operators alone; what was compiled of them stays.

    Raises:
        SystemExit: they cannot be built either, with one line of why.
    """
    why = re.sub(r"[;\"\\$]", " ", why)[:300]  # CMake's special characters
    try:
        run([*configure, "-DCRAMFAST_CUDA=OFF", f"-DCRAMFAST_CUDA_MISSING={why}"])
        run(compile_all)
    except BuildError as error:
        raise SystemExit(f"cramfast: {error}; {WITHOUT}") from None


PART = os.environ.get("CRAMFAST_BUILD") or "all"

if __name__ == "__main__":
    if PART not in PARTS:
        raise SystemExit(f"cramfast: CRAMFAST_BUILD={PART}: no such part; one of {', '.join(PARTS)}")
    modules = [Extension("cramfast._C", sources=[])] if PART != "none" else []
    setup(ext_modules=modules, cmdclass={"build_ext": CMakeBuild})
