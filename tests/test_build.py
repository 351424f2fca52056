"""An install says in one line what it lacks, builds for the right cards, and keeps the CPU part if CUDA fails."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NVCC = """#!/bin/sh
for known in {known}; do echo compute_$known; done
"""


@pytest.fixture(scope="module")
def build():
    """setup.py, which installs nothing when it is imported."""
    spec = importlib.util.spec_from_file_location("cramfast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_wishes(monkeypatch):
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "CUDAARCHS", "TORCH_CUDA_ARCH_LIST", "CMAKE_ARGS", "CXX"):
        monkeypatch.delenv(name, raising=False)


# What the log says, what the last line says.


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("CMake Error at CMakeLists.txt:4 (project):\n  No CMAKE_CXX_COMPILER could be found.\n", "apt install g++"),
        ('  The C++ compiler\n\n    "/usr/bin/c++"\n\n  is not able to compile a simple test program.\n', "set CXX"),
        ("  Could NOT find Python (missing: Python_INCLUDE_DIRS Development.Module)\n", "headers of Python {python}"),
        ("  Could NOT find OpenMP_CXX (missing: OpenMP_CXX_FLAGS\n  OpenMP_CXX_LIB_NAMES)\n", "no OpenMP"),
        ("/tmp/cc.s: write error: No space left on device\n", "set TMPDIR"),
        ("c++: fatal error: Killed signal terminated program cc1plus\n", "CMAKE_BUILD_PARALLEL_LEVEL=1"),
        ("[1/2] Building\na.cu(1): error: expected an expression\n1 error detected\n", "a.cu(1): error: expected an"),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_999'\n", "nvcc fatal   : Unsupported gpu"),
        ("#error -- unsupported GNU version! gcc later than 12 are not supported!\n", "unsupported GNU version"),
        ("CMake Error at csrc/cuda.cmake:6 (message):\n  cramfast: one\n  two\nCall Stack:\n\n\n", "one two"),
        ("CMake Error at CMakeLists.txt:4 (project):\n  Something else.\n", "Something else."),
        ("ninja: stopped\n", "the lines above say how"),
    ],
)  # fmt: skip
def test_a_failed_build_ends_with_its_cause(build, log, said):
    line = build.cause("-- before\n" + log + "-- Configuring incomplete, errors occurred!\n")
    assert said.format(python="{}.{}".format(*sys.version_info)) in line and "\n" not in line
    assert "Call Stack" not in line


def programs(folder: Path, **scripts: str) -> str:
    """A PATH of its own that holds CMake, Ninja and these programs alone."""
    folder.mkdir(exist_ok=True)
    for tool in ("cmake", "ninja"):
        if not (found := shutil.which(tool)):
            pytest.skip(f"needs {tool}: pip install cmake ninja")
        script = folder / tool
        script.write_text(f'#!/bin/sh\nPATH={os.environ["PATH"]} exec "{found}" "$@"\n')
        script.chmod(0o755)
        real = os.path.realpath(found)
        if not real.endswith(".py") and Path(real).read_bytes()[:4] == b"\x7fELF":
            script.unlink()
            script.symlink_to(real)
    for name, script in scripts.items():
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    return str(folder)


def install(folder: Path, path: str, **environment: str) -> subprocess.CompletedProcess:
    """setup.py as pip runs it, with nothing else on PATH."""
    command = [sys.executable, ROOT / "setup.py", "-q", "build", "--build-base", folder / "build"]
    environment = {"PATH": path, "HOME": str(folder), "CUDA_HOME": str(folder), **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def last_line(answer: subprocess.CompletedProcess) -> str:
    assert answer.returncode == 1
    said = answer.stderr.strip()
    assert "\n" not in said and "Traceback" not in answer.stdout, answer.stdout + said
    assert "CRAMFAST_BUILD=none" in said
    return said


def test_no_compiler(tmp_path):
    said = last_line(install(tmp_path, programs(tmp_path / "bin")))
    assert "no C++ compiler" in said and "apt install g++" in said and "dnf install gcc-c++" in said


def test_no_openmp(tmp_path):
    real = shutil.which("g++") or pytest.skip("needs g++")
    compiler = f"""#!/bin/sh
