"""Tables of Apache Arrow: .parquet, .arrow and .feather, never held whole."""

from collections.abc import Generator, Iterator
from pathlib import Path

import pyarrow
import pyarrow.compute
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet

from cramfast.errors import UserError
from cramfast.text.compressed import COMPRESSIONS, readable, seekable
from cramfast.text.records import RENAMED, texts_of
from cramfast.text.tally import Tally

PARQUET_BUFFER = 1 << 20  # bytes
ROWS_AT_ONCE = 256
FEATHER_V1 = b"FEA1"
ARROW_MAGIC = b"ARROW1"  # of files with a footer: at the beginning, padded to 8 bytes, and at the end
FOOTER_LENGTH_AT = 10  # bytes from the end


def read_parquet(path: Path, text_key: str, encoding: str, tally: Tally) -> Iterator[str]:
    """The documents of a column, of text or of bytes that are UTF-8."""
    with readable(path), seekable(path) as opened:
        try:
            # By default Arrow fetches every row group of the file ahead of the reader, and keeps them all.
            file = pyarrow.parquet.ParquetFile(opened, pre_buffer=False, buffer_size=PARQUET_BUFFER)
            steps = _steps(file.schema_arrow, text_key, path)
            batches = file.iter_batches(batch_size=ROWS_AT_ONCE, columns=[".".join(steps)])
            yield from _texts(batches, steps, text_key, path, tally)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: damaged parquet file ({error}) — write it again") from None


def read_arrow(path: Path, text_key: str, encoding: str, tally: Tally) -> Iterator[str]:
    """The same of Arrow's own files and streams (Feather is the former)."""
    with readable(path), seekable(path) as opened:
        if opened.read(len(FEATHER_V1)) == FEATHER_V1:
            raise UserError(f"{path}: Feather of version 1, which is no longer read — write it again, as version 2")
        try:
            plain = path.suffix.lower() not in COMPRESSIONS and path.stat().st_size
            source = pyarrow.memory_map(str(path)) if plain else pyarrow.PythonFile(opened, mode="r")
            row = 0
            for start in _streams(source, path):
                steps = _steps(_ipc(source, start).schema, text_key, path)
                column = _ipc(source, start).schema.get_field_index(steps[0])
                batches = _batches(_ipc(source, start, pyarrow.ipc.IpcReadOptions(included_fields=[column])))
                row = yield from _texts(batches, steps, text_key, path, tally, row)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: damaged Arrow file ({error}) — write it again") from None


def _streams(source: pyarrow.NativeFile, path: Path) -> list[int]:
    """Where the streams of a file begin, which may follow on each other; a file with a footer holds one.

    Arrow takes the end of a file for the end of a stream, and reads nothing after the first one.

    Raises:
        UserError: a stream without its mark of the end, or something else after it.
    """
    source.seek(0)
    footed = source.read(len(ARROW_MAGIC)) == ARROW_MAGIC
    starts, size, end = list[int](), source.size(), len(ARROW_MAGIC) + 2 if footed else 0
    while not starts or (end < size and not footed):
        starts.append(end)
        source.seek(end)
        messages, kinds, at = pyarrow.ipc.MessageReader.open_stream(source), set[str](), end
        for message in messages:
            kinds.add(message.type)
            at = source.tell()
        end = source.tell()
        if "schema" not in kinds:
            raise UserError(f"{path}: damaged Arrow file (bytes after the end of a stream) — write it again")
        if end == at:
            raise UserError(f"{path}: damaged Arrow file (cut short: no mark of the end) — fetch or write it again")
    if footed:
        source.seek(size - FOOTER_LENGTH_AT)
        if end + int.from_bytes(source.read(4), "little") + FOOTER_LENGTH_AT != size:
            raise UserError(f"{path}: damaged Arrow file (bytes after its end, as of files joined) — write it again")
        return [0]
    return starts


def _ipc(source: pyarrow.NativeFile, start: int, options: pyarrow.ipc.IpcReadOptions | None = None):
    """A reader of a file with a footer, or of the stream that begins there, as `datasets` keeps them."""
    source.seek(0)
    if source.read(len(ARROW_MAGIC)) == ARROW_MAGIC:
        return pyarrow.ipc.open_file(source, options=options)
    source.seek(start)
    return pyarrow.ipc.open_stream(source, options=options)


def _batches(reader) -> Iterator[pyarrow.RecordBatch]:
    whole = (
        (reader.get_batch(i) for i in range(reader.num_record_batches))
        if isinstance(reader, pyarrow.ipc.RecordBatchFileReader)
        else reader
    )
    for batch in whole:
        yield from (batch.slice(first, ROWS_AT_ONCE) for first in range(0, batch.num_rows, ROWS_AT_ONCE))


def _steps(schema: pyarrow.Schema, text_key: str, path: Path) -> list[str]:
    """The way to a column of text: its name, or names through structs.

    Raises:
        UserError: there is none, there are two, or it holds something else.
    """
    steps = [text_key] if text_key in schema.names else text_key.split(".")
    if (same := schema.names.count(steps[0])) > 1:
        raise UserError(f"{path}: {same} columns are named {steps[0]!r} — rename all but one")
    kind = pyarrow.struct(list(schema))
    for step in steps:
        if not pyarrow.types.is_struct(kind) or (place := kind.get_field_index(step)) < 0:
            names = ", ".join(schema.names)
            raise UserError(f"{path}: no column {text_key!r} (there: {names}) — {RENAMED}")
        kind = kind.field(place).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    text = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
    if str(kind) not in text and not pyarrow.types.is_fixed_size_binary(kind):
        raise UserError(f"{path}: column {text_key!r} holds {kind}, not text — {RENAMED}")
    return steps


def _texts(
    batches, steps: list[str], text_key: str, path: Path, tally: Tally, row: int = 0
) -> Generator[str, None, int]:
    """The documents of rows that follow on a number of others; returns how many there are with these."""
    for batch in batches:
        column = batch.column(0)
        for step in steps[1:]:
            column = pyarrow.compute.struct_field(column, step)
        padded = pyarrow.types.is_fixed_size_binary(column.type)  # to that size
        for value in column:
            row += 1
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                tally.skip(f"{path}, row {row}: not UTF-8 ({error.reason})", "write it again")
                continue
            if padded and text is not None:
                text = text.rstrip(b"\0")
            yield from texts_of(text, text_key, f"{path}, row {row}", tally)
    return row
