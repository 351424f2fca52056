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
    for number, line in whole_lines(path, encoding, tally):
        if number == 1 and line.startswith("{"):
            yield from read_jsonl(path, text_key, encoding, tally)
            return
        if line.startswith(("<doc ", "</doc>")):
            yield from pieces(html.unescape("".join(article)))
            article = []
        else:
            article.append(line)
    yield from pieces(html.unescape("".join(article)))
