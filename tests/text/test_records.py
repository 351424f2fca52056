"""Rows and tables: every format gives the same documents; what is no text is named, skipped as asked, and counted."""

import gzip
import io
import json

import pyarrow
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest

from cramfast.errors import UserError
from cramfast.text.corpus import Corpus

DOCUMENTS = ['First, "quoted" line.\nSecond line of one.', "Ein zweites: Größe, 日本語, 🙂.", "A third; short."]
TABLE = pyarrow.table({"id": [1, 2, 3], "text": DOCUMENTS})


def quoted(text):
    return '"' + text.replace('"', '""') + '"'


def stream(table):
    out = io.BytesIO()
    with pyarrow.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return out.getvalue()


def file(table):
    out = io.BytesIO()
    with pyarrow.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return out.getvalue()


def feather(table, **options):
    out = io.BytesIO()
    pyarrow.feather.write_feather(table, out, **options)
    return out.getvalue()


def parquet(table):
    out = io.BytesIO()
    pyarrow.parquet.write_table(table, out)
    return out.getvalue()


def csv(delimiter, line_end="\n"):
    rows = [["id", "text"], *([str(i), quoted(text)] for i, text in enumerate(DOCUMENTS))]
    return line_end.join(map(delimiter.join, rows)).encode()


def articles(ends="\n"):
    escaped = [text.replace("&", "&amp;") for text in DOCUMENTS]
    return "".join(
        f'<doc id="{i}" url="u" title="t">{ends}{t}{ends}</doc>{ends}' for i, t in enumerate(escaped)
    ).encode()


def read(path, **options):
    corpus = Corpus((str(path),), **options)
    return list(corpus), corpus


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", csv(",")), ("a.csv", csv(";")), ("a.csv", csv(",", "\r\n")), ("a.arrow", stream(TABLE)),
        ("a.arrow", file(TABLE)), ("a.feather", feather(TABLE)), ("a.feather", feather(TABLE, compression="zstd")),
        ("a.parquet", parquet(TABLE)), ("wiki_00", articles()),
        ("wiki_01", "".join(json.dumps({"id": 1, "text": t}) + "\n" for t in DOCUMENTS).encode()),
        ("a.ndjson", "".join(json.dumps({"id": 1, "text": t}) + "\n" for t in DOCUMENTS).encode()),
    ],
)  # fmt: skip
def test_every_kind_of_table_gives_the_same_documents(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert read(tmp_path)[0] == DOCUMENTS


def test_a_line_of_tab_separated_values_is_a_row_and_quotes_are_characters(tmp_path):
    (tmp_path / "a.tsv").write_text('id\ttext\n1\t"Open quote, he said\n2\tA second\n')
    assert read(tmp_path)[0] == ['"Open quote, he said', "A second"]


def test_text_stored_as_bytes_is_read_as_utf_8(tmp_path):
    texts = pyarrow.array([text.encode() for text in DOCUMENTS], pyarrow.binary())
    for kind in (pyarrow.binary(), pyarrow.large_binary()):
        for name, write in (("a.parquet", parquet), ("a.arrow", stream)):
            (tmp_path / name).write_bytes(write(pyarrow.table({"text": texts.cast(kind)})))
            assert read(tmp_path / name)[0] == DOCUMENTS
    (tmp_path / "b.parquet").write_bytes(parquet(pyarrow.table({"text": [b"fine", b"caf\xe9"]})))
    with pytest.raises(UserError, match=r"b\.parquet, row 2: not UTF-8"):
        read(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.arrow", stream(pyarrow.Table.from_arrays([["a"], ["b"]], names=["text", "text"]))),
        ("a.parquet", parquet(pyarrow.Table.from_arrays([["a"], ["b"]], names=["text", "text"]))),
        ("a.csv", b"text,text\na,b\n"),
        ("a.tsv", b"text\ttext\na\tb\n"),
    ],
)
def test_two_columns_of_one_name_are_refused(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}: 2 columns are named 'text' — rename all but one"):
        read(tmp_path)


def test_rows_without_text_are_counted(tmp_path):
    for name, write in (("a.parquet", parquet), ("b.arrow", stream)):
        (tmp_path / name).write_bytes(write(pyarrow.table({"text": ["one", None, "two", None]})))
    (tmp_path / "c.jsonl").write_text('{"text": null}\n{"text": "three"}\n')
    documents, corpus = read(tmp_path)
    assert documents == ["one", "two", "one", "two", "three"]
    assert corpus.notes() == [f"{tmp_path}: 5 rows have no text (null) and are no documents"]


