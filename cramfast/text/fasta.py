"""FASTA: one document a record. Headers are no text, the width of lines means nothing, soft-masked case is folded."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from cramfast.errors import UserError
from cramfast.text.lines import read_lines
from cramfast.text.tally import Tally

# A longer record, a chromosome, is cut: a multiple of 1 to 8, so that the k-mers of the rest stay what they were.
LONGEST_RECORD = 840 * 1248  # letters, a little below 1 << 20
SEQUENCE = re.compile(r"[A-Za-z*.-]+")  # letters, ends, gaps


def read_fasta(path: Path, text_key: str, encoding: str, tally: Tally) -> Iterator[str]:
    """The sequences of a file; `text_key` means nothing here."""
    return records(read_lines(path, encoding, tally), str(path))


def records(lines: Iterable[tuple[int, str]], name: str) -> Iterator[str]:
    """The sequences of a file, in upper case, in pieces of LONGEST_RECORD at most.

    Args:
        lines: (number, text with its line end); a long line may come in several pieces of one number.
        name: of the file, for errors.

    Raises:
        UserError: text before the first header; a line that is neither a header nor a sequence.
    """
    parts, size, started, header, last, pearson = list[str](), 0, False, 0, 0, False
    for number, line in lines:
        if number == header:  # the rest of a header too long for one piece
            continue
        begins = line[:1] if number != last else ""
        pearson = pearson or (begins == ";" and not started)  # the older form, whose headers begin with it
        if begins == ";" and not pearson:  # a comment, in the middle of a record too
            header = number
            continue
        if begins and begins in ">;":
            if parts:
                yield "".join(parts)
            parts, size, started, header = [], 0, True, number
            continue
        last = number
        letters = "".join(line.split())
        if not letters:
            continue
        if not started:
            kind = "FASTQ, as it looks" if letters[0] == "@" else "no FASTA"
            raise UserError(
                f"{name}:{number}: {kind}: a record begins with a line of '>' and its name — convert it, or name the "
                "file .txt where it is plain text"
            )
        if not (letters.isascii() and letters.isalpha()) and (foreign := SEQUENCE.sub("", letters)):
            raise UserError(f"{name}:{number}: {_no_sequence(letters, foreign[0])}")
        parts.append(letters.upper())
        size += len(letters)
        while size >= LONGEST_RECORD:
            whole = "".join(parts)
            yield whole[:LONGEST_RECORD]
            size -= LONGEST_RECORD
            parts = [whole[LONGEST_RECORD:]] if size else []
    if parts:
        yield "".join(parts)


def _no_sequence(line: str, foreign: str) -> str:
    """What a line is that should hold a sequence, and the remedy.

    Args:
        line: without white space.
        foreign: the first character that no sequence has.
    """
    if line[0] == ">":
        return "a header after a blank — begin the line with its '>'"
    if foreign == ">":
        return "a header within a line, as where files without a line end at their end are joined — put it on its own"
    if line[0] in "@+":
        return "FASTQ, as it looks: no line of a sequence — convert it"
    if line[0].isdigit():
        return "a numbered line, as of GenBank or GCG: no line of a sequence — convert it"
    return f"{foreign!r} is in no sequence (letters, '*', '-' and '.' are) — convert the file, or take the line out"
