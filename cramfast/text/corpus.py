"""Text in: files, folders, globs and Hugging Face datasets as one stream of documents, one at a time in memory."""

import glob
import gzip
import io
import json
import lzma
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal

import pyarrow
import pyarrow.parquet
from backports import zstd

from cramfast.errors import UserError
from cramfast.text import fasta
from cramfast.text.prepared import PARTIAL, is_prepared

Documents = Literal["blocks", "lines", "files"]
FORMATS = (".txt", ".jsonl", ".parquet", *fasta.SUFFIXES)
COMPRESSIONS = {".gz": gzip.open, ".xz": lzma.open, ".zst": zstd.open}
# Longest piece of a document held at once, in characters. A file without a single blank line is one document; it is
# cut here (between lines where it has lines), far above any sequence length, so that memory stays bounded.
LONGEST_PIECE = 1 << 20
READ_AT_ONCE = 1 << 18  # characters: a thread that reads by the line would wait for the interpreter as often
PARQUET_BUFFER = 1 << 20  # bytes


@dataclass(frozen=True)
class Corpus:
    """Text that can be read more than once; the arguments of read_documents."""

    sources: tuple[str, ...]
    documents: Documents = "blocks"
    text_key: str = "text"

    def __iter__(self) -> Iterator[str]:
        return read_documents(self.sources, self.documents, self.text_key)

    def __str__(self) -> str:
        return " ".join(self.sources)


def find_files(sources: tuple[str, ...]) -> list[Path]:
    """The files that the sources name, each source's own sorted by path.

    What lies in prepared folders and runs is no text to train on, held-out sentences and records of steps: they are
    passed over, unless a source is such a file itself.

    Raises:
        UserError: a source that matches nothing, a file of an unknown kind, a prepared folder or run, or a path that
            the system refuses.
    """
    found: list[Path] = []
    for source in sources:
        try:
            found += _files_of(source)
        except OSError as error:  # a name that is too long, a folder that may not be entered
            raise UserError(
                f"{source}: cannot be read ({error.strerror}) — check the path; several are given side by side, not "
                "in one pair of quotes"
            ) from None
    return list(dict.fromkeys(found))


def _files_of(source: str) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        if is_prepared(path):
            raise UserError(
                f"{source}: a prepared folder or a run, which cannot be read as text — name the text it was made "
                "from; to train, a prepared folder can be the only --data"
            )
        files = sorted(p for p in _files_under(path) if p.is_file() and file_format(p))
        if not files:
            raise UserError(f"{source}: no text in this folder — cramfast reads {_supported()}")
    elif path.is_file():
        if not file_format(path):
            raise UserError(f"{source}: unknown kind of file — cramfast reads {_supported()}")
        files = [path]
    else:
        matches = (p for p in map(Path, glob.glob(source, recursive=True)) if not is_prepared(p.parent))
        files = sorted(p for p in matches if p.is_file() and file_format(p))
        if not files:
            raise UserError(
                f"{source}: no such file or folder, and no readable file matches it as a pattern — check the path "
                "given to --data"
            )
    return files


def _files_under(root: Path) -> Iterator[Path]:
    """Every file in a folder and the folders in it, but for those that cramfast wrote or is writing.

    Symbolic links to folders are followed once all else was seen, and each folder is read once: links may lead in
    circles, or to what has a path of its own.
    """
    seen: set[Path] = set()
    starts = [root]
    for start in starts:  # grows by the links on the way
        for folder, inner, names in os.walk(start):
            here = Path(folder)
            if here.resolve() in seen:
                inner.clear()
                continue
            seen.add(here.resolve())
            yield from (here / name for name in names)
            unfinished = {name for name in inner if name.startswith(".") and name.endswith(PARTIAL)}
            inner[:] = sorted(name for name in inner if name not in unfinished and not is_prepared(here / name))
            starts += (here / name for name in inner if (here / name).is_symlink())


def _supported() -> str:
    return f"{', '.join(FORMATS)}, plain or {', '.join(COMPRESSIONS)}"


