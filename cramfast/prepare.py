"""Text -> tokenizer -> ids on disk: `python -m cramfast.prepare --data TEXT... [--out FOLDER]`.

Two passes over the text: one draws a sample and trains the tokenizer on it, one writes the ids. The folder appears
under its name only when it is complete.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from cramfast import docstrings
from cramfast.corpus import Documents, find_files, read_documents
from cramfast.errors import UserError, command
from cramfast.loader import check_size, read_manifest, verify
from cramfast.tokenizer import load_tokenizer, train_tokenizer, word_count
from cramfast.wordcache import WordCache

Report = Callable[[str, int, int], None]  # stage, done, total (0: unknown)

SAMPLE_CHARACTERS = 16_000_000  # for the tokenizer; a uniform draw, so more changes little but the time
SAMPLE_PIECE = 20_000  # characters drawn together, so that no huge document is the whole sample
BATCH_CHARACTERS = 4_000_000  # encoded at one time; bounds the memory
DEMO_LINES = 400
# A small text holds out more than the fraction asked for, up to a share of LARGEST_HELDOUT: a loss over fewer tokens
# (about 4.5 characters each) is too noisy to compare runs by.
LEAST_HELDOUT_CHARACTERS = 200_000
LARGEST_HELDOUT = 0.05
SPLITS = ("train", "heldout")
OFFSETS_HEADER_BYTES = 128


@dataclass(frozen=True)
class Options:
    """Turn text into a prepared folder that runs can share."""

    data: tuple[str, ...] = ()
    """Files, folders, globs or hf:NAME[:CONFIG[:SPLIT]]; nothing: docstrings found on this machine."""
    out: Path | None = None
    """Folder to write; nothing: a place in the user's cache, used again for the same text and options."""
    tokenizer: str = "wordpiece"
    """wordpiece (lower-cased ASCII), bpe (case and Unicode kept), or a tokenizer.json."""
    vocab_size: int = 32768
    heldout_fraction: float = 0.01
    """Share of the documents kept out of training, chosen by a hash of their text; more of a small text."""
    documents: Documents = "blocks"
    """What a document is in a .txt file: a block between blank lines, a line, or the whole file."""
    text_key: str = "text"
    """Field of .jsonl, column of .parquet that holds the text."""
    seed: int = 0
    """Of the draw of the tokenizer's sample and of the held-out documents."""
    verify: Path | None = field(default=None)
    """Only compare this prepared folder with its checksums."""


def prepare(
    data: tuple[str, ...],
    out: Path | None,
    *,
    tokenizer: str = "wordpiece",
    vocab_size: int = 32768,
    heldout_fraction: float = 0.01,
    documents: Documents = "blocks",
    text_key: str = "text",
    seed: int = 0,
    progress: Report | None = None,
) -> Path:
    """Prepare text for training, or return the folder where that was done before.

    Args:
        data: as Options.data; one prepared folder is returned as it is.
        out: folder to write, None for the cache.
        progress: called with (stage, done, total) as the work goes on; total 0 where it is not known.

    Returns:
        The folder: manifest.json, tokenizer.json, train.ids, train.offsets.npy, the same for heldout, heldout.txt.

    Raises:
        UserError: no text, unreadable text, a full disk, an `out` that holds something else.
    """
    report = progress or (lambda stage, done, total: None)
    if len(data) == 1 and (Path(data[0]) / "manifest.json").is_file():
        verify(Path(data[0]))  # reads it all once: a folder that was moved or edited must not fail in mid-run
        return Path(data[0])
    if not data:
        data = (str(default_corpus(report)),)
    if not 0 < heldout_fraction < 1:
        raise UserError(f"heldout_fraction={heldout_fraction} is not possible — use a value such as 0.01")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed={seed} is not possible — use 0 or more")
    options = Options(data, None, tokenizer, vocab_size, heldout_fraction, documents, text_key, seed)
    key = _key(options)
    folder = out or cache_folder() / "prepared" / key
    if _holds(folder, key):
        report("using the prepared text in " + str(folder), 1, 1)
        return folder
    if out is None:
        shutil.rmtree(folder, ignore_errors=True)  # damaged; ours to make again
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: not empty and not this preparation — name another folder with --out, or remove it")
    with _building(folder) as partial:
        _write(partial, options, report)
    return folder


