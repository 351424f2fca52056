"""What the docs name exists: files, links and their headings; and the log's index is complete."""

import contextlib
import functools
import importlib
import io
import os
import re
import sys
from pathlib import Path

import pytest

from cramfast.__main__ import COMMANDS, PACKAGES
from cramfast.runtime.arguments import VOCABULARY

ROOT = Path(__file__).resolve().parent.parent
FIRST = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "findings/README.md")]
PAGES = [*FIRST, *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [
    path
    for folder in ("cramfast", "kernels", "csrc", "bench", "scripts", "tests")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".h", ".cpp", ".cu", ".sh") and path != Path(__file__).resolve()
]
SCRIPTS = [ROOT / ".ci" / "run", *sorted((ROOT / "scripts").glob("*.sh"))]
FOLDERS = r"cramfast|kernels|csrc|bench|scripts|tests|docs|findings|\.ci"
ENDINGS = "py|md|h|cpp|cu|sh|json|jsonl|svg|png"
PATH = re.compile(rf"(?<![\w/.-])(?:(?:{FOLDERS})/[\w*./-]*\w\.(?:{ENDINGS})\b|\.ci/\w+)")
# A command at the start of a line, of code, of the next command in a line, or behind an interpreter's or torchrun's -m;
# its words end where the next command or a comment begins.
COMMAND = re.compile(r"(?m)(?:^|[`;&|] ?|-m )(?:\w+=\S+ )*(?:python -m )?cramfast[. ]([a-z]\w*)\b([^`\n&|;#]*)")
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"")
MONTHS = sorted((ROOT / "docs" / "log").glob("20??-??.md"), reverse=True)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchor(title: str) -> str:
    """Of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def headings(page: Path, marks: str = "#{1,6}") -> list[str]:
    return re.findall(rf"^{marks} (.+)$", page.read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for groups in LINK.findall(page.read_text(encoding="utf-8")):
        target, _, heading = "".join(groups).partition("#")
        if target.startswith(("http://", "https://")):
            continue
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{name_of(page)} links to {target}"
        if heading:
            assert heading in map(anchor, headings(there)), f"{name_of(page)} links to {target}#{heading}"


@functools.cache
def options_of(*words: str) -> frozenset[str]:
    """The options that the help of a command lists, as ("evaluate", "glue"); without a subcommand those of all."""
    name, *subcommand = words
    module = importlib.import_module(f"cramfast.{name}.__main__" if name in PACKAGES else f"cramfast.{name}")
    if name in PACKAGES and not subcommand:
        return frozenset().union(*(options_of(name, other) for other in module.COMMANDS))
    called, columns = sys.argv, os.environ.get("COLUMNS")
    said = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)  # without an encoding no frame is drawn
    sys.argv, os.environ["COLUMNS"] = [f"cramfast {name}", *subcommand, "--help"], "100"
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            module.main()
    finally:
        sys.argv = called
        os.environ.pop("COLUMNS") if columns is None else os.environ.update(COLUMNS=columns)
    found = re.findall(r"│ (?:-h, )?(--[\w.-]+)(?:, (--[\w.-]+))?", said.buffer.getvalue().decode())
    assert found, f"no options in the help of {words}"
    return frozenset(option for pair in found for option in pair if option) | set(VOCABULARY)


def mistakes(text: str) -> list[str]:
    """Commands of cramfast in a text that do not exist, and options that they do not have."""
    found = []
    for name, rest in COMMAND.findall(text.replace("\\\n", " ")):
        if name not in COMMANDS:
            found += [name] * (name not in ("help", "kernels"))  # cramfast.kernels is the package
            continue
        first = (rest.split() or [""])[0]
        module = importlib.import_module(f"cramfast.{name}.__main__") if name in PACKAGES else None
        known = options_of(name, first) if module and first in module.COMMANDS else options_of(name)
        found += [f"{name} {option}" for option in re.findall(r"(?<=\s)--[a-z][\w.-]*", rest) if option not in known]
    return found


@pytest.mark.parametrize("page", PAGES + SCRIPTS, ids=name_of)
def test_commands_and_their_options_exist(page):
    assert not mistakes(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", COMMANDS)
def test_an_invented_option_is_found(name):
    for line in (
        f"cramfast {name} --invented 3",
        f"pip install -e . && python -m cramfast.{name} --invented",
        f"cd text && cramfast {name} --invented",
        f"torchrun --nproc-per-node 2 -m cramfast.{name} --invented",
        f"so `cramfast {name} \\\n  --invented` does",
        f"A=1 $PYTHON -m cramfast {name} --invented; ls --all",
    ):
        assert mistakes(line) == [f"{name} --invented"], line
    assert mistakes(f"cramfast {name} --help | head --lines 3 && ls --all  # --invented") == []


def test_each_subcommand_has_its_own_options():
    assert mistakes("cramfast evaluate perplexity runs/a --characters 9 --seeds 3") == ["evaluate --seeds"]
    assert mistakes("cramfast evaluate glue runs/a --seeds 3") == []
    assert mistakes("cramfast evalute glue runs/a") == ["evalute"]


@pytest.mark.parametrize("page", [*PAGES, *SOURCES, ROOT / ".ci" / "run"], ids=name_of)
def test_paths_exist(page):
    """Written from the root, as cramfast/train.py; "*" stands for any name, and bench/results/DATE-... for none."""
    for path in PATH.findall(page.read_text(encoding="utf-8")):
        assert "DATE" in path or any(ROOT.glob(path)), f"{name_of(page)} names {path}"


def test_the_index_lists_every_page_once():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = [target for target, _ in LINK.findall(index)]
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    pages |= {"log/README.md", "scaling/README.md", "decisions"}
    pages |= {f"../{name_of(page)}" for page in FIRST}
    assert sorted(linked) == sorted(pages)


def test_the_page_of_commands_lists_them_all():
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    benches = [path for path in (ROOT / "bench").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")]
    commands = {f"cramfast {name}" for name in COMMANDS} | {f"python -m bench.{path.stem}" for path in benches}
    commands |= {name_of(path) for path in (ROOT / "scripts").glob("*.sh")}
    assert not [command for command in sorted(commands) if not re.search(rf"^\| `{command}\b", page, re.M)]


def test_the_readme_is_short_and_starts_with_both_commands():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    screen = "\n".join(lines[:20])
    for command in ("pip install -e . && python -m cramfast.train", "pip install -e '.[test]' && pytest"):
        assert command in screen
    assert len(lines) <= 120


def test_the_index_of_the_log_has_a_line_for_every_measurement():
    """In the order of the files, newest first, with the date of the entry that holds it."""
    expected = []
    for month in MONTHS:
        date = None
        for line in month.read_text(encoding="utf-8").splitlines():
            if entry := re.match(r"## (\d{4}-\d\d-\d\d)", line):
                date = entry[1]
            elif line.startswith("### "):
                expected.append((date, f"[{line[4:]}]({month.name}#{anchor(line[4:])})"))
    index = (ROOT / "docs" / "log" / "README.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in index.splitlines() if re.match(r"\| \d{4}-", line)]
    assert [(date, what) for date, what, _, _ in rows] == expected
    assert all(figure and machine for *_, figure, machine in rows)
    dates = [date for date, *_ in rows]
    assert dates == sorted(dates, reverse=True)
    for month in MONTHS:
        titles = headings(month, "###")
        assert len(titles) == len(set(titles)), f"{month.name}: two headings would share an anchor"


def test_decisions_are_numbered_without_a_gap():
    names = sorted(path.name for path in (ROOT / "docs" / "decisions").glob("*.md"))
    assert [int(name[:4]) for name in names] == list(range(1, len(names) + 1))
    for path in (ROOT / "docs" / "decisions").glob("*.md"):
        assert headings(path)[0].startswith(f"{int(path.name[:4])}. ")
