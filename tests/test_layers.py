"""Who may import whom (docs: architecture §3), read from the sources without importing them."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {path.stem: path for path in (ROOT / "cramfast").glob("*.py")}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(path: Path) -> set[str]:
    """Modules of cramfast that a file imports, by their short names."""
    parts = (name.split(".") for name in imported(path) if name.startswith("cramfast."))
    return {part[1] for part in parts if part[1] in SOURCES or part[1] == "kernels"}


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.stem)
def test_kernels_know_no_model_and_no_config(path):
    assert not ours(path) - {"kernels"}
    assert not {name.split(".")[0] for name in imported(path)} & {"bench", "tests", "transformers", "tyro"}


@pytest.mark.parametrize("path", sorted((ROOT / "cramfast").glob("*.py")), ids=lambda path: path.stem)
def test_nothing_imports_bench_or_tests(path):
    assert not {name.split(".")[0] for name in imported(path)} & {"bench", "tests"}


def test_only_the_command_line_uses_evaluate():
    """Report and model card know the tables that it leaves, not how they came about; training knows the quick probe."""
    for path in SOURCES.values():
        used = {name for name in imported(path) if name.startswith("cramfast.evaluate.")}
        assert {name.split(".")[2] for name in used} <= ({"probe"} if path.stem == "train" else set()), path.name
    for path in (ROOT / "cramfast" / "evaluate").glob("*.py"):
        assert "train" not in ours(path)
        foreign = {name.split(".")[0] for name in imported(path)} & {"bench", "tests", "transformers"}
        assert foreign <= ({"transformers"} if path.stem == "stock" else set()), path.name


def test_only_the_command_line_uses_scaling():
    """The trainer knows nothing of plans and switches; of them, only the one that starts it knows the trainer."""
    for path in SOURCES.values():
        assert path.stem == "plan" or not {n for n in imported(path) if n.startswith("cramfast.scaling")}, path.name
    for path in (ROOT / "cramfast" / "scaling").glob("*.py"):
        assert path.stem == "switched" or "train" not in ours(path), path.name
        assert not {name.split(".")[0] for name in imported(path)} & {"bench", "tests", "transformers"}


@pytest.mark.parametrize("name", ["errors", "config", "schedule", "interrupt"])
def test_the_ground_floor_stands_alone(name):
    assert ours(SOURCES[name]) <= {"errors", "config"}


@pytest.mark.parametrize("name", sorted(set(SOURCES) - {"train", "__init__"}))
def test_nothing_imports_the_training_loop(name):
    assert "train" not in ours(SOURCES[name])


@pytest.mark.parametrize(
    "name", ["corpus", "curation", "minhash", "tokenizer", "pack", "loader", "prepared", "survey", "splits", "prepare"]
)
def test_text_knows_no_model(name):
    if name not in SOURCES:
        pytest.skip(f"{name}.py is not there")
    assert not ours(SOURCES[name]) & {"model", "optim", "checkpoint", "kernels"}


def test_imports_have_no_cycle():
    """Whole-module cycles; imports inside a function count too."""
    graph = {name: ours(path) & SOURCES.keys() for name, path in SOURCES.items()}
    while graph:
        free = [name for name, uses in graph.items() if not uses & graph.keys()]
        assert free, f"cycle among {sorted(graph)}"
        for name in free:
            del graph[name]


def test_csrc_has_no_torch_header():
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            headers = re.findall(r"#\s*include\s*[<\"]([^>\"]+)", path.read_text(encoding="utf-8"))
            assert not [h for h in headers if h.startswith(("torch/", "ATen/", "c10/"))], path.name
            if path.name != "bindings.cpp":
                assert not [h for h in headers if h.startswith("pybind11/") or h == "Python.h"], path.name
