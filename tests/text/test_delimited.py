"""Comma- and tab-separated values: no row is lost in another, and what is no text is counted."""

import pytest

from cramfast.errors import UserError
from cramfast.text.corpus import Corpus


def read(path, **options):
    corpus = Corpus((str(path),), **options)
    return list(corpus), [line.removeprefix(f"{path}: ") for line in corpus.notes()]


@pytest.mark.parametrize("quote", ["", '"'])
def test_an_unclosed_quote_leaves_out_its_own_row_alone(tmp_path, quote):
    path = tmp_path / "a.csv"
    lines = [f"{number},{quote}text of row {number}{quote}" for number in range(2, 5002)]
    for number in (12, 300):
        lines[number - 2] = f'{number},"text of row {number}'
    path.write_text("\n".join(["id,text", *lines]))
    documents, said = read(path, skip_malformed=2)
    assert len(documents) == 4998 and documents[-1] == "text of row 5001"
    what = f"{path}:12: a quote that is never closed, or not where its cell ends"
    assert said == [f"2 malformed rows left out, the first: {what} — mend them, or leave it so"]
    for most, line in ((0, 12), (1, 300)):
        with pytest.raises(
            UserError, match=rf"a\.csv:{line}: a quote that is never closed, .* — mend its quotes; --sk"
        ):
            read(path, skip_malformed=most)


def test_the_quote_that_is_open_is_named_not_the_row_before_it(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('id,text\n1,one\n"2\n2\n2","two\nthree\nfour,x\n5,five\n')
    with pytest.raises(UserError, match=r"a\.csv:5: a quote that is never closed"):
        read(path)
    documents, said = read(path, skip_malformed=2)
    assert documents == ["one", "x", "five"] and "2 malformed rows" in said[0]  # its own lines, then line 6


@pytest.mark.parametrize(("lines", "header"), [(180, "id,text"), (5, "id,text,more"), (4, "id,text")])
def test_rows_that_a_stray_quote_joined_are_noted(tmp_path, lines, header):
    path = tmp_path / "a.csv"
    more = ",m" * header.count("more")
    table = [header, *(f"{i},text{more}" for i in range(400))]
    table[11] = f'10,"text{more}'
    table[11 + lines] = f'{10 + lines},text"{more}'
    path.write_text("\n".join(table))
    documents, said = read(path)
    assert len(documents) == 400 - lines
    expected = [f"1 cells may hold many rows each, the first: {path}:12: a cell of {lines} lines that look like rows"]
    assert [line.split(" — ")[0] for line in said] == (expected if lines > 4 else [])


def test_a_long_cell_of_prose_is_none_of_them(tmp_path):
    prose = "\n".join(["A line, with a comma", "and one without"] * 40)
    (tmp_path / "a.csv").write_text(f'id,text\n1,"{prose}"\n2,two\n')
    assert read(tmp_path / "a.csv") == ([prose, "two"], [])


def test_markers_of_missing_values_headers_and_empty_cells_are_counted(tmp_path):
    for name, mark in (("a.csv", ","), ("a.tsv", "\t")):
        path = tmp_path / name
        cells = ["one", "NA", r"\N", "NULL", "NaN", "", "  ", "NA is a word"]
        path.write_text("\n".join([f"id{mark}text", *(f"1{mark}{cell}" for cell in cells), f"id{mark}text", "", ""]))
        assert read(path) == (
            ["one", "NA is a word"],
            [
                f"4 cells are markers of missing values and no documents, the first: NA at {path}:3",
                f"1 rows repeat the header and are no documents, the first: {path}:10",
                "2 rows have no text (empty) and are no documents",
            ],
        )


QUOTED = 'id\ttext\n1\t"He said ""yes"", and went"\n2\tplain\n'


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        (QUOTED, ['He said "yes", and went', "plain"]),
        (QUOTED + '3\t"two\nlines of text"\n', ['He said "yes", and went', "plain", "two\nlines of text"]),
        ('"id"\t"text"\n"1"\t"one"\n"2"\t"two"\n', ["one", "two"]),
        ('id\ttext\n1\t"Hello"\n2\t"Open, he said\n3\tword"\n', ['"Hello"', '"Open, he said', 'word"']),
        ('id\ttext\n1\t"Open\n2\tword"\n', ['"Open', 'word"']),
        ('id\ttext\n1\ta 5" nail\n2\t"Hello"\n', ['a 5" nail', '"Hello"']),
    ],
)
def test_tabs_and_quotes_as_pandas_writes_them_and_as_they_stand(tmp_path, text, documents):
    (tmp_path / "a.tsv").write_text(text)
    assert read(tmp_path / "a.tsv") == (documents, [])


def test_quotes_of_which_some_are_a_spreadsheets_are_noted(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text(QUOTED + '3\t"Open, he said\n')
    documents, said = read(path)
    assert documents[0] == '"He said ""yes"", and went"' and len(documents) == 3
    assert said == [
        f"1 texts stand in quotes, as spreadsheets write them, and keep these, the first: {path}:2 — name the file "
        ".csv to read them as quotes"
    ]
