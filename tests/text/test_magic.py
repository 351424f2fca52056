"""Files of another kind than their names say are named by their first bytes, with the remedy."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile

import pyarrow
import pyarrow.orc
import pyarrow.parquet
import pytest

from cramfast.errors import UserError
from cramfast.text.compressed import zstd
from cramfast.text.corpus import Corpus
from cramfast.text.encodings import wide_encoding

ROW = b'{"text": "words"}\n'
TABLE = pyarrow.table({"text": ["some words"]})


def read(path, **options):
    corpus = Corpus((str(path),), **options)
    return list(corpus), [line.removeprefix(f"{path}: ") for line in corpus.notes()]


def written(write):
    out = io.BytesIO()
    write(out)
    return out.getvalue()


def tar(out):
    with tarfile.open(fileobj=out, mode="w") as archive:
        entry = tarfile.TarInfo("a.txt")
        entry.size = len(ROW)
        archive.addfile(entry, io.BytesIO(ROW))


def archive(out):
    with zipfile.ZipFile(out, "w") as packed:
        packed.writestr("a.txt", "words")


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.txt", written(tar), "a tar archive — unpack it"),
        ("a.txt.gz", gzip.compress(written(tar)), "a tar archive — unpack it"),
        ("a.txt", written(archive), r"a zip archive, or a document .*\.docx.* — unpack or convert it"),
        ("a.jsonl", gzip.compress(ROW), r"compressed by gzip, whatever its name says — add \.gz to its name"),
        ("a.csv", bz2.compress(ROW), r"compressed by bzip2, whatever its name says — add \.bz2"),
        ("a.txt", lzma.compress(ROW), r"compressed by xz, whatever its name says — add \.xz"),
        ("wiki_00", zstd.compress(ROW), r"compressed by zstd, whatever its name says — add \.zst"),
        ("a.parquet", gzip.compress(ROW), r"compressed by gzip, whatever its name says — add \.gz"),
        ("a.jsonl.gz", gzip.compress(gzip.compress(ROW)), "compressed by gzip, .* — unpack it once more"),
        ("a.txt", b"%PDF-1.7\nwords", "a PDF, whatever its name says — convert it to text"),
        ("a.txt", rb"{\rtf1\ansi words}", "RTF, text among commands of its layout, .* — convert it to plain text"),
        (
            "a.txt",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
            "a pointer of Git LFS, not .* git lfs pull",
        ),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
        (
            "a.txt",
            written(lambda out: pyarrow.parquet.write_table(TABLE, out)),
            r"a parquet file, .* — name it \.parquet",
        ),
        ("a.txt", written(lambda out: pyarrow.orc.write_table(TABLE, out)), r"an ORC file, .* — write it as \.parquet"),
        (
            "a.txt",
            ROW,
            r"its lines are JSON objects — name it \.jsonl, or --format jsonl reads .*; --format text reads",
        ),
        (
            "a.txt",
            b"[\n" + ROW + b"]",
            r"it begins as a JSON array of objects — name it \.json, or --format text reads",
        ),
        ("a.txt.xz", lzma.compress(b"\n" + ROW * 3), "its lines are JSON objects"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # compressed bytes hold the time
)
def test_another_kind_than_the_name_says(tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}: {said}"):
        read(tmp_path)


def test_text_that_begins_like_one_is_text(tmp_path):
    for number, text in enumerate(("BZh is a word", "ORC and PAR1", "{a set}", "{}, said twice", "PKs")):
        (tmp_path / "a.txt").write_text(text)
        assert read(tmp_path / "a.txt") == ([text], []), number
    (tmp_path / "a.txt").write_bytes(ROW)
    assert read(tmp_path / "a.txt", format="text")[0] == ['{"text": "words"}']
    (tmp_path / "a.txt").write_bytes(ROW + b"And what it means.")
    said = f"1 text files begin with a line that is a JSON object, the first: {tmp_path}/a.txt — see that it is text"
    assert read(tmp_path / "a.txt")[1] == [said]


def test_empty_files_of_every_kind_are_counted(tmp_path):
    for name in ("a.txt", "b.csv", "c.tsv", "d.parquet", "e.arrow", "f.jsonl", "g.json", "h.fa"):
        (tmp_path / name).touch()
    (tmp_path / "i.csv.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "j.csv").write_text("\n\n")
    assert read(tmp_path) == ([], ["10 files hold no document"])


def test_the_first_line_that_is_not_blank_says_what_a_wikiextractors_file_is(tmp_path):
    (tmp_path / "wiki_00").write_bytes(b"\n \n" + ROW)
    assert read(tmp_path)[0] == ["words"]


@pytest.mark.parametrize("zeros", [2, 7, 100, 5000, 1 << 21])
def test_nuls_that_fill_up_a_file_are_no_text(tmp_path, zeros):
    path = tmp_path / "a.txt"
    path.write_bytes(b"some words\n\nmore\n" + bytes(zeros))
    said = f"{zeros:,} NULs that fill up files are no text and left out, the first in {path}"
    assert read(path) == (["some words", "more"], [said])
    (tmp_path / "b.csv").write_bytes(b"id,text\n1,one\n2,two" + bytes(zeros))
    (tmp_path / "c.jsonl").write_bytes(ROW + bytes(zeros))
    for name, documents in (("b.csv", ["one", "two"]), ("c.jsonl", ["words"])):
        assert read(tmp_path / name) == (documents, [said.replace("a.txt", name)])
    for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
        assert wide_encoding("aĀ b\n".encode(encoding) * 9) == encoding


def test_bytes_of_a_fixed_size_lose_what_fills_them_up(tmp_path):
    table = pyarrow.table({"text": pyarrow.array([b"one\0\0", b"three", None], pyarrow.binary(5))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path)[0] == ["one", "three"]


@pytest.mark.parametrize("documents", ["blocks", "lines"])
@pytest.mark.parametrize(
    ("mark", "name"),
    [
        ("\x85", r"next lines (U+0085)"), ("\u2028", "line separators (U+2028)"), ("\f", "form feeds (U+000C)"),
        ("\0", "NULs"),
    ],
)  # fmt: skip
def test_what_separates_a_text_without_line_ends_is_named(tmp_path, mark, name, documents):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"Text number {i} of some words.{mark}" for i in range(500)))
    read_as, said = read(path, documents=documents)
    assert len(read_as) == 1 and said == [
        f"1 text files have no line ends and are one document each, the first: {path} with 500 {name} — put line ends "
        "in their place, a blank line between documents, or --documents files says that it is meant"
    ]
    path.write_text(mark.join(["words"] * 5000) + "\nand\nmore lines")
    assert "no line ends" not in str(read(path, documents=documents)[1])
    path.write_text("words " * 5000)
    assert "--documents lines" not in str(read(path, documents=documents)[1])
