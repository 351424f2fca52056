"""Who may import whom (docs/architecture.md), read from the sources without importing them."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "cramfast"

# From the ground up; a room, or a file at the front door, imports only from floors below its own.
FLOORS = (
    ("errors",),
    ("config", "kernels"),
    ("runtime",),
    ("model", "optim", "pages"),
    ("text",),
    ("batches",),
    ("session",),
    ("cost", "hf", "qualify"),
    ("recipes",),
    ("commandline",),
    ("prepare", "export", "report", "plan"),
    ("stages", "evaluate"),
    ("train", "doctor"),
    ("scaling",),
    ("__main__",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def module_of(path: Path) -> str:
    """cramfast/text/corpus.py is text.corpus; a room's __init__.py is the room."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    return module.split(".")[0]


MODULES = {module_of(path): path for path in FILES}
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def docstring(room: str) -> str:
    return ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))) or ""


def files_of(room: str) -> set[str]:
    return {path.stem for path in (PACKAGE / room).glob("[a-z]*.py")}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(path: Path) -> set[str]:
    """Modules of cramfast that a file imports, as text.corpus or kernels.attention; imports inside functions too."""
    names = {name.removeprefix("cramfast.") for name in imported(path) if name.startswith("cramfast.")}
    return {name for name in names if name in MODULES or room_of(name) == "kernels"}


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.stem)
def test_kernels_know_no_model_and_no_config(path):
    assert {room_of(name) for name in ours(path)} <= {"kernels"}
    assert not {name.split(".")[0] for name in imported(path)} & {"bench", "tests", "transformers", "tyro"}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_nothing_imports_bench_or_tests(path):
    assert not {name.split(".")[0] for name in imported(path)} & {"bench", "tests"}


def test_every_file_has_a_floor():
    assert {room_of(module) for module in MODULES} | {"kernels"} == set(FLOOR_OF)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_down(path):
    room = room_of(module_of(path))
    for used in sorted({room_of(name) for name in ours(path)} - {room}):
        assert FLOOR_OF[used] < FLOOR_OF[room], f"{room} imports {used}, which is not below it"


def test_rooms_say_what_lives_in_them():
    """One paragraph or two, and the file to read first, which is there; files are named in backticks."""
    for room in ROOMS:
        text = docstring(room)
        named = re.search(r"Read\s+`([a-z_]+\.py)`\s+first", text)
        assert named and (PACKAGE / room / named[1]).exists(), f"{room}: {text}"
        for name in files_of(room):
            assert re.search(rf"`{name}(\.\w+)?`", text), f"{room}/__init__.py does not name `{name}`"


@pytest.mark.parametrize("room", ROOMS)
def test_others_import_what_a_room_offers(room):
    """ "Others may import `a` and `b`.", "every file.", "every file but `c`." or "nothing.", in its docstring."""
    offered = re.search(
        r"Others\s+may\s+import\s+(every\s+file\s+but|every\s+file|nothing|)(.*?)[.;]\s", docstring(room), re.S
    )
    assert offered, f"{room}/__init__.py does not say what others may import"
    named = set(re.findall(r"`(\w+)`", offered[2]))
    assert named <= files_of(room)
    allowed = files_of(room) - named if offered[1].startswith("every") else named
    for module, path in MODULES.items():
        if room_of(module) != room:
            used = {name.split(".")[1] for name in ours(path) if room_of(name) == room and "." in name}
            assert used <= allowed, f"{module} imports {used - allowed} from {room}, which does not offer it"


def test_the_page_about_the_house_names_every_room():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawing, table = page.split("```")[1], page.split("## Which room is it?")[1]
    for floor in FLOORS:
        for room in floor:
            assert re.search(rf"\b{room}\b", drawing), f"docs/architecture.md: {room} is not in the drawing"
    for room in ROOMS:
        assert f"`cramfast/{room}/`" in table, f"docs/architecture.md: no line says what belongs into {room}"


def test_only_stock_models_are_computed_by_transformers():
    for path in [*(PACKAGE / "evaluate").glob("*.py"), *(PACKAGE / "scaling").glob("*.py")]:
        foreign = {name.split(".")[0] for name in imported(path)} & {"transformers"}
        assert foreign <= ({"transformers"} if path.stem == "stock" else set()), path.name


def test_training_knows_of_evaluation_only_the_quick_probe():
    used = {name for name in ours(MODULES["train"]) if room_of(name) == "evaluate"}
    assert used <= {"evaluate", "evaluate.probe"}
    assert {name for name, path in MODULES.items() if "train" in ours(path)} == {"scaling.switched"}


def test_imports_have_no_cycle():
    """Of modules, not only of rooms; imports inside a function count too."""
    graph = {name: ours(path) & MODULES.keys() - {name} for name, path in MODULES.items()}
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
