"""The sample and the split: a share of the tokens within bounds, no text on both sides, and what is said otherwise."""

import random
import re

import numpy as np
import pytest

from cramfast.config import Curation
from cramfast.errors import UserError
from cramfast.prepare import prepare
from cramfast.text import survey
from cramfast.text.corpus import Corpus
from cramfast.text.curation import Curator
from cramfast.text.prepared import PreparedText, read_manifest
from cramfast.text.survey import BINS, Survey, choose
from cramfast.text.units import fingerprints, units

WORDS = [
    "".join(pair)
    for pair in zip(*[iter("abandonbecausecertaindevelopeffectivefurthergenuinehistory")] * 3, strict=False)
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def words(rng, count):
    return " ".join(rng.choices(WORDS, k=count))


def split(tmp_path, text, **options):
    """(share of the tokens that is held out, manifest) of a text."""
    (tmp_path / "a.txt").write_text(text)
    folder = prepare((str(tmp_path / "a.txt"),), None, vocab_size=512, **options)
    manifest = read_manifest(folder)
    heldout, train = (manifest["splits"][name]["tokens"] for name in ("heldout", "train"))
    return heldout / (heldout + train), manifest, folder


def surveyed(path, curation=None, fraction=0.01, **options):
    corpus, curator = Corpus((str(path),), **options), Curator(curation or Curation())
    found = Survey(corpus, curator, 0, fraction, lambda *progress: None)
    sides = [part for index, text in enumerate(corpus) for part in found.parts(index, text)]
    return found, [[text for held, text in sides if held == side] for side in (False, True)]


def shared_stretches(train, heldout, length=100):
    """Stretches of so many characters of the held-out side that stand in training too."""
    whole = "\0".join(train)
    return [
        text[i : i + length] for text in heldout for i in range(0, len(text) - length) if text[i : i + length] in whole
    ]


FIVE = {
    "a flat file": lambda rng: "\n".join(words(rng, 12) for _ in range(24_000)),
    "two records": lambda rng: "\n\n".join("".join(rng.choices("ACGT", k=250_000)) for _ in range(2)),
    "a repeated paragraph": lambda rng: "\n\n".join(
        ["a paragraph that comes again " * 8 if i % 2 else words(rng, 70) for i in range(1000)]
    ),
    "885 documents": lambda rng: "\n\n".join(words(rng, rng.randint(20, 300)) for _ in range(885)),
}


@pytest.mark.parametrize("case", FIVE)
def test_the_heldout_side_is_a_share_of_the_tokens(tmp_path, capsys, case):
    text = FIVE[case](random.Random(0))
    meant = min(0.05, 200_000 / len(text))
    share, manifest, _ = split(tmp_path, text)
    assert 0.75 * meant < share < 1.25 * meant
    said = re.search(
        r"([0-9.]+) of the tokens are held out \(.* so small a text holds out more", capsys.readouterr().err
    )
    assert float(said[1]) == pytest.approx(share, rel=0.01) and any(said[0] in note for note in manifest["notes"])


def test_what_is_asked_for_within_bounds_is_not_remarked_on(tmp_path, capsys):
    text = FIVE["885 documents"](random.Random(0))
    share, manifest, _ = split(tmp_path, text, heldout_fraction=0.2)
    assert 0.19 < share < 0.22 and "held out" not in capsys.readouterr().err + str(manifest["notes"])


def test_equal_lines_and_one_other(tmp_path, capsys):
    text = "\n".join(["the same line over and over"] * 999 + ["another line"])
    share, *_ = split(tmp_path, text, documents="lines")
    assert share < 0.001
    said = capsys.readouterr().err
    assert "100.0% of the text are one and the same, which stays on one side — --curation.duplicates exact" in said
    for documents, advised in (("blocks", True), ("lines", False)):
        (tmp_path / "b.txt").write_text("the same line\n\n" * 1000)
        with pytest.raises(UserError, match=r"b\.txt: all 1,000 documents are equal, too short to cut") as raised:
            prepare((str(tmp_path / "b.txt"),), None, vocab_size=512, tokenizer="bpe", documents=documents)
        assert ("--documents lines" in str(raised.value)) == advised and "bpe" not in str(raised.value)


def test_no_text_is_on_both_sides_when_documents_are_cut(tmp_path):
    rng = random.Random(1)
    own, again = ("\n".join(words(rng, rng.randint(5, 40)) for _ in range(lines)) for lines in (6000, 300))
    editions = [f"Edition {i}.\n{again[70 * i :]}\nThe end of edition {i}." for i in range(20)]
    (tmp_path / "a.txt").write_text("\n".join([*editions[:10], own[: len(own) // 2]]))
    (tmp_path / "b.txt").write_text("\n".join([own[len(own) // 2 :], *editions[10:]]))
    found, (train, heldout) = surveyed(tmp_path, fraction=0.2, documents="files")
    assert found.unit > 0 and not found.shares_text and heldout
    assert not set(train) & set(heldout) and not shared_stretches(train, heldout)
    total = sum(map(len, train + heldout))
    assert 0.1 < sum(map(len, heldout)) / total < 0.25


def test_a_text_that_is_one_passage_over_and_over_says_so(tmp_path, capsys):
    text = "\n".join(["one line of some words that comes again", "a second line", "the third line ends it"] * 4000)
    split(tmp_path, text)
    assert "the text repeats itself so much that what is held out stands in training too" in capsys.readouterr().err


def test_one_long_document_is_cut(tmp_path):
    share, manifest, folder = split(tmp_path, words(random.Random(0), 40_000), documents="files")
    assert 0.04 < share < 0.06
    assert manifest["splits"]["train"]["words"] + manifest["splits"]["heldout"]["words"] == 40_000
    assert len(PreparedText(folder, "heldout").offsets) - 1 == manifest["splits"]["heldout"]["documents"]


@pytest.mark.parametrize("text", ["", "short", "é日🙂\n" * 5000, "a b\n\n" * 9000, "\ud800" * 3000, "x" * 70_000])
@pytest.mark.parametrize("size", [200, 1000])
def test_units_are_the_text(text, size):
    found = units(text, size)
    assert "".join(found) == text
    assert max(len(unit.encode("utf-8", "surrogatepass")) for unit in found) <= 2 * size


def test_units_are_cut_alike_wherever_they_stand():
    rng = random.Random(2)
    text = "\n".join(words(rng, rng.randint(5, 40)) for _ in range(3000))
    ours, shifted = units(text, 2000), units("Something before it. " * 30 + text, 2000)
    assert len(set(ours) & set(shifted)) > 0.95 * len(ours) and all(unit.endswith("\n") for unit in ours[:-1])
    repeated = "".join(f"line {i % 7} of seven lines that come again\n" for i in range(5000))
    assert len(set(units(repeated, 1000)[1:-1])) == 1


def test_fingerprints_are_those_of_the_contents():
    text = words(random.Random(3), 4000)
    ours, shifted = set(fingerprints(text).tolist()), set(fingerprints("before " + text).tolist())
    assert len(text) / 24 < len(ours) < len(text) / 10 and ours <= shifted
    assert not ours & set(fingerprints(words(random.Random(4), 4000)).tolist())


def test_bins_are_chosen_by_weight():
    weights = np.zeros(BINS, np.int64)
    weights[[10, 20, 30, 40, 50]] = [900, 30, 25, 40, 5]
    assert np.flatnonzero(choose(weights, 50)).tolist() == [20, 30]  # 900 are too many, 55 within a tenth
    assert np.flatnonzero(choose(weights, 1)).tolist() == [50]  # nothing fits: the lightest
    assert np.flatnonzero(choose(weights, 999)).tolist() == [10, 20, 30, 40]  # something is left


def test_documents_that_open_with_the_same_header_are_all_as_likely_to_be_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "SAMPLE_CHARACTERS", 200_000)
    header = "Name of the clinic, its address, and what the form is called. " * 5
    rng = random.Random(0)
    (tmp_path / "a.jsonl").write_text(
        "".join(f'{{"text": "{header if i % 10 < 6 else ""}{words(rng, 50)}"}}\n' for i in range(4000))
    )
    found, _ = surveyed(tmp_path / "a.jsonl")
    drawn = list(found.texts())
    assert 190_000 < sum(map(len, drawn)) < 210_000
    assert 0.5 < np.mean([text.startswith(header) for text in drawn]) < 0.7
    found.sample.clear()
    with pytest.raises(UserError, match="no text was drawn to learn the tokenizer from"):
        found.texts()


def test_equal_documents_are_drawn_as_often_as_they_come(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "SAMPLE_CHARACTERS", 20_000)
    (tmp_path / "a.txt").write_text(
        "\n".join(["equal lines of text"] * 3000 + [f"line {i} of text" for i in range(3000)])
    )
    found, _ = surveyed(tmp_path / "a.txt", documents="lines")
    assert 0.4 < np.mean([text == "equal lines of text" for text in found.texts()]) < 0.6


def test_a_vocabulary_far_below_what_was_asked_is_said(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n\n".join(words(random.Random(i), 300) for i in range(900)))
    manifest = read_manifest(prepare((str(tmp_path / "a.txt"),), None, vocab_size=8192))
    said = f"a vocabulary of {manifest['word_count']} entries where vocab_size=8192 was asked, from 1,0"
    assert said in capsys.readouterr().err and any(said in note for note in manifest["notes"])


def test_no_text_is_said_with_what_was_met(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n' * 5)
    with pytest.raises(
        UserError, match=r"no text found \(.*5 rows have no text .*; .*1 files hold no document\) — name"
    ):
        prepare((str(tmp_path),), None, vocab_size=512)


def test_documents_of_no_token_are_counted_apart(tmp_path, capsys):
    rng = random.Random(0)
    texts = [words(rng, 30) for _ in range(200)] + ["\ue000", "\ue001\ue002"]  # for private use: nobody spells them
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    folder = prepare((str(tmp_path / "a.txt"),), None, vocab_size=512)
    manifest = read_manifest(folder)
    assert manifest["without_tokens"] + sum(s["documents"] for s in manifest["splits"].values()) == 202
    assert manifest["without_tokens"] == 2
    said = f"{manifest['without_tokens']} of 202 documents have no token in wordpiece and are not counted"
    assert said in capsys.readouterr().err
    for name in ("train", "heldout"):
        assert (np.diff(PreparedText(folder, name).offsets) > 0).all()


def test_notes_are_said_again_when_the_text_is_used_again(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n\n".join(words(random.Random(i), 30) for i in range(100)))
    for _ in range(2):
        prepare((str(tmp_path / "a.txt"),), None, vocab_size=512)
        assert "of the tokens are held out" in capsys.readouterr().err


def test_a_text_file_without_a_blank_line_is_said(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n".join(words(random.Random(i), 30) for i in range(200)))
    prepare((str(tmp_path / "a.txt"),), None, vocab_size=512)
    assert re.search(
        r"the text file has no blank line in 2\d,\d{3} char.* — --documents lines", capsys.readouterr().err
    )
    for documents in ("lines", "files"):
        prepare((str(tmp_path / "a.txt"),), None, vocab_size=512, documents=documents)
        assert "blank line" not in capsys.readouterr().err
