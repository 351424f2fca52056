"""A tokenizer.json of one's own is tried before training as the export tries it afterwards."""

import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors

from cramfast.errors import UserError
from cramfast.prepare import prepare
from cramfast.text.giventokenizer import given_tokenizer
from cramfast.text.prepared import read_manifest
from cramfast.text.specials import CLS, MASK, SEP
from cramfast.text.tokenizer import train_tokenizer

TEXTS = [f"Words of a text, the {number}th, that a tokenizer learns from." for number in range(200)]


def saved(tmp_path, change, kind="bpe"):
    tokenizer = train_tokenizer(TEXTS, kind, 512)
    change(tokenizer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def without_template(tokenizer):
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)


def swapped_template(tokenizer):
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[SEP] $A [CLS]", pair="[SEP] $A [CLS] $B [CLS]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )


def swapped_pairs(tokenizer):
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $B [SEP] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )


def dropout(tokenizer):
    tokenizer.model.dropout = 0.3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_template, "its template is replaced by [CLS] A [SEP]"),
        (swapped_template, "its template is replaced by [CLS] A [SEP]"),
        (swapped_pairs, "its template is replaced by [CLS] A [SEP]"),
        (dropout, "its BPE dropout of 0.3 is switched off"),
    ],
)
def test_what_can_be_mended_is_and_said(tmp_path, capsys, change, said):
    path = saved(tmp_path, change)
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS))
    folder = prepare((str(tmp_path / "a.txt"),), tmp_path / "out", tokenizer=str(path))
    assert f"note: tokenizer {path}: {said}" in capsys.readouterr().err and said in str(read_manifest(folder)["notes"])
    kept = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = train_tokenizer(TEXTS, "bpe", 512)
    for text in (("A text, another.",), ("A text, another.", "A second one.")):
        assert all(kept.encode(*text).ids == ours.encode(*text).ids for _ in range(9))


def test_one_that_is_as_ours_is_taken_without_a_word(tmp_path):
    for kind in ("wordpiece", "bpe"):
        assert given_tokenizer(saved(tmp_path, lambda tokenizer: None, kind))[1] == []


def marked(tokenizer):
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Prepend("[MASK] "), pre_tokenizers.WhitespaceSplit()


def test_special_tokens_in_plain_text_are_refused(tmp_path):
    path = saved(tmp_path, marked, "wordpiece")
    assert MASK in Tokenizer.from_file(str(path)).encode("a").ids
    with pytest.raises(UserError, match=r"json: its normaliser or pre-tokenizer adds special tokens to plain text — "):
        given_tokenizer(path)