def test_a_field_in_a_field_is_named_with_dots(tmp_path):
    rows = [{"document": {"body": {"text": text}, "n": 1}} for text in DOCUMENTS] + [
        {"document": {"body": None, "n": 1}}
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = pyarrow.Table.from_pylist(rows)
    (tmp_path / "b.parquet").write_bytes(parquet(table))
    (tmp_path / "c.arrow").write_bytes(stream(table))
    documents, corpus = read(tmp_path, text_key="document.body.text")
    assert documents == DOCUMENTS * 3 and "3 rows have no text" in corpus.notes()[0]
    for name in ("a.jsonl", "b.parquet", "c.arrow"):
        with pytest.raises(UserError, match=r"'document\.title' \(there: document\) — .*a field in a field as OUTER"):
            read(tmp_path / name, text_key="document.title")
    (tmp_path / "d.jsonl").write_text('{"document.body": "a name with a dot"}\n')
    assert read(tmp_path / "d.jsonl", text_key="document.body")[0] == ["a name with a dot"]


def test_a_column_of_something_else_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet(pyarrow.table({"text": [["a", "list"]]})))
    with pytest.raises(UserError, match=r"a\.parquet: column 'text' holds list<.*>, not text — name it with"):
        read(tmp_path)


def utf8_but_for_one() -> bytes:
    texts = pyarrow.array([b"one", b"caf\xe9", b"two"]).cast(pyarrow.binary())
    return parquet(pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 3, texts.buffers())}))


@pytest.mark.parametrize(
    ("name", "data", "first"),
    [
        ("a.jsonl", b'{"text": "one"}\nnot JSON\n{"body": 1}\n{"text": 5}\n[1]\n{"text": "two"}\n', ":2: not JSON"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "caf\xe9"}\n{"text": "two"}\n', ":2: a line that cannot be decoded"),
        ("a.txt", b"one\n\ncaf\xe9\n\ntwo", ":3: a line that cannot be decoded"),
        ("a.parquet", utf8_but_for_one(), ", row 2: not UTF-8"),
        ("a.csv", b"id,text\n1,one\n2\n3,too,many\n4,two\n", ":3: 1 cells where the header has 2"),
        ("a.csv", b'id,text\n1,one\n2,"a"b\n4,two\n', ":3: not a row"),
        ("a.tsv", b"id\ttext\n1\tone\n2\n4\ttwo\n", ":3: 1 cells where the header has 2"),
    ],
)
def test_malformed_rows_are_skipped_up_to_a_stated_number(tmp_path, name, data, first):
    (tmp_path / name).write_bytes(data)
    documents, corpus = read(tmp_path, skip_malformed=4)
    count = corpus.read[1].malformed
    assert documents == ["one", "two"] and 1 <= count <= 4
    (said,) = [line for line in corpus.notes() if "malformed" in line]
    assert f"{count} malformed rows left out, the first: {tmp_path / name}{first}" in said
    assert list(corpus) == documents  # counted anew at each reading
    assert read(tmp_path, skip_malformed=count)[0] == documents
    with pytest.raises(UserError, match=r"--skip-malformed|a\.(txt|jsonl):\d: byte .* is not UTF-8"):
        read(tmp_path, skip_malformed=count - 1)


