"""Text in lower-cased ASCII: what WordPiece makes of every other character, as the field's transliterations spell it.

The rules are the normalizer in tokenizer.json, of steps that the tokenizers library and its JavaScript port both have,
so that training and every reader of an export see the same text. What has no spelling here is dropped, and counted
(`cramfast.text.lost`): text in another script belongs in byte-level BPE.
"""

import functools
import re

from tokenizers import Regex, normalizers

# As Unicode's Latin-ASCII transform and unidecode spell letters without a decomposition: ø is o, not oe.
LETTERS = {
    "ss": "ß", "ae": "æ", "oe": "œ", "th": "þ", "ng": "ŋ", "b": "ɓ", "d": "đðɖɗ", "e": "əɛǝ", "f": "ƒ", "g": "ɣɡ",
    "h": "ħ", "i": "ıɨɪ", "k": "ƙĸ", "l": "ł", "n": "ɲ", "o": "øɔɵ", "sh": "ʃ", "t": "ŧ", "u": "ʉʊ", "v": "ʋ", "y": "ƴ",
    "z": "ƶ", "zh": "ʒ",
}  # fmt: skip
GREEK = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ε", "zeta": "ζ", "eta": "η", "theta": "θ",
    "iota": "ι", "kappa": "κ", "lambda": "λ", "u": "μ", "nu": "ν", "xi": "ξ", "omicron": "ο", "pi": "π", "rho": "ρ",
    "sigma": "σς", "tau": "τ", "upsilon": "υ", "phi": "φ", "chi": "χ", "psi": "ψ", "omega": "ω",
}  # fmt: skip
STROKES = "\u0338\u0337\u20e5"  # the accents that change what the sign before them says, as a line through = does
RELATIONS = {
    "=": "=", "<": "<", ">": ">", ">=": "≥⩾≧", "<=": "≤⩽≦", "~=": "≈≅≃", "==": "≡", "~": "~∼", "<<": "≪", ">>": "≫",
    "<~": "≲", ">~": "≳", "->": "→⟶⟼➔➜➡", "<-": "←⟵⬅", "<->": "↔⟷", "=>": "⇒⟹", "<==": "⇐⟸", "<=>": "⇔⟺⇌⇄",
    "|": "∣", "||": "∥‖", " in ": "∈", " contains ": "∋", " exists ": "∃", " subset of ": "⊂", " superset of ": "⊃",
    " subset of or equal to ": "⊆", " superset of or equal to ": "⊇", " proportional to ": "∝",
}  # fmt: skip
SIGNS = {
    "+-": "±", "-+": "∓", "x": "×", "/": "÷⁄∕", "*": "∙⋅•∗●▪", "infinity": "∞", " sqrt ": "√",
    " sum ": "∑", " product ": "∏", " integral ": "∫", " partial ": "∂", " nabla ": "∇", " and ": "∧",
    " or ": "∨", " not ": "¬", " for all ": "∀", " union ": "∪", " intersection ": "∩", "delta": "∆",
    "(c)": "©", "(r)": "®", "!": "¡", "?": "¿", "|": "¦", "<": "‹⟨", ">": "›⟩",
    " up ": "↑⬆⇑↗", " down ": "↓⬇⇓↘", " up down ": "↕⇅", " no ": "∅", "[ ]": "☐□", "[x]": "☑☒", "( )": "○",
    " check ": "✓✔✅", " cross ": "✗✘❌", " rx ": "℞", " oz ": "℥", " female ": "♀", " male ": "♂",
    " diameter ": "⌀", " sharp ": "♯", " flat ": "♭", "(+)": "⊕", "(-)": "⊖", "(x)": "⊗",
    "+": "➕", "-": "‐‑‒–—―−⁃➖", "'": "‘’‚‛′ʼʹʻ", '"': "“”„‟ʺ«»",
    ")": "\u20e3\u20dd",  # a keycap or circle around the digit before it
}  # fmt: skip
# Currency and other signs that stay themselves: a middle dot is a decimal point, a product or a part of a word.
KEPT = "¢£¤¥§¶°·†‡‰‱" + "".join(map(chr, range(0x20A0, 0x20C1)))
GEMINATE = "(?<=[lL])·(?=[lL])"  # Catalan: col·legi is one word
RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-", strict=True))
FRACTIONS = {
    "½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5",
    "⅙": "1/6", "⅚": "5/6", "⅐": "1/7", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8", "⅑": "1/9", "⅒": "1/10",
    "↉": "0/3",
}  # fmt: skip
CIRCLED = (("①", 20), ("❶", 10), ("➀", 10), ("➊", 10))
ENCLOSED = {chr(ord(one) + i): f"({i + 1})" for one, many in CIRCLED for i in range(many)} | {"⓪": "(0)"}
ENCLOSED |= {chr(ord("⒈") + i): f" {i + 1}. " for i in range(20)}  # alone, as ⒈5 is no 1.5
UNITS = {"㎟": "mm", "㎠": "cm", "㎡": "m", "㎢": "km", "㎣": "mm", "㎤": "cm", "㎥": "m", "㎦": "km"}
UNITS = {sign: f"{unit}^{2 + i // 4} " for i, (sign, unit) in enumerate(UNITS.items())}
# Rare ones, which decompositions would make digits of, and days and hours: they are lost, and counted.
UNCOUNTED = "㉑-㉟㊱-㊿㋀-㋋㍘-㍰㏠-㏾\U0001f100-\U0001f10a"
# Decompositions would make a space and an accent of the first, other letters of the others.
ALONE = {"´": "'", "¨": '"', "″": '"', "˜": "~", "˚": "°", "º": "°", "ᵒ": "°", "∘": "°", "◦": "°", "ŀ": "l", "Ŀ": "L"}
BLANK = "\\x00-\\x20\\x7F-\xa0\u1680\u2000-\u200b\u2028\u2029\u202f\u205f\u3000"
CLASS_FROM = 8  # characters with one spelling, from where on one search for a class beats one for each
# No characters: they stand before and after each raised digit, and each lowered one, until a number's first and last
# are known.
RISEN, ROSE, SUNK, SANK = "\uffff", "\ufffe", "\ufdd0", "\ufdd1"
DIGIT = "0-9０-９\U0001d7ce-\U0001d7ff\U0001fbf0-\U0001fbf9"  # and what decomposes to them
# Raised and lowered digits of one number or fraction stand together in one match, others alone.
MOVED = f"[{''.join((*RAISED, *LOWERED))}{RISEN}{ROSE}{SUNK}{SANK}]"
FOREIGN = re.compile(f"({MOVED}+(?:[/⁄∕]{MOVED}+|⁄(?=[0-9]))*)|[^\\x00-\\x7F]")
IS_DIGIT, IS_GEMINATE = re.compile(f"[{DIGIT}]"), re.compile(GEMINATE)


