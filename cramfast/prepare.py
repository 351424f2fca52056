"""Text -> tokenizer -> ids on disk: `python -m cramfast.prepare --data TEXT... [--out FOLDER]`.

Two passes over the text: one chooses the documents, draws a sample and trains the tokenizer on it, one writes the ids.
The folder appears under its name only when it is complete; what was interrupted is made anew, to the same bytes.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from cramfast.config import Curation, from_json
from cramfast.errors import UserError, command, note
from cramfast.runtime.arguments import VOCABULARY, program, under_one_name
from cramfast.text import docstrings, hub
from cramfast.text.census import Census
from cramfast.text.corpus import Corpus, Documents
from cramfast.text.curation import Curator, summary
from cramfast.text.files import Format, find_files
from cramfast.text.giventokenizer import given_tokenizer
from cramfast.text.kmers import is_kmer_name, read_name
from cramfast.text.lines import check_encoding
from cramfast.text.lost import Lost, lost_characters
from cramfast.text.prepared import PARTIAL, is_prepared, read_manifest, verify
from cramfast.text.said import Notes, check_splits, few_entries
from cramfast.text.splits import SplitWriter, encode
from cramfast.text.survey import Report, Survey
from cramfast.text.tokenizer import check_vocab_size, is_trained, word_count
from cramfast.text.tokenizerchoice import check_lost, choose, learn

# Of a prepared folder. Made anew are those whose held-out side is a share of documents, whose letters and signs were
# not spelled out in ASCII, whose words were cut at inner signs, or whose files were read otherwise (docs/text.md).
FORMAT = 5


@dataclass(frozen=True)
class Options:
    """Turn text into a prepared folder that runs can share."""

    data: tuple[str, ...] = ()
    """Files, folders, globs or hf:NAME[:CONFIG[:SPLIT]]; nothing: docstrings found on this machine."""
    out: Path | None = None
    """Folder to write; nothing: a place in the user's cache, used again for the same text and options."""
    tokenizer: str = "auto"
    """wordpiece (lower-cased ASCII), bpe (case and Unicode kept), auto (wordpiece where ASCII can spell the text, else
    bpe), kmer[:K][:overlapping] (sequences of DNA or proteins), or a tokenizer.json."""
    vocab_size: int = 32768
    """Most entries of the vocabulary, a multiple of 64; k-mers have as many as there are. --model.vocab-size, its name
    in cramfast.train, is taken too."""
    heldout_fraction: float = 0.01
    """Share of the tokens kept out of training, chosen by a hash of the text; more of a small text, which is said."""
    documents: Documents = "blocks"
    """What a document is in a .txt file: a block between blank lines, a line, or the whole file."""
    text_key: str = "text"
    """Field of .jsonl, column of tables that holds the text; OUTER.INNER for one in another."""
    format: Format = "auto"
    """What all files are, whatever their names; auto goes by these."""
    encoding: str = "utf-8"
    """Of text files and rows in them, such as latin-1 or utf-16."""
    skip_malformed: int = 0
    """Rows that may be left out where they cannot be read; one more is an error."""
    curation: Curation = field(default_factory=Curation)
    seed: int = 0
    """Of the draw of the tokenizer's sample and of the held-out documents."""
    verify: Path | None = field(default=None)
    """Only compare this prepared folder with its checksums."""


def prepare(
    data: tuple[str, ...],
    out: Path | None,
    *,
    tokenizer: str = "auto",
    vocab_size: int = 32768,
    heldout_fraction: float = 0.01,
    documents: Documents = "blocks",
    text_key: str = "text",
    format: Format = "auto",
    encoding: str = "utf-8",
    skip_malformed: int = 0,
    curation: Curation | None = None,
    seed: int = 0,
    progress: Report | None = None,
) -> Path:
    """Prepare text for training, or return the folder where that was done before.

    Args:
        data: as Options.data; one prepared folder is returned as it is.
        out: folder to write, None for the cache.
        curation: which documents to leave out; None keeps all.
        progress: called with (stage, done, total) as the work goes on; total 0 where it is not known.

    Returns:
        The folder: manifest.json, tokenizer.json, train.ids, train.offsets.npy, the same for heldout, heldout.txt,
        curation.json (examples of what was dropped).

    Raises:
        UserError: no text, unreadable text, a full disk, an `out` that holds something else.
    """
    report, curation = progress or (lambda stage, done, total: None), curation or Curation()
    if len(data) == 1 and is_prepared(Path(data[0])):
        if (Path(data[0]) / "config.json").exists():
            raise UserError(f"{data[0]}: a run, which keeps no text — name the text, or go on with --resume {data[0]}")
        if curation != Curation():
            check_curation(Path(data[0]), curation, tuple(asdict(curation)))
        if out is not None and out.resolve() != Path(data[0]).resolve():
            raise UserError(f"{data[0]}: prepared already — train on it as it is, or name text for --out {out}")
        verify(Path(data[0]))  # reads it all once: a folder that was moved or edited must not fail in mid-run
        return Path(data[0])
    if not data:
        data = (str(default_corpus(report)),)
    if not 0 < heldout_fraction < 1:
        raise UserError(f"heldout_fraction={heldout_fraction} is not possible — use a value such as 0.01")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed={seed} is not possible — use 0 or more")
    if skip_malformed < 0:
        raise UserError(f"skip_malformed={skip_malformed} is not possible — use 0 or more")
    check_encoding(encoding)
    if is_kmer_name(tokenizer):
        read_name(tokenizer)
    elif is_trained(tokenizer):
        check_vocab_size(vocab_size)
    reading = (documents, text_key, format, encoding, skip_malformed)
    options = Options(data, None, tokenizer, vocab_size, heldout_fraction, *reading, curation, seed)
    key = _key(options)
    folder = out or cache_folder() / "prepared" / key
    was_there = folder.exists()  # asked first: another process may finish the same text at any moment
    if _holds(folder, key):
        _repeat_notes(folder)
        report("using the prepared text in " + str(folder), 1, 1)
        return folder
    if out is None:
        if was_there:
            shutil.rmtree(folder, ignore_errors=True)  # damaged; ours to make again
    elif folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise UserError(f"{folder}: you are in it, and the preparation would take its place — name a folder to make")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: not empty and not this preparation — name another folder with --out, or remove it")
    with _building(folder) as partial:
        _write(partial, options, key, report)
    return folder


