"""Text that is not UTF-8: what it is likely to be is named with the remedy, and --encoding reads it."""

import gzip

import pytest

from cramfast.errors import UserError
from cramfast.prepare import prepare
from cramfast.text.corpus import Corpus
from cramfast.text.lines import check_encoding, guess_encoding, wide_encoding

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
        rf"a\.txt:10: byte \d+ of the line is not UTF-8 \(.*\); it looks like {encoding} — --encoding {encoding} reads "
        rf"it, or convert it: iconv -f {iconv} -t UTF-8 'a\.txt' > 'a\.utf8\.txt'$"
    )
    with pytest.raises(UserError, match=message):
        list(Corpus((str(tmp_path / "a.txt"),)))
    assert list(Corpus((str(tmp_path / "a.txt"),), "lines", encoding=encoding))[-1] == text.strip()
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode(encoding)))
    with pytest.raises(UserError, match=rf"gzip -dc 'b\.txt\.gz' \| iconv -f {iconv} -t UTF-8 > 'b\.utf8\.txt'"):
        list(Corpus((str(tmp_path / "b.txt.gz"),)))


def test_what_cannot_be_guessed_is_not():
    assert guess_encoding("Это русский текст".encode("koi8-r")) is None
    assert guess_encoding(b"\x89PNG\r\n\x1a\n\xff") is None
    assert guess_encoding("日本語の文章です".encode("shift-jis")) is None
    assert wide_encoding(b"paths\0apart\0by\0zeros\0and\0so\0on\0" * 20) is None
    assert wide_encoding(b"a,b\0,c\n") is None
    assert wide_encoding(b"one \0 in plain text" + b"." * 100) is None


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
