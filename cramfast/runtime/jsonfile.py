"""A JSON object in a file, and one line for a file that holds none."""

import json
from pathlib import Path

from cramfast.errors import UserError


def read_json(path: Path, remedy: str = "restore the file or train again") -> dict:
    """The JSON object in a file, {} when there is no such file.

    Args:
        remedy: what the error tells to do.

    Raises:
        UserError: the file is no JSON object.
    """
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}) — {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object — {remedy}")
    return value
