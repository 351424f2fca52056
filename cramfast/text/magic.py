"""Files that are of another kind than their names say, by their first bytes."""

import codecs
import json
import re
from itertools import islice
from pathlib import Path

from cramfast.errors import UserError
from cramfast.text.compressed import COMPRESSIONS, open_bytes, readable
from cramfast.text.tally import Tally

HEAD = 1 << 12  # bytes
TAR_AT, TAR = 257, b"ustar"
# (first bytes, what it is, remedy); none of them begins a text.
KINDS = (
    (b"\x1f\x8b", "compressed by gzip", "add .gz to its name"),
    (b"BZh", "compressed by bzip2", "add .bz2 to its name"),
    (b"\xfd7zXZ\0", "compressed by xz", "add .xz to its name"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "add .zst to its name"),
    (b"PK\x03\x04", "a zip archive, or a document packed as one (.docx, .odt, .xlsx, .epub)", "unpack or convert it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"Rar!\x1a\x07", "a rar archive", "unpack it"),
    (b"%PDF-", "a PDF", "convert it to text, such as with pdftotext"),
    (b"{\\rtf", "RTF, text among commands of its layout", "convert it to plain text"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a document of Microsoft Office", "convert it to plain text"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", "fetch that with git lfs pull"),
    (b"PAR1", "a parquet file", "name it .parquet"),
    (b"ARROW1", "an Arrow file", "name it .arrow"),
    (b"SQLite format 3\0", "an SQLite database", "write its table as .parquet or .csv"),
    (b"Obj\x01", "an Avro file", "write it as .parquet"),
    (b"ORC", "an ORC file", "write it as .parquet"),
)
MAGICS = tuple(magic for magic, _, _ in KINDS)
OWN = {"parquet": b"PAR1", "arrow": b"ARROW1"}
ARRAY = re.compile(rb'\s*\[\s*\{\s*"')
SHORT = 4  # bytes
LONGEST_LINE = 1 << 24  # bytes


def check_magic(path: Path, kind: str, given: bool, tally: Tally) -> bool:
    """Whether a file holds anything, and that it is no archive, no document of an office and no other table, whatever
    its name says.

    Args:
        kind: what it is to be read as.
        given: by --format; a text whose lines are JSON may be meant then.

    Raises:
        UserError: it is, with the remedy.
    """
    with readable(path), open_bytes(path) as file:
        head = file.read(HEAD).removeprefix(codecs.BOM_UTF8)
    if head[TAR_AT:].startswith(TAR):
        raise UserError(f"{path}: a tar archive — unpack it")
    for magic, what, remedy in KINDS if head.startswith(MAGICS) else ():
        # A text may begin with the letters of a short one, but has no control characters.
        if head.startswith(magic) and OWN.get(kind) != magic and (len(magic) > SHORT or not _is_text(head)):
            again = what.startswith("compressed") and path.suffix.lower() in COMPRESSIONS
            raise UserError(f"{path}: {what}, whatever its name says — {'unpack it once more' if again else remedy}")
    if kind == "text" and not given and ARRAY.match(head):
        raise UserError(
            f"{path}: it begins as a JSON array of objects — name it .json, or --format text reads it as it stands"
        )
    if kind == "text" and not given and head.lstrip().startswith(b"{"):
        with readable(path), open_bytes(path) as file:
            lines = [line for line in islice(iter(lambda: file.readline(LONGEST_LINE), b""), 100) if line.strip()]
        if all(map(_is_object, lines[:2])):
            raise UserError(
                f"{path}: its lines are JSON objects — name it .jsonl, or --format jsonl reads their texts; --format "
                "text reads them as they stand"
            )
        if _is_object(lines[0]):
            tally.note("object", str(path))
    return bool(head)


def _is_text(head: bytes) -> bool:
    return not any(byte < 32 and byte not in b"\t\n\r\f" for byte in head)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
