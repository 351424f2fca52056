"""Rows with a text among other fields: JSON lines, and what rows of every kind share."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cramfast.text.lines import pieces, whole_lines
from cramfast.text.tally import Tally

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
