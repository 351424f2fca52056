"""Text that is not UTF-8: what it is likely to be is named with the remedy, and --encoding reads it."""

import gzip

import pytest

from cramfast.errors import UserError
from cramfast.prepare import prepare
from cramfast.text.corpus import Corpus
from cramfast.text.encodings import guesses, seven_bit_encoding, wide_encoding
from cramfast.text.lines import check_encoding

TEXTS = {
    "english": "An article of some words.\n" * 40,
    "russian": "Это русский текст, и в нём слова.\n" * 40,
    "chinese": "这是一些中文。\n這是另一行\n" * 60,
    "hindi": "यह एक वाक्य है।\n" * 60,
}
WIDE = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
@pytest.mark.parametrize("encoding", WIDE)
@pytest.mark.parametrize("text", TEXTS)
def test_wide_text_without_a_mark_is_named_and_read(tmp_path, text, encoding, kind):
    (tmp_path / "a.txt").write_bytes(TEXTS[text].encode(encoding))
    with pytest.raises(UserError, match=rf"a\.txt.* it looks like {encoding} without a mark — --encoding {encoding} "):
        prepare((str(tmp_path),), tmp_path / "out", vocab_size=512, tokenizer=kind)
    assert list(Corpus((str(tmp_path),), "lines", encoding=encoding)) == TEXTS[text].split("\n")[:-1]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_wide_text_with_a_mark(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes(TEXTS["russian"].encode(encoding))
    iconv = rf"iconv -f {encoding.upper()} -t UTF-8 'a\.txt' > 'a\.utf8\.txt'"
    with pytest.raises(UserError, match=rf"a\.txt:1: byte 1 .* it looks like {encoding} — .* {iconv}"):
        list(Corpus((str(tmp_path),)))
    for read_as in (encoding, encoding + "-le"):
        assert list(Corpus((str(tmp_path),), "files", encoding=read_as)) == [TEXTS["russian"].strip()]


@pytest.mark.parametrize(
    ("text", "encoding", "iconv"),
    [
        ("Ein schöner Tag für Gäste.\n", "latin-1", "ISO-8859-1"),
        ("Ein „schöner“ Tag – für Gäste.\n", "cp1252", "CP1252"),
    ],
)
def test_western_text_is_guessed_with_the_line_for_iconv(tmp_path, text, encoding, iconv):
    (tmp_path / "a.txt").write_bytes(b"Plain at first.\n" * 9 + text.encode(encoding))
    message = (
        rf"a\.txt:10: byte \d+ of the line is not UTF-8 \(.*\); it may be {encoding}: '{text[:20]}.*' — see which "
        rf"reads right and name it, such as --encoding {encoding}, or convert the file: iconv -f {iconv} -t UTF-8 "
        r"'a\.txt' > 'a\.utf8\.txt'$"
    )
    with pytest.raises(UserError, match=message):
        list(Corpus((str(tmp_path / "a.txt"),)))
    assert list(Corpus((str(tmp_path / "a.txt"),), "lines", encoding=encoding))[-1] == text.strip()
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode(encoding)))
    with pytest.raises(UserError, match=rf"gzip -dc 'b\.txt\.gz' \| iconv -f {iconv} -t UTF-8 > 'b\.utf8\.txt'"):
        list(Corpus((str(tmp_path / "b.txt.gz"),)))


FOREIGN = {
    "Zażółć gęślą jaźń. W Szczebrzeszynie chrząszcz brzmi w trzcinie.": ("cp1250", "iso8859_2", "cp852"),
    "Příliš žluťoučký kůň úpěl ďábelské ódy. Město leží u řeky.": ("cp1250", "iso8859_2", "cp852"),
    "Árvíztűrő tükörfúrógép. A város a folyó mellett fekszik.": ("cp1250", "iso8859_2", "cp852"),
    "Şehir ırmağın kıyısında yer alır ve uzun bir geçmişi vardır.": ("cp1254", "cp857"),
    "Miestas stovi prie upės ir turi ilgą istoriją. Žmonės čia gyvena.": ("cp1257", "cp775"),
    "Город стоит на реке, и у него долгая история.": ("cp1251", "koi8_r", "cp866", "iso8859_5", "mac_cyrillic"),
    "Місто стоїть на річці, і його історія довга.": ("cp1251", "koi8_u", "mac_cyrillic"),
    "Η πόλη βρίσκεται στο ποτάμι και έχει μακρά ιστορία.": ("cp1253", "cp737"),
    "Le garçon français a été très gêné à l'école où il étudiait.": ("latin-1", "mac_roman", "cp850"),
    "Smørrebrød på øerne er æblegrød og blåbær.": ("latin-1", "mac_roman", "cp850"),
    "日本語の文章です。町は川のそばにあり、長い歴史を持っています。": ("shift_jis", "euc_jp"),
    "这座城市位于河边，有着悠久的历史。": ("gb18030",),
    "這座城市位於河邊，有著悠久的歷史。": ("big5",),
    "도시는 강가에 있으며 오랜 역사를 가지고 있다.": ("euc_kr",),
}


