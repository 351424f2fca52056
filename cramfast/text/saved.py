"""Folders that `datasets` wrote with save_to_disk: which of their files are the data set."""

import json
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from cramfast.errors import UserError

STATE = "state.json"  # beside the files of one split, which it names
SPLITS = "dataset_dict.json"  # beside the folders of several
TRAIN = "train"


def data_files(folder: Path) -> set[str] | None:
    """The names of the files that hold a split's rows; others there are what map() and filter() left (cache-*.arrow).
    None for any other folder.

    Raises:
        UserError: one of them is missing.
    """
    state = _json(folder / STATE)
    files = state.get("_data_files") if isinstance(state, dict) else None
    if not isinstance(files, list):
        return None
    names = {str(file.get("filename")) for file in files if isinstance(file, dict)}
    if gone := sorted(name for name in names if not (folder / name).exists()):
        raise UserError(f"{folder}: {gone[0]} is not there, which {STATE} names — fetch the whole folder")
    return names


def splits(folder: Path) -> list[str]:
    """The splits of a folder of several."""
    named = _json(folder / SPLITS)
    found = named.get("splits") if isinstance(named, dict) else None
    return [str(name) for name in found] if isinstance(found, list) else []


def other_splits(folder: Path) -> set[str]:
    """Those that are not read where the folder is given: all but the one to train on; a user names another's folder."""
    found = splits(folder)
    return set(found) - {TRAIN} if TRAIN in found else set()


def read_splits(files: Iterable[Path]) -> list[str]:
    """Of each data set of which several splits are read, or one that is not for training: how many files of which."""
    counted: dict[Path, Counter[str]] = {}
    once = cache(splits)
    for path in files:
        whole = path.parent.parent
        if path.parent.name in once(whole):
            counted.setdefault(whole, Counter())[path.parent.name] += 1
    return [
        f"reads {', '.join(f'{name} ({files:,} files)' for name, files in sorted(found.items()))} of {whole}"
        for whole, found in counted.items()
        if set(found) != {TRAIN}
    ]


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
