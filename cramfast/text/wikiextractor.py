"""What WikiExtractor wrote: <doc id="..." ...> elements, or JSON lines, in files named wiki_00."""

import html
from collections.abc import Iterator
from pathlib import Path

from cramfast.text.lines import pieces, whole_lines
from cramfast.text.records import read_jsonl
from cramfast.text.tally import Tally


def read_wikiextractor(path: Path, text_key: str, encoding: str, tally: Tally) -> Iterator[str]:
    """An article is a document: its title, and its paragraphs; what was escaped is spelled out again."""
    article: list[str] = []
    first = True  # of the lines that are not blank
    for _, line in whole_lines(path, encoding, tally):
        if first and line.lstrip().startswith("{"):
            yield from read_jsonl(path, text_key, encoding, tally)
            return
        first = first and not line.strip()
        if line.startswith(("<doc ", "</doc>")):
            yield from pieces(html.unescape("".join(article)))
            article = []
        else:
            article.append(line)
    yield from pieces(html.unescape("".join(article)))
