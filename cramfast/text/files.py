"""Which files a text consists of, and which were passed over."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from cramfast.errors import UserError
from cramfast.text.compressed import COMPRESSIONS
from cramfast.text.copies import archived, equal
from cramfast.text.prepared import PARTIAL, is_prepared
from cramfast.text.records import holds_rows
from cramfast.text.saved import SPLITS, data_files, other_splits, read_splits

Format = Literal["auto", "text", "jsonl", "csv", "tsv", "parquet", "arrow", "wikiextractor", "fasta"]
FORMATS: dict[str, Format | Literal["json"]] = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".fasta": "fasta",
    ".fa": "fasta",
    ".fna": "fasta",
    ".faa": "fasta",
    ".fas": "fasta",
    ".ffn": "fasta",
    ".frn": "fasta",
    ".fsa": "fasta",
    ".mpfa": "fasta",
}
PIPE = "pipe or device"
WIKIEXTRACTOR = re.compile(r"wiki_\d\d+")  # its files have no ending
NAMED = 4  # of what was passed over, in a message
UNPACK, CONVERT, SEQUENCES = "unpack archives", "convert documents to text", "convert sequences to FASTA"
REMEDIES = {  # of kinds that are no text as they stand
    **dict.fromkeys((".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst"), UNPACK),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".xls", ".xlsx", ".ods"), CONVERT),
    **dict.fromkeys((".fastq", ".fq", ".gb", ".gbk", ".genbank", ".embl", ".gcg", ".sam", ".bam"), SEQUENCES),
    **dict.fromkeys((".orc", ".avro", ".sqlite", ".db", ".pkl", ".pickle", ".npy", ".rds"), "write tables as .parquet"),
    ".json": ".json is read where it is an array of objects, or has an object a line",
    PIPE: "write what a pipe gives to a file",
}


def is_hidden(name: str) -> bool:
    """.git, .ipynb_checkpoints, ._a.txt of a Mac's archive, which keeps them in __MACOSX as well."""
    return name.startswith(".") or name == "__MACOSX"


def file_format(path: Path, given: Format = "auto") -> Format | None:
    """What kind of file this is by its name, whatever its compression; None for one that is no text."""
    name = path.name.lower()
    if path.suffix.lower() in COMPRESSIONS:
        name = name.removesuffix(path.suffix.lower())
    if given != "auto":
        return "json" if given == "jsonl" and name.endswith(".json") else given
    if WIKIEXTRACTOR.fullmatch(name):
        return "wikiextractor"
    return FORMATS.get(Path(name).suffix)


def supported() -> str:
    """For messages."""
    return f"{', '.join(FORMATS)}, plain or {', '.join(COMPRESSIONS)}"


@dataclass
class Listing:
    """Attributes:
    files: of each source, sorted by path; each file once over all sources.
    sizes: of these files, in bytes.
    passed: [files, bytes] that are no text by their names, by ending.
    hidden: names left out.
    twice: files that were reached again.
    broken: links that lead nowhere.
    left: files of a folder of `datasets` that are no rows to train on, by why.
    archives: files beside which the same text lies packed.
    same: files with the bytes of an earlier one.
    """

    files: dict[str, list[Path]] = field(default_factory=dict)
    sizes: dict[Path, int] = field(default_factory=dict)
    passed: Counter[str] = field(default_factory=Counter)
    passed_bytes: int = 0
    read_bytes: int = 0
    hidden: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)
    archives: dict[Path, Path] = field(default_factory=dict)
    same: list[tuple[Path, Path]] = field(default_factory=list)

    def all(self) -> list[Path]:
        return [path for files in self.files.values() for path in files]

    def passed_over(self) -> str:
        """ "passed over 3 files, 12 MB: .csv 2, without ending 1"."""
        counted = [f"{ending or 'without ending'} {count:,}" for ending, count in self.passed.most_common(NAMED)]
        others = sum(self.passed.values()) - sum(count for _, count in self.passed.most_common(NAMED))
        counted += [f"others {others:,}"] * (others > 0)
        return f"passed over {_files(sum(self.passed.values()))}, {size(self.passed_bytes)}: {', '.join(counted)}"

    def left_out(self) -> str:
        """ "left out 2 hidden files or folders (texts/.git, texts/._a.txt)"."""
        shown = ", ".join(self.hidden[:NAMED]) + (", …" if len(self.hidden) > NAMED else "")
        return f"left out {len(self.hidden):,} hidden files or folders ({shown})"

    def remedy(self) -> str:
        """What to do about the files passed over; reading them as text is none for archives and the like."""
        known = list(dict.fromkeys(REMEDIES[ending] for ending in self.passed if ending in REMEDIES))
        others = len(self.passed) > sum(ending in REMEDIES for ending in self.passed)
        return "; ".join(known + [f"--format text reads {'the others' if known else 'them'}"] * others)

    def leave_copies(self) -> None:
        """Take out archives of a file beside them, and look for other files with the same bytes."""
        self.archives = archived(self.all())
        for source, files in self.files.items():
            self.files[source] = [path for path in files if path not in self.archives]
        self.same = equal({path: size for path, size in self.sizes.items() if path not in self.archives})

    def notes(self) -> list[str]:
        """One line for each kind of file that was not read."""
        said = []
        if self.passed:
            said.append(f"{self.passed_over()} — {self.remedy()}, or name the files alone")
        if self.hidden:
            said.append(f"{self.left_out()} — name one to read it")
        if self.broken:
            said.append(f"{len(self.broken):,} links lead nowhere, the first {self.broken[0]} — mend or remove them")
        if self.twice:
            said.append(f"{_files(len(self.twice))} reached by two paths, read once, the first {self.twice[0]}")
        said += (f"left out {_files(count)}: {why}" for why, count in self.left.items())
        said += read_splits(self.all())
        if self.archives:
            packed, kept = next(iter(self.archives.items()))
            said.append(
                f"left out {_files(len(self.archives))} with the text of one beside them, the first: {kept} and "
                f"{packed.name} hold the same text"
            )
        if self.same:
            path, earlier = self.same[0]
            said.append(
                f"{_files(len(self.same))} of the same bytes as another, read as well, the first: {path} and {earlier} "
                f"hold the same text — remove one, or --curation.duplicates exact keeps each document once"
            )
        return said


