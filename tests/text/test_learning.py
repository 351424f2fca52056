"""What a tokenizer learns from: words, a part of long runs of letters, and no dumps unless there is nothing else."""

import hashlib

import pytest

from cramfast.text.learning import LEARNED_FROM, Learned, is_dump, to_learn_from
from cramfast.text.tokenizer import train_tokenizer, word_count

KINDS = ("wordpiece", "bpe")


def test_of_runs_of_letters_a_part_is_learnt_from_and_that_is_counted():
    chinese, learned = "大家好，" * 300_000, Learned()
    assert list(to_learn_from([chinese, "a" * 100], learned)) == [chinese, "a" * 100] and learned.note() == ""
    learned = Learned()
    cut = list(to_learn_from(["acgt" * 400_000, "acgt" * 400_000 + " end"], learned))
    assert [len(text) for text in cut] == [1_600_000, LEARNED_FROM - 1_600_000 + 4]
    assert learned.runs == 1_200_000 and learned.note().startswith("37.5% (runs of over 100 letters")


@pytest.mark.parametrize(
    ("stretch", "expected"),
    [
        (hashlib.sha256(b"a").hexdigest(), True),
        (hashlib.md5(b"a").hexdigest(), True),
        ("U29tZSB0ZXh0IHRoYXQgd2FzIGVuY29kZWQgaW4gYmFzZTY0IGZvciBtYWls", True),
        ("ACGT" * 30, False),
        ("Donaudampfschifffahrtselektrizitaetenhauptbetriebswerk", False),
        ("usr/lib/python3/dist-packages/some_module/some_file", False),
        ("12345678901234567890123456789012345678901234", False),
        ("https_www_example_org_2024_A_Long_Title_Of_A_Page", False),
    ],
)
def test_dumps_are_told_from_words(stretch, expected):
    assert is_dump(stretch) == expected
    text = f"see {stretch} there"
    assert list(to_learn_from([text], Learned())) == ["see there" if expected else text]


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_of_dumps_alone_is_learnt_from(kind):
    texts, learned = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(300)], Learned()
    tokenizer = train_tokenizer(texts, kind, 1024, learned)
    assert word_count(tokenizer) > 512 and learned.note() == ""
