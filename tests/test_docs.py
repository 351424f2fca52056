"""What the docs name exists: files, links and their headings; and the log's index is complete."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from cramfast.__main__ import COMMANDS
from cramfast.commandline import Arguments
from cramfast.config import TrainConfig, flatten
from cramfast.prepare import Options
from cramfast.runtime.arguments import VOCABULARY

ROOT = Path(__file__).resolve().parent.parent
FIRST = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "findings" / "README.md"]
PAGES = [*FIRST, *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [
    path
    for folder in ("cramfast", "kernels", "csrc", "bench", "scripts", "tests")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".h", ".cpp", ".cu", ".sh") and path != Path(__file__).resolve()
]
FOLDERS = "cramfast|kernels|csrc|bench|scripts|tests|docs|findings"
PATH = re.compile(rf"(?<![\w/.-])(?:{FOLDERS})/[\w*./-]*\w\.(?:py|md|h|cpp|cu|sh|json|jsonl|svg|png)\b")
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


def flags(*keys: str) -> set[str]:
    return {f"--{key.replace('_', '-')}" for key in keys}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_their_options_exist(page):
    own = [field.name for field in fields(Arguments) if field.name != "config"]
    known = {"train": flags(*flatten(TrainConfig()), *own), "prepare": flags(*flatten(Options()))}
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for name, words in re.findall(r"(?m)(?:^|`)(?:python -m )?cramfast[. ]([a-z]\w*)([^`\n]*)", text):
        assert name in COMMANDS or name == "kernels", f"{name_of(page)}: cramfast {name}"
        options = set(re.findall(r"(?<= )--[a-z][\w.-]*", words.partition("#")[0]))
        missing = options - known.get(name, options) - set(VOCABULARY)
        assert not missing, f"{name_of(page)}: cramfast {name} {missing}"


@pytest.mark.parametrize("page", PAGES + SOURCES, ids=name_of)
def test_paths_exist(page):
    """Written from the root, as cramfast/train.py; "*" stands for any name, and bench/results/DATE-... for none."""
    for path in PATH.findall(page.read_text(encoding="utf-8")):
        assert "DATE" in path or any(ROOT.glob(path)), f"{name_of(page)} names {path}"


def test_the_index_lists_every_page_once():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = [target for target, _ in LINK.findall(index)]
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    pages |= {"log/README.md", "scaling/README.md", "decisions", "../README.md", "../CONTRIBUTING.md"}
    assert sorted(linked) == sorted(pages)


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
