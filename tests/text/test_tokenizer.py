"""Tokenizers: fixed special ids, the same for the same text in every process, and a word cache that changes nothing."""

import hashlib
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from cramfast.errors import UserError
from cramfast.text.census import Census
from cramfast.text.lost import lost_characters, suitable
from cramfast.text.specials import FIRST_WORD, SPECIAL_TOKENS, UNK
from cramfast.text.spelling import KEPT, ascii_of, normalizer
from cramfast.text.tokenizer import (
    LONGEST_WORD,
    SPACES,
    _words_to_learn,
    load_tokenizer,
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


ENGLISH = "The committee published its report in March, and the minister answered. "
RUSSIAN = "Комитет опубликовал свой отчёт в марте, и министр ответил через неделю. "


SPELLED = {
    "Straße, Größe, ẞ": "strasse, grosse, ss",
    "Smørrebrød, Ærø, cœur, Þór, það": "smorrebrod, aero, coeur, thor, thad",
    "Łódź, ışık, İzmir, Đorđe": "lodz, isik, izmir, dorde",
    "5 µg, 5 μg": "5 ug, 5 ug",
    "½, 2½ cups": " 1/2 , 2 1/2  cups",
    "10⁻⁶ m², x¹⁰": "10^-6  m^2 , x^10 ",
    "H₂O, CO₂": "h2o, co2",
    "a ≠ b, a =\u0338 b": "a != b, a != b",
    "≥ 5, ≤ 3, ± 2, 3 × 4, 6 ÷ 2": ">= 5, <= 3, +- 2, 3 x 4, 6 / 2",
    "TNFα, β-Ωσς": "tnfalpha, beta-omegasigmasigma",
    "€5 £3 §12 37 °C": "€5 £3 §12 37 °c",
    "“q” – ‘r’ — … «s»": '"q" - \'r\' - ... "s"',
    "→ ∞ © ｗｉｄｅ ﬁ": "-> infinity (c) wide fi",
}


@pytest.mark.parametrize(("text", "expected"), SPELLED.items())
def test_what_ascii_can_spell_is_spelled(text, expected):
    own = train_tokenizer([*TEXTS, *SPELLED], "wordpiece", 512)
    assert normalizer().normalize_str(text) == expected
    assert lost_characters(own, [text]).share == 0
    assert own.decode(own.encode(text).ids).replace(" ", "") == expected.replace(" ", "")
    assert UNK not in own.encode(text).ids


def test_signs_that_stay_are_tokens_of_their_own():
    own = train_tokenizer(TEXTS, "wordpiece", 512)
    tokens = own.encode("dog€dog §dog12° ₿", add_special_tokens=False).tokens
    assert [token for token in tokens if token in KEPT] == ["€", "§", "°", "₿"]


@pytest.mark.parametrize(
    ("kind", "text"),
    [("wordpiece", ENGLISH), ("wordpiece", "Größe und Fluß"), ("bpe", RUSSIAN), ("bpe", "अंग्रेज़ी"), ("bpe", "ACGT" * 99),
     ("bpe", "Đây là tiếng Việt nhiều thanh"), ("bpe", "αβγδ"), ("wordpiece", ENGLISH + "µ β ≤ €")],
)  # fmt: skip
def test_auto_takes_byte_level_where_ascii_cannot_spell(kind, text):
    assert suitable(Census.of([text]))[0] == kind


def test_byte_level_gives_any_text_back_in_composed_form():
    tokenizer = train_tokenizer(TEXTS, "bpe", 512)
    for text in ("Größe 日本語 🙂 — İstanbul\t\n  x", "\x00\x1f weird\u2028line", "  leading and trailing  "):
        assert tokenizer.decode(tokenizer.encode(text).ids).removeprefix(" ") == text.removeprefix(" ")
    assert tokenizer.encode("Vie\u0302\u0323t").ids == tokenizer.encode("Việt").ids


# Syllables of each script, of which words are made.
SCRIPTS = {
    "Hindi": ("कि ने में का हिं दी भा षा रा ज्य सं घ क्षे त्र", " "),
    "Tamil": ("த மி ழ் மொ ழி பே சு கி றே ன் நா டு", " "),
    "vocalised Arabic": ("كَ تَ بَ مُ دَ رِّ سَ ةٌ قَ لَ مٌ", " "),
    "decomposed Vietnamese": ("tie\u0302\u0301 ng vie\u0323\u0302 t nu\u031b\u0301 ho\u0301 a", " "),
    "Persian": ("می‌ خوا هم نِ می شو د", " "),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_words_with_marks_become_tokens(script):
    syllables, between = SCRIPTS[script]
    rng = random.Random(0)
    words = ["".join(rng.choices(syllables.split(), k=rng.randint(1, 4))) for _ in range(150)]
    texts = [between.join(rng.choices(words, k=12)) for _ in range(400)]
    tokenizer = train_tokenizer(texts, "bpe", 2048)
    tokens = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    assert tokens <= 1.05 * 12 * 400


@pytest.mark.parametrize(
    "script",
    [
        "ภา ษา ไท ย ประ เท ศ น้ำ ที่",
        "ພາ ສາ ລາ ວ ປະ ເທດ ນ້ຳ",
        "ភា សា ខ្មែ រ ប្រ ទេ ស",
        "中 文 语 言 国 家 学 习",
        "日 本 語 で す か ひ ら",
    ],
)
def test_scripts_without_spaces_learn_pieces_inside_runs(script):
    rng = random.Random(0)
    words = ["".join(rng.choices(script.split(), k=rng.randint(2, 3))) for _ in range(40)]
    texts = ["".join(rng.choices(words, k=rng.choice((9, 60, 200)))) for _ in range(300)]
    tokenizer = train_tokenizer(texts, "bpe", 2048)
    pieces = [tokenizer.decode([i]) for i in range(FIRST_WORD, word_count(tokenizer))]
    assert max(map(len, pieces)) <= 32 and not any("\ufffd" in piece for piece in pieces[300:])
    assert sum(word in pieces for word in words) > 20
    characters, tokens = (sum(map(len, each)) for each in (texts, map(tokenizer.encode, texts)))
    assert characters / tokens > 3
    assert_same_ids(tokenizer, texts[:20])


def test_numbers_are_cut_into_groups_of_three():
    tokenizer = train_tokenizer([f"in {n} and {n * 7919}" for n in range(1000, 9999)], "bpe", 4096)
    assert tokenizer.encode("in 1234567", add_special_tokens=False).tokens == ["Ġin", "Ġ123", "456", "7"]


def test_a_mask_takes_the_space_before_it_and_words_one_by_one_are_those_of_a_sentence(tokenizer):
    sentence = "The red dog isn't as lazy."
    ids = tokenizer.encode(sentence).ids
    words = ["The", "red", "dog", "isn't", "as", "lazy", "."]
    assert tokenizer.encode(words, is_pretokenized=True).ids == ids
    dog = tokenizer.encode("The red dog", add_special_tokens=False).ids[len(tokenizer.encode("The red").ids) - 2 :]
    masked = tokenizer.encode("The red [MASK] isn't as lazy.").ids
    place = next(i for i in range(len(ids)) if ids[i : i + len(dog)] == dog)
    assert masked == [*ids[:place], 4, *ids[place + len(dog) :]]


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
AWKWARD = st.text(
    alphabet=st.sampled_from(
        "ab1Z'.,-_ \t\n\r\x00\x0b\x85\xa0é\u0301ß日\u2028\u3000’—İΣ٣²⁻⁶½≠=\u0338∈€°\uffffि\u200d"
        '₂₊⁄/8８①·lL\u0337\u20e5\u200b\xad\u200fпת״"ա՞་፡ቃ'
    ),
    max_size=40,
)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(PHRASES, AWKWARD, st.text(max_size=30)), max_size=4))
def test_word_cache_gives_the_ids_of_the_tokenizer(tokenizer_pair, texts):
    for tokenizer in tokenizer_pair:
        assert_same_ids(tokenizer, texts)


