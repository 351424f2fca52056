"""Comma- and tab-separated values with a header."""

import csv
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from cramfast.errors import UserError
from cramfast.text.lines import whole_lines
from cramfast.text.records import RENAMED, texts_of
from cramfast.text.tally import Tally

DELIMITERS = ",;\t|"  # of .csv, which spreadsheets of many countries write with semicolons
# What pandas takes for a missing value, and what databases write for one.
MISSING = frozenset(("\\N", "NULL", "null", "NaN", "nan", "NA", "N/A", "n/a", "#N/A", "#NA", "<NA>", "None"))
LARGEST_CELL = 1 << 26  # characters; beyond that a quote was never closed
LOOKED_AT = 1 << 20  # characters of a .tsv, for how its cells are quoted
CELL = re.compile(r'(?:(?<=[\t\n])|^)"(?:[^"]|"")*"(?=[\t\n]|$)')
CELL_OF_A_LINE = re.compile(r'(?:(?<=[\t\n])|^)"(?:[^"\t\n]|"")*"(?=[\t\n]|$)')
# A cell of several lines that nearly all have as many delimiters as the header may be rows that a stray quote joined.
# One delimiter a line is common in prose: so many are asked for in all.
ROWLIKE_SHARE = 0.9
ROWLIKE_DELIMITERS = 10


def read_csv(path: Path, text_key: str, encoding: str, tally: Tally) -> Iterator[str]:
    """The documents of comma-separated values with a header (RFC 4180); other delimiters by the header."""
    lines = whole_lines(path, encoding, tally)
    first = next((line for _, line in lines if line.strip()), "")
    if not first:
        return
    headers = {delimiter: next(csv.reader([first], delimiter=delimiter), []) for delimiter in DELIMITERS}
    delimiter = next((d for d, names in headers.items() if text_key in names), DELIMITERS[0])
    place = _column(headers[delimiter], text_key, path)
    yield from _quoted_cells(lines, delimiter, headers[delimiter], place, text_key, path, tally)


def _quoted_cells(
    lines: Iterator[tuple[int, str]],
    delimiter: str,
    header: list[str],
    place: int,
    text_key: str,
    path: Path,
    tally: Tally,
) -> Iterator[str]:
    for number, row, taken in _rows(lines, delimiter, path, tally):
        where = f"{path}:{number}"
        if len(taken) > 1 and (count := _rowlike(taken[1:], delimiter, header)):
            tally.note("joined", f"{where}: a cell of {count:,} lines that look like rows")
        yield from _cell(row, place, header, text_key, where, tally)


def _rows(
    lines: Iterator[tuple[int, str]], delimiter: str, path: Path, tally: Tally
) -> Iterator[tuple[int, list[str], list[str]]]:
    """(number of its first line, cells, lines) of each row. What cannot be a row ends with the line that opened its
    last quote: an unclosed one leaves out no row but its own."""
    csv.field_size_limit(LARGEST_CELL)
    taken: list[tuple[int, str]] = []  # lines of the row at hand
    again: deque[tuple[int, str]] = deque()

    def feed() -> Iterator[str]:
        while again or (following := next(lines, None)):
            taken.append(again.popleft() if again else following)
            yield taken[-1][1]

    rows = csv.reader(feed(), delimiter=delimiter, strict=True)
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            unclosed = len(taken) > 1 or "unexpected end" in str(error)
            # A quote that is not where its cell ends stands in the newest line, and was opened before.
            opened = _opened([line for _, line in (taken[:-1] if "expected after" in str(error) else taken)])
            what = "a quote that is never closed, or not where its cell ends" if unclosed else f"not a row ({error})"
            tally.skip(f"{path}:{taken[opened][0]}: {what}", "mend its quotes")
            again.extendleft(reversed(taken[opened + 1 :]))
            taken.clear()
            rows = csv.reader(feed(), delimiter=delimiter, strict=True)
            continue
        if row is None:
            return
        yield taken[0][0], row, [line for _, line in taken]
        taken.clear()


