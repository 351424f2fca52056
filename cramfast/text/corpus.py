"""Text in: files, folders, globs and Hugging Face datasets as one stream of documents, one at a time in memory."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cramfast.text import lines
from cramfast.text.delimited import read_csv, read_tsv
from cramfast.text.fasta import read_fasta
from cramfast.text.files import Format, Listing, file_format, list_files
from cramfast.text.hub import is_hub, read_dataset
from cramfast.text.lines import pieces, read_lines, ready_pieces
from cramfast.text.magic import check_magic
from cramfast.text.records import read_json, read_jsonl
from cramfast.text.tables import read_arrow, read_parquet
from cramfast.text.tally import SEPARATORS, Tally
from cramfast.text.wikiextractor import read_wikiextractor

Documents = Literal["blocks", "lines", "files"]
# Of files with rows or elements of their own: (path, text_key, encoding, tally) to documents.
READERS: dict[str, Callable[[Path, str, str, Tally], Iterator[str]]] = {
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": read_csv,
    "tsv": read_tsv,
    "parquet": read_parquet,
    "arrow": read_arrow,
    "wikiextractor": read_wikiextractor,
    "fasta": read_fasta,
}


@dataclass(frozen=True)
class Corpus:
    """Text that can be read more than once.

    Attributes:
        sources: files, folders, globs, or hf:NAME[:CONFIG[:SPLIT]].
        documents: what a document is in a .txt file: a block of lines between blank ones, a line, or the file.
        text_key: field of .jsonl, column of tables and datasets that holds the text; OUTER.INNER for one in another.
        format: what all files are, whatever their names; auto goes by these.
        encoding: of text files and rows in them.
        skip_malformed: rows that may be left out where they cannot be read.
        read: what the newest reading met: files and rows that were left out.
    """

    sources: tuple[str, ...]
    documents: Documents = "blocks"
    text_key: str = "text"
    format: Format = "auto"
    encoding: str = "utf-8"
    skip_malformed: int = 0
    read: list[Listing | Tally] = field(default_factory=list, compare=False, repr=False)

    def __iter__(self) -> Iterator[str]:
        """Every document of every source, in order.

        Raises:
            UserError: missing, damaged or undecodable input, named with file and line.
        """
        if self.read:  # a later reading is of the same files
            listing = self.read[0]
        else:
            listing = list_files(self.sources, self.format)
            listing.leave_copies()
        tally = Tally(self.skip_malformed)
        self.read[:] = listing, tally
        for source in dict.fromkeys(self.sources):
            if is_hub(source):
                yield from read_dataset(source, self.text_key, tally)
                continue
            for path in listing.files[source]:
                documents = self._documents_of(path, tally)
                if (first := next(documents, None)) is None:
                    tally.empty += 1
                else:
                    yield first
                    yield from documents

    def _documents_of(self, path: Path, tally: Tally) -> Iterator[str]:
        kind = file_format(path, self.format)
        if not check_magic(path, kind, self.format != "auto", tally):
            return iter(())
        if kind == "text":
            return _split_text(path, self.documents, self.encoding, tally)
        return READERS[kind](path, self.text_key, self.encoding, tally)

    def __str__(self) -> str:
        return " ".join(self.sources)

    def notes(self) -> list[str]:
        """What the newest reading left out, a line each."""
        return [f"{self}: {line}" for read in self.read for line in read.notes()]


def read_documents(sources: tuple[str, ...], documents: Documents = "blocks", text_key: str = "text") -> Iterator[str]:
    """The documents of a Corpus."""
    return iter(Corpus(sources, documents, text_key))


def _split_text(path: Path, documents: Documents, encoding: str, tally: Tally) -> Iterator[str]:
    block: list[str] = []
    size = characters = 0
    blank, ends, separators = documents != "blocks", 0, Counter[str]()
    for _, line in read_lines(path, encoding, tally):
        if not ends and documents != "files":
            for mark in SEPARATORS:
                if mark in line:
                    separators[mark] += line.count(mark)
        characters += len(line)
        ends += line.endswith("\n")
        if documents == "blocks" and line.isspace():
            blank = True
            yield from pieces("".join(block))
            block, size = [], 0
            continue
        block.append(line)
        size += len(line)
        if size > lines.LONGEST_PIECE:
            ready, rest = ready_pieces("".join(block))
            yield from ready
            block, size = [rest], len(rest)
        if documents == "lines" and line.endswith("\n"):
            yield from pieces("".join(block))
            block, size = [], 0
    yield from pieces("".join(block))
    tally.text_file(str(path), characters, blank, ends, separators)