PATH={os.environ["PATH"]}
for word; do case $word in *openmp*) echo "error: no $word" >&2; exit 1;; esac; done
exec {real} "$@"
"""
    said = last_line(
        install(tmp_path, programs(tmp_path / "bin", compiler=compiler), CXX=str(tmp_path / "bin/compiler"))
    )
    assert "no OpenMP" in said and "libomp-dev" in said


def test_no_headers(tmp_path):
    real = shutil.which("g++") or pytest.skip("needs g++")
    wishes = "-DPython_INCLUDE_DIR=/nonexistent -DPython_ROOT_DIR=/nonexistent"
    said = last_line(install(tmp_path, f"{programs(tmp_path / 'bin')}:{Path(real).parent}", CMAKE_ARGS=wishes))
    assert "headers of Python" in said and "python{}.{}-dev".format(*sys.version_info) in said


def test_no_cmake(tmp_path):
    assert "cmake is missing" in last_line(install(tmp_path, str(tmp_path)))


def test_nothing_is_compiled_where_that_is_asked_for(tmp_path):
    answer = install(tmp_path, str(tmp_path), CRAMFAST_BUILD="none")
    assert answer.returncode == 0, answer.stderr
    assert not list((tmp_path / "build").rglob("_C*")) and list((tmp_path / "build").rglob("train.py"))


def test_an_unknown_part_is_named(tmp_path):
    answer = install(tmp_path, str(tmp_path), CRAMFAST_BUILD="gpu")
    assert answer.returncode == 1 and "CRAMFAST_BUILD=gpu: no such part; one of all, cpu, none" in answer.stderr


# The CUDA part.


@pytest.mark.parametrize("failing", ("configure", "compile"))
def test_a_cuda_part_that_fails_costs_the_cuda_operators_alone(build, monkeypatch, capsys, tmp_path, failing):
    commands = []

    def run(command):
        commands.append(command)
        with_cuda = not any("-DCRAMFAST_CUDA=OFF" in words for words in commands)
        if with_cuda and ("--build" in command) == (failing == "compile"):
            raise build.BuildError('csrc/glu_cuda.cu(7): error: "x;y" is $undefined\n')

    monkeypatch.setattr(build, "run", run)
    monkeypatch.setattr(build, "PART", "all")
    monkeypatch.setattr(build, "need", lambda tool, how: tool)
    command = build.CMakeBuild(distribution())
    command.build_temp, command.inplace = str(tmp_path), False
    command.get_ext_fullpath = lambda name: str(tmp_path / "_C.so")
    command.build_extension(build.Extension("cramfast._C", sources=[]))
    reason = next(word for word in commands[-2] if word.startswith("-DCRAMFAST_CUDA_MISSING="))
    assert "csrc/glu_cuda.cu(7): error:" in reason and not set(';"$') & set(reason)
    assert "--build" in commands[-1]
    assert "without the CUDA operators: csrc/glu_cuda.cu(7): error" in capsys.readouterr().out


def distribution():
    from setuptools.dist import Distribution

    return Distribution({"name": "x", "script_name": "setup.py"})


def test_what_fails_without_cuda_too_ends_the_install(build, monkeypatch):
    def run(command):
        raise build.BuildError("csrc/glu_cpu.cpp:1:1: error: expected unqualified-id\n")

    monkeypatch.setattr(build, "run", run)
    with pytest.raises(SystemExit, match=r"cramfast: csrc/glu_cpu.cpp:1:1: error: expected .*CRAMFAST_BUILD=none"):
        build.without_cuda([], [], "why")


def chosen(tmp_path, known="75 80 86 89 90 100 103 120", **environment) -> tuple[str, str, str]:
    """(architectures for CMake, their names in the module, everything printed) with a made-up nvcc."""
    cmake = shutil.which("cmake") or pytest.skip("needs cmake: pip install cmake")
    path = programs(tmp_path / "bin", nvcc=NVCC.format(known=known))
    script = tmp_path / "choose.cmake"
    script.write_text(
        f"""cmake_minimum_required(VERSION 3.24)
