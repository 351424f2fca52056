"""A prepared folder on disk: its manifest, its checksums, its text as ids. Without torch, so that commands on text
alone start at once.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from cramfast.errors import UserError

REMEDY = "run python -m cramfast.prepare again"
PARTIAL = ".partial"  # .NAME.partial is a folder that is being written
COUNTED_AT_ONCE = 1 << 20  # tokens
MANIFEST_KEYS = ("key", "splits", "files", "vocab_size", "word_count", "ids_dtype", "unigram_entropy_nats")


class PreparedText:
    """One split of a prepared folder, memory-mapped.

    Attributes:
        ids: (tokens,) uint16 or uint32, without special tokens.
        offsets: (documents + 1,) int64.
        manifest: the folder's manifest.json.

    Raises:
        UserError: a file that is missing, damaged, cut off or from another preparation.
    """

    def __init__(self, folder: Path, split: str):
        self.manifest = read_manifest(folder)
        if split not in self.manifest["splits"]:
            raise UserError(f"{folder}: no split {split!r} (there: {', '.join(self.manifest['splits'])})")
        for name in (f"{split}.ids", f"{split}.offsets.npy"):
            check_size(folder, self.manifest, name)
        dtype, tokens = np.dtype(self.manifest["ids_dtype"]), self.manifest["splits"][split]["tokens"]
        self.ids = np.memmap(folder / f"{split}.ids", dtype=dtype, mode="r", shape=(tokens,))
        try:
            self.offsets = np.load(folder / f"{split}.offsets.npy", mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise UserError(f"{folder / f'{split}.offsets.npy'}: damaged ({error}) — {REMEDY}") from None
        if len(self.offsets) == 0 or self.offsets[0] != 0 or self.offsets[-1] != tokens:
            raise UserError(f"{folder / f'{split}.offsets.npy'}: does not fit {split}.ids — {REMEDY}")

    def counts(self) -> np.ndarray:
        """(V,), how often each entry occurs; read in pieces, since numpy counts in 8 bytes a token."""
        found = np.zeros(self.manifest["vocab_size"], np.int64)
        for begin in range(0, len(self.ids), COUNTED_AT_ONCE):
            piece = np.fromfile(self.ids.filename, self.ids.dtype, COUNTED_AT_ONCE, offset=begin * self.ids.itemsize)
            found += np.bincount(piece, minlength=len(found))
        return found


def is_prepared(folder: Path) -> bool:
    """Whether prepare() wrote the folder, whole or damaged by now, or a run copied from one; texts may have a
    manifest.json of their own."""
    names = ("train.ids", "train.offsets.npy", "tokenizer.json")
    isfile = os.path.isfile  # also false where a Path raises: a name that is too long, a folder that may not be entered
    return isfile(folder / "manifest.json") and any(isfile(folder / name) for name in names)


def read_manifest(folder: Path) -> dict:
    """manifest.json of a prepared folder.

    Raises:
        UserError: missing, unreadable, damaged, or of another version.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing, so the folder was not prepared to the end — {REMEDY}") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}) — name a folder made by python -m cramfast.prepare"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: damaged JSON ({error}) — {REMEDY}") from None
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != 1:
        raise UserError(f"{path}: version {version} is not known here — {REMEDY}")
    for key in MANIFEST_KEYS:
        if key not in manifest:
            raise UserError(f"{path}: no key {key!r} — {REMEDY}")
    entries = manifest["files"].values() if isinstance(manifest["files"], dict) else [None]
    if not all(isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in entries):
        raise UserError(f"{path}: files: sizes or checksums are missing — {REMEDY}")
    return manifest


def check_size(folder: Path, manifest: dict, name: str) -> None:
    """Raise UserError unless the file has the size that the manifest states."""
    path, expected = folder / name, manifest["files"][name]["bytes"]
    if not path.is_file():
        raise UserError(f"{path}: missing — {REMEDY}")
    if path.stat().st_size != expected:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes where {expected:,} were written — {REMEDY}")


def verify(folder: Path) -> None:
    """Compare size and sha256 of every file with the manifest; reads everything.

    Raises:
        UserError: the first file that differs.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        check_size(folder, manifest, name)
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise UserError(f"{folder / name}: contents changed since it was prepared — {REMEDY}")
