"""The encoder: equal to stock ModernBERT, equal on our operators and on the reference, and able to learn."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from fake_loader import FakeSource

from cramfast.config import ModelConfig
from cramfast.errors import UserError
from cramfast.kernels import reference
from cramfast.model import encoder
from cramfast.model.encoder import Encoder, flops_per_token, positions
from cramfast.optim.adamw import AdamW, FlatParameters
from cramfast.recipes import PRESETS, starting_config

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = (5, 40, 1, 23)


def batch(index: int = 0):
    return FakeSource(None, "train", sequence_len=16, batch_tokens=256, seed=0).batch(0, index, 0.3)


def small_model(**changes) -> Encoder:
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "layers": 3, "width": 64, "heads": 2, "feedforward": 96, "max_len": 64}
    return Encoder(ModelConfig(**(shape | changes)))


def packed(vocabulary: int):
    generator = torch.Generator().manual_seed(1)
    ids_N = torch.randint(5, vocabulary, (sum(LENGTHS) + 7,), generator=generator, dtype=torch.int32)
    return ids_N, torch.tensor([0, 5, 45, 46, 69, 69, 69], dtype=torch.int32)


def parameter_count(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Encoder(config).parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"global_every": 3, "window": 8, "rope_theta_global": 160000.0, "layers": 4},
        {"global_every": 2, "window": 15, "norm_bias": True, "activation": "silu"},
    ],
    ids=["global", "local windows", "bias and silu"],
)
def test_equals_stock_modernbert(changes):
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    model = small_model(**changes)
    config = model.config
    stock = ModernBertForMaskedLM(
        ModernBertConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=config.layers,
            num_attention_heads=2,
            hidden_activation=config.activation,
            max_position_embeddings=64,
            norm_bias=config.norm_bias,
            local_attention=config.window,
            global_attn_every_n_layers=config.global_every,
            global_rope_theta=config.rope_theta_global,
            local_rope_theta=config.rope_theta_local,
            decoder_bias=False,
            pad_token_id=0,
            bos_token_id=2,
            cls_token_id=2,
            eos_token_id=3,
            sep_token_id=3,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # away from the initial values, at which norms and biases say nothing
            parameter.add_(0.1 * torch.randn_like(parameter))
    named = {k if k.startswith("head.") else f"model.{k}": v for k, v in model.state_dict().items()}
    missing, unexpected = stock.load_state_dict(named, strict=False)
    assert (missing, unexpected) == (["decoder.weight"], [])  # tied to the embedding
    ids_N, cu_seqlens = packed(64)
    with torch.no_grad():
        ours_NV = model.logits(model(ids_N, cu_seqlens, 40))
        begin = 0
        for length in LENGTHS:
            theirs = stock(input_ids=ids_N[None, begin : begin + length].long()).logits[0]
            torch.testing.assert_close(ours_NV[begin : begin + length], theirs, atol=1e-4, rtol=0)
            begin += length


@pytest.mark.parametrize(
    "changes", [{}, {"positions": "sinusoidal", "first_norm": True, "head": False}], ids=["rotary", "sinusoidal"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_equal_reference(changes, dtype, monkeypatch):
    """Loss and every gradient; in bfloat16 both paths round at each operator, 2^-8 at a time."""
    results = []
    for operators in (encoder.kernels, reference):
        monkeypatch.setattr(encoder, "kernels", operators)
        model = small_model(norm_bias=True, global_every=2, window=8, **changes)
        flat = FlatParameters(model, dtype)
        loss = model.loss(batch())
        loss.backward()
        results.append((loss.detach(), flat.grad))
    (loss, grad), (true_loss, true_grad) = results
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(loss, true_loss, atol=0, rtol=tolerance)
    assert (grad - true_grad).norm() <= tolerance * true_grad.norm()
    assert true_grad.norm() > 0


def test_rows_that_are_not_predicted_change_nothing(monkeypatch):
    """Loss and every gradient are those of the whole sequence's hidden states, of which the masked rows are taken."""
    monkeypatch.setattr(encoder, "kernels", reference)
    gradients = []
    for spared in (True, False):
        model, data = small_model().double(), batch()
        if spared:
            loss = model.loss(data)
        else:
            hidden_ND = model(data.ids_N, data.cu_seqlens, data.max_seqlen)
            loss = F.cross_entropy(model.logits(hidden_ND)[data.masked_index_M], data.target_M)
        loss.backward()
        gradients.append([loss.detach().double(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


def test_overfits_one_batch():
    model = small_model()
    optimizer = AdamW(FlatParameters(model), beta1=0.9, beta2=0.98, eps=1e-12, weight_decay=0.0, max_norm=1.0)
    for _ in range(150):
        loss = model.loss(batch())
        loss.backward()
        optimizer.step(5e-3, loss.detach(), 1.0)
    assert loss < 0.1


# From the first run of this model, on the reference operators (float32, torch 2.13 on x86-64, 2026-11-24).
GOLDEN = [4.1761, 4.1528, 4.2027, 4.1570, 4.1353, 4.1404, 4.2194, 4.0590, 4.0799, 4.0589]


def test_ten_golden_losses():
    torch.manual_seed(0)
    if abs(float(torch.nn.init.trunc_normal_(torch.empty(64, 4)).sum()) - 1.69641) > 1e-3:
        pytest.skip(
            f"trunc_normal_ of torch {torch.__version__} draws other initial weights than that of 2.13 and later"
        )
    model = small_model()
    optimizer = AdamW(FlatParameters(model), beta1=0.9, beta2=0.98, eps=1e-12, weight_decay=0.01, max_norm=0.5)
    losses = []
    for index in range(10):
        loss = model.loss(batch(index % 7))
        loss.backward()
        optimizer.step(3e-3, loss.detach(), 1.0)
        losses.append(loss.item())
    assert losses == pytest.approx(GOLDEN, abs=3e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flat_parameters_follow_torch_adamw(dtype):
    """Three updates of two microbatches each, against torch's AdamW and clip on plain float32 parameters."""
    ours, theirs = small_model(norm_bias=True), small_model(norm_bias=True)
    flat = FlatParameters(ours, dtype)
    optimizer = AdamW(flat, beta1=0.9, beta2=0.98, eps=1e-8, weight_decay=0.1, max_norm=0.5)
    expected = dict(theirs.named_parameters())
    groups = [{"params": [p for p in expected.values() if (p.dim() < 2) == vector]} for vector in (False, True)]
    groups[1]["weight_decay"] = 0.0
    stock = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for step in range(3):
        for index in (2 * step, 2 * step + 1):
            loss = ours.loss(batch(index))
            loss.backward()
            (theirs.loss(batch(index)) / 2).backward()
        optimizer.step(1e-3, loss.detach(), 2.0)
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        stock.step()
        stock.zero_grad()
        assert optimizer.grad_norm == pytest.approx(norm.item(), rel=tolerance)
    assert not optimizer.skipped
    if dtype == torch.float32:
        for name, view in flat.views(flat.master):
            torch.testing.assert_close(view, expected[name].detach(), atol=2e-5, rtol=1e-4)
    else:
        assert torch.equal(flat.half, flat.master[: flat.matrices_end].bfloat16())
        assert ours.layers[0].attn.Wo.weight.dtype == torch.bfloat16
        assert ours.final_norm.weight.dtype == torch.float32


def test_segments_are_aligned_and_matrices_come_first():
    model = small_model(norm_bias=True, positions="sinusoidal")  # its learned scale has a single entry
    flat = FlatParameters(model, torch.bfloat16)
    for name, (begin, shape) in flat.places.items():
        assert begin % 16 == 0
        assert (begin < flat.matrices_end) == (len(shape) == 2), name
        assert dict(model.named_parameters())[name].data_ptr() % 32 == 0


def test_masked_token_gradient_is_summed_in_float32():
    """4096 equal rows would stop growing at 256 in bfloat16."""
    weight_VD = torch.zeros(8, 2, dtype=torch.bfloat16, requires_grad=True)
    out = encoder.TokenLookup.apply(torch.full((4096,), 4, dtype=torch.int32), weight_VD)
    out.backward(torch.ones_like(out))
    assert weight_VD.grad[4].tolist() == [4096, 4096]
    assert weight_VD.grad[5].tolist() == [0, 0]


def test_selected_rows_get_their_gradient():
    x_ND, index_M = torch.randn(6, 3, dtype=torch.float64, requires_grad=True), torch.tensor([4, 0, 5])
    assert torch.autograd.gradcheck(lambda x: encoder.SelectRows.apply(x, index_M), x_ND)


def test_positions_restart_in_each_sequence():
    ids_N, cu_seqlens = packed(64)
    expected = [p for length in LENGTHS for p in range(length)]
    assert positions(ids_N, cu_seqlens, 40)[: sum(LENGTHS)].tolist() == expected


def test_figures_of_the_paper():
    """119.59 M parameters and 623 MFLOP per token at 25 % masks, had the last layer spared nothing."""
    config = PRESETS["crammed_bert"]("cuda").model
    assert parameter_count(config) == pytest.approx(119.59e6, rel=1e-4)
    spared = 0.75 * 6 * (config.width**2 + 3 * config.width * config.feedforward)
    assert flops_per_token(config, 0.25, 128) + spared == pytest.approx(623e6, rel=1e-3)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_presets_are_possible(device):
    for name, recipe in PRESETS.items():
        config = recipe(device)
        assert config.preset == name
        assert config.batch_tokens % config.microbatch_tokens == 0
    assert parameter_count(PRESETS["base"](device).model) == pytest.approx(120e6, rel=0.01)


def test_crammed_is_the_papers_recipe_at_every_size():
    paper = PRESETS["crammed_bert"]("cuda")
    assert dataclasses.replace(starting_config("base", "crammed", "cuda"), preset="crammed_bert") == paper
    assert (
        paper.batch_tokens == 8192 * 128 and paper.lr == 1e-3 and starting_config("crammed_bert", None, "cuda") == paper
    )
    for size in ("tiny", "mini", "small"):
        plain, crammed = PRESETS[size]("cpu"), starting_config(size, "crammed", "cpu")
        assert dataclasses.replace(paper.model, **shape_of(plain.model)) == crammed.model
        kept = ("preset", "model", "budget", "lr", "microbatch_tokens", "batch_tokens", "eval_interval")
        kept += ("checkpoint_interval", "heldout_tokens", "curation")
        assert crammed.curation.max_tokens_per_char == 0.3 and paper.curation.max_tokens_per_char == 0.25
        assert dataclasses.replace(crammed, **{key: getattr(paper, key) for key in kept}) == paper
    assert starting_config("mini", "cramfast", "cpu") == starting_config("mini", None, "cpu") == PRESETS["mini"]("cpu")
    with pytest.raises(UserError, match="crammed_bert with recipe=cramfast"):
        starting_config("crammed_bert", "cramfast", "cpu")
    with pytest.raises(UserError, match=r"recipe='fast' .*cramfast, crammed"):
        starting_config("mini", "fast", "cpu")


def shape_of(config: ModelConfig) -> dict[str, int]:
    return {key: getattr(config, key) for key in ("vocab_size", "layers", "width", "heads", "feedforward")}


def test_z_loss_is_the_square_of_log_z():
    model = small_model()
    plain, hidden_MD = model.loss(batch()), model.masked_hidden(batch())
    model.z_loss = 0.25
    log_z_M = model.logits(hidden_MD).logsumexp(-1)
    assert model.loss(batch()).item() == pytest.approx((plain + 0.25 * log_z_M.square().mean()).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"heads": 5}, "heads"),
        ({"vocab_size": 1000}, "vocab_size"),
        ({"layers": 0}, "layers"),
        ({"width": 60}, "width"),
    ],
)
def test_impossible_models_are_named(changes, word):
    with pytest.raises(UserError, match=word):
        small_model(**changes)


def test_first_loss_is_that_of_guessing():
    assert small_model().loss(batch()).item() == pytest.approx(math.log(64), abs=0.1)
