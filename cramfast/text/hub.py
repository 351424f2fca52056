"""Datasets of the Hugging Face hub, or of folders that its `datasets` package reads, as text; streamed."""

import functools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from cramfast.errors import UserError
from cramfast.text.records import row_texts
from cramfast.text.tally import Tally

HUB = "hf:"


def dataset_name(source: str) -> tuple[str, str, str]:
    """(name, config, split) of hf:NAME[:CONFIG[:SPLIT]]; "" where it is not given.

    Raises:
        UserError: another form.
    """
    name, config, split, *rest = [*source.removeprefix(HUB).split(":"), "", ""][:4]
    if not name or any(rest):
        raise UserError(f"{source}: not the name of a dataset — give hf:NAME[:CONFIG[:SPLIT]]")
    return name, config, split


def is_hub(source: str) -> bool:
    """Whether a source is a dataset, hf:NAME[:CONFIG[:SPLIT]], and no file, folder or glob."""
    return source.startswith(HUB)


def is_local(source: str) -> bool:
    """Whether the name is that of a folder or file here, which `datasets` reads before it asks the hub."""
    return Path(dataset_name(source)[0]).exists()


def located(source: str) -> str:
    """The source, with the whole path of a local folder: it means the same from every directory."""
    name, *rest = source.removeprefix(HUB).split(":")
    return HUB + ":".join([str(Path(name).resolve()), *rest]) if is_local(source) else source


def state(source: str) -> list[object]:
    """What the contents of a dataset depend on: path, sizes and times of a local folder's files, or the hub's revision.
    None in its place where the hub does not answer."""
    name, _, _ = dataset_name(source)
    path = Path(name)
    if not is_local(source):
        return [source, revision(name)]
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    described = [[str(p.resolve()), (status := p.stat()).st_size, status.st_mtime_ns] for p in files]
    return [located(source), *described]


@functools.cache
def revision(name: str) -> str | None:
    """The commit of a dataset on the hub, asked once a process: what is read is what the key names. None where it
    cannot be asked."""
    try:
        import huggingface_hub

        return huggingface_hub.HfApi().dataset_info(name, timeout=10).sha
    except Exception:  # of the hub's client and its HTTP library: they share no other base class
        return None


def revision_of(source: str) -> str | None:
    """revision() of a source's dataset."""
    return revision(dataset_name(source)[0])


def read_dataset(source: str, text_key: str, tally: Tally) -> Iterator[str]:
    """Every document of the dataset.

    Raises:
        UserError: no such package, dataset or column, or a network that fails.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source}: needs the datasets package — pip install 'cramfast[hf]'") from None
    name, config, split = dataset_name(source)
    at = {} if is_local(source) or (sha := revision(name)) is None else {"revision": sha}
    load = partial(datasets.load_dataset, name, config or None, split=split or "train", streaming=True, **at)
    for row in _streamed(source, load):
        yield from row_texts(row, text_key, source, tally)


def _streamed(source: str, load: Callable[[], Iterable[dict]]) -> Iterator[dict]:
    """The rows of a dataset; whatever goes wrong on the way, at the first or at any later one, names the source."""
    try:
        yield from load()
    except Exception as error:  # of datasets, the hub's client, its HTTP library, Arrow: they share no other base class
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{source}: could not be read ({reason}) — check its name and the network, or download its files and name "
            "these with --data"
        ) from error
