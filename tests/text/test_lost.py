"""Characters without a token: each counts alike, wherever it stands, and the commonest are named."""

import json

import pytest
from test_tokenizer import ENGLISH, RUSSIAN, TEXTS
from tokenizers import Regex, Tokenizer, normalizers

from cramfast.text.lost import described, lost_characters
from cramfast.text.tokenizer import train_tokenizer


@pytest.mark.parametrize(("kind", "expected"), [("wordpiece", [0, 9 / 13, 1, 0]), ("bpe", [0, 0, 0, 0])])
def test_characters_without_a_token_are_counted(kind, expected):
    texts = ["Hello, café “world” – it’s 17.", "Привет, мир 17.", "Ж" * 1000, " \n"]
    tokenizer = train_tokenizer(texts[:2], kind, 512)
    assert [lost_characters(tokenizer, [text]).share for text in texts] == expected


def without_letters_outside_ascii(texts):
    """WordPiece that was given: accents are folded, all else outside ASCII is dropped."""
    tokenizer = train_tokenizer(texts, "wordpiece", 512)
    steps = [normalizers.NFKD(), normalizers.Lowercase(), normalizers.Replace(Regex("[^\\x20-\\x7E]+"), "")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    return Tokenizer.from_str(tokenizer.to_str())


def test_a_letter_dropped_inside_a_word_is_lost():
    text = "smørrebrød på øerne"  # 17 letters, three of them ø; å is a with an accent
    given = without_letters_outside_ascii(TEXTS)
    assert lost_characters(given, [text]).share == pytest.approx(3 / 17)
    assert lost_characters(given, [text]).counts == {"ø": 3}
    own = train_tokenizer(TEXTS, "wordpiece", 512)
    assert lost_characters(own, [text]).share == 0 and own.normalizer.normalize_str(text) == "smorrebrod pa oerne"


def seen(text):
    return len("".join(text.split()))


@pytest.mark.parametrize(
    "make", [without_letters_outside_ascii, lambda texts: train_tokenizer(texts, "wordpiece", 512)]
)
def test_every_character_of_a_text_counts_alike(make):
    """Russian after the first 500 characters of each document; in the longest 40 of 4,040 documents."""
    tokenizer = make([ENGLISH])
    start, end = (ENGLISH * 20)[:510], (RUSSIAN * 40)[:2000]
    cyrillic = sum(not c.isascii() for c in end)
    expected = cyrillic / (seen(start) + seen(end))
    assert 0.75 < expected < 0.81
    assert lost_characters(tokenizer, [start + end] * 300).share == pytest.approx(expected)
    short, long = ENGLISH.strip(), RUSSIAN * 60
    cyrillic = sum(not c.isascii() for c in long)
    expected = 40 * cyrillic / (4000 * seen(short) + 40 * seen(long))
    assert 0.30 < expected < 0.45
    assert lost_characters(tokenizer, [short] * 4000 + [long] * 40).share == pytest.approx(expected)


def test_the_commonest_lost_characters_are_named_and_never_control_a_terminal():
    own = train_tokenizer(TEXTS, "wordpiece", 512)
    lost = lost_characters(own, ["жжж яя 日本本 a\x1b[31m \u202e \ue000 b"])
    assert lost.commonest(3) == [("ж", 3 / 15), ("я", 2 / 15), ("本", 2 / 15)]
    names = [described(*each) for each in lost.commonest()]
    assert names[0].startswith("ж U+0436 ") and not any(c in "".join(names) for c in "\x1b\u202e\ue000")
    assert any(name.startswith("U+E000 ") for name in names)


def test_words_that_a_given_vocabulary_cannot_spell_are_lost_whole():
    parts = json.loads(without_letters_outside_ascii(TEXTS).to_str())
    parts["normalizer"], parts["pre_tokenizer"] = None, {"type": "BertPreTokenizer"}
    given = Tokenizer.from_str(json.dumps(parts))
    assert lost_characters(given, ["the dog", "naïve dog"]).share == pytest.approx(5 / 14)
    assert lost_characters(given, ["the Dog"]).counts == {"D": 1, "o": 1, "g": 1}
