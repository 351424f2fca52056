"""Exported folders against the installed transformers, 4.57 or 5.x alike; planted faults that the check must see."""

import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import SENTENCES, make_run, tiny_config, tiny_tokenizer
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

import cramfast.export
from cramfast.errors import UserError
from cramfast.export import FILES, describe, export, load
from cramfast.hf.check import TOLERANCE, packed_logits
from cramfast.session import checkpoint
from cramfast.session.checkpoint import load_model
from cramfast.stages import publish

LOCAL = {"window": 16, "global_every": 2, "rope_theta_global": 160000.0, "rope_theta_local": 5000.0}
VARIANTS = {
    "default": {},
    "local and global": LOCAL,
    "every third global, narrow": {"window": 5, "global_every": 3, "layers": 4},
    "norm bias": {"norm_bias": True},
    "silu": {"activation": "silu"},
    "no head": {"head": False},
    "no head, norm bias, local": {"head": False, "norm_bias": True, **LOCAL},
    "head width 32 of 128, long": {"width": 128, "heads": 4, "max_len": 512, "window": 128, "global_every": 2},
}


def stock(auto, folder, **changes):
    """A model of transformers in float32; 4.57 must not compile it."""
    config = AutoConfig.from_pretrained(folder, **changes)
    config.reference_compile = False
    return auto.from_pretrained(folder, config=config, dtype=torch.float32, attn_implementation="sdpa").eval()


