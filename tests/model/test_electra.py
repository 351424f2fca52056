"""Replaced-token detection: samples that follow the softmax and hang on the batch alone, labels, gradients, export."""

import dataclasses
import json
import math

import pytest
import torch
from fake_loader import FakeSource, rows, run
from safetensors.torch import save_file
from tiny_run import make_run, tiny_config

from cramfast import stages
from cramfast.batches import feed
from cramfast.config import ModelConfig
from cramfast.errors import UserError
from cramfast.evaluate import checkpoints, masked
from cramfast.export import export
from cramfast.model.electra import DETECTION_WEIGHT, Discriminator, generator_config, sample, uniform
from cramfast.model.encoder import flops_per_token
from cramfast.session import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def batch(index: int = 0):
    return FakeSource(None, "train", sequence_len=16, batch_tokens=256, seed=0).batch(0, index, 0.3)


def discriminator(**changes) -> Discriminator:
    torch.manual_seed(0)
    shape = {"vocab_size": 128, "layers": 4, "width": 64, "heads": 2, "feedforward": 96, "max_len": 32}
    return Discriminator(ModelConfig(**(shape | changes)))


def test_samples_follow_the_softmax():
    logits_V = torch.randn(192, generator=torch.Generator().manual_seed(0)) * 2
    draws = 40_000
    uniform_M = (torch.arange(draws) + 0.5) / draws
    counts_V = torch.bincount(sample(logits_V.expand(draws, -1), uniform_M), minlength=192)
    # evenly spread chances: every count is its share to the rounding of both ends
    assert (counts_V - draws * logits_V.softmax(0)).abs().max() < 2
    steep = torch.full((2, 192), -1e4)
    steep[0, 5] = steep[1, 191] = 0.0
    assert sample(steep, torch.tensor([1e-7, 1 - 1e-7])).tolist() == [5, 191]


def test_chances_are_even_and_hang_on_the_batch_alone():
    one = batch()
    first = uniform(one.ids_N, one.masked_index_M)
    assert torch.equal(first, uniform(one.ids_N.clone(), one.masked_index_M.clone()))
    changed = one.ids_N.clone()
    changed[-1] += 1
    assert torch.isclose(uniform(changed, one.masked_index_M), first, atol=1e-3).float().mean() < 0.1
    many = torch.cat([uniform(batch(i).ids_N, batch(i).masked_index_M) for i in range(100)])
    assert many.min() > 0 and many.max() < 1
    share = torch.histc(many, 10, 0, 1) / len(many)
    assert (share - 0.1).abs().max() < 5 * math.sqrt(0.09 / len(many))  # five standard deviations


def test_only_masked_words_are_replaced_and_a_right_guess_is_no_replacement():
    model, one = discriminator(), batch()
    one.target_M[:3] = -100  # rows left over
    ids_N, replaced_N = model.corrupt(one)
    truth_N = one.ids_N.clone()
    truth_N[one.masked_index_M[3:]] = one.target_M[3:].int()
    assert ids_N.dtype == one.ids_N.dtype and torch.equal(replaced_N.bool(), ids_N != truth_N)
    assert 0.9 < replaced_N[one.masked_index_M[3:]].mean() <= 1  # an untrained generator guesses right 1 time in 128
    assert not replaced_N[one.masked_index_M[:3]].any() and replaced_N.sum() == (ids_N != truth_N).sum()


def test_the_loss_is_both_and_samples_let_no_gradient_through():
    model, one = discriminator(), batch()
    torch.nn.init.normal_(model.detector.weight)
    total, words, found = model.loss(one), model.generator.loss(one), model.detection_loss(one)
    assert total.item() == pytest.approx((words + DETECTION_WEIGHT * found).item(), rel=1e-6)
    found.backward()
    assert all(p.grad is None for n, p in model.named_parameters() if n.startswith("generator."))
    assert model.layers[0].attn.Wo.weight.grad.any() and model.detector.bias.grad.any()
    plain = discriminator()
    assert plain.detection_loss(one).item() == pytest.approx(math.log(2), rel=1e-6)


def test_rows_of_no_sequence_count_nowhere():
    model, one = discriminator(), batch()
    torch.nn.init.normal_(model.detector.weight)
    offsets = one.cu_seqlens.clone()
    offsets[offsets == 256] = offsets[offsets < 256].max()  # the last sequence is padding now
    cut = dataclasses.replace(one, cu_seqlens=offsets)
    ids_N, replaced_N = model.corrupt(cut)
    end = int(offsets[-1])
    logit_N = model.transform(model(ids_N, offsets, 16)) @ model.detector.weight + model.detector.bias
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logit_N[:end], replaced_N[:end])
    assert model.detection_loss(cut).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_embedding_table_is_one_and_the_generator_small():
    model = discriminator()
    assert model.generator.embeddings.tok_embeddings.weight is model.embeddings.tok_embeddings.weight
    assert sum("tok_embeddings" in name for name, _ in model.named_parameters()) == 1
    assert len(model.generator.layers) == 1 and len(model.layers) == 4


def test_flops_count_both_passes():
    one, config = batch(), discriminator().config
    small = flops_per_token(generator_config(config), len(one.target_M) / one.tokens, 0)
    words = feed.batch_flops(config, one) / one.tokens
    both = feed.batch_flops(config, one, "rtd") / one.tokens
    assert both > small + flops_per_token(config, 0.0, 0) and both != words


def test_learns_to_detect(tmp_path, fake_text):
    found = rows(run(tmp_path / "run", "80steps", objective="rtd"), "heldout_loss")
    assert found[0]["heldout_detection_loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert found[-1]["heldout_detection_loss"] < 0.55 and found[-1]["heldout_loss"] < found[0]["heldout_loss"] - 0.2
    model, _ = checkpoint.load_model(tmp_path / "run")
    assert not model.fills_masks and len(model.layers) == 2 and not hasattr(model, "generator")


@pytest.mark.parametrize("positions", ["rotary", "sinusoidal"])
def test_export_says_that_it_fills_no_masks(tmp_path, positions, capsys):
    folder = make_run(tmp_path / "run", tiny_config(positions=positions))
    model, config = checkpoint.load_model(folder)
    stored = dict(model.named_parameters()) | {"detector.weight": torch.zeros(config.width)}
    save_file({k: v.detach() for k, v in stored.items()}, checkpoint.newest(folder) / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"objective": "rtd"}))
    result = export(folder, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "fills no masks" in card and "pipeline_tag: feature-extraction" in card and "fill-mask" not in card
    if positions == "rotary":
        assert result.max_difference < 1e-4
        assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == ["ModernBertModel"]
    for path in (folder, tmp_path / "hf"):
        with pytest.raises(UserError, match="fills no masks — use glue or task"):
            masked.log_probabilities(checkpoints.load(path), [])
    stages.print_demo(folder)
    assert "fills no masks" in capsys.readouterr().out