include("{ROOT}/csrc/cuda.cmake")
cramfast_find_nvcc(nvcc)
cramfast_choose_architectures("${{nvcc}}" chosen)
cramfast_name_architectures("${{chosen}}" names)
message("chosen=${{chosen}}")
message("names=${{names}}")
"""
    )
    environment = os.environ | {"PATH": f"{path}:{os.environ['PATH']}"} | environment
    said = subprocess.run([cmake, "-P", script], env=environment, capture_output=True, text=True)
    lines = dict(line.split("=", 1) for line in said.stderr.splitlines() if line.startswith(("chosen=", "names=")))
    return lines.get("chosen", ""), lines.get("names", ""), " ".join((said.stdout + said.stderr).split())


def test_every_card_from_turing_on_and_ptx_of_the_highest(tmp_path):
    architectures, names, _ = chosen(tmp_path)
    assert architectures == "75-real;80-real;86-real;89-real;90-real;100-real;120"
    assert names == "sm_75 sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 compute_120"


def test_what_an_old_toolkit_lacks_is_left_out_with_a_line(tmp_path):
    architectures, _, said = chosen(tmp_path, known="35 60 70 75 80 86 89 90")
    assert architectures == "75-real;80-real;86-real;89-real;90"
    assert "cramfast: sm_100 is left out" in said and "cramfast: sm_120 is left out" in said


@pytest.mark.parametrize(
    ("name", "wish", "names"),
    [
        ("TORCH_CUDA_ARCH_LIST", "8.6", "sm_86"),
        ("TORCH_CUDA_ARCH_LIST", "8.6+PTX", "sm_86 compute_86"),
        ("TORCH_CUDA_ARCH_LIST", "8.6;9.0", "sm_86 sm_90"),
        ("TORCH_CUDA_ARCH_LIST", "8.0 9.0a 12.0+PTX", "sm_80 sm_90a sm_120 compute_120"),
        ("CUDAARCHS", "86", "sm_86 compute_86"),
        ("CUDAARCHS", "75-real;80-virtual", "sm_75 compute_80"),
        ("CUDAARCHS", "all", "sm_75 sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 compute_120"),
    ],
)
def test_architectures_that_are_asked_for(tmp_path, name, wish, names):
    assert chosen(tmp_path, **{name: wish})[1] == names


def test_each_configuration_of_a_folder_builds_for_what_it_is_asked_for(tmp_path):
    """A made-up compiler cannot pass CMake's own checks, so enable_language does here what it does to the cache."""
    cmake = shutil.which("cmake") or pytest.skip("needs cmake: pip install cmake")
    path = programs(tmp_path / "bin", nvcc=NVCC.format(known="75 80 86"))
    (tmp_path / "CMakeLists.txt").write_text(
        f"""cmake_minimum_required(VERSION 3.24)
project(made_up LANGUAGES NONE)
include("{ROOT}/csrc/cuda.cmake")
macro(enable_language language)
  set(CMAKE_CUDA_ARCHITECTURES "${{CMAKE_CUDA_ARCHITECTURES}}" CACHE STRING "CUDA architectures")
endmacro()
cramfast_enable_cuda("{path}/nvcc")
message(STATUS "built for ${{CMAKE_CUDA_ARCHITECTURES}}")
"""
    )

    def built_for(*words, **wishes) -> str:
        command = [cmake, "-S", tmp_path, "-B", tmp_path / "build", "-G", "Ninja", *words]
        answer = subprocess.run(command, env=os.environ | wishes, capture_output=True, text=True)
        return re.search(r"built for (.*)", answer.stdout)[1]

    assert built_for(CUDAARCHS="80") == "80"
    assert built_for(CUDAARCHS="75-real") == "75-real"
    assert built_for(TORCH_CUDA_ARCH_LIST="8.6") == "86-real"
    assert built_for() == "75-real;80-real;86"
    assert built_for("-DCMAKE_CUDA_ARCHITECTURES=75", CUDAARCHS="80") == "75"
    assert built_for(CUDAARCHS="80") == "75", "a -D stays in a build folder, as CMake has it"


def test_a_build_without_cuda_says_why(tmp_path):
    """Where -DCRAMFAST_CUDA=OFF stands alone too: the doctor shows the reason behind "not built: "."""
    cmake, _ = shutil.which("cmake") or pytest.skip("needs cmake"), shutil.which("g++") or pytest.skip("needs g++")
    pybind11 = pytest.importorskip("pybind11")
    words = ["-DCRAMFAST_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}", "-DPYBIND11_FINDPYTHON=ON"]
    words += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-G", "Ninja"]
    for more, reason in (((), "it was built with CRAMFAST_CUDA=OFF"), (("-DCRAMFAST_CUDA_MISSING=why",), "why")):
        answer = subprocess.run([cmake, "-S", ROOT, "-B", tmp_path, *words, *more], capture_output=True, text=True)
        assert answer.returncode == 0, answer.stdout + answer.stderr
        assert f'CRAMFAST_CUDA_MISSING R"reason({reason})reason"' in (tmp_path / "build_info.h").read_text()


