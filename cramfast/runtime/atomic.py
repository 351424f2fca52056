"""Small files that appear complete or not at all."""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place (partial_path), then rename it; a missing folder is made.

    Surrogates, as in file names that are no Unicode, become question marks.

    Raises:
        OSError: the disk refused; what was there before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _renamed(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")


def copy_file(source: Path, path: Path) -> None:
    """The same for a copy of another file's bytes; the folder is there."""
    with _renamed(path) as partial:
        shutil.copyfile(source, partial)


@contextlib.contextmanager
def _renamed(path: Path) -> Iterator[Path]:
    partial = partial_path(path)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def partial_path(path: Path) -> Path:
    """Where a file lies while it is written; nobody else's place, so that two processes may write one file."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


def is_partial(path: Path) -> bool:
    """Whether this is what a kill left of a file that was being written."""
    return re.fullmatch(r"\..+\.\d+-[0-9a-f]{8}\.partial", path.name) is not None


def sweep(folder: Path) -> None:
    """Remove what kills have left in a folder; nobody else may be writing there."""
    for path in filter(is_partial, folder.iterdir()):
        path.unlink(missing_ok=True)
