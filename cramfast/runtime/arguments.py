"""Words of a command line: how the command was called, and keys that go by two names."""

import re
import sys
from collections.abc import Mapping

from cramfast.errors import UserError

# `prepare` knows no model, so its key of the vocabulary stands alone; both commands take both names.
VOCABULARY = "--vocab-size", "--model.vocab-size"


def program(name: str) -> str:
    """How to call a command as this one was called: `cramfast train` where cramfast/__main__.py was in front of it, of
    whatever command, else `python -m cramfast.train`."""
    front = re.fullmatch(r"((?:python -m )?cramfast) [a-z]+", sys.argv[0])
    return f"{front[1]} {name}" if front else f"python -m cramfast.{name}"


def under_one_name(words: list[str] | None, renamed: Mapping[str, str]) -> list[str]:
    """The command line with every flag in `renamed` under its other name; None stands for the program's own words.

    A flag may have "_" for "-", and its value may follow after "=" or as the next word.

    Raises:
        UserError: a key is given under both names, with different values.
    """
    words = sys.argv[1:] if words is None else words
    values: dict[str, dict[str, str]] = {}  # of each key, by the name it was given under
    changed = []
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-") if flag.startswith("--") else flag
        key = renamed.get(flag, flag)
        if key in renamed.values():
            value = value if equals else "".join(words[place + 1 : place + 2])
            if any(name != flag and there != value for name, there in values.get(key, {}).items()):
                (other, there), *_ = values[key].items()
                raise UserError(f"{other} {there} and {flag} {value} are one key — give it once")
            values.setdefault(key, {})[flag] = value
        changed.append(key + equals + word.partition("=")[2] if flag in renamed else word)
    return changed
