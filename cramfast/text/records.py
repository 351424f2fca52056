"""Rows with a text among other fields: JSON lines, and what rows of every kind share."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cramfast.errors import UserError
from cramfast.text.compressed import Damaged, open_bytes
from cramfast.text.encodings import LOOKED_AT
from cramfast.text.lines import pieces, read_lines, whole_lines
from cramfast.text.tally import Tally

EACH_LINE = "each line must hold one object"
LARGEST_ARRAY = 1 << 28  # characters of a .json file, which is held whole
LINES_OF = "jq -c '.[]' '{}' > rows.jsonl"
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
    if not value or value.isspace():
        tally.blank_text += 1
        return
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which is no character
            tally.note("half", where)
            value = value.encode("utf-8", "replace").decode()
    yield from pieces(value)


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
    parse = _parser(text_key)
    for number, line in whole_lines(path, encoding, tally):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = _parse_json(parse, line, where)
        except _NotARow as error:
            tally.skip(*error.args)
            continue
        yield from row_texts(row, text_key, where, tally)


def read_json(path: Path, text_key: str, encoding: str, tally: Tally) -> Iterator[str]:
    """The same of a file that is one JSON array of objects; else one with an object a line, which many name .json."""
    first = next((line.strip() for _, line in read_lines(path, encoding) if line.strip()), "")
    if first == "{":
        raise UserError(f"{path}: one object over many lines — write its rows as one array, or an object a line")
    if not first.startswith("["):
        yield from read_jsonl(path, text_key, encoding, tally)
        return
    parts, size = [], 0
    for _, line in whole_lines(path, encoding):
        parts.append(line)
        size += len(line)
        if size > LARGEST_ARRAY:
            raise UserError(f"{path}: too large for one JSON array — make lines of it: {LINES_OF.format(path.name)}")
    try:
        rows = _parser(text_key).decode("".join(parts))
    except (_NotARow, ValueError, RecursionError) as error:
        what = error.args[0] if isinstance(error, _NotARow) else f"not JSON ({error})"
        raise UserError(f"{path}: {what} — it should be one array of objects, or hold one a line") from None
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        if isinstance(row, dict):
            yield from row_texts(row, text_key, where, tally)
        else:
            tally.skip(f"{where}: a JSON {type(row).__name__} where an object is expected", "leave it out")


def holds_rows(path: Path) -> bool:
    """Whether a .json file looks like rows, an array of objects or an object a line, and not like settings."""
    try:
        with open_bytes(path) as file:
            head = file.read(LOOKED_AT).removeprefix(codecs.BOM_UTF8).lstrip()
    except (OSError, EOFError, Damaged):
        return True  # the reader names what is wrong
    if not head:
        return True  # an empty file, counted as one
    first, _, rest = head.partition(b"\n")
    if head.startswith(b"["):
        return head[1:].lstrip().startswith(b"{")
    return _is_object(first) and rest.lstrip().startswith(b"{")


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parser(text_key: str) -> json.JSONDecoder:
    """Refuses an object that has the text, or what the text is in, twice: which of the two is meant is unknown."""
    steps = {text_key, *text_key.split(".")}

    def once(pairs: list[tuple[str, Any]]) -> dict:
        row = dict(pairs)
        if len(row) != len(pairs):
            keys = [key for key, _ in pairs]
            if twice := sorted(key for key in steps if keys.count(key) > 1):
                raise _NotARow(f"{keys.count(twice[0])} keys are named {twice[0]!r}", "rename all but one")
        return row

    return json.JSONDecoder(object_pairs_hook=once)


def _parse_json(parse: json.JSONDecoder, line: str, where: str) -> dict:
    try:
        row = parse.decode(line)
    except json.JSONDecodeError as error:
        what = f"{error.msg} at character {error.pos + 1}"
        raise _NotARow(f"{where}: not JSON ({what})", EACH_LINE) from None
    except _NotARow as error:
        raise _NotARow(f"{where}: {error.args[0]}", error.args[1]) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        raise _NotARow(f"{where}: not to be read as JSON ({error})", EACH_LINE) from None
    if not isinstance(row, dict):
        what = f"{where}: a JSON {type(row).__name__} where an object is expected"
        raise _NotARow(what, "each line must hold one, or the file be named .json and be one array of them")
    return row
