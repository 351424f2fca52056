"""Rows with a text among other fields: JSON lines, comma- and tab-separated values."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cramfast.errors import UserError
from cramfast.text.lines import pieces, whole_lines
from cramfast.text.tally import Tally

DELIMITERS = ",;\t|"  # of .csv, which spreadsheets of many countries write with semicolons
LARGEST_CELL = 1 << 26  # characters; beyond that a quote was never closed
RENAMED = "name it with --text-key, a field in a field as OUTER.INNER"


def field_of(row: dict, text_key: str, where: str) -> Any:
    """The field of this name, or of this path through objects.

    Raises:
        UserError: there is none.
    """
    if text_key in row:
        return row[text_key]
    inner: Any = row
    for step in text_key.split("."):
        if inner is None:
            return None
        if not isinstance(inner, dict) or step not in inner:
            keys = ", ".join(sorted(map(str, row))) or "none"
            raise _NotARow(f"{where}: no key {text_key!r} (there: {keys})", RENAMED)
        inner = inner[step]
    return inner


class _NotARow(Exception):
    """What is wrong with a row, and the remedy."""


def texts_of(value: Any, text_key: str, where: str, tally: Tally) -> Iterator[str]:
    """The document that a field holds; null is none, and counted.

    Raises:
        UserError: not a text, where no more such rows may be skipped.
    """
    if value is None:
        tally.without_text += 1
        return
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            tally.skip(f"{where}: not UTF-8 ({error.reason})", "write it again")
            return
    if not isinstance(value, str):
        tally.skip(f"{where}: {text_key!r} is a {type(value).__name__}, not text", "name another with --text-key")
        return
    # JSON can spell half a surrogate pair, which is no character.
    yield from pieces(value if value.isascii() else value.encode("utf-8", "replace").decode())


def row_texts(row: dict, text_key: str, where: str, tally: Tally) -> Iterator[str]:
    """The document of a row of named fields, as texts_of()."""
    try:
        value = field_of(row, text_key, where)
    except _NotARow as error:
        tally.skip(*error.args)
        return
    yield from texts_of(value, text_key, where, tally)


def read_jsonl(path: Path, text_key: str, encoding: str, tally: Tally) -> Iterator[str]:
    """The documents of a file with one JSON object a line."""
    for number, line in whole_lines(path, encoding, tally):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = _parse_json(line, where)
        except _NotARow as error:
            tally.skip(*error.args)
            continue
        yield from row_texts(row, text_key, where, tally)


def _parse_json(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        what = f"{error.msg} at character {error.pos + 1}"
        raise _NotARow(f"{where}: not JSON ({what})", "each line must hold one object") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        raise _NotARow(f"{where}: not to be read as JSON ({error})", "each line must hold one object") from None
    if not isinstance(row, dict):
        what = f"{where}: a JSON {type(row).__name__} where an object is expected"
        raise _NotARow(what, "each line must hold one")
    return row


def read_csv(path: Path, text_key: str, encoding: str, tally: Tally) -> Iterator[str]:
    """The documents of comma-separated values with a header (RFC 4180); other delimiters by the header."""
    csv.field_size_limit(LARGEST_CELL)
    lines = (line for _, line in whole_lines(path, encoding, tally))
    first = next(lines, "")
    headers = {delimiter: next(csv.reader([first], delimiter=delimiter), []) for delimiter in DELIMITERS}
    delimiter = next((d for d, names in headers.items() if text_key in names), DELIMITERS[0])
    place = _column(headers[delimiter], text_key, path)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            tally.skip(f"{path}:{rows.line_num + 1}: not a row ({error})", "mend its quotes")
            continue
        if row is None:
            return
        yield from _cell(row, place, headers[delimiter], text_key, f"{path}:{rows.line_num + 1}", tally)


def read_tsv(path: Path, text_key: str, encoding: str, tally: Tally) -> Iterator[str]:
    """The documents of tab-separated values with a header: a line is a row, quotes are characters (IANA)."""
    header: list[str] | None = None
    for number, line in whole_lines(path, encoding, tally):
        row = line.rstrip("\n").split("\t")
        if header is None:
            header, place = row, _column(row, text_key, path)
        else:
            yield from _cell(row, place, header, text_key, f"{path}:{number}", tally)


def _column(header: list[str], text_key: str, path: Path) -> int:
    if header.count(text_key) > 1:
        raise UserError(f"{path}: {header.count(text_key)} columns are named {text_key!r} — rename all but one")
    if text_key not in header:
        raise UserError(f"{path}: no column {text_key!r} (there: {', '.join(header) or 'none'}) — {RENAMED}")
    return header.index(text_key)


def _cell(row: list[str], place: int, header: list[str], text_key: str, where: str, tally: Tally) -> Iterator[str]:
    if not any(row):  # a blank line
        return
    if len(row) != len(header):
        cells = f"{len(row)} cells where the header has {len(header)}"
        tally.skip(f"{where}: {cells}", "quote cells that hold delimiters or line ends")
        return
    yield from texts_of(row[place], text_key, where, tally)
