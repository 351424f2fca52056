"""AutoTokenizer beside training: texts, pairs, masked words, words one by one, a tokenizer's own special tokens."""

import json
import re
from dataclasses import replace

import pytest
import torch
from tiny_run import SENTENCES, make_run, tiny_config
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from cramfast import export, stages
from cramfast.errors import UserError
from cramfast.hf.tokens import compare_tokens, own_special_tokens, words_alone_are_those_of_a_text
from cramfast.prepare import prepare
from cramfast.recipes import resolve, starting_config
from cramfast.text.giventokenizer import given_tokenizer
from cramfast.text.prepared import PreparedText
from cramfast.text.specials import MASK, SPECIAL_TOKENS
from cramfast.text.tokenizer import for_text, framing, train_tokenizer
from cramfast.text.wordcache import WordCache

WORDS = tuple(re.findall("[a-z]+", "the eagle always sharpens pencils and draws small maps of rivers near old towns"))
TEXTS = [
    " ".join(WORDS[(7 * i + j * (1 + i % 5)) % len(WORDS)] for j in range(12)).capitalize() + "." for i in range(400)
]


def given(folder, tokenizer):
    """A tokenizer as a run takes one that is given, and a folder with its files as an export has them."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "given.json"))
    mended, notes = given_tokenizer(folder / "given.json")
    mended.save(str(folder / "given.json"))
    export._write_tokenizer(folder / "given.json", folder, tiny_config())
    return mended, notes


def gpt2(prefix=False):
    """Byte-level BPE as GPT-2 has it: a space belongs to the word after it."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = framing()
    tokenizer.add_special_tokens([f"[unused{i}]" for i in range(-tokenizer.get_vocab_size() % 64)])
    return tokenizer


def with_names():
    tokenizer = train_tokenizer(TEXTS, "bpe", 512)
    tokenizer.add_special_tokens([AddedToken("[NAME]", special=True), AddedToken("[DATE]", special=True)])
    tokenizer.add_special_tokens([f"[unused{1000 + i}]" for i in range(-tokenizer.get_vocab_size() % 64)])
    return tokenizer


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_ours_are_alike_and_words_alone_too(tmp_path, kind):
    tokenizer, notes = given(tmp_path, train_tokenizer(TEXTS, kind, 512))
    compare_tokens(tmp_path, tokenizer, TEXTS)
    assert not notes and words_alone_are_those_of_a_text(tmp_path, TEXTS)


@pytest.mark.parametrize(("prefix", "alone"), [(False, False), (True, True)])
def test_a_mask_takes_the_space_of_its_word_also_in_a_given_tokenizer(tmp_path, prefix, alone):
    tokenizer, notes = given(tmp_path, gpt2(prefix))
    assert len(notes) == 1 and "[MASK] takes the space before it" in notes[0]
    compare_tokens(tmp_path, tokenizer, TEXTS)
    assert words_alone_are_those_of_a_text(tmp_path, TEXTS) == alone


def test_a_mask_that_leaves_its_space_is_found(tmp_path):
    given(tmp_path, train_tokenizer(TEXTS, "bpe", 512))
    parts = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    (mask,) = (token for token in parts["added_tokens"] if token["id"] == MASK)
    mask["lstrip"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    with pytest.raises(UserError, match=r"export check: AutoTokenizer splits the masked .*'Ġ \[MASK\] .* training has"):
        compare_tokens(tmp_path, tokenizer, TEXTS)


def test_another_template_of_pairs_is_found(tmp_path):
    tokenizer, _ = given(tmp_path, train_tokenizer(TEXTS, "bpe", 512))
    parts = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    parts["post_processor"]["pair"].insert(3, parts["post_processor"]["pair"][0])  # [CLS] A [SEP] [CLS] B [SEP]
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    with pytest.raises(UserError, match="export check: AutoTokenizer splits the pair of"):
        compare_tokens(tmp_path, tokenizer, TEXTS)


def test_special_tokens_of_a_given_tokenizer_are_tokens_of_the_text(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokenizer, _ = given(tmp_path, with_names())
    assert own_special_tokens(tokenizer) == ["[DATE]", "[NAME]"]
    text = "the eagle saw [NAME] on [DATE] near [MASK] towns"
    tokens = for_text(tokenizer).encode(text, add_special_tokens=False).tokens
    assert tokens.count("[NAME]") == tokens.count("[DATE]") == 1 and "[MASK]" not in tokens
    assert WordCache(tokenizer).encode([text])[0].tolist() == [tokenizer.token_to_id(token) for token in tokens]
    compare_tokens(tmp_path, tokenizer, TEXTS)
    (tmp_path / "notes.txt").write_text("\n\n".join(text.replace(" ", " [NAME] ", 1) for text in TEXTS))
    folder = prepare((str(tmp_path / "notes.txt"),), tmp_path / "out", tokenizer=str(tmp_path / "given.json"))
    found = sum(
        int((PreparedText(folder, side).ids == tokenizer.token_to_id("[NAME]")).sum()) for side in ("train", "heldout")
    )
    assert found == len(TEXTS)


def test_what_keeps_an_export_back_is_known_before_the_first_step(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", tiny_config())
    config = resolve(replace(starting_config("tiny", None, "cpu"), model=tiny_config()))
    state = torch.get_rng_state()
    stages.rehearse_export(config, run)
    assert torch.equal(state, torch.get_rng_state()) and len(SENTENCES) > 1
    right = export.hf_config
    monkeypatch.setattr(export, "hf_config", lambda *arguments: right(*arguments) | {"norm_eps": 1e-2})
    with pytest.raises(UserError, match="before the first step: export check: logits of transformers differ"):
        stages.rehearse_export(config, run)
