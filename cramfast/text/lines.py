"""Lines of text files in any encoding, one at a time; what is no text in that encoding is named, with what it is."""

import codecs
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from cramfast.errors import UserError
from cramfast.text.compressed import COMPRESSIONS, open_bytes, readable
from cramfast.text.encodings import LOOKED_AT, guesses, is_binary, marked, seven_bit_encoding, wide_encoding
from cramfast.text.tally import Tally

# Longest piece of a document held at once, in characters. A file without a single blank line is one document; it is
# cut here (between lines where it has lines), far above any sequence length, so that memory stays bounded.
LONGEST_PIECE = 1 << 20
READ_AT_ONCE = 1 << 18  # characters: a thread that reads by the line would wait for the interpreter as often
PADDING = re.compile("\0{2,}")  # of a file that was larger than what was written to it
EASTERN_CHARACTERS = 8  # from which pairs of bytes are hardly UTF-8 by chance
ICONV = {  # names of iconv's own
    "latin-1": "ISO-8859-1",
    "mac_roman": "MACINTOSH",
    "mac_latin2": "MAC-CENTRALEUROPE",
    "shift_jis": "SHIFT_JIS",
    "hz": "HZ-GB-2312",
    "iso2022_jp_ext": "ISO-2022-JP-3",
    "iso2022_jp_2004": "ISO-2022-JP-3",
}
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
        if name != "utf-8-sig":
            _refuse_unicode(path, name)
        try:
            errors = "surrogateescape" if skips else "strict"
            with io.TextIOWrapper(open_bytes(path), encoding=name, errors=errors, newline=newline) as text:
                while more := text.read(READ_AT_ONCE):
                    if "\0" in more and name == "utf-8-sig" and (wide := wide_encoding(more.encode(errors=errors))):
                        raise UserError(f"{path}: {_advice(path, wide)}")
                    if tally is not None and "\0\0" in more:
                        whole, more = more, PADDING.sub("", more)
                        tally.note("padding", str(path), len(whole) - len(more))
                    if name == "utf-8-sig" and more.isascii() and (seven := seven_bit_encoding(more)):
                        raise UserError(f"{path}: {_advice(path, seven)}")
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
            if _is_utf8(line):
                continue
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as found:
                place = f"{path}:{number}: byte {found.start + 1} of the line is not UTF-8 ({found.reason})"
                before = line[: found.start].decode("utf-8")
                line = line[max(found.start - LOOKED_AT // 2, 0) : found.start + LOOKED_AT // 2]
            if wide := marked(head) or wide_encoding(head):
                return f"{place}; {_advice(path, wide)}"
            if is_binary(head):
                return f"{place}; it looks like no text at all — leave it out, or unpack or convert it"
            if sum(not character.isascii() for character in before) > 1:  # one may be so by chance
                return f"{place}, and the line before it is — mend that place, or take the line out"
            # Other lines alone say which alphabet it is; those that are UTF-8 would mislead.
            others = [other for other in data.read(LOOKED_AT).split(b"\n") if not _is_utf8(other)]
            return f"{place}{_guessed(path, guesses(b''.join([line, *others]), line))}"
    return f"{path}: not UTF-8 — {_unknown(path)}"


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _refuse_unicode(path: Path, encoding: str) -> None:
    """That the file is no Unicode, where it is to be read in an encoding of another kind: nearly any bytes are text in
    one of these, and another text.

    Raises:
        UserError: a mark, NULs of wide characters, or valid UTF-8 beyond ASCII; any UTF-8 where a wide one was named.
    """
    wide, foreign = encoding.startswith(("utf-16", "utf-32")), 0
    east = encoding.startswith(("gb", "big5", "euc", "shift", "cp9", "johab"))  # whose pairs of bytes may be UTF-8
    decoder, found, head = codecs.getincrementaldecoder("utf-8")(), None, b""
    with open_bytes(path) as data:
        while more := data.read(LOOKED_AT):
            if not head:
                head = more
                found = _other_order(head, encoding) if wide else marked(head) or wide_encoding(head)
            try:
                text = decoder.decode(more)
            except UnicodeDecodeError:
                break
            if found or (wide and "\0" in text):
                break
            foreign += len(text) - len(text.encode("ascii", "ignore")) + wide * len(text)
        else:
            try:
                decoder.decode(b"", final=True)
            except UnicodeDecodeError:
                pass
            else:
                found = "utf-8" if foreign >= (EASTERN_CHARACTERS if east else 1) else None
    if found:
        raise UserError(
            f"{path}: it is {found}, and would be another text in {encoding} — leave --encoding out and convert the "
            f"files that are not UTF-8 with iconv, or prepare the two apart"
        )


def _other_order(head: bytes, encoding: str) -> str | None:
    """The wide encoding of a text that begins so, where it is not this one: of other width or order of bytes."""
    given = encoding if encoding.endswith(("le", "be")) else f"{encoding}-{sys.byteorder[0]}e"
    if mark := marked(head):
        return None if encoding == mark or head.startswith("\ufeff".encode(given)) else mark
    actual = wide_encoding(head)
    return actual if actual != given else None


def _guessed(path: Path, found: list[tuple[str, str]]) -> str:
    """What an encoding may be, as a reader can tell; never that it is."""
    if not found:
        return f" — {_unknown(path)}"
    readings = " or ".join(f"{name}: {piece!r}" for name, piece in found)
    first = found[0][0]
    return (
        f"; it may be {readings} — see which reads right and name it, such as --encoding {first}, or convert the "
        f"file: {_iconv(path, first)}"
    )


def _advice(path: Path, encoding: str) -> str:
    """Of an encoding that marks, NULs or escapes tell."""
    without = " without a mark" if encoding.endswith(("-le", "-be")) else ""
    convert = f"convert it: {_iconv(path, encoding)}"
    try:
        check_encoding(encoding)
    except UserError:  # Python has no codec for it
        return f"it looks like {encoding} — {convert}"
    return f"it looks like {encoding}{without} — --encoding {encoding} reads it, or {convert}"


def _unknown(path: Path) -> str:
    return f"name its encoding with --encoding, or convert the file to UTF-8: {_iconv(path, 'ENCODING')}"


def _iconv(path: Path, encoding: str) -> str:
    """A shell's line that makes UTF-8 of a file."""
    source = encoding.upper().replace("_", "-").replace("-LE", "LE").replace("-BE", "BE")
    source = ICONV.get(encoding, source.replace("ISO8859", "ISO-8859").replace("ISO2022", "ISO-2022"))
    ending = path.suffix.lower()
    stem = path.with_suffix("") if ending in COMPRESSIONS else path
    target = stem.with_suffix(f".utf8{stem.suffix}").name
    if ending in COMPRESSIONS:
        return f"{UNPACKED_BY[ending]} -dc '{path.name}' | iconv -f {source} -t UTF-8 > '{target}'"
    return f"iconv -f {source} -t UTF-8 '{path.name}' > '{target}'"