def _holds(folder: Path, key: str) -> bool:
    """Whether the folder holds this preparation, complete; the contents are not read, only their sizes compared."""
    try:
        manifest = read_manifest(folder)
        for name in manifest["files"]:
            check_size(folder, manifest, name)
    except (UserError, OSError):
        return False
    return manifest["key"] == key


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
    state: list[object] = [{k: v for k, v in asdict(options).items() if k not in ("out", "verify")}]
    files = find_files(tuple(s for s in options.data if not s.startswith("hf:")))
    if options.tokenizer not in ("wordpiece", "bpe"):
        files.append(Path(options.tokenizer))
    for path in files:
        if path.is_file():
            status = path.stat()
            state.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _building(folder: Path) -> Iterator[Path]:
    """A folder beside the final one that takes its name at the end, or vanishes with any error."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        for stale in folder.parent.glob(f".{folder.name}.*.partial"):
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
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None
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


def _fraction(text: str, seed: int, purpose: bytes) -> float:
    """A number in [0, 1) that depends on the text alone: the same document always lands on the same side."""
    key = hashlib.blake2b(
        text.encode("utf-8", "surrogatepass"), digest_size=8, salt=seed.to_bytes(8, "little"), person=purpose
    )
    return int.from_bytes(key.digest(), "little") / 2**64


class _Survey:
    """What the first pass learns: the sample for the tokenizer and the threshold of the held-out split."""

    def __init__(self, options: Options, report: Report):
        self.sample: list[tuple[float, str]] = []
        self.documents = self.characters = 0
        self.least_side, self.greatest_side = 1.0, 0.0
        self.sample_characters, self.sample_below = 0, 1.0
        for text in read_documents(options.data, options.documents, options.text_key):
            self.documents += 1
            self.characters += len(text)
            side = _fraction(text, options.seed, b"heldout")
            self.least_side, self.greatest_side = min(self.least_side, side), max(self.greatest_side, side)
            self._draw(text, options.seed)
            if self.documents % 5000 == 0:
                report("reading text", self.documents, 0)
        if self.documents < 2:
            what = "no text" if self.documents == 0 else "a single document"
            raise UserError(
                f"{' '.join(options.data)}: {what} found — cramfast needs at least two documents, one to hold out; "
                "--documents lines takes every line of a .txt file as one"
            )
        enough = min(LARGEST_HELDOUT, LEAST_HELDOUT_CHARACTERS / self.characters)
        wanted = max(options.heldout_fraction, enough)
        # At least one document on either side, however few there are.
        self.heldout_below = min(max(wanted, float(np.nextafter(self.least_side, 1.0))), self.greatest_side)
        report("reading text", self.documents, self.documents)

    def _draw(self, text: str, seed: int) -> None:
        """Perhaps add pieces of the document to the sample; halve the sample when it has grown to twice its size."""
        for start in range(0, len(text), SAMPLE_PIECE):
            piece = text[start : start + SAMPLE_PIECE]
            draw = _fraction(piece[:256], seed, b"sample")
            if draw >= self.sample_below:
                continue
            self.sample.append((draw, piece))
            self.sample_characters += len(piece)
            while self.sample_characters > 2 * SAMPLE_CHARACTERS:
                self.sample_below /= 2
                self.sample = [item for item in self.sample if item[0] < self.sample_below]
                self.sample_characters = sum(len(t) for _, t in self.sample)

    def texts(self) -> Iterator[str]:
        """The sample, cut to its size."""
        left = SAMPLE_CHARACTERS
        for _, text in sorted(self.sample, key=lambda item: item[0]):
            if left <= 0:
                return
            yield text
            left -= len(text)


class _SplitWriter:
    """Ids and offsets of one split, appended as they come; counts on the way."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, vocab_size: int):
        self.name, self.dtype = name, dtype
        self.offsets_path = folder / f"{name}.offsets.npy"
        self.file, self.offsets_file = (folder / f"{name}.ids").open("wb"), self.offsets_path.open("wb")
        self.offsets_file.write(bytes(OFFSETS_HEADER_BYTES))  # the number of documents is known at the end
        self.offsets_file.write(np.zeros(1, np.int64))
        self.documents = self.tokens = self.characters = 0
        self.histogram = np.zeros(vocab_size, np.int64)

    def append(self, ids: np.ndarray, lengths: np.ndarray, characters: int) -> None:
        self.file.write(ids.astype(self.dtype))
        self.offsets_file.write(self.tokens + np.cumsum(lengths))
        self.documents += len(lengths)
        self.tokens += len(ids)
        self.characters += characters
        self.histogram += np.bincount(ids, minlength=len(self.histogram))

    def close(self) -> dict:
        # The .npy format, version 1: magic, length of the description, description filled up with spaces.
        described = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({self.documents + 1},), }}".encode()
        filled = described.ljust(OFFSETS_HEADER_BYTES - 11) + b"\n"
        self.offsets_file.seek(0)
        self.offsets_file.write(b"\x93NUMPY\x01\x00" + len(filled).to_bytes(2, "little") + filled)
        for file in (self.file, self.offsets_file):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        return {"documents": self.documents, "tokens": self.tokens, "characters": self.characters}


