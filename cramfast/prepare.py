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
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from cramfast.config import Curation, from_json
from cramfast.errors import UserError, command
from cramfast.text import docstrings
from cramfast.text.census import Census
from cramfast.text.corpus import Corpus, Documents, find_files
from cramfast.text.curation import Curator, summary
from cramfast.text.kmers import is_kmer_name, read_name
from cramfast.text.learning import Learned
from cramfast.text.lost import Lost, described, lost_characters, suitable
from cramfast.text.prepared import PARTIAL, is_prepared, read_manifest, verify
from cramfast.text.splits import SplitWriter, encode
from cramfast.text.survey import Report, Survey
from cramfast.text.tokenizer import check_vocab_size, is_trained, load_tokenizer, train_tokenizer, word_count

# Text in another script than the tokenizer's vanishes without a trace in the loss, so the sample is looked at.
LOST_NOTED, LOST_REFUSED = 0.0001, 0.5
FORMAT = 3  # of a prepared folder; one made before letters and signs were spelled out in ASCII is made anew


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
    """Most entries of the vocabulary; k-mers have as many as there are."""
    heldout_fraction: float = 0.01
    """Share of the documents kept out of training, chosen by a hash of their text; more of a small text."""
    documents: Documents = "blocks"
    """What a document is in a .txt file: a block between blank lines, a line, or the whole file."""
    text_key: str = "text"
    """Field of .jsonl, column of .parquet that holds the text."""
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
    if is_kmer_name(tokenizer):
        read_name(tokenizer)
    elif is_trained(tokenizer):
        check_vocab_size(vocab_size)
    options = Options(data, None, tokenizer, vocab_size, heldout_fraction, documents, text_key, curation, seed)
    key = _key(options)
    folder = out or cache_folder() / "prepared" / key
    was_there = folder.exists()  # asked first: another process may finish the same text at any moment
    if _holds(folder, key):
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
    """Names a preparation: its options and the size and time of every file it reads."""
    state: list[object] = [FORMAT, {k: v for k, v in asdict(options).items() if k not in ("out", "verify")}]
    files = find_files(tuple(s for s in options.data if not s.startswith("hf:")))
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
    given = None if is_trained(options.tokenizer) else load_tokenizer(Path(options.tokenizer))
    corpus = Corpus(options.data, options.documents, options.text_key)
    curator = Curator(options.curation)
    survey = Survey(corpus, curator, options.seed, options.heldout_fraction, report)
    curator.finish()
    report("training the tokenizer", 0, 1)
    census = Census.of(survey.texts())
    kind = _chosen(options, census)
    tokenizer = given or _trained(survey, kind, options)
    report("training the tokenizer", 1, 1)
    lost = lost_characters(tokenizer, survey.texts(), census)
    _check_lost(lost, kind, options)
    survey.sample.clear()
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")

    writers, encoder = encode(folder, corpus, tokenizer, survey, curator, report)
    (folder / "heldout.txt").write_text("\n".join(encoder.demo) + "\n", encoding="utf-8")
    findings = json.dumps(curator.findings(encoder.originals), indent=1, ensure_ascii=False)
    (folder / "curation.json").write_text(findings + "\n", encoding="utf-8", errors="replace")
    splits = {name: writer.close() for name, writer in writers.items()}
    if splits["train"]["tokens"] == 0 or splits["heldout"]["tokens"] == 0:
        dropped = sum(each.documents for each in curator.dropped.values())
        raise UserError(
            f"{corpus}: too little text to train on and to hold out — add documents, "
            + (f"loosen --curation, which dropped {dropped:,} of {len(curator.verdicts):,}, " if dropped else "")
            + "or use --tokenizer bpe if it is not written in Latin letters"
        )
    _write_manifest(folder, options, key, splits, curator, tokenizer, (kind, lost), writers["train"])


def _chosen(options: Options, census: Census) -> str:
    """The tokenizer that was asked for; what auto takes is said, unless it is the usual."""
    if options.tokenizer != "auto":
        return options.tokenizer
    kind, why = suitable(census)
    if kind != "wordpiece":
        print(
            f"note: --tokenizer auto takes {kind}, which keeps case and all of Unicode: {why}; --tokenizer wordpiece "
            "is the other, kmer is for DNA and proteins",
            file=sys.stderr,
        )
    return kind


def _trained(survey: Survey, kind: str, options: Options) -> Tokenizer:
    """A tokenizer learned from the sample; what it did not learn from is said."""
    learned = Learned()
    tokenizer = train_tokenizer(survey.texts(), kind, options.vocab_size, learned)
    if left_out := learned.note():
        print(
            f"note: {' '.join(options.data)}: the tokenizer did not learn from all of its sample, left out were "
            f"{left_out}; training reads them all the same",
            file=sys.stderr,
        )
    if kind.endswith(":overlapping"):
        print(
            "note: the letters of an overlapping k-mer stand in its neighbours, from which a hidden one can be read; "
            f"--tokenizer {kind.removesuffix(':overlapping')} has none of this",
            file=sys.stderr,
        )
    return tokenizer


def _check_lost(lost: Lost, kind: str, options: Options) -> None:
    """Characters without a token: above LOST_NOTED of them it is said, above LOST_REFUSED refused."""
    commonest = ", ".join(described(*each) for each in lost.commonest())
    what = f"{' '.join(options.data)}: {lost.share:.2%} of the characters have no token in {kind} ({commonest})"
    remedy = "--tokenizer bpe has one for every character"
    if lost.share > LOST_REFUSED:
        raise UserError(f"{what} — {remedy}")
    if lost.share > LOST_NOTED:
        print(f"note: {what}; {remedy}", file=sys.stderr)


def _write_manifest(
    folder: Path,
    options: Options,
    key: str,
    splits: dict,
    curator: Curator,
    tokenizer: Tokenizer,
    taken: tuple[str, Lost],
    train: SplitWriter,
) -> None:
    files = {}
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
        "seed": options.seed,
        "heldout_fraction": options.heldout_fraction,
        "splits": splits,
        "curation": asdict(options.curation) | {"dropped": curator.counts()},
        "unigram_entropy_nats": float(-(probability * np.log(probability)).sum()),
        "sources": [source if source.startswith("hf:") else Path(source).name for source in options.data],
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

    options = tyro.cli(Options, prog="python -m cramfast.prepare", description=__doc__)
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
    console.print(f"train on it: python -m cramfast.train --data {folder}", **plain)


if __name__ == "__main__":
    command(main)