def test_a_quote_that_is_never_closed(tmp_path, monkeypatch):
    monkeypatch.setattr("cramfast.text.delimited.LARGEST_CELL", 1000)
    (tmp_path / "a.csv").write_text('id,text\n1,"' + "many words\n" * 1000)
    with pytest.raises(UserError, match=r"a\.csv:2: a quote that is never closed"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a.arrow", "a.feather"])
@pytest.mark.parametrize("data", [b"ARROW1 not really", stream(TABLE)[:-90], file(TABLE)[:-90]])
def test_a_damaged_arrow_file_is_named(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}: damaged Arrow file"):
        read(tmp_path)


@pytest.mark.parametrize("ending", ["arrow", "arrow.gz"])
def test_arrow_streams_end_to_end_are_read_and_each_has_its_end(tmp_path, ending):
    packed = gzip.compress if ending.endswith("gz") else bytes
    path = tmp_path / f"a.{ending}"
    one, whole = stream(TABLE), file(TABLE)
    for data in (one + one, packed(one) + packed(one)):
        path.write_bytes(packed(data) if data == one + one else data)
        assert read(path)[0] == DOCUMENTS * 2
    path.write_bytes(packed(one + stream(pyarrow.table({"text": [b"a", b"caf\xe9"]}))))
    with pytest.raises(UserError, match="row 5: not UTF-8"):
        read(path)
    for data, reason in (
        (one[:-8], "cut short: no mark of the end"),  # at the border of a batch
        (one + one[:-8], "cut short: no mark of the end"),
        (one + bytes(8), "bytes after the end of a stream"),
        (one + b"garbage!" * 9, ".*"),
        (whole + whole, r"bytes after its end, as of files joined"),
        (one + whole, ".*"),
    ):
        path.write_bytes(packed(data))
        with pytest.raises(UserError, match=rf"{path.name}: damaged Arrow file \({reason}\) — "):
            read(path)


def test_feather_of_the_first_version_is_named(tmp_path):
    (tmp_path / "a.feather").write_bytes(b"FEA1" + bytes(60))
    with pytest.raises(UserError, match=r"a\.feather: Feather of version 1, which is no longer read — write it again"):
        read(tmp_path)


def test_a_long_document_is_cut_alike_in_a_file_of_any_kind(tmp_path, monkeypatch):
    monkeypatch.setattr("cramfast.text.lines.LONGEST_PIECE", 100)
    text = "\n".join(" ".join(f"word{i}" for i in range(n, n + n % 40)) for n in range(60)).strip()
    (tmp_path / "a.txt").write_text(f"\n\n  {text}\n\n\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}))
    (tmp_path / "c.parquet").write_bytes(parquet(pyarrow.table({"text": [text]})))
    blocks = [read(tmp_path / name, documents="files")[0] for name in ("a.txt", "b.jsonl", "c.parquet")]
    assert blocks[0] == blocks[1] == blocks[2] and max(map(len, blocks[0])) <= 100 < len(text)
    assert "".join("".join(blocks[0]).split()) == "".join(text.split())
    assert all(word in text.split() for block in blocks[0] for word in block.split())  # no word is cut


@pytest.mark.parametrize("row", ['{"text": "a", "text": "b"}', '{"document": {"text": 1}, "document": {"text": "b"}}'])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_two_keys_of_one_name_are_refused(tmp_path, name, row):
    (tmp_path / name).write_text(row if name == "a.jsonl" else f"[{row}]")
    key = "text" if row.startswith('{"text') else "document"
    with pytest.raises(UserError, match=rf"{name}.*: 2 keys are named '{key}' — "):
        read(tmp_path / name, text_key="text" if key == "text" else "document.text")
    (tmp_path / name).write_text('{"id": 1, "id": 2, "text": "one"}\n{"id": 1, "text": "two"}\n')
    assert read(tmp_path / name)[0] == ["one", "two"]


def test_a_json_file_of_rows_is_read_and_settings_are_passed_over(tmp_path):
    rows = [{"id": i, "text": text} for i, text in enumerate(DOCUMENTS)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "c.json.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    (tmp_path / "config.json").write_text('{"a": 1}\n')
    (tmp_path / "more.json").write_text(json.dumps({"a": [1, 2]}, indent=1))
    documents, corpus = read(tmp_path)
    assert documents == DOCUMENTS * 3 and "passed over 2 files" in corpus.notes()[0]
    assert read(tmp_path / "a.json", format="jsonl")[0] == DOCUMENTS
    for text, said in (
        ('[{"text": 1}]', r", row 1: 'text' is a int"),
        ("[1]", ", row 1: a JSON int where an object"),
        ('{\n"text": "a"\n}', ": one object over many lines — write its rows as one array, or an object a line"),
        ('[{"text": "a"}', r": not JSON \(.*\) — it should be one array of objects, or hold one a line"),
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match=rf"a\.json{said}"):
            read(tmp_path / "a.json")


def test_empty_texts_and_halves_of_characters_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": null}\n{"text": ""}\n{"text": " "}\n{"text": "a\\ud83d b"}\n{"text": "\\ud83d\\ude42"}\n')
    documents, corpus = read(path)
    assert documents == ["a? b", "🙂"]
    assert [line.removeprefix(f"{path}: ") for line in corpus.notes()] == [
        "1 texts hold halves of surrogate pairs, which are no characters and become '?', the first: "
        f"{path}:4 — write them again, or leave it so",
        "3 rows have no text (1 null, 2 empty) and are no documents",
    ]
