"""Reading text: formats and compressions agree, and every bad input names its place."""

import gzip
import io
import json
import lzma
import random
import site
import sys
import sysconfig
import tracemalloc
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cramfast.errors import UserError
from cramfast.text import docstrings, lines
from cramfast.text.compressed import zstd
from cramfast.text.corpus import read_documents
from cramfast.text.files import find_files
from cramfast.text.lines import read_lines
from cramfast.text.prepared import is_prepared

DOCUMENTS = ["First line.\nSecond line of one.", "Ein zweites: Größe, 日本語, 🙂.", "A third."]
PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd.compress}


def read(*sources, **options):
    return list(read_documents(tuple(map(str, sources)), **options))


def bad_parquet() -> bytes:
    """A column of text, of which row 300 is not UTF-8."""
    texts = pyarrow.array([b"fine"] * 299 + [b"caf\xe9"]).cast(pyarrow.binary())
    rows = pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 300, texts.buffers())})
    file = io.BytesIO()
    pyarrow.parquet.write_table(rows, file)
    return file.getvalue()


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_every_format_and_compression_gives_the_same_documents(tmp_path, kind, compression):
    text = "\n\n".join(DOCUMENTS) if kind == "txt" else "\n".join(json.dumps({"text": d}) for d in DOCUMENTS)
    path = tmp_path / f"a.{kind}{compression}"
    path.write_bytes(PACK[compression]((text + "\n").encode()))
    assert read(path) == DOCUMENTS


@pytest.mark.parametrize("compression", PACK)
def test_compressed_parquet(tmp_path, compression):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS}), file)
    (tmp_path / f"a.parquet{compression}").write_bytes(PACK[compression](file.getvalue()))
    assert read(tmp_path) == DOCUMENTS


