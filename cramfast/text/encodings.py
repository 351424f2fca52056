"""What bytes are text in: told by marks, escapes and NULs where these say it, else guessed, for a message."""

import base64
import codecs
import re
import unicodedata
from collections.abc import Iterator

import numpy as np

LOOKED_AT = 1 << 16  # bytes
WIDE_SHARE = 0.02  # of NUL bytes from which text is UTF-16; that of spaces and line ends in any language is higher
LETTERS_SHARE = 0.25  # in text of Latin letters without a space; it is nearly a half
LEAST_ZEROS = 4
FILLED = re.compile(rb"\0{4,}\Z|\0{8,}")  # NULs of no character, which fill up a file
SPACES = tuple(b" \n\r")
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # before that of UTF-16, which it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

# Encodings of seven bits, whose bytes are valid UTF-8 (RFC 1468, 1557, 1922, 1843, 2152).
ESCAPES = (
    (re.compile(r"\x1b\$\)C"), "iso2022_kr"),
    (re.compile(r"\x1b\$\)[AG]"), "iso-2022-cn"),  # Python has no codec of it
    (re.compile(r"\x1b\$(?:[@BA]|\([CDOPQ])|\x1b\([JI]"), "iso2022_jp"),
)
JAPANESE = ("iso2022_jp", "iso2022_jp_2", "iso2022_jp_ext", "iso2022_jp_3", "iso2022_jp_2004")
HZ = re.compile(r"~\{((?:[!-w][!-~])+)~\}")
UTF7 = re.compile(r"\+([A-Za-z0-9/]{3,})(?![A-Za-z0-9/+])")
LEAST_GROUPS = 5

PUNCTUATION = "“”‘’„‚…–—«»°§©®№·€"
LATIN = {  # letters beyond ASCII of groups of languages
    "äöüßàâæçèéêëîïôœùûÿ": ("latin-1", "cp1252", "mac_roman", "cp850"),  # German, French
    "áéíñóúü¿¡ºªãõâàçêôìòèù": ("latin-1", "cp1252", "mac_roman", "cp850"),  # Spanish, Portuguese, Italian
    "åäöæøéáðíóúýþ": ("latin-1", "cp1252", "mac_roman", "cp850"),  # of the north
    "ąćęłńóśźż": ("cp1250", "iso8859_2", "cp852", "mac_latin2"),
    "áčďéěíňóřšťúůýžäĺľôŕ": ("cp1250", "iso8859_2", "cp852", "mac_latin2"),
    "áéíóöőúüű": ("cp1250", "iso8859_2", "cp852", "mac_latin2"),
    "čćđšž": ("cp1250", "iso8859_2", "cp852", "mac_latin2"),
    "ăâîşţ": ("cp1250", "iso8859_2", "cp852"),
    "çğıöşüi̇âî": ("cp1254", "cp857"),
    "ąčęėįšųūž": ("cp1257", "iso8859_13", "cp775"),
    "āčēģīķļņšūž": ("cp1257", "iso8859_13", "cp775"),
    "äöõüšž": ("cp1257", "iso8859_13", "cp775"),
}
OTHERS = {  # the eight commonest letters first
    "оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфъё": ("cp1251", "koi8_r", "cp866", "iso8859_5", "mac_cyrillic"),
    "оанитевриласкдмпуягзбчйхжшюцщєіїґь": ("cp1251", "koi8_u", "cp1125", "mac_cyrillic"),
    "аоиентрсвјдкумлпгзбчхшцжћђљњџфѓќѕ": ("cp1251", "iso8859_5"),
    "αοιετσνηυρπκμλςωάίόέθήδγύώχφβξζψϊϋ": ("cp1253", "iso8859_7", "cp737"),
    "יוהלארתבמשנםעדקחפךןצגטזףכסץ": ("cp1255", "cp862"),
    "اليمنورتبةعدسفهكقحجشطصخذئضءزأإآؤغظى": ("cp1256", "iso8859_6"),
    "านรอกเงมยลวดทสตะปบคหแจพช" + "".join(map(chr, range(0xE01, 0xE5C))): ("cp874",),
}
COMMONEST = 8
TELLING = 8  # characters, from which their frequencies say something
EAST = {  # a standard, and its first bytes of the commoner characters
    "shift_jis": ("euc_jp", 0xB0, 0xCF),
    "euc_jp": ("euc_jp", 0xB0, 0xCF),
    "euc_kr": ("euc_kr", 0xB0, 0xC8),
    "gb18030": ("gb2312", 0xB0, 0xD7),
    "big5": ("big5", 0xA4, 0xC6),
}
LEAST_SHARE = 0.6  # of characters at home in a language
GUESSES = 3
AROUND = (12, 24)  # characters of a guess that are shown, before and from the first one that is no ASCII


def marked(data: bytes) -> str | None:
    """The wide encoding that a text's first bytes name."""
    return next((name for mark, name in MARKS.items() if data.startswith(mark)), None)


