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
# Decompositions make = and U+0338 of ≠; such pairs are looked for before the plain signs.
NEGATED = {
    "!=": "=\u0338", "!<": "<\u0338", "!>": ">\u0338", "!==": "≡\u0338", "!<=": "≤\u0338", "!>=": "≥\u0338",
    "!~": "∼\u0338", "!~=": "≈\u0338", " not in ": "∈\u0338", "!->": "→\u0338", "!=>": "⇒\u0338",
}  # fmt: skip
SIGNS = {
    ">=": "≥⩾≧", "<=": "≤⩽≦", "~=": "≈≅≃", "==": "≡", "~": "∼", "<<": "≪", ">>": "≫", "+-": "±", "-+": "∓", "x": "×",
    "/": "÷⁄∕", "*": "·∙⋅•∗", "->": "→", "<-": "←", "<->": "↔", "=>": "⇒", "<=>": "⇔", "infinity": "∞", " sqrt ": "√",
    " sum ": "∑", " product ": "∏", " integral ": "∫", " partial ": "∂", " nabla ": "∇", " in ": "∈", " and ": "∧",
    " or ": "∨", " not ": "¬", "(c)": "©", "(r)": "®", "!": "¡", "?": "¿", "|": "¦", "<": "‹⟨", ">": "›⟩",
    "-": "‐‑‒–—―−⁃", "'": "‘’‚‛′ʼʹʻ", '"': "“”„‟ʺ«»",
}  # fmt: skip
KEPT = "¢£¤¥§¶°†‡‰" + "".join(map(chr, range(0x20A0, 0x20C1)))  # currency and other signs that stay themselves
RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
FRACTIONS = {
    "½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5",
    "⅙": "1/6", "⅚": "5/6", "⅐": "1/7", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8", "⅑": "1/9", "⅒": "1/10",
}  # fmt: skip
ALONE = {"´": "'", "¨": '"', "″": '"', "˜": "~"}  # decompositions would make a space and an accent of them
BLANK = "\\x00-\\x20\\x7F\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
CLASS_FROM = 8  # characters with one spelling, from where on one search for a class beats one for each
RISEN = "\uffff"  # no character: stands before each raised digit, until those of one number are known
STROKE = "\u0338"  # the one accent that changes what the sign before it says, wherever it stands among other accents
# Raised digits of one number stand together in one match, others alone: nothing else depends on a neighbour.
FOREIGN = re.compile(f"[{''.join(RAISED)}{RISEN}][-0-9+n{''.join(RAISED)}{RISEN}]*|[^\\x00-\\x7F]")


@functools.cache
def normalizer() -> normalizers.Normalizer:
    """The rules: what depends on the composed form first, then case and accents, then sign by sign."""
    raised = (normalizers.Replace(sign, RISEN + spelled) for sign, spelled in RAISED.items())
    once = Regex(f"(?<={RISEN}[0-9+n-]){RISEN}")
    return normalizers.Sequence(
        [
            *raised,  # 10⁻⁶ is 10^-6
            normalizers.Replace(once, ""),
            normalizers.Replace(RISEN, "^"),
            *(normalizers.Replace(sign, " " + spelled) for sign, spelled in FRACTIONS.items()),  # 2½ is 2 1/2
            *(normalizers.Replace(sign, spelled) for sign, spelled in ALONE.items()),
            normalizers.NFKD(),
            normalizers.Lowercase(),
            *(normalizers.Replace(sign, spelled) for spelled, sign in NEGATED.items()),
            *_by_spelling(LETTERS | GREEK | {"u": LETTERS["u"] + GREEK["u"]}),
            *_by_spelling(SIGNS),
            normalizers.Replace(Regex(f"[{BLANK}]"), " "),
            normalizers.Replace(Regex(f"[^\\x20-\\x7E{KEPT}]+"), ""),
        ]
    )


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
    if STROKE in text:
        return spelling(text)
    return FOREIGN.sub(lambda found: spelling(found[0]), text)


@functools.lru_cache(maxsize=1 << 17)
def spelling(characters: str) -> str:
    """What the normalizer makes of a character, or of some that belong together."""
    return normalizer().normalize_str(characters)