def test_what_the_kernels_cannot_do_is_left_out_with_a_line(tmp_path):
    _, names, said = chosen(tmp_path, known="70 75 86", TORCH_CUDA_ARCH_LIST="7.0;8.6")
    assert names == "sm_86" and "cramfast: sm_70 is left out: the kernels need sm_75 or later" in said


def test_cudaarchs_goes_before_torchs_list(tmp_path):
    assert chosen(tmp_path, CUDAARCHS="86-real", TORCH_CUDA_ARCH_LIST="9.0")[1] == "sm_86"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"TORCH_CUDA_ARCH_LIST": "Ampere"}, "TORCH_CUDA_ARCH_LIST: Ampere is not understood; write 8.6"),
        ({"CUDAARCHS": "60;130"}, "for none of the architectures 60;130"),
        ({"CUDAARCHS": "native"}, "no GPU was found for CUDAARCHS=native"),
    ],
)
def test_wishes_that_cannot_be_had_are_named(tmp_path, environment, message):
    _, names, said = chosen(tmp_path, **environment)
    assert not names and message in said


def test_a_compiler_that_cannot_compile_is_named_with_its_own_words(tmp_path):
    cmake = shutil.which("cmake") or pytest.skip("needs cmake: pip install cmake")
    path = programs(tmp_path / "bin", nvcc="#!/bin/sh\necho '#error -- unsupported GNU version!' >&2; exit 1\n")
    script = tmp_path / "check.cmake"
    head = f'cmake_minimum_required(VERSION 3.24)\ninclude("{ROOT}/csrc/cuda.cmake")\n'
    script.write_text(f'{head}cramfast_check_nvcc("{path}/nvcc")\n')
    answer = subprocess.run([cmake, "-P", script], cwd=tmp_path, capture_output=True, text=True)
    said = " ".join(answer.stderr.split())
    assert answer.returncode == 1
    assert f"cramfast: {path}/nvcc does not compile: #error -- unsupported GNU version! (CUDAHOSTCXX names" in said


FIND = f"""cmake_minimum_required(VERSION 3.24)
include("{ROOT}/csrc/cuda.cmake")
cramfast_find_nvcc(nvcc)
message("${{nvcc}}")
"""


def test_path_alone_says_where_the_compiler_is_without_a_home(tmp_path, monkeypatch):
    """Not /bin before it, which is what is left of "HOME/bin" without a home."""
    from cramfast.kernels import cuda_build

    cmake = shutil.which("cmake") or pytest.skip("needs cmake: pip install cmake")
    path = programs(tmp_path / "bin", sh="#!/bin/false\n")  # a name that /bin has too
    (tmp_path / "find.cmake").write_text(FIND)
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("CUDACXX", "sh")
    found = subprocess.run([cmake, "-P", tmp_path / "find.cmake"], capture_output=True, text=True).stderr.strip()
    assert found == cuda_build.nvcc() == f"{path}/sh"


def test_the_compiler_is_found_where_the_doctor_looks(tmp_path, monkeypatch):
    from cramfast.kernels import cuda_build

    def find() -> tuple[str, str]:
        script = tmp_path / "find.cmake"
        script.write_text(FIND)
        return subprocess.run([cmake, "-P", script], capture_output=True, text=True).stderr.strip(), cuda_build.nvcc()

    cmake = shutil.which("cmake") or pytest.skip("needs cmake: pip install cmake")
    on_path = programs(tmp_path / "bin", nvcc=NVCC)
    (tmp_path / "home").mkdir()
    at_home = programs(tmp_path / "home/bin", nvcc=NVCC)
    monkeypatch.setenv("PATH", on_path)
    assert find() == (f"{on_path}/nvcc",) * 2
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "home"))
    assert find() == (f"{at_home}/nvcc",) * 2
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find() == (f"{on_path}/nvcc",) * 2
    (tmp_path / "bin/nvcc").rename(tmp_path / "other")
    assert find() == ("", None)
    monkeypatch.setenv("CUDACXX", str(tmp_path / "other"))
    assert find() == (str(tmp_path / "other"),) * 2