def _files(count: int) -> str:
    return f"{count:,} file{'s' * (count != 1)}"


def size(count: int) -> str:
    """Bytes for reading."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} bytes"


def list_files(sources: tuple[str, ...], given: Format = "auto") -> Listing:
    """The files that the sources name; hf: ones aside.

    What lies in prepared folders and runs is no text to train on, held-out sentences and records of steps: they are
    passed over, unless a source is such a file itself.

    Args:
        given: the format of all files, whatever their names; auto goes by these.

    Raises:
        UserError: a source that matches nothing, a file of an unknown kind, a prepared folder or run, a path that
            the system refuses; files that are passed over and are most of the bytes.
    """
    if given not in get_args(Format):
        raise UserError(f"format={given!r} is not known — use one of {', '.join(get_args(Format))}")
    if any(not source.strip() for source in sources):
        raise UserError("data: an empty name — name files or folders; . is the folder at hand")
    listing, seen = Listing(), set()
    for source in dict.fromkeys(s for s in sources if not s.startswith("hf:")):
        try:
            listing.files[source] = list(_new(_files_of(source, given, listing), listing, seen))
        except OSError as error:  # a name that is too long, a folder that may not be entered
            raise UserError(
                f"{source}: cannot be read ({error.strerror}) — check the path; several are given side by side, not "
                "in one pair of quotes"
            ) from None
    if listing.passed_bytes > listing.read_bytes:
        raise UserError(
            f"{' '.join(sources)}: {listing.passed_over()}, most of what is there, with {size(listing.read_bytes)} to "
            f"read — {listing.remedy()}, or name the files to read alone, such as 'FOLDER/**/*.txt'"
        )
    return listing


def find_files(sources: tuple[str, ...], given: Format = "auto") -> list[Path]:
    """The files of list_files()."""
    return list_files(sources, given).all()


def _new(files: list[Path], listing: Listing, seen: set[tuple[int, int]]) -> Iterator[Path]:
    for path in files:
        status = path.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in seen:
            listing.twice.append(str(path))
            continue
        seen.add(identity)
        listing.read_bytes += status.st_size
        listing.sizes[path] = status.st_size
        yield path


def _files_of(source: str, given: Format, listing: Listing) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        if is_prepared(path):
            raise UserError(
                f"{source}: a prepared folder or a run, which cannot be read as text — name the text it was made "
                "from; to train, a prepared folder can be the only --data"
            )
        found = sorted(_files_under(path, listing))
        listing.broken += (str(p) for p in found if not p.exists())
        if not (files := _known([p for p in found if p.exists()], given, listing)):
            reasons = [f"{listing.passed_over()}; {listing.remedy()}"] * bool(listing.passed)
            reasons += [f"{listing.left_out()}; name one to read it"] * bool(listing.hidden)
            reason = f" ({'; '.join(reasons)})" if reasons else ""
            raise UserError(f"{source}: no text in this folder{reason} — cramfast reads {supported()}")
        return files
    if path.is_file():
        if not file_format(path, given):
            other = REMEDIES.get(_ending(path), "--format says what another one is")
            raise UserError(f"{source}: unknown kind of file — cramfast reads {supported()}; {other}")
        return [path]
    if path.exists():
        raise UserError(f"{source}: a pipe or a device, which cannot be read twice — write what it gives to a file")
    return _matches(source, given, listing)


def _ending(path: Path) -> str:
    """By which a file is counted that is not read."""
    return path.suffix.lower() if path.is_file() else PIPE


def _matches(pattern: str, given: Format, listing: Listing) -> list[Path]:
    found = glob.glob(pattern, recursive=True)
    hidden = set(glob.glob(pattern, recursive=True, include_hidden=True)).difference(found)
    written = set(pattern.split("/"))
    hidden |= {name for name in found if "__MACOSX" in set(name.split("/")) - written}
    listing.hidden += sorted(name for name in hidden if os.path.isfile(name))
    visible = (Path(name) for name in found if name not in hidden)
    there = sorted(p for p in visible if p.exists() and not p.is_dir() and not is_prepared(p.parent))
    if there and not (files := _known(there, given, listing)):
        raise UserError(
            f"{pattern}: every file that matches is of an unknown kind, {listing.passed_over()} — cramfast reads "
            f"{supported()}; {listing.remedy()}"
        )
    as_written = pattern.replace("[", "[[]")
    literal = set(glob.glob(as_written, recursive=True)).difference(found) if "[" in pattern else ()
    if there and literal:
        why = f"of names with brackets, which are signs of a pattern — write '{as_written}' to read them"
        listing.left[why] += len(literal)
    if not there and literal:
        raise UserError(
            f"{pattern}: nothing matches it, since [ ] are signs of a pattern — write '{as_written}' for the brackets "
            "themselves, or name the folder"
        )
    if not there:
        raise UserError(
            f"{pattern}: no such file or folder, and no readable file matches it as a pattern — check the path "
            "given to --data"
        )
    return files


def _known(paths: list[Path], given: Format, listing: Listing) -> list[Path]:
    """Those that can be read; the others are counted."""
    known, saved = [], cache(data_files)
    for path in paths:
        file = path.is_file()
        kind = file_format(path, given) if file else None
        rows = saved(path.parent)
        if rows is not None and file and path.name not in rows:
            if kind == "arrow":
                listing.left["Arrow files that are not of the data set beside them (cache-*.arrow of datasets)"] += 1
        elif kind is None or (kind == "json" and given == "auto" and not holds_rows(path)):
            if path.name != SPLITS:
                listing.passed[_ending(path)] += 1
                listing.passed_bytes += path.stat().st_size
        else:
            known.append(path)
    return known


def _refuse(error: OSError) -> None:
    """A folder that may not be entered is an error, not an empty one."""
    raise UserError(f"{error.filename}: cannot be read ({error.strerror}) — check its permissions")


def _files_under(root: Path, listing: Listing) -> Iterator[Path]:
    """Every file in a folder and the folders in it, but for hidden ones and those that cramfast wrote or is writing.

    Symbolic links to folders are followed once all else was seen, and each folder is read once: links may lead in
    circles, or to what has a path of its own.
    """
    seen: set[Path] = set()
    starts = [root]
    for start in starts:  # grows by the links on the way
        for folder, inner, names in os.walk(start, onerror=_refuse):
            here = Path(folder)
            if here.resolve() in seen:
                inner.clear()
                continue
            seen.add(here.resolve())
            yield from (here / name for name in names if not is_hidden(name))
            ours = {name for name in inner if name.startswith(".") and name.endswith(PARTIAL)}
            ours |= {name for name in inner if is_prepared(here / name)}
            for name in sorted(others := other_splits(here) & set(inner)):
                count = sum(len(files) for _, _, files in os.walk(here / name))
                listing.left[
                    f"the split {name} of {here}, which is not for training — name {here / name} to read it"
                ] += count
            ours |= others
            listing.hidden += sorted(str(here / name) for name in {*names, *inner} - ours if is_hidden(name))
            inner[:] = sorted(name for name in inner if name not in ours and not is_hidden(name))
            starts += (here / name for name in inner if (here / name).is_symlink())