@settings(max_examples=400, deadline=None)
@given(st.one_of(PHRASES, AWKWARD, st.text(max_size=30)))
def test_training_sees_what_the_normalizer_makes(text):
    assert ascii_of(text).lower().translate(SPACES) == normalizer().normalize_str(text)


@pytest.mark.parametrize("text", ["a" * 100, "b" * 101, f"é{'Xy3' * 70}-{'z' * 250}. {'q' * 103} € 5° end", "'" * 120])
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


def test_the_length_of_a_run_does_not_decide_its_pieces(genome_pair):
    sequence = "".join(np.random.default_rng(3).choice(list("ACGT"), 5000))
    for tokenizer in genome_pair:
        whole = tokenizer.encode(sequence, add_special_tokens=False)
        hundred = tokenizer.encode(sequence[:LONGEST_WORD], add_special_tokens=False).ids
        assert whole.ids[: len(hundred)] == hundred and UNK not in whole.ids
        rates = [
            n * len(starts) / sum(len(tokenizer.encode(sequence[i : i + n], add_special_tokens=False)) for i in starts)
            for n in (70, 101, 500)
            for starts in [range(0, 4500, 100)]
        ]
        assert max(rates) < 1.1 * min(rates)
        assert lost_characters(tokenizer, [sequence]).share == 0


def test_stock_transformers_cuts_long_words_alike(tmp_path, genome_pair):
    from transformers import AutoTokenizer

    text = "a genome: " + "".join(np.random.default_rng(1).choice(list("ACGTN"), 5000)) + " and the dog's"
    for kind, tokenizer in zip(KINDS, genome_pair, strict=True):
        (tmp_path / kind).mkdir()
        tokenizer.save(str(tmp_path / kind / "tokenizer.json"))
        (tmp_path / kind / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        assert AutoTokenizer.from_pretrained(tmp_path / kind)(text)["input_ids"] == tokenizer.encode(text).ids


@pytest.mark.parametrize("kind", [*KINDS, "kmer:3", "kmer:3:overlapping"])
def test_stock_transformers_reads_the_same_ids(tmp_path, kind):
    from transformers import AutoTokenizer

    texts = [
        *TEXTS,
        *SPELLED,
        "The red [MASK] dog.",
        "[MASK]",
        "acgt acgtnacgu",
        "A ≇ B, ①5 ②10, log₂8, 2¹⁄₂, m²3, ∅ ↑ ☑ ‱, col·legi N·m, a\u200bb 5日5 +\u0338",
        "п'ять м’яч צה״ל Фото\xadграфия ինչպե՞ս བོད་ཡིག་ ሰላም፡ለዓለም \u202ea\u202c",
        *(words for words, _ in SCRIPTS.values()),
    ]
    tokenizer = train_tokenizer(["ACGT" * 50] if "kmer" in kind else texts, kind, 1024)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | special
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    stock = AutoTokenizer.from_pretrained(tmp_path)
    assert stock(texts)["input_ids"] == [tokenizer.encode(text).ids for text in texts]
    stock.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again(texts)["input_ids"] == [tokenizer.encode(text).ids for text in texts]
    words = ["The", "red", "dog", "isn't", "as", "lazy", "as", "that", "."]
    if kind in KINDS:
        assert (
            stock(words, is_split_into_words=True)["input_ids"]
            == tokenizer.encode("The red dog isn't as lazy as that.").ids
        )