def test_parquet_and_other_columns(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": [*DOCUMENTS, None]}), tmp_path / "a.parquet")
    assert read(tmp_path, text_key="body") == DOCUMENTS
    with pytest.raises(UserError, match=r"a\.parquet: no column 'text' \(there: body\)"):
        read(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"a\.parquet: damaged"):
        read(tmp_path, text_key="body")


@pytest.mark.parametrize("row_group_size", [256, 1 << 20])
def test_parquet_is_never_held_whole(tmp_path, row_group_size):
    chance, path = random.Random(0), tmp_path / "a.parquet"
    rows = pyarrow.table({"text": [chance.randbytes(2000).hex() for _ in range(4000)]})
    pyarrow.parquet.write_table(rows, path, row_group_size, compression="none", use_dictionary=False)
    del rows
    before, decoded = pyarrow.total_allocated_bytes(), 0
    tracemalloc.start()  # sees what is read of the file; what Arrow decodes lies in its own pool
    try:
        for _ in read_documents((str(path),)):
            decoded = max(decoded, pyarrow.total_allocated_bytes() - before)
        fetched = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 16e6 and fetched < 8e6 and decoded < 10e6


def test_three_readings_of_a_text_file(tmp_path):
    (tmp_path / "a.txt").write_text("\n\none\ntwo\r\n \n\n\nthree\n", encoding="utf-8-sig", newline="")
    assert read(tmp_path) == ["one\ntwo", "three"]
    assert read(tmp_path, documents="lines") == ["one", "two", "three"]
    assert read(tmp_path, documents="files") == ["one\ntwo\n \n\n\nthree"]


def test_folders_and_globs_are_read_in_sorted_order_once(tmp_path):
    for name in ("b/2.txt", "a/9.txt", "1.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    assert read(tmp_path) == ["1.txt", "a/9.txt", "b/2.txt"]
    assert read(tmp_path / "*" / "*.txt") == ["a/9.txt", "b/2.txt"]


def test_links_to_folders_are_followed_and_each_folder_is_read_once(tmp_path):
    texts, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    for name in ("texts/m/1.txt", "elsewhere/2.txt", "elsewhere/inner/3.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for link, target in (("a", texts / "m"), ("b", elsewhere), ("c", elsewhere / "inner"), ("m/circle", texts)):
        (texts / link).symlink_to(target)
    (elsewhere / "back").symlink_to(elsewhere)
    (texts / "gone").symlink_to(tmp_path / "nowhere")
    found = [str(path.relative_to(texts)) for path in find_files((str(texts),))]
    assert found == ["b/2.txt", "b/inner/3.txt", "m/1.txt"]
    (tmp_path / "link").symlink_to(texts)
    assert len(read(tmp_path / "link")) == 3


def test_a_long_document_comes_in_pieces_and_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "LONGEST_PIECE", 100)
    text = " ".join(f"word{i}" for i in range(200))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": text}).ljust(2000))  # a multiple of a piece, and no line end
    for name in ("a.txt", "b.jsonl", "c.jsonl"):
        pieces = read(tmp_path / name)
        assert max(map(len, pieces)) <= 200
        assert "".join("".join(pieces).split()) == text.replace(" ", "")


LINES = st.lists(st.sampled_from(["a", "bc\n", "\n", "\r\n", "\r", "é", "x" * 10, "\u2028", " "]), max_size=40).map(
    "".join
)


@settings(max_examples=300, deadline=None)
@given(LINES, st.booleans(), st.integers(1, 12), st.integers(1, 30))
def test_lines_are_those_of_readline(tmp_path_factory, text, mark, longest, at_once):
    path = tmp_path_factory.getbasetemp() / "lines.txt"
    path.write_bytes(text.encode("utf-8-sig" if mark else "utf-8"))
    expected, number = [], 1
    with path.open(encoding="utf-8-sig") as file:
        while line := file.readline(longest):
            expected.append((number, line))
            number += line.endswith("\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "LONGEST_PIECE", longest)
        patch.setattr(lines, "READ_AT_ONCE", at_once)
        assert list(read_lines(path)) == expected


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1: a JSON list"),
        ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl:1: no key 'text' \(there: body\)"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl:1: 'text' is a int"),
        ("a.txt", b"fine\n" * 3000 + b"caf\xe9 noir\n", r"a\.txt:3001: byte 4 of the line is not UTF-8"),
        ("a.txt.gz", gzip.compress(b"text\n" * 10000, mtime=0)[:-30], r"a\.txt\.gz: damaged or truncated"),
        ("a.txt.gz", gzip.compress(b"t", mtime=0)[:10] + b"\xff" * 20, r"a\.txt\.gz: damaged or truncated"),
        ("a.txt.xz", lzma.compress(b"text\n" * 10000)[:-30], r"a\.txt\.xz: damaged or truncated"),
        ("a.txt.zst", b"not zstd at all", r"a\.txt\.zst: damaged or truncated"),
        (
            "a.txt.zst",
            zstd.compress(random.Random(0).randbytes(9999).hex().encode())[:-9],
            r"a\.txt\.zst: damaged or",
        ),
        ("a.txt.gz", b"", r"a\.txt\.gz: damaged or truncated archive \(0 bytes\)"),
        ("a.jsonl", b"[" * 200_000, r"a\.jsonl:1: not to be read as JSON"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "y"',
            r"a\.jsonl:2: not JSON \(Expecting ',' .* at character 13\)",
        ),
        ("a.parquet", bad_parquet(), r"a\.parquet, row 300: not UTF-8"),
        ("a.docx", b"PK", r"a\.docx: unknown kind of file — cramfast reads \.txt, \.jsonl, .*\.parquet"),
    ],
)
def test_bad_input_is_named_with_its_place(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        read(path)


def test_nothing_to_read_is_an_error(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match="no text in this folder"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"missing\*\.txt: no such file"):
        read(tmp_path / "missing*.txt")


def test_files_that_are_quoted_together_are_an_error_of_one_line():
    together = " ".join(f"part-{number:03}.txt" for number in range(100))
    with pytest.raises(UserError, match=r"part-099\.txt: cannot be read \(File name too long\) — .*not in one pair"):
        read(together)
    assert not is_prepared(Path(together))


def test_a_dataset_without_the_package_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'cramfast\[hf\]'"):
        read("hf:wikitext:wikitext-2-v1:train")


class HTTPError(Exception):
    """Like those of httpx and aiohttp, it derives from nothing but Exception."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("Dataset scripts are no longer supported, but found c4.py"), "Dataset scripts are no longer"),
        (ConnectionError("Couldn't reach the Hub\n\n(offline)"), r"Couldn't reach the Hub \(offline\)"),
        (HTTPError("429 Too Many Requests"), "429 Too Many Requests"),
        (TimeoutError(), "TimeoutError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
@pytest.mark.parametrize("rows", [None, 0, 2], ids=["opening", "first row", "third row"])
def test_a_dataset_that_fails_names_itself_and_the_remedy(monkeypatch, error, message, rows):
    def stream():
        yield from [{"text": "one"}, {"text": "two"}][:rows]
        raise error

    def load_dataset(name, config, *, split, streaming):
        assert (name, config, split, streaming) == ("c4", "en", "train", True)
        if rows is None:
            raise error
        return stream()

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    documents = read_documents(("hf:c4:en",))
    assert list(islice(documents, rows or 0)) == ["one", "two"][: rows or 0]
    with pytest.raises(UserError, match=rf"^hf:c4:en: could not be read \({message}.* — .*--data$") as raised:
        next(documents)
    assert "\n" not in str(raised.value)


def test_a_dataset_without_the_column_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *a, **k: iter([{"body": "one"}])))
    with pytest.raises(UserError, match=r"^hf:c4: no key 'text' \(there: body\) — name it with --text-key, .*$"):
        read("hf:c4")


def test_docstrings_become_prose(tmp_path):
    (tmp_path / "m.py").write_text(
        '"""Compute the sum of all the numbers that a list holds.\n\n    >>> total([1, 2])\n    3\n\n'
        '    =====  =====\n    table  table\n    =====  =====\n"""\n'
        'def f():\n    "A pattern such as \\d is no error here, only a warning."\n'
    )
    (tmp_path / "broken.py").write_text("def f(:\n")
    texts = docstrings.docstrings(tmp_path / "m.py")
    assert texts[0] == "Compute the sum of all the numbers that a list holds."
    assert texts[1].startswith("A pattern such as")
    assert docstrings.docstrings(tmp_path / "broken.py") == []