def wide_encoding(data: bytes) -> str | None:
    """The encoding of which these bytes are text without a mark, by the places of their NUL bytes; None for any of one
    byte or more a character.

    Args:
        data: from the beginning of a character, or of any half or quarter of one.
    """
    data = FILLED.sub(b"", data[:LOOKED_AT])
    zeros = [data[i::4].count(0) for i in range(4)]
    total = sum(zeros)
    if total < max(WIDE_SHARE * len(data), LEAST_ZEROS):
        return None
    full = [4 * count > 0.9 * len(data) for count in zeros]
    if full[2] and full[3]:  # three bytes of four in Latin letters, and two in any script
        return "utf-32-le"
    if full[0] and full[1]:
        return "utf-32-be"
    units = np.frombuffer(data[: len(data) // 2 * 2], np.uint8).reshape(-1, 2)
    little, big = (int((np.isin(units[:, at], SPACES) & (units[:, 1 - at] == 0)).sum()) for at in (0, 1))
    even, odd = zeros[0] + zeros[2], zeros[1] + zeros[3]
    # Halves of Chinese characters may be 0 too, but not beside a space or a line end.
    if max(little, big) > 10 * min(little, big) and 2 * max(little, big) > WIDE_SHARE * len(units):
        return "utf-16-le" if little > big else "utf-16-be"
    if min(even, odd) > 0.1 * total or total < LETTERS_SHARE * len(data):  # records of even length between NULs
        return None
    return "utf-16-le" if odd > even else "utf-16-be"


def seven_bit_encoding(text: str) -> str | None:
    """The encoding of seven bits that this ASCII text is really in."""
    if "\x1b$" in text or "\x1b(" in text:
        for escape, name in ESCAPES:
            if escape.search(text):
                fits = (japanese for japanese in JAPANESE if _decoded(text.encode(), japanese) is not None)
                return next(fits, name) if name == "iso2022_jp" else name
    if "~{" in text and len(groups := HZ.findall(text)) >= LEAST_GROUPS:
        wide = [_decoded(bytes(byte | 128 for byte in group.encode()), "gb2312") for group in groups]
        if sum(each is not None for each in wide) > 0.9 * len(wide):
            return "hz"
    groups = UTF7.findall(text) if text.count("+") >= LEAST_GROUPS else []
    if len(groups) >= LEAST_GROUPS and sum(map(_is_utf7, groups)) > 0.9 * len(groups):
        return "utf-7"
    return None


def _is_utf7(group: str) -> bool:
    """Whether these are letters beyond ASCII in UTF-7: of one script, and without a bit left over that is set."""
    data = base64.b64decode(group + "=" * (-len(group) % 4)) if len(group) % 4 != 1 else b""
    end = len(data) // 2 * 2
    exact = base64.b64encode(data[:end]).decode().rstrip("=") == group
    letters = _decoded(data[:end], "utf-16-be") or ""
    scripts = {unicodedata.name(letter, "").split(" ")[0] for letter in letters} - {"HIRAGANA", "KATAKANA"}
    return exact and letters.isalpha() and not any(letter.isascii() for letter in letters) and len(scripts) <= 1


def is_binary(data: bytes) -> bool:
    """Whether there are control characters that text has not; of DOS, it has one at its end."""
    return any(byte < 32 and byte not in b"\t\n\r\f\x1a\x1b" for byte in data)


def guesses(sample: bytes, line: bytes) -> list[tuple[str, str]]:
    """(encoding, how a piece of the line reads in it) of the likeliest, each of which reads it in another way.

    Args:
        sample: the line with others like it.
    """
    ranked = []
    for letters, encodings in (LATIN | OTHERS).items():
        ranked += ((_share(_decoded(sample, name), letters, letters in OTHERS), name) for name in encodings)
    ranked += ((_eastern_share(_decoded(sample, name), name), name) for name in EAST)
    if any(128 <= byte < 160 for byte in sample):  # controls in latin-1, where cp1252 has quotes and dashes
        ranked = [(share, name) for share, name in ranked if name != "latin-1"]
    shown: dict[str, tuple[str, str]] = {}
    for share, name in sorted(ranked, key=lambda each: -each[0]):
        reading = _decoded(line, name)
        if share >= LEAST_SHARE and reading and len(shown) < GUESSES:
            shown.setdefault(reading, (name, _piece(reading)))
    return list(shown.values())


def _decoded(data: bytes, encoding: str) -> str | None:
    try:
        return codecs.getincrementaldecoder(encoding)().decode(data)  # the last character may be cut
    except UnicodeError:
        return None


def _piece(text: str) -> str:
    first = next((at for at, character in enumerate(text) if not character.isascii()), 0)
    return " ".join(text[max(first - AROUND[0], 0) : first + AROUND[1]].split())


def _beyond_ascii(text: str) -> Iterator[tuple[str, str, str]]:
    """(character, the one before it, the one after it)."""
    for at, character in enumerate(text):
        if not character.isascii():
            yield character, text[at - 1 : at] if at else "", text[at + 1 : at + 2]


def _share(text: str | None, letters: str, other_script: bool) -> float:
    """Of a text's characters beyond ASCII, those that are at home in a language, where they stand."""
    if not text:
        return 0.0
    home = total = common = 0
    for character, before, after in _beyond_ascii(text):
        total += 1
        if character in PUNCTUATION:
            home += character == "’" or not (before.isalpha() and after.isalpha())
        elif character.lower() in letters:
            mixed = other_script and any(c.isascii() and c.isalpha() for c in before + after)
            risen = character.isupper() and before.islower()  # as in "ГОрод"
            home += not mixed and not risen
            common += other_script and not mixed and character in letters[:COMMONEST]
    return (home + common / 2 * (total >= TELLING)) / total if total else 0.0


def _eastern_share(text: str | None, encoding: str) -> float:
    """The same of Chinese, Japanese and Korean: those of the commoner half of a standard."""
    if not text:
        return 0.0
    home = total = kana = 0
    standard, first, last = EAST[encoding]
    japanese = standard == "euc_jp"
    for character, _, _ in _beyond_ascii(text):
        total += 1
        is_kana = "\u3040" <= character <= "\u30ff"
        kana += is_kana
        full_width = "\u3000" <= character <= "\u303f" or "\uff00" <= character <= "\uff60"
        code = character.encode(standard, "replace")
        home += full_width or (is_kana and japanese) or (len(code) == 2 and first <= code[0] <= last)
    return home / total if total and (not japanese or kana > 0.05 * total) else 0.0
