"""Lines of text files in any encoding, one at a time; what is no text in that encoding is named, with what it is."""

import codecs
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cramfast.errors import UserError
from cramfast.text.compressed import COMPRESSIONS, open_bytes, readable
from cramfast.text.tally import Tally

# Longest piece of a document held at once, in characters. A file without a single blank line is one document; it is
# cut here (between lines where it has lines), far above any sequence length, so that memory stays bounded.
LONGEST_PIECE = 1 << 20
READ_AT_ONCE = 1 << 18  # characters: a thread that reads by the line would wait for the interpreter as often
LOOKED_AT = 1 << 16  # bytes, when an encoding is guessed
WIDE_SHARE = 0.02  # of NUL bytes from which text is UTF-16; that of spaces and line ends in any language is higher
LEAST_ZEROS = 4
SPACES = tuple(b" \n\r")
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # before that of UTF-16, which it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
FOREIGN_SHARE = 0.25  # of bytes outside ASCII up to which a text is taken for one in Latin letters
UNPACKED_BY = {".gz": "gzip", ".bgz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}


def check_encoding(encoding: str) -> str:
    """The codec's own name; UTF-8 with or without a mark.

    Raises:
        UserError: not the name of an encoding of text.
    """
    try:
        name = codecs.lookup(encoding).name
        "".encode(encoding)  # raises for codecs between bytes, such as base64
    except (LookupError, ValueError):
        raise UserError(f"encoding={encoding!r} is not known — use a name such as utf-8, latin-1 or utf-16") from None
    return "utf-8-sig" if name == "utf-8" else name


def read_lines(
    path: Path, encoding: str = "utf-8", tally: Tally | None = None, newline: str | None = None
) -> Iterator[tuple[int, str]]:
    """(line number, text with its line end) of a plain or compressed text file, in pieces of LONGEST_PIECE at most.

    Args:
        tally: where it may skip malformed rows, lines that cannot be decoded are such rows.
        newline: as open() takes it; None: a lone carriage return ends a line too.

    Raises:
        UserError: a missing, damaged or undecodable file; the message names the place.
    """
    name = check_encoding(encoding)
    skips = tally is not None and tally.most_malformed > 0
    number, rest, first = 1, "", True
    with readable(path):
        try:
            errors = "surrogateescape" if skips else "strict"
            with io.TextIOWrapper(open_bytes(path), encoding=name, errors=errors, newline=newline) as text:
                while more := text.read(READ_AT_ONCE):
                    if "\0" in more and name == "utf-8-sig" and (wide := wide_encoding(more.encode(errors=errors))):
                        raise UserError(f"{path}: {_advice(path, wide)}")
                    if first:
                        more, first = more.removeprefix("\ufeff"), False
                    *lines, rest = (rest + more).split("\n")
                    for line in lines:
                        line += "\n"
                        if skips and not _is_decoded(line, path, number, tally):
                            line = ""
                        while len(line) > LONGEST_PIECE:
                            yield number, line[:LONGEST_PIECE]
                            line = line[LONGEST_PIECE:]
                        if line:
                            yield number, line
                        number += 1
                    while len(rest) > LONGEST_PIECE:
                        yield number, rest[:LONGEST_PIECE]
                        rest = rest[LONGEST_PIECE:]
                if rest and not (skips and not _is_decoded(rest, path, number, tally)):
                    yield number, rest
        except UnicodeError as error:  # also UTF-16 without its mark, which is no UnicodeDecodeError
            raise UserError(_undecodable(path, encoding, error)) from None


def whole_lines(path: Path, encoding: str = "utf-8", tally: Tally | None = None) -> Iterator[tuple[int, str]]:
    """(number, line) of a text file, however long the line."""
    number, parts = 1, []
    for number, piece in read_lines(path, encoding, tally):
        parts.append(piece)
        if piece.endswith("\n"):
            yield number, "".join(parts)
            parts = []
    if parts:  # the last line has no end
        yield number, "".join(parts)


def pieces(text: str) -> Iterator[str]:
    """A document without the white space around it; a long one in pieces of LONGEST_PIECE at most. Where it is cut
    depends on the document alone, so that it is cut alike in a file of any kind."""
    if len(text) > LONGEST_PIECE:
        ready, text = ready_pieces(text)
        yield from ready
    if rest := text.strip():
        yield rest


def ready_pieces(text: str) -> tuple[list[str], str]:
    """pieces() of a document of which this is the beginning: those that what follows cannot change, and the rest."""
    start, ready = len(text) - len(text.lstrip()), []
    end = len(text.rstrip())
    while end - start > LONGEST_PIECE:
        place = start + LONGEST_PIECE
        for mark in ("\n", " "):
            if (found := text.rfind(mark, start + LONGEST_PIECE // 2, place + 1)) >= 0:
                place = found
                break
        ready.append(text[start:place].rstrip())
        while text[place].isspace():
            place += 1
        start = place
    return ready, text[start:]


def wide_encoding(data: bytes) -> str | None:
    """The encoding of which these bytes are text without a mark, by the places of their NUL bytes; None for any of one
    byte or more a character.

    Args:
        data: from the beginning of a character, or of any half or quarter of one.
    """
    data = data[:LOOKED_AT]
    zeros = [data[i::4].count(0) for i in range(4)]
    total = sum(zeros)
    if total < max(WIDE_SHARE * len(data), LEAST_ZEROS):
        return None
    full = [4 * count > 0.9 * len(data) for count in zeros]
    if full[2] and full[3]:  # three bytes of four in Latin letters, and two in any script
        return "utf-32-le"
    if full[0] and full[1]:
        return "utf-32-be"
    units = np.frombuffer(data[: len(data) // 2 * 2], np.uint8).reshape(-1, 2)
    little, big = (int((np.isin(units[:, at], SPACES) & (units[:, 1 - at] == 0)).sum()) for at in (0, 1))
    even, odd = zeros[0] + zeros[2], zeros[1] + zeros[3]
    # Halves of Chinese characters may be 0 too, but not beside a space or a line end.
    if max(little, big) > 10 * min(little, big) and 2 * max(little, big) > WIDE_SHARE * len(units):
        return "utf-16-le" if little > big else "utf-16-be"
    if min(even, odd) > 0.1 * total:
        return None
    return "utf-16-le" if odd > even else "utf-16-be"


def guess_encoding(data: bytes) -> str | None:
    """What bytes that are no UTF-8 are likely to be: wide with or without a mark, or Western; None for anything else.

    Args:
        data: the beginning of the text, or of the part that cannot be decoded.
    """
    for mark, name in MARKS.items():
        if data.startswith(mark):
            return name
    if wide := wide_encoding(data):
        return wide
    if sum(byte >= 128 for byte in data) > FOREIGN_SHARE * len(data) or _is_binary(data):
        return None
    if not any(128 <= byte < 160 for byte in data):
        return "latin-1"  # its bytes from 128 to 159 are control characters, which cp1252 has quotes and dashes in
    try:
        data.decode("cp1252")
    except UnicodeDecodeError:
        return None
    return "cp1252"


def _is_binary(data: bytes) -> bool:
    return any(byte < 32 and byte not in b"\t\n\r\f\x1b" for byte in data)


def _is_decoded(line: str, path: Path, number: int, tally: Tally) -> bool:
    if line.isascii() or not any("\udc80" <= character <= "\udcff" for character in line):
        return True
    tally.skip(f"{path}:{number}: a line that cannot be decoded", "convert the file, or name it with --encoding")
    return False


def _undecodable(path: Path, encoding: str, error: UnicodeError) -> str:
    """Where exactly a file stops being text of this encoding, which the decoder does not know, and what it may be."""
    if check_encoding(encoding) != "utf-8-sig":
        reason = getattr(error, "reason", error)
        return f"{path}: not {encoding} ({reason}) — name its encoding with --encoding, or convert it to UTF-8"
    with open_bytes(path) as data:
        head = data.read(LOOKED_AT)
    with open_bytes(path) as data:
        for number, line in enumerate(data, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as found:
                place = f"{path}:{number}: byte {found.start + 1} of the line is not UTF-8 ({found.reason})"
                wide = guess_encoding(head)
                guess = wide if wide and wide.startswith("utf") else guess_encoding(head + line[:LOOKED_AT])
                if guess:
                    return f"{place}; {_advice(path, guess)}"
                if _is_binary(head):
                    return f"{place}; it looks like no text at all — leave it out, or unpack or convert it"
                return f"{place} — {_unknown(path)}"
    return f"{path}: not UTF-8 — {_unknown(path)}"


def _advice(path: Path, encoding: str) -> str:
    without = " without a mark" if encoding.endswith(("-le", "-be")) else ""
    return (
        f"it looks like {encoding}{without} — --encoding {encoding} reads it, or convert it: {_iconv(path, encoding)}"
    )


def _unknown(path: Path) -> str:
    return f"name its encoding with --encoding, or convert the file to UTF-8: {_iconv(path, 'ENCODING')}"


def _iconv(path: Path, encoding: str) -> str:
    """A shell's line that makes UTF-8 of a file."""
    source = {"latin-1": "ISO-8859-1"}.get(encoding, encoding.upper().replace("-LE", "LE").replace("-BE", "BE"))
    ending = path.suffix.lower()
    stem = path.with_suffix("") if ending in COMPRESSIONS else path
    target = stem.with_suffix(f".utf8{stem.suffix}").name
    if ending in COMPRESSIONS:
        return f"{UNPACKED_BY[ending]} -dc '{path.name}' | iconv -f {source} -t UTF-8 > '{target}'"
    return f"iconv -f {source} -t UTF-8 '{path.name}' > '{target}'"
