"""Compressed files as streams of bytes, to their last byte or not at all."""

import bz2
import gzip
import io
import lzma
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cramfast.errors import UserError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

READ_AT_ONCE = 1 << 18  # bytes
XZ_ALIGNMENT = 4  # bytes: between streams an .xz file may hold zeros, a multiple of so many
# Large dumps are compressed with --long=31, a window of 2 GiB; memory is touched only as far as the text reaches.
ANY_WINDOW = {zstd.DecompressionParameter.window_log_max: 31}


class Damaged(Exception):
    """What a compressed file holds is not what was compressed."""


class Streams(io.RawIOBase):
    """The streams of one file end to end. What the standard library reads as the end of such a file, anything after a
    whole stream that does not begin another, is an error here: half of a text would be missing without a word.

    Raises:
        Damaged: when read: bytes that are no stream, or a stream that does not end.
    """

    def __init__(self, file: BinaryIO, start: Callable, padded: bool):
        self.file, self.start, self.padded = file, start, padded
        self.stream, self.waiting = start(), b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.file.close()
        super().close()

    def readinto(self, buffer) -> int:
        while not self.stream.eof or self._next():
            more = b""
            if self.stream.needs_input:
                more, self.waiting = self.waiting or self.file.read(READ_AT_ONCE), b""
                if not more:
                    raise Damaged("it ends within a stream")
            try:
                data = self.stream.decompress(more, len(buffer))
            except (OSError, lzma.LZMAError) as error:
                raise Damaged(str(error)) from None
            if data:
                buffer[: len(data)] = data
                return len(data)
        return 0

    def _next(self) -> bool:
        """Begin the stream that follows the one just ended, if there is one."""
        zeros, rest = 0, self.stream.unused_data or self.file.read(READ_AT_ONCE)
        while self.padded and rest and not (tail := rest.lstrip(b"\0")):
            zeros, rest = zeros + len(rest), self.file.read(READ_AT_ONCE)
        else:
            if self.padded and rest:
                zeros, rest = zeros + len(rest) - len(tail), tail
        if zeros % XZ_ALIGNMENT:
            raise Damaged(f"{zeros} zeros after a stream, no multiple of {XZ_ALIGNMENT}")
        self.waiting = rest
        if rest:
            self.stream = self.start()
        return bool(rest)


def _streams(start: Callable, padded: bool) -> Callable[[Path], BinaryIO]:
    return lambda path: io.BufferedReader(Streams(path.open("rb"), start, padded), READ_AT_ONCE)


COMPRESSIONS: dict[str, Callable[[Path], BinaryIO]] = {
    ".gz": gzip.open,
    ".bgz": gzip.open,  # blocks of gzip end to end
    ".bz2": _streams(bz2.BZ2Decompressor, padded=False),
    ".xz": _streams(lzma.LZMADecompressor, padded=True),
    ".zst": lambda path: zstd.open(path, options=ANY_WINDOW),
}


def open_bytes(path: Path) -> BinaryIO:
    """The file's contents, uncompressed by its ending."""
    opener = COMPRESSIONS.get(path.suffix.lower())
    if opener and path.stat().st_size == 0:
        raise Damaged("0 bytes")  # gzip would take it for an empty text
    return opener(path) if opener else path.open("rb")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what reading a file may raise into a UserError that names it."""
    try:
        yield
    except (Damaged, EOFError, zlib.error, gzip.BadGzipFile, zstd.ZstdError) as error:
        raise UserError(f"{path}: damaged or truncated archive ({error}) — fetch or compress it again") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}) — check the path and its permissions"
        ) from None


@contextmanager
def seekable(path: Path) -> Iterator[BinaryIO]:
    """The file, uncompressed, for formats that are read from their end: a compressed stream cannot do that."""
    if path.suffix.lower() not in COMPRESSIONS:
        with path.open("rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as plain:
        with open_bytes(path) as packed:
            shutil.copyfileobj(packed, plain)
        plain.seek(0)
        yield plain