@pytest.mark.parametrize(("text", "encoding"), [(text, each) for text, some in FOREIGN.items() for each in some])
def test_of_two_or_three_guesses_one_reads_right(tmp_path, text, encoding):
    (tmp_path / "a.txt").write_bytes((text + "\n").encode(encoding))
    with pytest.raises(
        UserError, match=r"a\.txt:1: byte \d+ .*; it may be .* — see which reads right and name it"
    ) as said:
        list(Corpus((str(tmp_path / "a.txt"),)))
    found = guesses(text.encode(encoding), text.encode(encoding))
    (right,) = [name for name, piece in found if piece in text]
    assert len(found) <= 3 and right in str(said.value) and "reads it" not in str(said.value)
    assert list(Corpus((str(tmp_path / "a.txt"),), encoding=right)) == [text]


@pytest.mark.parametrize(
    ("text", "encoding", "named"),
    [
        ("日本語の文章です。\n", "iso2022_jp", "iso2022_jp"),
        ("도시는 강가에 있으며\n", "iso2022_kr", "iso2022_kr"),
        ("这座城市位于河边，\n" * 5, "hz", "hz"),
        ("Město leží u řeky a má dlouhé dějiny.\n" * 9, "utf-7", "utf-7"),
        ("Город стоит на реке, и у него\n" * 5, "utf-7", "utf-7"),
    ],
)
def test_encodings_of_seven_bits_are_named_and_read(tmp_path, text, encoding, named):
    for name in ("a.txt", "b.csv"):
        (tmp_path / name).write_bytes("text\n".encode(encoding) + text.encode(encoding))
        with pytest.raises(
            UserError, match=rf"{name}: it looks like {named} — --encoding {named} reads it, or convert"
        ):
            list(Corpus((str(tmp_path / name),)))
    assert list(Corpus((str(tmp_path / "a.txt"),), "files", encoding=named)) == ["text\n" + text.strip()]


def test_plain_text_is_in_no_encoding_of_seven_bits():
    assert seven_bit_encoding("\x1b[31mred\x1b[0m and \x1b(B\n" * 9) is None
    assert seven_bit_encoding("Figure~{\\rm one}~ and ~{two}~{three}\n" * 9) is None
    assert seven_bit_encoding("a+abc-b, +cdef-, +ghi-, x+1-y, C+std-lib, +more-, K+ion-s\n" * 9) is None


def test_what_cannot_be_guessed_is_not():
    assert guesses(*[b"\x89PNG\r\n\x1a\n\xff"] * 2) == []
    assert wide_encoding(b"paths\0apart\0by\0zeros\0and\0so\0on\0" * 20) is None
    assert wide_encoding(b"a,b\0,c\n") is None
    assert wide_encoding(b"one \0 in plain text" + b"." * 100) is None


@pytest.mark.parametrize("packed", [bytes, gzip.compress])
@pytest.mark.parametrize(
    ("text", "written", "encoding"),
    [
        ("Größe\n", "utf-8", "cp1250"), ("Größe\n", "utf-16", "latin-1"), ("Plain\n" * 9, "utf-16-le", "latin-1"),
        ("words\n" * 20_000 + "Größe", "utf-8", "cp1252"), ("P", "utf-8-sig", "latin-1"), ("text", "utf-8", "utf-16"),
        ("日本語の文章です。", "utf-8", "shift_jis"), ("plain text\n", "utf-16-be", "utf-16-le"),
        ("plain text\n", "utf-32-be", "utf-16-le"), ("plain text\n", "utf-16-le", "utf-16-be"),
    ],
)  # fmt: skip
def test_unicode_among_files_of_another_encoding_is_refused_by_name(tmp_path, text, written, encoding, packed):
    name = "a.txt.gz" if packed is gzip.compress else "a.txt"
    (tmp_path / name).write_bytes(packed(text.encode(written)))
    (tmp_path / "b.txt").write_bytes("Größe, 日本".encode(encoding, "ignore"))
    kind = written.removesuffix("-sig")
    with pytest.raises(
        UserError, match=rf"{name}: it is {kind}, and would be another text in .* — leave --encoding out"
    ):
        list(Corpus((str(tmp_path),), encoding=encoding))
    assert len(list(Corpus((str(tmp_path / "b.txt"),), encoding=encoding))) == 1


def test_a_place_in_a_line_of_utf_8_is_no_other_encoding(tmp_path):
    for data in ("日本語".encode()[:-1], "Größe ".encode() + b"caf\xe9"):
        (tmp_path / "a.txt").write_bytes(data)
        with pytest.raises(
            UserError, match=r"a\.txt:1: byte \d+ of .*\), and the line before it is — mend that place, or"
        ):
            list(Corpus((str(tmp_path),)))
    (name, _), *_ = guesses("café".encode("latin-1"), "café".encode("latin-1"))
    assert name == "latin-1"


def test_what_is_no_text_at_all_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\xff")
    with pytest.raises(UserError, match=r"a\.txt:1: byte 1 of .*; it looks like no text at all — leave it out"):
        list(Corpus((str(tmp_path),)))


def test_a_nul_here_and_there_is_a_character(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\0two " + b"and many words " * 50)
    assert next(iter(Corpus((str(tmp_path),)))).startswith("one\0two")


def test_another_encoding_that_does_not_fit_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt: not ascii \(ordinal not in range.* — name its encoding with --enc"):
        list(Corpus((str(tmp_path),), encoding="ascii"))
    for name in ("base64", "no-such"):
        with pytest.raises(UserError, match=f"encoding='{name}' is not known — use a name such as utf-8"):
            check_encoding(name)
