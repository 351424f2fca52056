"""Which tokenizer a text gets, what it loses and what was not learned from: each is said."""

import random
import re
from pathlib import Path

import pytest
from test_prepare import OPTIONS, write_text
from tokenizers import Tokenizer

from cramfast import prepare as stage
from cramfast.errors import UserError
from cramfast.prepare import prepare
from cramfast.text import report
from cramfast.text.prepared import read_manifest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_text_in_another_script_is_not_lost_in_silence(tmp_path, capsys):
    def text(*paragraphs):
        path = tmp_path / "a.txt"
        path.write_text("\n\n".join(f"{paragraph} {i}." for i in range(200) for paragraph in paragraphs))
        return str(path)

    latin, russian = "An english paragraph of some words", "Это русский текст"
    wordpiece = OPTIONS | {"tokenizer": "wordpiece"}
    assert prepare((text(latin),), tmp_path / "latin", **OPTIONS)
    assert "no token" not in capsys.readouterr().err
    with pytest.raises(
        UserError, match=r"a\.txt: 8.\.\d+% of the characters have no token in wordpiece .* — --tokenizer"
    ):
        prepare((text(russian),), tmp_path / "russian", **wordpiece)
    chinese = "".join(chr(0x4E00 + 37 * i % 5000) for i in range(300)) + "。"
    with pytest.raises(
        UserError, match=r"a\.txt: 9.\.\d+% of the characters have no token in wordpiece .* — --tokenizer"
    ):
        prepare((text(chinese),), tmp_path / "chinese", **wordpiece)
    both = prepare((text(latin, russian),), tmp_path / "both", **wordpiece)
    lost = read_manifest(both)["lost_share"]
    said, page = capsys.readouterr().err, report.render(both)
    assert 0.2 < lost < 0.4 and f"a.txt: {lost:.2%} of the characters have no token in wordpiece (" in said
    for shown in ("к U+043A", "и U+0438"):
        assert shown in said
    assert said.count("no token") == 1 and "cyrillic small letter ka" in page and f"{100 * lost:.3g} % of all" in page
    bpe = read_manifest(prepare((text(russian),), tmp_path / "bpe", **OPTIONS | {"tokenizer": "bpe"}))
    assert bpe["lost_share"] == 0 and bpe["lost_characters"] == {}


def test_one_lost_sign_in_a_large_text_is_named(tmp_path, capsys):
    paragraphs = [f"An english paragraph of some words, number {i}." for i in range(600)]
    paragraphs[300] += " ⊬"
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    folder = prepare((str(tmp_path / "a.txt"),), tmp_path / "out", **OPTIONS | {"tokenizer": "wordpiece"})
    said = [line for line in capsys.readouterr().err.splitlines() if "no token" in line]
    assert len(said) == 1 and "under 0.01% of the characters" in said[0] and "⊬ U+22AC under 0.01%" in said[0]
    assert 0 < read_manifest(folder)["lost_share"] < 0.0001


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("bpe", "Это русский текст из нескольких слов, номер"),
        ("bpe", "Đây là tiếng Việt, ngôn ngữ có nhiều thanh điệu, số"),
        ("bpe", "Αυτό είναι ένα κείμενο στα ελληνικά, αριθμός"),
        ("wordpiece", "Größere Flüsse fließen häufig nach Süden, Nummer"),
        ("wordpiece", "A dose of 5 µg, ≥ 2½ times 10⁻⁶ m², number"),
    ],
)
def test_auto_takes_the_tokenizer_that_can_spell_the_text_and_says_so(tmp_path, capsys, kind, text):
    (tmp_path / "a.txt").write_text("\n\n".join(f"{text} {i}." for i in range(300)))
    manifest = read_manifest(prepare((str(tmp_path / "a.txt"),), tmp_path / "out", **OPTIONS))
    assert (manifest["tokenizer"], manifest["tokenizer_asked"], manifest["lost_share"]) == (kind, "auto", 0)
    said = [line for line in capsys.readouterr().err.splitlines() if "are held out" not in line]
    assert [line.startswith("note: --tokenizer auto takes bpe") for line in said] == [True] * (kind == "bpe")


def test_the_key_of_prepared_text_is_another_than_before_numbers_were_kept_apart(tmp_path, monkeypatch):
    data = write_text(tmp_path / "a.txt")
    after = prepare((data,), None, **OPTIONS)
    now = stage.FORMAT
    monkeypatch.setattr(stage, "FORMAT", 4)
    assert prepare((data,), None, **OPTIONS) != after and now == 5


def test_dumps_are_left_out_of_learning_and_said_and_are_in_the_ids(tmp_path, capsys):
    rng, text = random.Random(0), Path(write_text(tmp_path / "clean.txt", 600)).read_text()
    documents = text.strip().split("\n\n")
    letters = "".join(map(chr, (*range(65, 91), *range(97, 123), *range(48, 58), 43, 47)))
    for i in range(0, 600, 10):
        lines = ["".join(rng.choices(letters, k=76)) for _ in range(20)]
        documents[i] += "\n" + "\n".join(lines) + "\n" + "".join(rng.choices(letters, k=42)) + "=="
    (tmp_path / "mail.txt").write_text("\n\n".join(documents))
    kept = {}
    for kind in ("wordpiece", "bpe"):
        options = OPTIONS | {"tokenizer": kind, "vocab_size": 1024}
        clean = prepare((str(tmp_path / "clean.txt"),), tmp_path / f"clean-{kind}", **options)
        capsys.readouterr()
        mail = prepare((str(tmp_path / "mail.txt"),), tmp_path / f"mail-{kind}", **options)
        said = capsys.readouterr().err
        assert re.search(r"left out were \d\d\.\d% \(1,200 stretches of base64 or hex\); training reads them", said)
        one, two = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (clean, mail))
        assert one.get_vocab() == two.get_vocab(), kind
        kept[kind] = sum(split["characters"] for split in read_manifest(mail)["splits"].values())
    assert set(kept.values()) == {sum(map(len, documents))}
