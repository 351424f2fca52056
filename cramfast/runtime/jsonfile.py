"""JSON in files: without NaN, which JSON does not have, and one line for a file that holds no object."""

import json
import math
from pathlib import Path

from cramfast.errors import UserError


def dumps(value, indent: int | None = None) -> str:
    """JSON text of nested dicts, lists and tuples; a number that is not finite becomes null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