def padded(folder):
    """A padded batch of two sentences, and where its tokens are."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer([SENTENCES[0], SENTENCES[2]], padding=True, return_tensors="pt")
    return encoded, encoded["attention_mask"].bool()


def hidden(model, encoded):
    """Our (N, D) hidden states of the same batch, end to end."""
    lengths = encoded["attention_mask"].sum(1)
    ids_N = encoded["input_ids"][encoded["attention_mask"].bool()].int()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    return model(ids_N, offsets, int(lengths.max()))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), tiny_config(**LOCAL))


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    return export(run, tmp_path_factory.mktemp("out") / "model").path


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
@torch.no_grad()
def test_masked_language_model(tmp_path, changes):
    config = tiny_config(**changes)
    run = make_run(tmp_path / "run", config)
    result = export(run, tmp_path / "out")
    assert result.max_difference <= TOLERANCE and not result.own_loader_reason
    assert {path.name for path in result.path.iterdir()} == FILES

    model, _ = load_model(run)
    ids = torch.randint(5, 200, (config.max_len,), generator=torch.Generator().manual_seed(1)).tolist()
    theirs = stock(AutoModelForMaskedLM, result.path)(input_ids=torch.tensor([ids])).logits[0]
    ours = packed_logits(model, [ids])
    assert float(ours.std()) > 0.3  # the comparison means something
    assert float((ours - theirs).abs().max()) <= TOLERANCE


def test_saved_again_it_reads_the_same_in_4_57(tmp_path):
    """What save_pretrained of 5.x leaves out of config.json is what 4.57 takes by itself; .ci/run has both."""
    config = tiny_config(layers=4, global_every=3, window=16)
    folder = export(make_run(tmp_path / "run", config), tmp_path / "out").path
    stock(AutoModelForMaskedLM, folder).save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    found = written.get("global_rope_theta", 160_000.0), written.get("local_rope_theta", 10_000.0)
    assert found == (config.rope_theta_global, config.rope_theta_local)
    assert written.get("global_attn_every_n_layers", 3) == 3 and written["local_attention"] == 16
    assert "put this" not in (folder / "README.md").read_text()
    other = export(make_run(tmp_path / "other", tiny_config(**LOCAL)), tmp_path / "theta").path
    assert "put this\n`config.json` back" in (other / "README.md").read_text()


@torch.no_grad()
def test_a_decoder_that_was_never_trained_is_new_in_transformers(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", tiny_config())
    model, config = load_model(run)
    model.fills_masks = False  # replaced-token detection
    monkeypatch.setattr(cramfast.export, "load_model", lambda folder: (model, config))
    folder = export(run, tmp_path / "out").path
    _, report = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert sorted(report["missing_keys"]) == ["decoder.weight"]
    _, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]


@torch.no_grad()
def test_backbone_and_sequence_classification(run, exported):
    model, _ = load_model(run)
    encoded, where = padded(exported)
    ours = hidden(model, encoded)
    backbone = stock(AutoModel, exported)(**encoded).last_hidden_state[where]
    assert float((ours - backbone).abs().max()) <= TOLERANCE

    classifier = stock(AutoModelForSequenceClassification, exported, num_labels=3)
    lengths = encoded["attention_mask"].sum(1).tolist()
    pooled = torch.stack([part.mean(0) for part in ours.split(lengths)])
    logits = classifier.classifier(model.transform(pooled))
    assert float((classifier(**encoded).logits - logits).abs().max()) <= TOLERANCE


@torch.no_grad()
def test_token_classification(run, exported):
    model, _ = load_model(run)
    encoded, where = padded(exported)
    tagger = stock(AutoModelForTokenClassification, exported, num_labels=5)
    logits = tagger.classifier(model.transform(hidden(model, encoded)))
    assert logits.shape[1] == 5
    assert float((tagger(**encoded).logits[where] - logits).abs().max()) <= TOLERANCE


def test_tokenizer(run, exported):
    ours, theirs = Tokenizer.from_file(str(run / "tokenizer.json")), AutoTokenizer.from_pretrained(exported)
    encoded = theirs(list(SENTENCES))
    assert encoded["input_ids"] == [ours.encode(sentence).ids for sentence in SENTENCES]
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert theirs.model_max_length == 128
    ids = (theirs.pad_token_id, theirs.unk_token_id, theirs.cls_token_id, theirs.sep_token_id, theirs.mask_token_id)
    assert ids == (0, 1, 2, 3, 4)
    assert theirs("a [MASK] b")["input_ids"].count(4) == 1


def test_config_speaks_to_both_generations(exported):
    config = json.loads((exported / "config.json").read_text())
    assert config["global_attn_every_n_layers"] == 2
    assert (config["global_rope_theta"], config["local_rope_theta"]) == (160000.0, 5000.0)
    assert config["layer_types"] == ["full_attention", "sliding_attention", "full_attention"]
    assert config["rope_parameters"]["full_attention"] == {"rope_type": "default", "rope_theta": 160000.0}
    assert config["rope_parameters"]["sliding_attention"]["rope_theta"] == 5000.0
    assert config["max_position_embeddings"] == 128 and config["decoder_bias"] is False


def test_model_card_has_the_figures(exported):
    text = (exported / "README.md").read_text()
    for part in ("6.900 → 5.250", "123 k", "12.5 %", "52,000 tokens", "6.500", "re-saving under 5.x", "pipeline_tag"):
        assert part in text, part


def test_a_text_whose_name_is_no_unicode(tmp_path):
    run = make_run(tmp_path / "run", tiny_config())
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"sources": [os.fsdecode(b"caf\xe9.txt")]}))
    result = export(run, tmp_path / "out", check=False)
    assert "caf?.txt" in (result.path / "README.md").read_text() and {p.name for p in result.path.iterdir()} == FILES


def swap_gate_halves(tensors):
    weight = tensors["model.layers.1.mlp.Wi.weight"]
    tensors["model.layers.1.mlp.Wi.weight"] = torch.cat(weight.chunk(2)[::-1]).contiguous()


def swap_queries_and_keys(tensors):
    q, k, v = tensors["model.layers.2.attn.Wqkv.weight"].chunk(3)
    tensors["model.layers.2.attn.Wqkv.weight"] = torch.cat([k, v, q])


def forget_a_norm(tensors):
    del tensors["model.layers.1.mlp_norm.weight"]


def unknown_weight(tensors):
    tensors["model.layers.1.mlp.extra.weight"] = torch.ones(3)


def not_finite(tensors):
    tensors["head.dense.weight"][3, 3] = math.nan


def sharpened(path, factor=1000.0):
    """Logits a thousand times as large, as no training makes them: differences grow with them."""
    tensors = load_file(path)
    tensors["final_norm.weight"] *= factor
    save_file(tensors, path)


def test_large_logits_may_differ_by_rounding_and_by_nothing_else(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", tiny_config(head=False))
    sharpened(checkpoint.newest(run) / "model.safetensors")
    result = export(run, tmp_path / "out")
    assert TOLERANCE < result.max_difference < 0.1 and "rounding" in describe(result)
    right = cramfast.export.hf_config
    monkeypatch.setattr(cramfast.export, "hf_config", lambda config, *rest: right(config, *rest) | {"norm_eps": 1e-4})
    with pytest.raises(UserError, match="times its own rounding"):
        export(run, tmp_path / "other")


@pytest.mark.parametrize(
    "fault",
    [swap_gate_halves, swap_queries_and_keys, forget_a_norm, unknown_weight, not_finite],
    ids=lambda f: f.__name__,
)
def test_faulty_weights_are_seen(run, tmp_path, monkeypatch, fault):
    right = cramfast.export.hf_tensors

    def wrong(model):
        tensors = {name: tensor.clone() for name, tensor in right(model).items()}
        fault(tensors)
        return tensors

    monkeypatch.setattr(cramfast.export, "hf_tensors", wrong)
    with pytest.raises(UserError, match="export check"):
        export(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "fault",
    [
        {
            "local_rope_theta": 160000.0,
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": 160000.0}
                for kind in ("full_attention", "sliding_attention")
            },
        },
        {"local_attention": 64},
        {"global_attn_every_n_layers": 1, "layer_types": ["full_attention"] * 3},
        {"classifier_activation": "silu"},
        {"hidden_activation": "silu"},
        {"norm_eps": 1e-2},
    ],
    ids=lambda fault: next(iter(fault)),
)
def test_faulty_config_is_seen(run, tmp_path, monkeypatch, fault):
    right = cramfast.export.hf_config
    monkeypatch.setattr(cramfast.export, "hf_config", lambda config, ids, *rest: right(config, ids) | fault)
    with pytest.raises(UserError, match="export check: logits"):
        export(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changes", [{"positions": "sinusoidal"}, {"first_norm": True}], ids=str)
@torch.no_grad()
def test_what_modernbert_cannot_express_comes_back_through_our_loader(tmp_path, changes):
    run = make_run(tmp_path / "run", tiny_config(head=False, norm_bias=True, norm_eps=1e-12, **changes))
    result = export(run, tmp_path / "out")
    assert result.own_loader_reason and "cramfast.export import load" in describe(result)
    assert "Stock `transformers` cannot load this folder" in (result.path / "README.md").read_text()
    loaded, tokenizer = load(result.path)
    ids = tokenizer.encode(SENTENCES[0]).ids
    assert torch.equal(packed_logits(loaded, [ids]), packed_logits(load_model(run)[0], [ids]))
    with pytest.raises((ValueError, KeyError)):
        AutoModelForMaskedLM.from_pretrained(result.path)
    weights = result.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"model\.safetensors: unreadable"):
        load(result.path)


def test_our_loader_sends_stock_folders_to_transformers(exported, tmp_path):
    with pytest.raises(UserError, match="from_pretrained"):
        load(exported)
    with pytest.raises(UserError, match="give an exported folder"):
        load(tmp_path)


def test_runs_that_cannot_be_exported(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="no checkpoint"):
        export(tmp_path / "nowhere", out)
    run = make_run(tmp_path / "run", tiny_config())
    weights = run / "checkpoints/step-00000002/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        export(run, out)
    weights.write_bytes(whole)
    (run / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        export(run, out)
    tiny_tokenizer().save(str(run / "tokenizer.json"))
    (run / "heldout.txt").unlink()
    with pytest.raises(UserError, match=r"heldout\.txt"):
        export(run, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("out", [".", ".."])
def test_the_folder_that_one_is_in_is_not_replaced(run, tmp_path, monkeypatch, out):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="you are in it"):
        export(run, out, check=False, overwrite=True)


def test_a_run_whose_folder_holds_something_else_ends_with_report_and_demonstration(tmp_path, capsys):
    run = make_run(tmp_path / "run", tiny_config())
    (run / "hf" / "onnx").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"holds onnx, .*: python -m cramfast\.export {run} FOLDER$"):
        publish(run)
    said = capsys.readouterr().out
    assert "[MASK]" in said and "held-out loss 6.900 -> 5.250" in said
    assert f"{run / 'report.html'}\n" in said and (run / "report.html").stat().st_size > 0


def test_a_taken_folder_is_replaced_only_when_asked_and_only_an_export(run, tmp_path):
    out = tmp_path / "out"
    export(run, out, check=False)
    with pytest.raises(UserError, match="--overwrite"):
        export(run, out, check=False)
    (out / "README.md").write_text("old")
    assert math.isnan(export(run, out, check=False, overwrite=True).max_difference)
    assert (out / "README.md").read_text() != "old"
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        export(run, out, check=False, overwrite=True)
    assert (out / "thesis.txt").exists() and [path.name for path in tmp_path.iterdir()] == ["out"]
