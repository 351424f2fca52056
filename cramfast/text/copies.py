"""The same text in two files: one beside its archive is left out, other copies are said."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from cramfast.text.compressed import COMPRESSIONS, open_bytes, readable

READ_AT_ONCE = 1 << 20  # bytes


@lru_cache(maxsize=1 << 20)
def _digest(path: Path, unpacked: bool, size: int, changed: int) -> bytes:
    """Of a file's contents; of a file of this size that was changed at this time they are computed once."""
    digest = hashlib.blake2b(digest_size=16)
    with readable(path), open_bytes(path) if unpacked else path.open("rb") as file:
        while data := file.read(READ_AT_ONCE):
            digest.update(data)
    return digest.digest()


def _digest_of(path: Path, unpacked: bool = False) -> bytes:
    status = path.stat()
    return _digest(path, unpacked, status.st_size, status.st_mtime_ns)


def archived(files: Iterable[Path]) -> dict[Path, Path]:
    """Archives beside a file, or another archive, of the same name without the ending and the same contents: to it."""
    named: dict[Path, list[Path]] = defaultdict(list)
    for path in files:
        named[path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path].append(path)
    found: dict[Path, Path] = {}
    for same in named.values():
        first: dict[bytes, Path] = {}
        # The plain one first: it is kept.
        for path in sorted(same, key=lambda each: (each.suffix.lower() in COMPRESSIONS, each)) if len(same) > 1 else ():
            kept = first.setdefault(_digest_of(path, unpacked=True), path)
            if kept != path:
                found[path] = kept
    return found


def equal(sizes: dict[Path, int]) -> list[tuple[Path, Path]]:
    """(file, an earlier one) with the same bytes, of files with their sizes."""
    of_size: dict[int, list[Path]] = defaultdict(list)
    for path, size in sizes.items():
        of_size[size].append(path)
    found = []
    for size, same in of_size.items():
        first: dict[bytes, Path] = {}
        for path in same if size and len(same) > 1 else ():
            earlier = first.setdefault(_digest_of(path), path)
            if earlier != path:
                found.append((path, earlier))
    return found
