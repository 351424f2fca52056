"""The fill-mask demo: which word it hides, and that it asks the model about that place."""

import io

import pytest
import torch
from rich.console import Console
from tiny_run import SENTENCES, make_run, tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cramfast.hf.check import packed_logits
from cramfast.hf.demo import fill_mask, show
from cramfast.session.checkpoint import load_model


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("run"), tiny_config())
    return load_model(run)[0], Tokenizer.from_file(str(run / "tokenizer.json"))


def byte_level(texts=SENTENCES, entries=512):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.BpeTrainer(vocab_size=entries, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def test_hides_whole_words_and_gives_probabilities(parts):
    results = fill_mask(*parts, SENTENCES)
    assert len(results) == 5
    for sentence, guesses, truth in results:
        assert sentence.replace("[MASK]", truth) in SENTENCES
        assert len(truth) >= 4 and truth.isalpha()
        chances = [chance for _, chance in guesses]
        assert len(guesses) == 5 and chances == sorted(chances, reverse=True) and 0 < sum(chances) <= 1
    assert results == fill_mask(*parts, SENTENCES)


def test_guesses_are_those_of_the_masked_place(parts):
    model, tokenizer = parts
    [(sentence, guesses, _)] = fill_mask(*parts, SENTENCES[2:3], top=1)
    ids = tokenizer.encode(sentence).ids
    with torch.no_grad():
        row_V = packed_logits(model, [ids])[ids.index(4)].softmax(-1)
    assert guesses[0][1] == pytest.approx(float(row_V.max()), rel=1e-4)


def test_prefers_content_words_and_passes_over_sentences_without_a_letter(parts):
    results = fill_mask(*parts, ["1 2 3!", "", "a b c", "The river with them."])
    assert [truth for _, _, truth in results] == ["b", "river"]
    assert fill_mask(*parts, ["1 2 3!"]) == []


def test_long_sentences_are_cut(parts):
    [(sentence, _, truth)] = fill_mask(*parts, [" ".join(SENTENCES * 3)])
    assert sentence.endswith(" …") and sentence[:-2].replace("[MASK]", truth) in " ".join(SENTENCES * 3)


def test_byte_level_tokens_keep_their_space_outside_the_mask(parts):
    for sentence, _, truth in fill_mask(parts[0], byte_level(), SENTENCES):
        assert sentence.replace("[MASK]", truth) in SENTENCES and truth == truth.strip()


@pytest.mark.parametrize(
    "text",
    [
        "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。床前明月光，疑是地上霜。举头望明月，低头思故乡。",
        "古池や蛙飛び込む水の音。閑さや岩にしみ入る蝉の声。夏草や兵どもが夢の跡。五月雨をあつめて早し最上川。",
        "ในน้ำมีปลา ในนามีข้าว เพื่อนบูบ้านในเมือง ลูทางไปค้า ขี่ม้าไปขาย ใครจักใคร่ค้าช้างค้า",
    ],
    ids=["Chinese", "Japanese", "Thai"],
)
@pytest.mark.parametrize("entries", [80, 120])  # so few merges that many characters lie in pieces
def test_scripts_without_spaces(parts, text, entries):
    sentences = text.replace("。", "。\n").split("\n")[:-1] or [text]
    tokenizer = byte_level(sentences, entries)
    results = fill_mask(parts[0], tokenizer, sentences)
    assert results
    for masked, _, truth in results:
        assert masked.replace("[MASK]", truth) in sentences and any(map(str.isalpha, truth))
        assert truth in map(tokenizer.decode, zip(tokenizer.encode(truth).ids, strict=True)), "no part of a character"


def test_show_prints_sentence_guesses_and_truth():
    console = Console(file=io.StringIO(), width=100)
    show(console, [("A [MASK] [x].", [("river", 0.5), ("[UNK]", 0.25)], "River")])
    said = console.file.getvalue()
    for part in ("A [MASK] [x].", "river 50%", "[UNK] 25%", "truth: River"):
        assert part in said