def test_docstrings_of_every_place_where_packages_lie(tmp_path, monkeypatch):
    stdlib, user = tmp_path / "lib" / "python3", tmp_path / "user"
    debian, own = stdlib / "dist-packages", stdlib / "site-packages"
    for folder in (stdlib, debian, own, user):
        folder.mkdir(parents=True)
        (folder / "module.py").touch()
    (tmp_path / "lib64").symlink_to(tmp_path / "lib")
    lib64 = tmp_path / "lib64" / "python3" / "site-packages"
    paths = {"stdlib": str(stdlib), "purelib": str(own), "platlib": str(lib64)}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(own), str(debian), str(tmp_path / "none")])
    monkeypatch.setattr(site, "getusersitepackages", lambda: str(user))
    first, *others = docstrings.source_files()
    assert first == stdlib / "module.py"
    assert sorted(others) == [folder / "module.py" for folder in (debian, own, user)]


def test_docstrings_are_the_same_twice_and_hold_no_repetition(tmp_path, monkeypatch):
    files = docstrings.source_files()[:60]
    monkeypatch.setattr(docstrings, "source_files", lambda: files + files)
    monkeypatch.setattr(docstrings, "FILES_PER_TASK", 40)
    with pytest.raises(UserError, match="words of docstrings on this machine"):
        docstrings.write_docstrings(tmp_path / "none.txt")
    monkeypatch.setattr(docstrings, "LEAST_WORDS", 1000)
    for name in ("a.txt", "b.txt"):
        assert docstrings.write_docstrings(tmp_path / name) > 1000
    assert (tmp_path / "a.txt").read_bytes() == (tmp_path / "b.txt").read_bytes()
    found = read(tmp_path / "a.txt")
    assert len(found) == len(set(found))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b.txt"]  # nothing half-written stays
