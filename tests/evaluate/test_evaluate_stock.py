"""Masked-language models of other architectures: the same figures as transformers alone, and nothing of theirs run."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_evaluate import command, edit_config, stock_log_probability
from tiny_run import SENTENCES, make_run, tiny_config, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from cramfast.errors import UserError
from cramfast.evaluate import blimp, checkpoints, perplexity, stock
from cramfast.evaluate.machine import Machine
from cramfast.export import export
from cramfast.text.tokenizer import train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = SHAPE | {"intermediate_size": 96, "max_position_embeddings": 64, "initializer_range": 0.3}
SPECIAL = {"pad_token_id": 0, "cls_token_id": 2, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3}
KINDS = {
    "bert": ("Bert", WIDE),
    "roberta": ("Roberta", WIDE | {"max_position_embeddings": 66, "pad_token_id": 1}),
    "modernbert": ("ModernBert", WIDE | SPECIAL | {"attention_bias": True, "local_attention": 8}),
    "electra": ("Electra", WIDE | {"embedding_size": 32}),
    "distilbert": (
        "DistilBert",
        {
            "vocab_size": 512, "dim": 64, "n_layers": 2, "n_heads": 2, "hidden_dim": 96,
            "max_position_embeddings": 64, "initializer_range": 0.3,
        },
    ),
}  # fmt: skip


def write(folder, kind):
    """A tiny random model with every weight drawn, and its tokenizer: RoBERTa's special tokens or BERT's."""
    name, config = KINDS[kind]
    torch.manual_seed(1)
    model = getattr(transformers, f"{name}ForMaskedLM")(getattr(transformers, f"{name}Config")(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if kind == "roberta":
        fast = train_tokenizer(SENTENCES * 50, "bpe", 512)
        names = {"[CLS]": "<s>", "[PAD]": "<pad>", "[SEP]": "</s>", "[UNK]": "<unk>", "[MASK]": "<mask>"}
        text = fast.to_str()
        for ours, theirs in names.items():
            text = text.replace(ours, theirs)
        path = folder / "tokenizer.json"
        path.write_text(text)
        special = {
            "cls_token": "<s>",
            "sep_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "mask_token": "<mask>",
        }
        PreTrainedTokenizerFast(tokenizer_file=str(path), **special).save_pretrained(folder)
    else:
        special = {f"{key}_token": f"[{key.upper()}]" for key in ("cls", "sep", "pad", "unk", "mask")}
        PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write(tmp_path_factory.mktemp("models") / "bert", "bert")


def test_figures_are_those_of_transformers(folder):
    """One sequence at a time, unpadded; the padded batches of mixed lengths must agree."""
    model = stock.load_masked(folder)
    assert isinstance(model, stock.StockModel) and model.name == f"{folder.name}, by transformers"
    assert model.max_len == 64
    plain = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    ids = {key: getattr(model, key) for key in ("cls", "sep", "mask")}
    masks = perplexity.Masks(fraction=0.3, sequence_len=16)
    result = perplexity.measure(model, SENTENCES, masks)
    losses = []
    for encoding, chosen, _ in perplexity.hide(model, SENTENCES, masks):
        for begin in range(0, len(encoding.ids), 14):
            part = encoding.ids[begin : begin + 14]
            hidden = [ids["mask"] if begin + i in chosen else token for i, token in enumerate(part)]
            with torch.no_grad():
                logits = plain(input_ids=torch.tensor([[ids["cls"], *hidden, ids["sep"]]])).logits[0].double()
            losses += [
                -float(logits[i + 1].log_softmax(-1)[token]) for i, token in enumerate(part) if begin + i in chosen
            ]
    assert result.hidden == len(losses) > 20
    assert result.loss == pytest.approx(np.mean(losses), abs=1e-4)


def test_blimp_of_another_architecture(bert):
    model = stock.load_masked(bert)
    plain = transformers.AutoModelForMaskedLM.from_pretrained(bert).eval()
    for sentence, found in blimp.pseudo_log_likelihoods(model, SENTENCES[:3]).items():
        ids = [model.cls, *model.tokenizer.encode(sentence, add_special_tokens=False).ids, model.sep]
        expected = sum(stock_log_probability(plain, ids, place) for place in range(1, len(ids) - 1))
        assert found == pytest.approx(expected, abs=1e-3)


def test_all_positions_can_be_used_and_no_more(folder):
    model = stock.load_masked(folder)
    text = [" ".join(SENTENCES)]
    assert perplexity.measure(model, text, perplexity.Masks(sequence_len=64)).hidden > 5
    with pytest.raises(UserError, match="takes 64 tokens"):
        perplexity.measure(model, text, perplexity.Masks(sequence_len=65))


def test_every_precision_runs(folder):
    model = stock.load_masked(folder)
    whole = perplexity.measure(model, SENTENCES, perplexity.Masks(sequence_len=16)).loss
    Machine(device="cpu", dtype="bfloat16").place(model.module)
    half = perplexity.measure(model, SENTENCES, perplexity.Masks(sequence_len=16)).loss
    assert half != whole and half == pytest.approx(whole, rel=0.1)


def test_ours_stays_ours(tmp_path):
    run = make_run(tmp_path / "run", tiny_config())
    out = export(run, tmp_path / "out", check=False).path
    assert isinstance(stock.load_masked(run), checkpoints.Checkpoint)
    assert isinstance(stock.load_masked(out), checkpoints.Checkpoint)
    theirs = stock.load_stock(out)
    masks = perplexity.Masks(sequence_len=32)
    ours, other = (perplexity.measure(model, SENTENCES, masks) for model in (stock.load_masked(out), theirs))
    assert ours.masks == other.masks and ours.loss == pytest.approx(other.loss, abs=1e-4)
    assert "every column compares" in perplexity.table({"a": ours, "b": other}, masks).notes[0]


def test_models_beside_each_other(tmp_path, bert, monkeypatch, capsys):
    run = make_run(tmp_path / "run", tiny_config())
    other, text = write(tmp_path / "roberta", "roberta"), tmp_path / "text.txt"
    text.write_text("\n\n".join(SENTENCES))
    words = ("perplexity", run, bert, other, "--data", text, "--threads", 1, "--sequence-len", 32)
    out = " ".join(command(monkeypatch, capsys, *words, "--out", tmp_path / "p.json").split())
    assert "bert, by transformers" in out and "no column compares strictly; use --unit words" in out
    command(monkeypatch, capsys, *words, "--unit", "words", "--out", tmp_path / "p.json")
    found = json.loads((tmp_path / "p.json").read_text())["results"]
    assert {name for name, figures in found.items() if figures["characters"]} == {
        "run, step 2", "bert, by transformers", "roberta, by transformers",
    }  # fmt: skip
    assert len({figures["characters"] for figures in found.values()}) == 1  # the same words, none of them unknown


def test_nothing_of_a_folder_is_run(bert, tmp_path):
    trap = "open(r'{}', 'w').write('run')\n".format(tmp_path / "trapped")
    auto = {"AutoConfig": "trap.C", "AutoModelForMaskedLM": "trap.M", "AutoTokenizer": ["trap.T", "trap.T"]}
    for number, kind in enumerate(("bert", "unheard-of")):
        folder = edit_config(bert, tmp_path / str(number), auto_map=auto, model_type=kind)
        (folder / "trap.py").write_text(trap)
        if kind == "bert":
            assert stock.load_stock(folder).max_len == 64  # the class that transformers itself has
        else:
            with pytest.raises(UserError, match="transformers cannot load it"):
                stock.load_stock(folder)
    folder = edit_config(bert, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="transformers cannot load it"):
        stock.load_stock(folder)
    assert not (tmp_path / "trapped").exists()


def test_models_without_a_prediction_head_are_refused(bert, tmp_path):
    folder = edit_config(bert, tmp_path / "headless")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "transform" not in name}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"no weights for cls\.predictions\.transform"):
        stock.load_masked(folder)
    (folder / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UserError, match="transformers cannot load it") as raised:
        stock.load_masked(folder)
    assert "\n" not in str(raised.value)


def test_glue_still_says_what_it_takes(bert):
    with pytest.raises(UserError, match="a bert model"):
        checkpoints.load(bert)
