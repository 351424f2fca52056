"""One self-contained HTML page about a prepared text: what it holds, what was left out and why."""

import unicodedata
from html import escape
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from cramfast.pages.charts import Line, bars, chart
from cramfast.pages.numbers import short
from cramfast.pages.page import document, figure, table, tile, write_page
from cramfast.runtime.jsonfile import read_json
from cramfast.text.curation import SIMILARITY_BINS, dropped_steps
from cramfast.text.prepared import PreparedText
from cramfast.text.specials import FIRST_WORD, UNK

STYLE = """
td.text { overflow-wrap: anywhere; font-size: .84rem; } td.n.short { width: 9rem; }
"""
RARE = 20  # occurrences below which an entry of the vocabulary is hardly trained
BINS_PER_OCTAVE = 4
FREQUENT = 30  # tokens shown


def write_report(folder: Path) -> Path:
    """Write report.html into a prepared folder and return its path.

    Raises:
        UserError: no prepared folder, or a damaged one.
    """
    return write_page(folder / "report.html", render(folder))


def render(folder: Path) -> str:
    """The page as text; nothing in it points outside it."""
    train, heldout = (PreparedText(folder, split) for split in ("train", "heldout"))
    manifest, findings = train.manifest, read_json(folder / "curation.json")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    counts = train.counts()
    lengths = np.concatenate([np.diff(train.offsets), np.diff(heldout.offsets)])
    parts = [
        "<h1>Prepared text</h1>",
        f'<p class="soft">{escape(", ".join(manifest["sources"]))}</p>',
        '<div class="tiles">',
        *(tile(name, value) for name, value in _tiles(manifest, lengths)),
        "</div>",
        table([(name, *(f"{n:,}" for n in split.values())) for name, split in manifest["splits"].items()],
              ["split", *manifest["splits"]["train"]]),
        "<h2>Left out</h2>",
        *_left_out(manifest, findings),
        *_lost(manifest),
        "<h2>Lengths and words</h2>",
        '<div class="charts">',
        _lengths_figure(lengths),
        _coverage_figure(counts),
        "</div>",
        table(_vocabulary_rows(manifest, counts)),
        "<h3>Most frequent tokens of the training split</h3>",
        f"<p>{_frequent(tokenizer, counts)}</p>",
    ]  # fmt: skip
    return document("Prepared text", parts, STYLE)


def _tiles(manifest: dict, lengths: np.ndarray) -> list[tuple[str, str]]:
    both = {key: sum(split[key] for split in manifest["splits"].values()) for key in manifest["splits"]["train"]}
    steps = dropped_steps(manifest)
    read = both["documents"] + sum(step.documents for step in steps)
    share = (read - both["documents"]) / read
    return [
        ("documents kept", short(both["documents"])),
        ("of the documents left out", f"{100 * share:.3g} %"),
        ("words", short(both["words"])),
        ("tokens", short(both["tokens"])),
        ("tokens a word", f"{both['tokens'] / both['words']:.2f}"),
        ("characters a token", f"{both['characters'] / both['tokens']:.2f}"),
        ("tokens of a document, median", f"{np.median(lengths):,.0f}"),
        ("unigram entropy, nats", f"{manifest['unigram_entropy_nats']:.3f}"),
    ]


def _left_out(manifest: dict, findings: dict) -> list[str]:
    steps = dropped_steps(manifest)
    if not steps:
        return ["<p class=soft>Nothing: every step of --curation was off.</p>"]
    rows = [
        (step.name, f"{step.documents:,}", f"{100 * step.document_share:.3g}", f"{step.characters:,}",
         f"{100 * step.character_share:.3g}")
        for step in steps
    ]  # fmt: skip
    parts = [
        "<p class=soft>In this order; shares are of all that was read. Up to five examples of each step, chosen by a "
        "hash of their text.</p>",
        table(rows, ["step", "documents", "%", "characters", "%"]),
    ]
    if any(findings["similarities"]):
        parts += ['<div class="charts">', _similarity_figure(np.array(findings["similarities"])), "</div>"]
    for name, examples in findings["examples"].items():
        if examples:
            parts += [f"<h3>Examples: {escape(name)}</h3>", _examples(examples)]
    if findings["most_copied"]:
        parts += ["<h3>Documents with most duplicates: the first stays</h3>", _copied(findings["most_copied"])]
    return parts


