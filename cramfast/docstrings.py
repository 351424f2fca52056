"""The default corpus: documentation text that is on this machine already.

Docstrings of the Python standard library and of the installed packages, read with ast and never imported. Doctests,
tables and code are left out, so that what remains is prose.
"""

import ast
import concurrent.futures
import hashlib
import inspect
import multiprocessing
import os
import re
import sysconfig
import warnings
from pathlib import Path

from cramfast.errors import UserError

LEAST_WORDS = 1_000_000
LARGEST_SOURCE_BYTES = 2 << 20  # beyond that, sources are generated tables
FILES_PER_TASK = 200
SHORTEST_WORDS = 8  # of a kept paragraph: "Returns:" and the like teach nothing
_CODE = re.compile(r">>>|\.\.\. |^\s*[-=+|~^`*#]{3,}|^\s*\.\. |^\s*:\w+|[{}<>]|\w\(.*\)\s*$|=\s*\S+$|^\s*@")


def source_files() -> list[Path]:
    """Python files of the standard library and of the installed packages, sorted; tests left out."""
    paths = sysconfig.get_paths()
    roots = dict.fromkeys(Path(paths[name]) for name in ("stdlib", "purelib", "platlib"))
    found = set()
    for root in roots:
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).parts
            inside_stdlib = root == Path(paths["stdlib"])
            if inside_stdlib and "site-packages" in parts:
                continue  # belongs to another environment, or is listed by its own root
            if not {"tests", "test", "testing", "_vendor", "vendor"} & set(parts):
                found.add(path)
    return sorted(found)


def docstrings(path: Path) -> list[str]:
    """Cleaned docstrings of one source file; none where it is no valid Python."""
    try:
        if path.stat().st_size > LARGEST_SOURCE_BYTES:
            return []
        source = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's escape sequences
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []  # templates, other versions of Python, files that went away
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            if text and (prose := clean(text)):
                texts.append(prose)
    return texts


def clean(docstring: str) -> str:
    """The paragraphs of a docstring that are prose, each on one line."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        lines = [line.strip() for line in paragraph.splitlines()]
        prose = [line for line in lines if line and not _CODE.search(line)]
        words = " ".join(prose).split()
        if len(words) >= SHORTEST_WORDS and len(prose) * 2 > len(lines):
            kept.append(" ".join(words).replace("``", "").replace("`", ""))
    return "\n".join(kept)


def _collect(paths: list[Path]) -> list[str]:
    return [text for path in paths for text in docstrings(path)]


def write_docstrings(path: Path, progress=None) -> int:
    """Write the default corpus, one document a block, without repetitions; returns its words.

    Args:
        path: the text file, replaced whole.
        progress: called with (stage, done, total).

    Raises:
        UserError: fewer than a million words on this machine, or the file cannot be written.
    """
    files = source_files()
    tasks = [files[i : i + FILES_PER_TASK] for i in range(0, len(files), FILES_PER_TASK)]
    seen: set[bytes] = set()
    words = 0
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8", errors="replace") as out:
            # Processes, because ast holds the interpreter lock; spawned, because torch's threads do not survive a fork.
            context = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(min(4, os.cpu_count() or 1), mp_context=context) as pool:
                for done, texts in enumerate(pool.map(_collect, tasks)):
                    for text in texts:
                        key = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=12).digest()
                        if key not in seen:
                            seen.add(key)
                            out.write(text + "\n\n")
                            words += len(text.split())
                    if progress:
                        progress("reading docstrings", done + 1, len(tasks))
        if words < LEAST_WORDS:
            raise UserError(f"only {words:,} words of docstrings on this machine — name your own text with --data")
        partial.replace(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}) — free some space or set XDG_CACHE_HOME"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    return words