def curation_of(folder: Path) -> Curation:
    """How a prepared folder was curated; what its manifest does not name was off.

    Raises:
        UserError: a manifest that is damaged, or of another version.
    """
    stored = read_manifest(folder).get("curation", {})
    values = {key: value for key, value in stored.items() if key != "dropped"}
    return from_json(Curation, values, f"{folder / 'manifest.json'}: curation")


def check_curation(folder: Path, curation: Curation, keys: tuple[str, ...]) -> None:
    """Raise UserError where one of these keys asks that a prepared folder be curated in another way than it was."""
    prepared = curation_of(folder)
    for key in keys:
        asked, there = getattr(curation, key), getattr(prepared, key)
        if asked != there:
            raise UserError(
                f"curation.{key}={asked} with {folder}, which was prepared with another, {there} — name the text "
                "itself, or leave the value as it was prepared"
            )


def _holds(folder: Path, key: str) -> bool:
    """Whether the folder holds this preparation, complete and as it was written."""
    try:
        if read_manifest(folder)["key"] != key:
            return False
        verify(folder)
    except (UserError, OSError):
        return False
    return True


def _repeat_notes(folder: Path) -> None:
    """Say again what was said when the folder was made, and when that was where the hub does not tell its revision."""
    manifest = read_manifest(folder)
    for line in manifest.get("notes", []):
        note(line)
    for source, revision in manifest.get("revisions", {}).items():
        if revision is None:
            made = datetime.fromtimestamp((folder / "manifest.json").stat().st_mtime).isoformat(" ", "minutes")
            note(f"{source}: the hub does not answer, so this is its text as of {made} — remove {folder} to read anew")