def _opened(lines: list[str]) -> int:
    """Which of these lines opens the last quote; the first where none does."""
    opened, inside = 0, False
    for at, line in enumerate(lines):
        quotes = line.replace('""', "").count('"')
        if quotes > inside:
            opened = at
        inside ^= quotes % 2 == 1
    return opened


def _rowlike(lines: list[str], delimiter: str, header: list[str]) -> int:
    """How many lines of a cell look like rows, where nearly all do; else 0."""
    wanted = len(header) - 1
    count = sum(line.count(delimiter) == wanted for line in lines)
    return count if count >= ROWLIKE_SHARE * len(lines) and count * wanted >= ROWLIKE_DELIMITERS else 0


def read_tsv(path: Path, text_key: str, encoding: str, tally: Tally) -> Iterator[str]:
    """The documents of tab-separated values with a header: a line is a row, quotes are characters (IANA); but where all
    cells with quotes are quoted as pandas and spreadsheets do it, cells are read so."""
    head, size = list[str](), 0
    for _, line in whole_lines(path, encoding, Tally(tally.most_malformed)):
        head.append(line)
        size += len(line)
        if size > LOOKED_AT:
            break
    lines = whole_lines(path, encoding, tally)
    first = next((line for _, line in lines if line.strip()), "")
    if not first:
        return
    quoted = is_quoted(head)
    header = next(csv.reader([first], delimiter="\t")) if quoted else first.rstrip("\n").split("\t")
    place = _column(header, text_key, path)
    if quoted:
        yield from _quoted_cells(lines, "\t", header, place, text_key, path, tally)
        return
    for number, line in lines:
        row = line.rstrip("\n").split("\t") if line != "\n" else []
        where = f"{path}:{number}"
        if len(row) == len(header) and CELL.fullmatch(row[place]) and '""' in row[place][1:-1]:
            tally.note("quoted", where)
        yield from _cell(row, place, header, text_key, where, tally)


def is_quoted(lines: list[str]) -> bool:
    """Whether the cells of tab-separated values, of which this is the beginning, are quoted where they hold a quote, a
    tab or a line end, or all of them; a text that merely begins and ends with a quote says nothing."""
    text = "".join(lines)
    if '"' not in text:
        return False
    # Where every line is a row as it stands, a quote on one line and one on the next are of no one cell.
    alone = all(line.count("\t") == lines[0].count("\t") for line in lines if line.strip())
    pattern = CELL_OF_A_LINE if alone else CELL
    cells, rest = [cell[1:-1] for cell in pattern.findall(text)], pattern.sub("", text)
    cut = re.search(r'(?:^|[\t\n])"[^\t"]*$', rest)  # the last cell
    if '"' in (rest[: cut.start()] if cut and not alone else rest):
        return False
    if not any(rest.split()):
        return len(cells) > 1
    written = any('""' in cell or "\t" in cell or "\n" in cell for cell in cells)
    return written and not any(set('"\t\n,').isdisjoint(cell) for cell in cells)


def _column(header: list[str], text_key: str, path: Path) -> int:
    if header.count(text_key) > 1:
        raise UserError(f"{path}: {header.count(text_key)} columns are named {text_key!r} — rename all but one")
    if text_key not in header:
        raise UserError(f"{path}: no column {text_key!r} (there: {', '.join(header) or 'none'}) — {RENAMED}")
    return header.index(text_key)


def _cell(row: list[str], place: int, header: list[str], text_key: str, where: str, tally: Tally) -> Iterator[str]:
    if not row:  # a blank line
        return
    if not any(row):
        tally.blank_text += 1
        return
    if row == header:  # files that were joined
        tally.note("header", where)
        return
    if len(row) != len(header):
        cells = f"{len(row)} cells where the header has {len(header)}"
        tally.skip(f"{where}: {cells}", "quote cells that hold delimiters or line ends")
        return
    if row[place] in MISSING:
        tally.note("missing", f"{row[place]} at {where}")
        return
    yield from texts_of(row[place], text_key, where, tally)
