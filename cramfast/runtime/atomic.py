"""Small files that appear complete or not at all."""

import os
import shutil
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place (partial_path), then rename it; a missing folder is made.

    Surrogates, as in file names that are no Unicode, become question marks.

    Raises:
        OSError: the disk refused; what was there before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    partial.write_text(text, encoding="utf-8", errors="replace")
    os.replace(partial, path)


def copy_file(source: Path, path: Path) -> None:
    """The same for a copy of another file's bytes; the folder is there."""
    partial = partial_path(path)
    shutil.copyfile(source, partial)
    os.replace(partial, path)


def partial_path(path: Path) -> Path:
    """Where a file lies while it is written; what a kill leaves there, the next write replaces."""
    return path.with_name(f".{path.name}.partial")