@functools.cache
def normalizer() -> normalizers.Normalizer:
    """The rules: what depends on the composed form first, then case and accents, then sign by sign."""
    return normalizers.Sequence(
        [
            normalizers.Replace(Regex(GEMINATE), ""),
            *_numbers(),
            *(normalizers.Replace(sign, f" {spelled} ") for sign, spelled in FRACTIONS.items()),  # 2½ is 2 1/2
            normalizers.Replace("⅟", " 1/"),
            *(normalizers.Replace(sign, spelled) for sign, spelled in (ENCLOSED | UNITS | ALONE).items()),
            normalizers.Replace(Regex(f"[{UNCOUNTED}]"), " "),
            normalizers.NFKD(),
            normalizers.Lowercase(),
            *(normalizers.Replace(stroke, STROKES[0]) for stroke in STROKES[1:]),
            *_negated(),
            *_by_spelling(LETTERS | GREEK | {"u": LETTERS["u"] + GREEK["u"]}),
            *_by_spelling({spelled: signs.replace(spelled, "") for spelled, signs in RELATIONS.items()}),
            *_by_spelling(SIGNS),
            normalizers.Replace(Regex(f"[{BLANK}]"), " "),
            normalizers.Replace(Regex("[\\p{M}\\p{Cf}]+"), ""),
            # One for each, as it is where characters are looked up one by one; none would join what stands around it.
            normalizers.Replace(Regex(f"[^\\x20-\\x7E{KEPT}]"), " "),
        ]
    )


def _numbers() -> list[normalizers.Normalizer]:
    """10⁻⁶ is 10^-6, 2¹⁄₂ is 2 1/2, H₂O is h2o; no digit runs into those of another number: m²3 is m^2 3, and log₂8 is
    log_2 8."""
    steps = [
        (Regex(f"[{RISEN}{ROSE}{SUNK}{SANK}]"), ""),
        *((sign, RISEN + spelled + ROSE) for sign, spelled in RAISED.items()),
        *((sign, SUNK + spelled + SANK) for sign, spelled in LOWERED.items()),
        (ROSE + RISEN, ""),
        (SANK + SUNK, ""),
        (Regex(f"{RISEN}(?=[0-9]+{ROSE}(?:⁄[{SUNK}0-9]|[/∕]{SUNK}))"), " "),
        (Regex(f"{ROSE}[/⁄∕]{SUNK}"), "/"),
        (Regex(f"(?<=[{DIGIT}{ROSE}]){SUNK}"), "_"),
        (Regex(f"{SUNK}(?=[-+0-9]+{SANK}[{DIGIT}])"), "_"),
        (SUNK, ""),
        (Regex(f"{SANK}(?=[{DIGIT}])"), " "),
        (SANK, ""),
        (RISEN, "^"),
        (ROSE, " "),
    ]
    return [normalizers.Replace(pattern, content) for pattern, content in steps]


def _negated() -> list[normalizers.Normalizer]:
    """Decompositions make = and U+0338 of ≠: such pairs are looked for before the plain signs."""
    return [
        normalizers.Replace(Regex(f"[{signs}]{STROKES[0]}"), f" not{spelled}" if spelled[0] == " " else f"!{spelled}")
        for spelled, signs in RELATIONS.items()
    ]


def _by_spelling(table: dict[str, str]) -> list[normalizers.Normalizer]:
    steps = []
    for spelled, characters in table.items():
        patterns = list(characters) if len(characters) < CLASS_FROM else [Regex(f"[{characters}]")]
        steps += [normalizers.Replace(pattern, spelled) for pattern in patterns]
    return steps


def ascii_of(text: str) -> str:
    """The text with every other character spelled as the normalizer does, many times as fast.

    On the result, only lower case and spaces for control characters are left to do.
    """
    if text.isascii():
        return text
    if any(stroke in text for stroke in STROKES):
        return normalizer().normalize_str(text)
    if "·" in text:
        text = IS_GEMINATE.sub("", text)
    return FOREIGN.sub(_spelled, text)


def _spelled(found: re.Match) -> str:
    """A character; or raised and lowered digits, of which others may stand on either side."""
    if found[1] is None:
        return spelling(found[0])
    text, (begin, end) = found.string, found.span()
    before, after = text[max(0, begin - 1) : begin], text[end : end + 1]
    before, after = (side if IS_DIGIT.match(side) else "" for side in (before, after))
    whole = spelling(before + found[0] + after)
    return whole[len(before) : len(whole) - len(after)]


@functools.lru_cache(maxsize=1 << 17)
def spelling(characters: str) -> str:
    """What the normalizer makes of a character, or of some that belong together."""
    return normalizer().normalize_str(characters)
