"""Tokenizers: fixed special ids, the same for the same text in every process, and a word cache that changes nothing."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from cramfast.errors import UserError
from cramfast.text.tokenizer import (
    FIRST_WORD,
    LONG_OF_BPE,
    LONG_OF_WORDPIECE,
    PIECE,
    SPACES,
    SPECIAL_TOKENS,
    UNK,
    _without_excess,
    _words_to_learn,
    ascii_of,
    load_tokenizer,
    lost_share,
    train_tokenizer,
    word_count,
    wordpiece,
)
from cramfast.text.wordcache import WordCache

ADJECTIVES = ("red", "green", "quick", "lazy", "small", "tired", "golden", "unhappy", "running", "walked")
NOUNS = ("fox", "dog", "house", "river", "mountain", "tokenizer", "children", "station")
TEXTS = [f"The {a} {b} isn't as {a} as {b}'s number {i * 37}." for i, a in enumerate(ADJECTIVES) for b in NOUNS]
KINDS = ("wordpiece", "bpe")


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return train_tokenizer(TEXTS, request.param, 512)


def test_special_tokens_have_fixed_ids_and_frame_a_sequence(tokenizer):
    assert [tokenizer.id_to_token(i) for i in range(FIRST_WORD)] == list(SPECIAL_TOKENS)
    assert tokenizer.encode("the dog").tokens[0] == "[CLS]" and tokenizer.encode("the dog").tokens[-1] == "[SEP]"
    assert tokenizer.get_vocab_size() % 64 == 0
    assert tokenizer.id_to_token(word_count(tokenizer) - 1)[:7] != "[unused"
    assert all(tokenizer.id_to_token(i) == f"[unused{i - word_count(tokenizer)}]"
               for i in range(word_count(tokenizer), tokenizer.get_vocab_size()))  # fmt: skip


def test_wordpiece_is_lower_cased_ascii():
    tokenizer = train_tokenizer(TEXTS, "wordpiece", 512)
    tokens = tokenizer.encode("“Café” — naïve 日本 DOG’s\x00end", add_special_tokens=False)
    assert tokenizer.decode(tokens.ids).replace(" ", "") == '"cafe"-naivedog\'send'
    assert "[UNK]" not in tokens.tokens


@pytest.mark.parametrize(("kind", "expected"), [("wordpiece", [0, 9 / 13, 1, 0]), ("bpe", [0, 0, 0, 0])])
def test_characters_without_a_token_are_counted(kind, expected):
    texts = ["Hello, café “world” – it’s 17.", "Привет, мир 17.", "Ж" * 1000, " \n"]
    tokenizer = train_tokenizer(texts[:2], kind, 512)
    assert [lost_share(tokenizer, [text]) for text in texts] == expected


def test_byte_level_gives_any_text_back():
    tokenizer = train_tokenizer(TEXTS, "bpe", 512)
    for text in ("Größe 日本語 🙂 — İstanbul\t\n  x", "\x00\x1f weird\u2028line", "  leading and trailing  "):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


PROGRAM = """
import sys, hashlib
from cramfast.text.tokenizer import train_tokenizer
text = open(sys.argv[2], encoding="utf-8").read().split("\\n\\n")
print(hashlib.sha256(train_tokenizer(text, sys.argv[1], 4096).to_str().encode()).hexdigest())
"""


@pytest.mark.parametrize("kind", KINDS)
def test_training_gives_the_same_bytes_whatever_the_hash_seed(kind, tmp_path):
    """On text with foreign letters and control characters, whose order of discovery is random in the trainer."""
    noise = [f"{t} x{chr(7 + i % 20)}y ß{chr(0x4E00 + i)} a{chr(0x3B1 + i % 24)}b" for i, t in enumerate(TEXTS * 5)]
    sample = tmp_path / "text.txt"
    words = (hashlib.md5(str(i).encode()).hexdigest()[: 3 + i % 9] for i in range(20000))
    sample.write_text("\n\n".join([*noise, " ".join(words)]), encoding="utf-8")
    hashes = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM, kind, str(sample)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "77")
    }
    assert len(hashes) == 1


def assert_same_ids(tokenizer, texts):
    tokenizer.encode_special_tokens = True
    plain = [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    cache = WordCache(tokenizer)
    assert cache.splits_at_words
    for _ in range(2):  # cold and warm
        ids, lengths = cache.encode(texts)
        assert lengths.tolist() == [len(row) for row in plain]
        assert ids.tolist() == [i for row in plain for i in row]


PHRASES = st.lists(
    st.sampled_from(["The", " quick", "fox", " dog's", " ", "  ", "\n", "isn't", "(", ",", " 37", ".", "é", "—"]),
    max_size=12,
).map("".join)
AWKWARD = st.text(alphabet=st.sampled_from("ab1Z'.,-_ \t\n\r\x00\x0b\x85\xa0é́ß日\u2028\u3000’—İΣ٣²"), max_size=40)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(PHRASES, AWKWARD, st.text(max_size=30)), max_size=4))
def test_word_cache_gives_the_ids_of_the_tokenizer(tokenizer_pair, texts):
    for tokenizer in tokenizer_pair:
        assert_same_ids(tokenizer, texts)


@settings(max_examples=400, deadline=None)
@given(st.one_of(PHRASES, AWKWARD, st.text(max_size=30)))
def test_training_sees_what_the_normalizer_makes(text):
    assert ascii_of(text).lower().translate(SPACES) == wordpiece({}).normalizer.normalize_str(text)


@pytest.mark.parametrize("text", ["a" * 100, "b" * 101, f"é{'Xy3' * 70}-{'z' * 250}. {'q' * 103} end", "'" * 120])
def test_training_sees_the_words_of_the_tokenizer(text):
    full = wordpiece({})
    expected = full.pre_tokenizer.pre_tokenize_str(full.normalizer.normalize_str(text))
    learned = pre_tokenizers.BertPreTokenizer().pre_tokenize_str(_words_to_learn(text))
    assert [word for word, _ in learned] == [word for word, _ in expected]


@pytest.fixture(scope="module")
def tokenizer_pair():
    return [train_tokenizer(TEXTS, kind, 512) for kind in KINDS]


def test_word_cache_on_contractions_numbers_and_special_words(tokenizer):
    assert_same_ids(
        tokenizer, ["", "can't 'tis it's'll 3.14 (a) a_b [MASK] [unused0] don't'", "x" * 300, "a  b   c \n d", " "]
    )
    assert not set(WordCache(tokenizer).encode(["a [MASK] b [CLS]"])[0].tolist()) & {0, 2, 3, 4}


def test_word_cache_starts_afresh_when_full(tokenizer, monkeypatch):
    monkeypatch.setattr("cramfast.text.wordcache.MOST_WORDS", 50)
    monkeypatch.setattr("cramfast.text.wordcache.SLOTS", 256)
    cache = WordCache(tokenizer)
    texts = [f"w{i} v{i * i}" for i in range(2000)]
    plain = np.concatenate([e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)])
    assert np.array_equal(np.concatenate([cache.encode(texts[i : i + 40])[0] for i in range(0, 2000, 40)]), plain)
    assert np.array_equal(cache.encode(texts)[0], plain)  # more words at once than the table holds


def test_a_given_tokenizer_is_checked(tmp_path, tokenizer):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    assert load_tokenizer(path).get_vocab() == tokenizer.get_vocab()
    gap = json.loads(path.read_text())
    gap["model"]["vocab"]["t"] += 1000  # as many entries as before
    path.write_text(json.dumps(gap))
    with pytest.raises(UserError, match=r"'t' has id 1\d\d\d, of \d+ entries — number them from 0 on"):
        load_tokenizer(path)
    tokenizer.save(str(path))
    path.write_text(path.read_text().replace("[MASK]", "<mask>"))
    with pytest.raises(UserError, match=r"\[MASK\] has id None, not 4"):
        load_tokenizer(path)
    path.write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer"):
        load_tokenizer(path)
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer(tmp_path / "none.json")


@pytest.mark.parametrize(("kind", "size"), [("wordpiece", 1000), ("bpe", 64), ("unigram", 512)])
def test_impossible_tokenizers_are_refused(kind, size):
    with pytest.raises(UserError):
        train_tokenizer(TEXTS, kind, size)


LETTERS = "acgtACGTnN"
LONG = st.tuples(
    st.sampled_from(["", " ", "\n", "  ", "(", "é", "5", " '", "\t", ", "]),
    st.sampled_from([1, 5, 6, 7, 99, 100, 101, 102, 106, 400, 401, 402, 407, 950]),
    st.integers(0, 9),
    st.sampled_from(["", " ", "\n", "'s ", ".", "7", "é", "\x00"]),
).map(lambda p: p[0] + "".join(LETTERS[(i * i + p[2]) % 10] for i in range(p[1])) + p[3])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(LONG, max_size=4).map("".join), max_size=3))
def test_word_cache_cuts_long_words_as_the_tokenizer_does(genome_pair, texts):
    for tokenizer in genome_pair:
        assert_same_ids(tokenizer, texts)


@pytest.fixture(scope="module")
def genome_pair():
    letters = np.random.default_rng(0).choice(list("ACGT"), 30_000)
    return [train_tokenizer([*TEXTS, "".join(letters)], kind, 1024) for kind in KINDS]


def test_a_word_of_a_hundred_letters_stays_whole_and_a_longer_one_becomes_pieces(tokenizer):
    """The ids of ordinary text are those of the same vocabulary without the cut."""
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.pre_tokenizer = (
        pre_tokenizers.BertPreTokenizer() if plain.normalizer else pre_tokenizers.ByteLevel(add_prefix_space=False)
    )
    hundred = "é🙂ab dog " + "🙂" * 100 + " " + "tokenizer" * 11 + "x the dog, " * 3
    for text in (*TEXTS, hundred):
        assert tokenizer.encode(text).ids == plain.encode(text).ids
    genome = "acgtgatta" * 100
    ids = tokenizer.encode(genome, add_special_tokens=False).ids
    pieces = [genome[i : i + PIECE] for i in range(0, 900, PIECE)]
    assert ids == [i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False).ids]
    assert UNK not in ids and lost_share(tokenizer, [genome]) == 0


def test_stock_transformers_cuts_long_words_alike(tmp_path, genome_pair):
    from transformers import AutoTokenizer

    text = "a genome: " + "".join(np.random.default_rng(1).choice(list("ACGTN"), 5000)) + " and the dog's"
    for kind, tokenizer in zip(KINDS, genome_pair, strict=True):
        (tmp_path / kind).mkdir()
        tokenizer.save(str(tmp_path / kind / "tokenizer.json"))
        (tmp_path / kind / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        assert AutoTokenizer.from_pretrained(tmp_path / kind)(text)["input_ids"] == tokenizer.encode(text).ids


def test_only_words_that_are_cut_are_learnt_from_in_part():
    chinese = "大家好，" * 300_000
    for kind, words in (("wordpiece", LONG_OF_WORDPIECE), ("bpe", LONG_OF_BPE)):
        assert list(_without_excess([chinese, "a" * 100], words)) == [chinese, "a" * 100], kind
        cut = list(_without_excess(["acgt" * 400_000, "acgt" * 400_000 + " end"], words))
        assert [len(text) for text in cut] == [1_600_000, 400_004], kind