def _write(folder: Path, options: Options, report: Report) -> None:
    given = None if options.tokenizer in ("wordpiece", "bpe") else load_tokenizer(Path(options.tokenizer))
    survey = _Survey(options, report)
    report("training the tokenizer", 0, 1)
    tokenizer = given or train_tokenizer(survey.texts(), options.tokenizer, options.vocab_size)
    report("training the tokenizer", 1, 1)
    survey.sample.clear()
    tokenizer.save(str(folder / "tokenizer.json"))

    size = tokenizer.get_vocab_size()
    dtype = np.dtype(np.uint16 if size <= 65536 else np.uint32)
    writers = {name: _SplitWriter(folder, name, dtype, size) for name in SPLITS}
    heldout_lines = _encode(tokenizer, options, survey, writers, report)
    (folder / "heldout.txt").write_text("\n".join(heldout_lines) + "\n", encoding="utf-8")
    splits = {name: writer.close() for name, writer in writers.items()}
    if splits["train"]["tokens"] == 0 or splits["heldout"]["tokens"] == 0:
        raise UserError(
            f"{' '.join(options.data)}: too little text to train on and to hold out — add documents, "
            "or use --tokenizer bpe if it is not written in Latin letters"
        )
    _write_manifest(folder, options, splits, tokenizer, dtype, writers["train"].histogram)


def _encode(
    tokenizer: Tokenizer, options: Options, survey: _Survey, writers: dict[str, _SplitWriter], report: Report
) -> list[str]:
    """Second pass: ids of every document to its split. Returns sentences of held-out documents."""
    demo: list[str] = []
    words = WordCache(tokenizer)

    def store(texts: list[str]) -> None:
        sides = [_fraction(text, options.seed, b"heldout") < survey.heldout_below for text in texts]
        for name, held in (("train", False), ("heldout", True)):
            chosen = [text for text, side in zip(texts, sides, strict=True) if side == held]
            if chosen:
                writers[name].append(*words.encode(chosen), sum(map(len, chosen)))
            if held and len(demo) < DEMO_LINES:
                demo.extend(line for text in chosen for line in _sentences(text))

    done = 0
    with concurrent.futures.ThreadPoolExecutor(1) as beside:  # one batch is encoded while the next is read
        stored = beside.submit(store, [])
        for texts in _batches(read_documents(options.data, options.documents, options.text_key)):
            stored.result()
            report("writing ids", done, survey.documents)
            stored, done = beside.submit(store, texts), done + len(texts)
        stored.result()
    report("writing ids", done, survey.documents)
    return demo[:DEMO_LINES]


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _sentences(text: str) -> list[str]:
    """Up to three sentences of five to forty words; the start of the text where it has none."""
    flat = " ".join(text.split())
    found = [s for s in re.split(r"(?<=[.!?])\s+", flat) if 5 <= len(s.split()) <= 40][:3]
    return found or [flat[:300]]


def _write_manifest(
    folder: Path, options: Options, splits: dict, tokenizer: Tokenizer, dtype: np.dtype, histogram: np.ndarray
) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    probability = histogram[histogram > 0] / histogram.sum()
    manifest = {
        "version": 1,
        "key": _key(options),
        "tokenizer": Path(options.tokenizer).name,
        "tokenizer_sha256": files["tokenizer.json"]["sha256"],
        "vocab_size": tokenizer.get_vocab_size(),
        "word_count": word_count(tokenizer),
        "ids_dtype": dtype.name,
        "seed": options.seed,
        "heldout_fraction": options.heldout_fraction,
        "splits": splits,
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

    from cramfast.progress import Stages

    options = tyro.cli(Options, prog="python -m cramfast.prepare", description=__doc__)
    console = Console()
    if options.verify is not None:
        verify(options.verify)
        console.print(f"{options.verify}: every file is as it was written")
        return
    values = {k: v for k, v in vars(options).items() if k not in ("data", "out", "verify")}
    start = time.perf_counter()
    with Stages() as stages:
        folder = prepare(options.data, options.out, **values, progress=stages)
    elapsed = time.perf_counter() - start
    manifest = read_manifest(folder)
    table = Table("split", "documents", "tokens", "characters", "characters a token")
    for name, split in manifest["splits"].items():
        ratio = split["characters"] / split["tokens"]
        table.add_row(name, *(f"{split[k]:,}" for k in ("documents", "tokens", "characters")), f"{ratio:.2f}")
    console.print(table)
    characters = sum(split["characters"] for split in manifest["splits"].values())
    console.print(
        f"vocabulary {manifest['vocab_size']:,}, unigram entropy {manifest['unigram_entropy_nats']:.3f} nats, "
        f"{elapsed:.1f} s ({characters / elapsed / 1e6:.1f} million characters a second)"
    )
    console.print(f"train on it: python -m cramfast.train --data {folder}", soft_wrap=True)


if __name__ == "__main__":
    command(main)