def cache_folder() -> Path:
    """The user's cache: $XDG_CACHE_HOME/cramfast or ~/.cache/cramfast."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cramfast"


def default_corpus(report: Report) -> Path:
    """The docstrings of this machine, gathered at the first call and kept in the cache."""
    path = cache_folder() / "docstrings.txt"
    if not path.is_file():
        docstrings.write_docstrings(path, report)
    return path


def _key(options: Options) -> str:
    """Names a preparation: its options, the size and time of every file it reads, and the hub's revisions."""
    state: list[object] = [FORMAT, {k: v for k, v in asdict(options).items() if k not in ("out", "verify")}]
    files = find_files(options.data, options.format)
    state += (hub.state(source) for source in options.data if hub.is_hub(source))
    if not is_trained(options.tokenizer):
        files.append(Path(options.tokenizer))
    for path in files:
        if path.is_file():
            status = path.stat()
            state.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _building(folder: Path) -> Iterator[Path]:
    """A folder beside the final one that takes its name at the end, or vanishes with any error."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}{PARTIAL}")
    try:
        for stale in folder.parent.glob(f".{folder.name}.*{PARTIAL}"):
            owner = stale.suffixes[-2][1:]
            if owner == str(os.getpid()) or not (owner.isdigit() and _alive(int(owner))):  # killed before it cleaned up
                shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():  # empty, or finished meanwhile by another process with the same key
            with contextlib.suppress(OSError):
                folder.rmdir()
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / "manifest.json").is_file():
                raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{folder}: the disk is full; nothing was kept — free some space and run it again"
            ) from None
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}) — choose another folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _write(folder: Path, options: Options, key: str, report: Report) -> None:
    given, notes, source = None, Notes(), " ".join(options.data)
    if not is_trained(options.tokenizer):
        given, mended = given_tokenizer(Path(options.tokenizer))
        notes.say(*mended)
    reading = (options.documents, options.text_key, options.format, options.encoding, options.skip_malformed)
    corpus = Corpus(options.data, *reading)
    curator = Curator(options.curation)
    survey = Survey(corpus, curator, options.seed, options.heldout_fraction, report)
    curator.finish()
    notes.say(*corpus.notes())
    report("training the tokenizer", 0, 1)
    census = Census.of(survey.texts())
    kind, why = choose(options.tokenizer, census)
    notes.say(why)
    if given is None:
        tokenizer, left_out = learn(survey, kind, options.vocab_size, source)
        notes.say(*left_out)
    else:
        tokenizer = given
    report("training the tokenizer", 1, 1)
    notes.say("" if given else few_entries(source, tokenizer, survey, options.vocab_size))
    lost = lost_characters(tokenizer, survey.texts(), census)
    notes.say(check_lost(lost, kind, source))
    survey.sample.clear()
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")

    writers, encoder = encode(folder, corpus, tokenizer, survey, curator, report)
    (folder / "heldout.txt").write_text("\n".join(encoder.demo) + "\n", encoding="utf-8")
    findings = json.dumps(curator.findings(encoder.originals), indent=1, ensure_ascii=False)
    (folder / "curation.json").write_text(findings + "\n", encoding="utf-8", errors="replace")
    splits = {name: writer.close() for name, writer in writers.items()}
    notes.say(*check_splits(source, writers, survey, curator, kind, options.heldout_fraction))
    _write_manifest(folder, options, key, splits, curator, tokenizer, (kind, lost), writers, notes)


def _write_manifest(
    folder: Path,
    options: Options,
    key: str,
    splits: dict,
    curator: Curator,
    tokenizer: Tokenizer,
    taken: tuple[str, Lost],
    writers: dict[str, SplitWriter],
    notes: Notes,
) -> None:
    files, train = {}, writers["train"]
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    kind, lost = taken
    probability = train.histogram[train.histogram > 0] / train.tokens
    manifest = {
        "version": 1,
        "key": key,
        "tokenizer": Path(kind).name,
        "tokenizer_asked": Path(options.tokenizer).name,
        "tokenizer_sha256": files["tokenizer.json"]["sha256"],
        "vocab_size": tokenizer.get_vocab_size(),
        "word_count": word_count(tokenizer),
        "ids_dtype": train.dtype.name,
        "lost_share": lost.share,
        "lost_characters": {f"U+{ord(character):04X}": share for character, share in lost.commonest()},
        "documents": options.documents,
        "text_key": options.text_key,
        "format": options.format,
        "encoding": options.encoding,
        "skip_malformed": options.skip_malformed,
        "seed": options.seed,
        "heldout_fraction": options.heldout_fraction,
        "splits": splits,
        "without_tokens": sum(writer.empty for writer in writers.values()),
        "curation": asdict(options.curation) | {"dropped": curator.counts()},
        "unigram_entropy_nats": float(-(probability * np.log(probability)).sum()),
        "sources": [source if source.startswith("hf:") else Path(source).name for source in options.data],
        "revisions": {s: hub.revision_of(s) for s in options.data if hub.is_hub(s) and not hub.is_local(s)},
        "notes": notes,
        "files": files,
    }
    path = folder / "manifest.json"
    path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """The command line of python -m cramfast.prepare."""
    import time

    import tyro
    from rich.console import Console
    from rich.table import Table

    from cramfast.runtime.progress import Stages
    from cramfast.text import report as text_report

    options = tyro.cli(
        Options,
        args=under_one_name(None, dict([VOCABULARY[::-1]])),
        prog=program("prepare"),
        description=__doc__.replace("python -m cramfast.prepare", program("prepare")),
    )
    console = Console()
    plain = {"markup": False, "highlight": False, "soft_wrap": True}  # a folder's name may look like markup
    if options.verify is not None:
        verify(options.verify)
        console.print(f"{options.verify}: every file is as it was written", **plain)
        return
    values = {k: v for k, v in vars(options).items() if k not in ("data", "out", "verify")}
    start = time.perf_counter()
    with Stages() as stages:
        folder = prepare(options.data, options.out, **values, progress=stages)
    elapsed = time.perf_counter() - start
    manifest = read_manifest(folder)
    columns = ("documents", "words", "tokens", "characters")
    table = Table("split", *columns, "characters a token")
    for split_name, split in manifest["splits"].items():
        ratio = split["characters"] / split["tokens"]
        table.add_row(split_name, *(f"{split[name]:,}" for name in columns), f"{ratio:.2f}")
    console.print(table)
    for line in summary(manifest):
        console.print(line, **plain)
    characters = sum(split["characters"] for split in manifest["splits"].values())
    console.print(
        f"vocabulary {manifest['vocab_size']:,}, unigram entropy {manifest['unigram_entropy_nats']:.3f} nats, "
        f"{elapsed:.1f} s ({characters / elapsed / 1e6:.1f} million characters a second)"
    )
    console.print(f"report: {text_report.write_report(folder)}", **plain)
    console.print(f"train on it: {program('train')} --data {folder}", **plain)


if __name__ == "__main__":
    command(main)