def file_format(path: Path) -> str | None:
    """ ".txt", ".jsonl" or ".parquet" whatever the compression, or None for anything else."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def read_documents(sources: tuple[str, ...], documents: Documents = "blocks", text_key: str = "text") -> Iterator[str]:
    """Every document of every source, in order.

    Args:
        sources: files, folders, globs, or hf:NAME[:CONFIG[:SPLIT]].
        documents: what a document is in a .txt file: a block of lines between blank ones, a line, or the file.
        text_key: field of .jsonl and column of .parquet and datasets that holds the text.

    Raises:
        UserError: missing, damaged or undecodable input, named with file and line.
    """
    for source in sources:
        if source.startswith("hf:"):
            yield from _read_dataset(source, text_key)
            continue
        for path in find_files((source,)):
            kind = file_format(path)
            if kind == ".parquet":
                yield from _read_parquet(path, text_key)
            elif kind == ".jsonl":
                yield from _read_jsonl(path, text_key)
            elif kind in fasta.SUFFIXES:
                yield from fasta.records(read_lines(path), str(path))
            else:
                yield from _split_text(path, documents)


def _open(path: Path) -> BinaryIO:
    opener = COMPRESSIONS.get(path.suffix.lower())
    if opener and path.stat().st_size == 0:
        raise EOFError("0 bytes")  # gzip would take it for an empty text
    return opener(path, "rb") if opener else path.open("rb")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what reading a file may raise into a UserError that names it."""
    try:
        yield
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, zstd.ZstdError) as error:
        raise UserError(f"{path}: damaged or truncated archive ({error}) — fetch or compress it again") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}) — check the path and its permissions"
        ) from None


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, text with its line end) of a plain or compressed text file, in pieces of LONGEST_PIECE at most.

    Raises:
        UserError: a missing, damaged or undecodable file; the message names the place.
    """
    number, rest = 1, ""
    with _readable(path):
        try:
            with io.TextIOWrapper(_open(path), encoding="utf-8-sig", errors="strict", newline=None) as text:
                while more := text.read(READ_AT_ONCE):
                    *lines, rest = (rest + more).split("\n")
                    for line in lines:
                        line += "\n"
                        while len(line) > LONGEST_PIECE:
                            yield number, line[:LONGEST_PIECE]
                            line = line[LONGEST_PIECE:]
                        yield number, line
                        number += 1
                    while len(rest) > LONGEST_PIECE:
                        yield number, rest[:LONGEST_PIECE]
                        rest = rest[LONGEST_PIECE:]
                if rest:
                    yield number, rest
        except UnicodeDecodeError:
            raise UserError(f"{_undecodable(path)} — convert the file to UTF-8") from None


def _undecodable(path: Path) -> str:
    """Where exactly a file stops being UTF-8; the decoder itself knows its buffer only."""
    with _open(path) as data:
        for number, line in enumerate(data, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"{path}:{number}: byte {error.start + 1} of the line is not UTF-8 ({error.reason})"
    return f"{path}: not UTF-8"


def _split_text(path: Path, documents: Documents) -> Iterator[str]:
    if documents == "lines":
        yield from (text for _, line in read_lines(path) if (text := line.strip()))
        return
    block: list[str] = []
    size = 0
    for _, line in read_lines(path):
        blank = not line.strip()
        if (blank and documents == "blocks") or size > LONGEST_PIECE:
            if text := "".join(block).strip():
                yield text
            block, size = [], 0
        block.append(line)
        size += len(line)
    if text := "".join(block).strip():
        yield text


def _read_jsonl(path: Path, text_key: str) -> Iterator[str]:
    for number, line in _whole_lines(path):
        if line.strip():
            yield from _text_of(_parse_json(line, path, number), text_key, f"{path}:{number}")


def _whole_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of a text file, however long the line."""
    number, parts = 1, []
    for number, piece in read_lines(path):
        parts.append(piece)
        if piece.endswith("\n"):
            yield number, "".join(parts)
            parts = []
    if parts:  # the last line has no end
        yield number, "".join(parts)


def _parse_json(line: str, path: Path, number: int) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        what = f"{error.msg} at character {error.pos + 1}"
        raise UserError(f"{path}:{number}: not JSON ({what}) — each line must hold one object") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        raise UserError(f"{path}:{number}: not to be read as JSON ({error}) — each line must hold one object") from None
    if not isinstance(row, dict):
        raise UserError(
            f"{path}:{number}: a JSON {type(row).__name__} where an object is expected — each line must hold one"
        )
    return row


def _text_of(row: dict, text_key: str, where: str) -> Iterator[str]:
    if text_key not in row:
        keys = ", ".join(sorted(row)) or "none"
        raise UserError(f"{where}: no key {text_key!r} (there: {keys}) — name it with --text-key")
    text = row[text_key]
    if text is None:
        return
    if not isinstance(text, str):
        raise UserError(f"{where}: {text_key!r} is a {type(text).__name__}, not text — name another with --text-key")
    text = text.encode("utf-8", "replace").decode()  # JSON can spell half a surrogate pair, which is no character
    if text := text.strip():
        for start in range(0, len(text), LONGEST_PIECE):
            yield text[start : start + LONGEST_PIECE]


@contextmanager
def _seekable(path: Path) -> Iterator[BinaryIO]:
    """The file, uncompressed: parquet is read from its end, which a compressed stream cannot do."""
    if path.suffix.lower() not in COMPRESSIONS:
        with path.open("rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as plain:
        with _open(path) as packed:
            shutil.copyfileobj(packed, plain)
        yield plain


def _read_parquet(path: Path, text_key: str) -> Iterator[str]:
    with _readable(path), _seekable(path) as opened:
        row = 0
        try:
            # By default Arrow fetches every row group of the file ahead of the reader, and keeps them all.
            file = pyarrow.parquet.ParquetFile(opened, pre_buffer=False, buffer_size=PARQUET_BUFFER)
            if text_key not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise UserError(f"{path}: no column {text_key!r} (there: {names}) — name it with --text-key")
            for batch in file.iter_batches(batch_size=256, columns=[text_key]):
                for text in batch.column(0):
                    row += 1
                    yield from _text_of({text_key: text.as_py()}, text_key, f"{path}, row {row}")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, row {row}: not UTF-8 ({error.reason}) — write it again") from None
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: damaged parquet file ({error}) — write it again") from None


def _read_dataset(source: str, text_key: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source}: needs the datasets package — pip install 'cramfast[hf]'") from None
    name, config, split, *rest = [*source.removeprefix("hf:").split(":"), "", ""][:4]
    if not name or any(rest):
        raise UserError(f"{source}: not the name of a dataset — give hf:NAME[:CONFIG[:SPLIT]]")
    load = partial(datasets.load_dataset, name, config or None, split=split or "train", streaming=True)
    for row in _streamed(source, load):
        yield from _text_of(row, text_key, source)


def _streamed(source: str, load: Callable[[], Iterable[dict]]) -> Iterator[dict]:
    """The rows of a dataset; whatever goes wrong on the way, at the first or at any later one, names the source."""
    try:
        yield from load()
    except Exception as error:  # of datasets, the hub's client, its HTTP library, Arrow: they share no other base class
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{source}: could not be read ({reason}) — check its name and the network, or download its files and name "
            "these with --data"
        ) from error
