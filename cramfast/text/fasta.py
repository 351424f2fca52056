"""FASTA: one document a record. Headers are no text, the width of lines means nothing, soft-masked case is folded."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from cramfast.errors import UserError
from cramfast.text.lines import read_lines
from cramfast.text.tally import Tally

# A longer record, a chromosome, is cut: a multiple of 1 to 8, so that the k-mers of the rest stay what they were.
LONGEST_RECORD = 840 * 1248  # letters, a little below 1 << 20


def read_fasta(path: Path, text_key: str, encoding: str, tally: Tally) -> Iterator[str]:
    """The sequences of a file; `text_key` means nothing here."""
    return records(read_lines(path, encoding, tally), str(path))


def records(lines: Iterable[tuple[int, str]], name: str) -> Iterator[str]:
    """The sequences of a file, in upper case, in pieces of LONGEST_RECORD at most.

    Args:
        lines: (number, text with its line end); a long line may come in several pieces of one number.
        name: of the file, for errors.

    Raises:
        UserError: text before the first header.
    """
    parts, size, started, header, last = list[str](), 0, False, 0, 0
    for number, line in lines:
        if number == header:  # the rest of a header too long for one piece
            continue
        if line[:1] in (">", ";") and number != last:
            if parts:
                yield "".join(parts)
            parts, size, started, header = [], 0, True, number
            continue
        last = number
        letters = "".join(line.split()).upper()
        if not letters:
            continue
        if not started:
            kind = "FASTQ, as it looks" if letters[0] == "@" else "no FASTA"
            raise UserError(
                f"{name}:{number}: {kind}: a record begins with a line of '>' and its name — convert it, or name the "
                "file .txt where it is plain text"
            )
        parts.append(letters)
        size += len(letters)
        while size >= LONGEST_RECORD:
            whole = "".join(parts)
            yield whole[:LONGEST_RECORD]
            size -= LONGEST_RECORD
            parts = [whole[LONGEST_RECORD:]] if size else []
    if parts:
        yield "".join(parts)
