"""What WordPiece makes of signs and numbers: negations stay negations, and no number runs into another."""

import re
import unicodedata

import pytest
from test_tokenizer import TEXTS

from cramfast.text.lost import lost_characters
from cramfast.text.specials import UNK
from cramfast.text.spelling import RELATIONS, STROKES, ascii_of, normalizer, spelling
from cramfast.text.tokenizer import SPACES, train_tokenizer
from cramfast.text.wordcache import WordCache

# Spaces mean nothing to WordPiece but that they separate: runs of them are one here, and none stand at the ends.
SPELLED = {
    "A ≇ B ≄ C": "a !~= b !~= c",
    "A ⇎ B ↮ C ↚ D ≠ E": "a !<=> b !<-> c !<- d != e",
    "a ≃\u0338 b ≅\u0337 c ⇔\u20e5 d ↔\u0338 e ←\u0337 f =\u20e5 g": "a !~= b !~= c !<=> d !<-> e !<- f != g",
    "∄ x ∌ y ⊄ z ≴ 3": "not exists x not contains y not subset of z !<~ 3",
    "①5 mg ②10 mg": "(1)5 mg (2)10 mg",
    "①②③, ⑳ ❶ ➊": "(1)(2)(3), (20) (1) (1)",
    "⒈5 mg ⑴5 1\ufe0f\u20e35": "1. 5 mg (1)5 1)5",
    "log₂8, 10₂3, x₁, H₂O": "log_2 8, 10_2 3, x1, h2o",
    "2¹⁄₂ cups, 2¹/₂, 5⅟₂, 2½3": "2 1/2 cups, 2 1/2, 5 1/2, 2 1/2 3",
    "m²3, x²₃, SO₄²⁻": "m^2 3, x^2 _3, so4^2-",
    "3月5日, 5㎡ 2㎤": "3 5 , 5m^2 2cm^3",
    "BP ↑ xyz, HR ↓, ∅ fever": "bp up xyz, hr down , no fever",
    "☐ a ☑ b ☒ c ✓ d ✗ e": "[ ] a [x] b [x] c check d cross e",
    "℞ ℥ ♀ ♂ ‱ 37˚C 37ºC 37∘C": "rx oz female male ‱ 37°c 37°c 37°c",
    "≲ 3 ≳ 4 ⟶ ⟷": "<~ 3 >~ 4 -> <->",
    "⌀ 5, C♯, B♭, ∀ x ∃ y": "diameter 5, c sharp , b flat , for all x exists y",
    "col·legi, COL·LEGI, coŀlegi": "collegi, collegi, collegi",
    "étudiant·e·s, N·m, 0·05": "etudiant·e·s, n·m, 0·05",
    "word\u200bbreak wo\u2060rd wo\u200drd wo\xadrd": "word break word word word",
}


@pytest.mark.parametrize(("text", "expected"), SPELLED.items())
def test_signs_and_numbers_mean_what_they_meant(text, expected):
    own = train_tokenizer([*TEXTS, *SPELLED], "wordpiece", 512)
    spelled = normalizer().normalize_str(text)
    assert re.sub(" +", " ", spelled).strip() == expected
    assert ascii_of(text).lower().translate(SPACES) == spelled
    plain, fast = own.encode(text, add_special_tokens=False).ids, WordCache(own).encode([text])[0].tolist()
    assert fast == plain and UNK not in plain
    assert plain == own.encode(expected, add_special_tokens=False).ids
    assert lost_characters(own, [text]).counts == ({"月": 1, "日": 1} if "月" in text else {})


SIGNS = [chr(code) for code in range(0x80, 0x3400)]


def test_no_character_is_spelled_as_without_its_stroke():
    for sign in SIGNS:
        decomposed = unicodedata.normalize("NFKD", sign)
        without = "".join(c for c in decomposed if c not in STROKES)
        if without and without != decomposed and spelling(without).strip():
            assert spelling(sign) != spelling(without), sign
    for base in "".join(RELATIONS.values()):
        assert len({spelling(base + stroke) for stroke in STROKES}) == 1 and spelling(base + "\u0338") != spelling(base)


def test_no_sign_makes_one_number_of_two():
    for sign in SIGNS:
        if unicodedata.category(sign)[0] in "MC" or unicodedata.category(sign) == "Nd":
            continue  # digits themselves; accents, joiners and bidi marks, which say nothing
        spelled, decomposed = spelling(f"7{sign}7"), unicodedata.normalize("NFKD", sign)
        assert spelled != "77", sign
        if decomposed[0].isdigit():
            assert re.match("7[^0-9]", spelled), (sign, spelled)
        if decomposed[-1].isdigit() and not re.search("[a-z]", decomposed):  # dm2 of ㍸ is a word
            assert re.search("[^0-9]7$", spelled), (sign, spelled)


def test_every_character_is_spelled_alike_in_training():
    for before, after in (("", ""), ("7", "7"), ("l", "l"), ("²", "₂"), ("=", "\u0338")):
        text = "x".join(before + sign + after for sign in SIGNS if not unicodedata.category(sign).startswith("M"))
        assert ascii_of(text).lower().translate(SPACES) == normalizer().normalize_str(text)


def test_a_stroke_that_remains_is_lost():
    own = train_tokenizer(TEXTS, "wordpiece", 512)
    assert lost_characters(own, ["a =\u0338 b, o\u0338 ≠"]).counts == {}
    assert lost_characters(own, ["5\u0338 +\u20e5 =\u0337 ⊬"]).counts == {"\u0338": 1, "\u20e5": 1, "⊬": 1}
