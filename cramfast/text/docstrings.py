"""The default corpus: documentation text that is on this machine already.

Docstrings of the Python standard library and of the installed packages, read with ast and never imported. Doctests,
tables and code are left out, so that what remains is prose.
"""

import ast
import concurrent.futures
import hashlib
import inspect
import json
import os
import re
import signal
import site
import subprocess
import sys
import sysconfig
import time
import warnings
from pathlib import Path

from cramfast.errors import UserError

LEAST_WORDS = 1_000_000
ENOUGH_WORDS = 2_000_000  # an epoch of the default run; more would only cost time before it
LARGEST_SOURCE_BYTES = 2 << 20  # beyond that, sources are generated tables
FILES_PER_TASK = 100
ABANDONED_S = 3600.0  # a half-written corpus that nobody has added to for so long is a killed process's
SHORTEST_WORDS = 8  # of a kept paragraph: "Returns:" and the like teach nothing
_CODE = re.compile(r">>>|\.\.\. |^\s*[-=+|~^`*#]{3,}|^\s*\.\. |^\s*:\w+|[{}<>]|\w\(.*\)\s*$|=\s*\S+$|^\s*@")


def source_files() -> list[Path]:
    """Python files of the standard library, sorted, then of the installed packages in a mixed order; tests left out.

    The order is that of a hash of the path inside its folder: the same on every machine, and a part of the list is a
    fair sample of the packages.
    """
    roots = _roots()
    stdlib = roots[0]
    found: dict[Path, tuple] = {}
    for root in roots:
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).parts
            if root == stdlib and {"site-packages", "dist-packages"} & set(parts):
                continue  # belongs to another environment, or is listed by its own root
            if not {"tests", "test", "testing", "_vendor", "vendor"} & set(parts):
                name = path.relative_to(root).as_posix()
                mixed = b"" if root == stdlib else hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
                found.setdefault(path, (mixed, name))
    return sorted(found, key=found.__getitem__)


def _roots() -> list[Path]:
    """The folder of the standard library, then those of installed packages: the environment's, the user's (pip install
    --user), and those that a distribution's own packages use (Debian's dist-packages); each once."""
    paths = sysconfig.get_paths()
    schemes = (paths["stdlib"], paths["purelib"], paths["platlib"])
    folders = (Path(name).resolve() for name in (*schemes, *site.getsitepackages(), site.getusersitepackages()))
    return list(dict.fromkeys(folders))


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
    """Docstrings of some files, read by a fresh Python.

    ast holds the interpreter lock, so threads alone gain nothing; a fork would not survive torch's threads, and a
    process of `multiprocessing` imports the caller's main module, torch and all.
    """
    package = str(Path(__file__).resolve().parent.parent)
    search = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "cramfast.text.docstrings"],
        input=json.dumps([str(path) for path in paths]),
        env=os.environ | {"PYTHONPATH": search},
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches us alone; the few workers end by themselves
        text=True,
        encoding="utf-8",
        check=True,
    )
    return json.loads(done.stdout)


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
        for other in path.parent.glob(f"{path.stem}.*.partial"):
            if time.time() - other.stat().st_mtime > ABANDONED_S:
                other.unlink(missing_ok=True)
        with partial.open("w", encoding="utf-8", errors="replace") as out:
            pool = concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1))
            try:
                for texts in pool.map(_collect, tasks):
                    for text in texts:
                        key = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=12).digest()
                        if key not in seen:
                            seen.add(key)
                            out.write(text + "\n\n")
                            words += len(text.split())
                    if progress:
                        progress("reading docstrings (words)", min(words, ENOUGH_WORDS), ENOUGH_WORDS)
                    if words >= ENOUGH_WORDS:
                        break
            finally:
                pool.shutdown(cancel_futures=True)
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


if __name__ == "__main__":  # the worker of _collect
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends without a word when the reader is killed
    json.dump([text for name in json.load(sys.stdin) for text in docstrings(Path(name))], sys.stdout)