def _lost(manifest: dict) -> list[str]:
    """Characters that no token stands for, the commonest first."""
    if not manifest.get("lost_characters"):
        return []
    rows = []
    for code, share in manifest["lost_characters"].items():
        character = chr(int(code.removeprefix("U+"), 16))
        shown = character if character.isprintable() else ""
        rows.append((shown, code, unicodedata.name(character, "without a name").lower(), f"{100 * share:.3g}"))
    return [
        "<h2>Characters without a token</h2>",
        f"<p class=soft>{100 * manifest['lost_share']:.3g} % of all characters but spaces are dropped, or hidden "
        f"in [UNK]; these {len(rows)} are the commonest. Byte-level BPE (--tokenizer bpe) has a token for each.</p>",
        table(rows, ["", "code point", "name", "% of all characters"]),
    ]


def _examples(examples: list[dict]) -> str:
    beside = any("original" in example for example in examples)
    head = ["", "left out", *(["stays; from where they differ"] if beside else [])]
    body = [
        [example["measure"], example["text"], *([example.get("original", "")] if beside else [])]
        for example in examples
    ]
    return _text_table(head, body)


def _copied(copied: list[dict]) -> str:
    return _text_table(["left out", "document"], [[f"{each['copies']:,}", each["text"]] for each in copied])


def _text_table(head: list[str], body: list[list[str]]) -> str:
    """A table whose first column is short and whose others hold text of the corpus."""
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    rows = "".join(
        f"<tr><td class='n short'>{escape(first)}</td>"
        + "".join(f"<td class=text>{escape(text)}</td>" for text in texts)
        + "</tr>"
        for first, *texts in body
    )
    return f'<div class="scroll"><table><tr>{names}</tr>{rows}</table></div>'


def _similarity_figure(counts: np.ndarray) -> str:
    edges = np.arange(SIMILARITY_BINS + 1) / SIMILARITY_BINS
    first = int(np.flatnonzero(counts)[0])
    svg = bars(edges[first:], counts[first:], "estimated similarity to the document kept", "near-duplicates", salt="s")
    return figure(svg)


def _lengths_figure(lengths: np.ndarray) -> str:
    longest = max(2, int(lengths.max()))
    steps = int(np.ceil(BINS_PER_OCTAVE * np.log2(longest + 1))) + 1
    edges = np.unique(np.round(2 ** (np.arange(steps + 1) / BINS_PER_OCTAVE))) - 0.5
    heights, _ = np.histogram(np.maximum(lengths, 1), edges)
    first, last = np.flatnonzero(heights)[[0, -1]]
    edges, heights = edges[first : last + 2], heights[first : last + 1]
    return figure(bars(edges, heights, "tokens of a document (logarithmic)", "documents", salt="lengths", log_x=True))


def _coverage_figure(counts: np.ndarray) -> str:
    ranked = np.sort(counts[counts > 0])[::-1]
    covered = 100 * np.cumsum(ranked) / ranked.sum()
    ranks = np.unique(np.geomspace(1, len(ranked), 200).astype(int))
    line = Line("", ranks.tolist(), covered[ranks - 1].tolist())
    label = "share of all tokens that they cover, %"
    return figure(chart([line], "most frequent entries of the vocabulary", label, salt="coverage", log_x=True))


def _vocabulary_rows(manifest: dict, counts: np.ndarray) -> list[tuple[str, str]]:
    words = counts[FIRST_WORD : manifest["word_count"]]
    total = counts.sum()
    half, most = (int(np.searchsorted(np.cumsum(np.sort(counts)[::-1]), share * total)) + 1 for share in (0.5, 0.9))
    return [
        (
            "vocabulary",
            f"{manifest['vocab_size']:,} entries, {len(words):,} of them words and pieces",
        ),
        ("never used", f"{(words == 0).sum():,} ({100 * (words == 0).mean():.1f} %)"),
        (f"used fewer than {RARE} times", f"{(words < RARE).sum():,} ({100 * (words < RARE).mean():.1f} %)"),
        ("[UNK]", f"{counts[UNK]:,} tokens ({100 * counts[UNK] / total:.4f} %)"),
        ("half of all tokens are among", f"{half:,} entries"),
        ("nine tenths are among", f"{most:,} entries"),
    ]


def _frequent(tokenizer: Tokenizer, counts: np.ndarray) -> str:
    ranked = np.argsort(-counts, kind="stable")[:FREQUENT]
    shown = [
        f"<code>{escape(tokenizer.id_to_token(int(i)))}</code> {100 * counts[i] / counts.sum():.2f}"
        for i in ranked
        if counts[i]
    ]
    return ", ".join(shown) + " % of all tokens"
