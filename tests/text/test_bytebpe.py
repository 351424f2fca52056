"""Byte-level BPE: signs inside of words belong to them, what parts words goes with the next, English is as before."""

import random

import pytest
from test_tokenizer import assert_same_ids
from tokenizers import Regex, pre_tokenizers

from cramfast.text.bytebpe import UNSEEN, WORDS
from cramfast.text.lost import lost_characters
from cramfast.text.tokenizer import train_tokenizer

SPLIT = pre_tokenizers.Split(Regex(WORDS), "isolated")


def pieces(text):
    return [piece for piece, _ in SPLIT.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    "word",
    ["п'ять", "м’яч", "мʼяч", "צה״ל", 'צה"ל', "ג׳ירפה", "צ'יפס", "ինչպե՞ս", "ո՛չինչ", "col·legi", "COL·LEGI",
     "བོད་ཡིག་", "می‌خواهم", "wo\u2060rd", "፡ሰላም", "\u200bភាសា"],
)  # fmt: skip
def test_signs_between_the_letters_of_a_word_are_in_its_pieces(word):
    assert pieces(word) == [word]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("isn't it's we'll", ["isn", "'t", " it", "'s", " we", "'ll"]),
        ("isn’t l’homme", ["isn", "’", "t", " l", "’", "homme"]),
        ("rock'n'roll N·m", ["rock", "'", "n", "'", "roll", " N", "·", "m"]),
        ("п's d'п 'п' \"п\"", ["п", "'s", " d", "'", "п", " '", "п", "'", ' "', "п", '"']),
        ('ו"שלום" אמר "כן"', ["ו", '"', "שלום", '"', " אמר", ' "', "כן", '"']),
        ("ሰላም፡ለዓለም።", ["ሰላም", "፡ለዓለም", "።"]),
    ],
)
def test_contractions_quotes_and_products_are_cut_as_before(text, expected):
    assert pieces(text) == expected


# (words, what parts them): tokens a word were, in this order, 3.0, 3.0, 3.0, 1.9, 1.9.
LANGUAGES = {
    "Ukrainian": ("п'ять м’яч сім’я об'єкт здоров’я ім’я п’ятниця з'їзд під’їзд комп’ютер", " "),
    "Hebrew": ('צה״ל חו״ל ארה״ב ג׳ירפה צ\'יפס צה"ל ד"ר רמטכ״ל', " "),
    "Armenian": ("ինչպե՞ս որտե՞ղ ե՞րբ ինչո՞ւ ո՞վքեր ինչպե՛ս արե՛ք", " "),
    "Amharic": ("ሰላም ለዓለም ሕዝብ ኢትዮጵያ አገር ቋንቋ መጽሐፍ", "፡"),
    "Khmer": ("ភាសា ខ្មែរ ប្រទេស កម្ពុជា រៀន សាលា", "\u200b"),
}


def samples(language):
    words, between = LANGUAGES[language]
    rng = random.Random(0)
    return [between.join(rng.choices(words.split(), k=12)) for _ in range(300)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_words_with_signs_become_tokens(language):
    texts = samples(language)
    tokenizer = train_tokenizer(texts, "bpe", 1024)
    assert sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts) <= 1.02 * 12 * len(texts)
    assert_same_ids(tokenizer, texts[:20])


def test_tibetan_syllables_become_pieces_together():
    rng, syllables = random.Random(0), ["བོད་", "ཡིག་", "སྐད་", "རང་", "སྐྱོང་", "ལྗོངས་", "ལྷ་", "ས་", "མི་"]
    words = ["".join(rng.choices(syllables, k=2)) for _ in range(20)]
    texts = ["".join(rng.choices(words, k=20)) + "།" for _ in range(300)]
    tokenizer = train_tokenizer(texts, "bpe", 2048)
    tokens = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    assert tokens / (len(texts) * 40) < 0.3  # a syllable; 2.0 before
    assert tokenizer.decode(tokenizer.encode(texts[0]).ids).strip() == texts[0]
    assert_same_ids(tokenizer, texts[:20])


def test_soft_hyphens_and_marks_of_direction_carry_no_text():
    texts = [f"Фотография {i} города, של צה״ל" for i in range(100)]
    plain = train_tokenizer(texts, "bpe", 512)
    marked = train_tokenizer([text.replace("о", "о\xad").replace("ש", "\u200fש") for text in texts], "bpe", 512)
    assert marked.get_vocab() == plain.get_vocab()
    for mark in UNSEEN:
        assert plain.encode(f"Фото{mark}графия{mark} 1").ids == plain.encode("Фотография 1").ids
    assert lost_characters(plain, [f"Фо{UNSEEN}то"]).share == 0
    awkward = [f"{UNSEEN}a b\xad c\xad.\xad d e \xad f", "\xad", "\u200f.a", "x\xad 's \u200ey", "o\u202e\u0302"]
    assert_same_ids(plain, awkward)
