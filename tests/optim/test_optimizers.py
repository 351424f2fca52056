"""StableAdamW, Muon and the average of the weights: their formulas in float64, and what all optimizers promise."""

import math

import pytest
import torch
from fake_loader import rows, run, small_config, weights

from cramfast.batches.feed import evaluate, heldout_batches
from cramfast.config import ModelConfig
from cramfast.model.encoder import Encoder
from cramfast.optim.adamw import AdamW, FlatParameters, StableAdamW
from cramfast.optim.make import OPTIMIZERS
from cramfast.optim.muon import MOMENTUM, NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS, Muon, orthogonalised
from cramfast.session import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = {"vocab_size": 64, "layers": 2, "width": 64, "heads": 2, "feedforward": 96, "max_len": 32, "norm_bias": True}
PLAIN = {"beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "weight_decay": 0.1, "max_norm": 0.0}
LOSS = torch.zeros(())
every_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS)


def optimizer_of(kind=AdamW, dtype=torch.float32, **changes) -> AdamW:
    torch.manual_seed(0)
    return kind(FlatParameters(Encoder(ModelConfig(**SHAPE)), dtype), **(PLAIN | changes))


def fill_gradient(flat: FlatParameters, seed: int, factor: float = 1.0) -> dict[str, torch.Tensor]:
    """A random gradient for every parameter; its values by name."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator) * factor for name, (_, shape) in flat.places.items()}
    for name, view in flat.views(flat.grad):
        view.copy_(drawn[name])
    return drawn


def snapshot(optimizer: AdamW) -> dict[str, torch.Tensor]:
    """Copies of everything that an update may change, but for the verdict."""
    found = {"master": optimizer.flat.master} | optimizer.state()
    if optimizer.flat.half is not None:
        found["half"] = optimizer.flat.half
    if optimizer.average is not None:
        found["average"] = optimizer.average.values
    return {name: tensor.clone() for name, tensor in found.items()}


# What all of them promise


@every_optimizer
@pytest.mark.parametrize("place", [0, -1], ids=["first matrix", "last vector"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(kind, place, value):
    optimizer = optimizer_of(kind, torch.bfloat16, max_norm=0.5, ema_decay=0.9)
    fill_gradient(optimizer.flat, 0)
    optimizer.step(1e-2, LOSS, 1)
    before = snapshot(optimizer)
    fill_gradient(optimizer.flat, 1)
    optimizer.flat.grad[place] = value
    optimizer.step(1e-2, LOSS, 1)
    assert optimizer.skipped and not math.isfinite(optimizer.grad_norm)
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(optimizer).items())
    fill_gradient(optimizer.flat, 1)
    optimizer.step(1e-2, LOSS + math.inf, 1)
    assert optimizer.skipped
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(optimizer).items())
    fill_gradient(optimizer.flat, 1)
    optimizer.step(1e-2, LOSS, 1)
    assert not optimizer.skipped and optimizer.scalars[1] == 2
    changed = {name for name, tensor in snapshot(optimizer).items() if not torch.equal(tensor, before[name])}
    assert changed == set(before)


@every_optimizer
def test_clip_and_loss_scale_act_on_the_whole_gradient(kind):
    """Moments and momentum see the gradient of norm 0.5, whatever factors it came with."""
    scaled, plain = optimizer_of(kind, max_norm=0.5), optimizer_of(kind)
    scaled.loss_scale.set(1024.0, 0)
    drawn = fill_gradient(scaled.flat, 0, 3 * 1024.0)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in drawn.values())) / (3 * 1024.0)
    fill_gradient(plain.flat, 0, 0.5 / norm)
    scaled.step(1e-2, LOSS, 3)
    plain.step(1e-2, LOSS, 1)
    assert scaled.grad_norm == pytest.approx(norm, rel=1e-5) and plain.grad_norm == pytest.approx(0.5, rel=1e-5)
    for name, tensor in plain.state().items():
        torch.testing.assert_close(scaled.state()[name], tensor)


@every_optimizer
def test_half_precision_copies_follow_and_gradients_are_cleared(kind):
    optimizer = optimizer_of(kind, torch.bfloat16)
    flat = optimizer.flat
    before = flat.half.clone()
    fill_gradient(flat, 0)
    optimizer.step(1e-2, LOSS, 1)
    assert torch.equal(flat.half, flat.master[: flat.matrices_end].bfloat16()) and not flat.grad.any()
    moved = (flat.half != before).float()
    assert moved[: flat.hidden_end].mean() > 0.9 and moved[flat.hidden_end :].mean() > 0.9


@every_optimizer
def test_reset_forgets_all_but_the_weights(kind):
    optimizer = optimizer_of(kind, ema_decay=0.9)
    fill_gradient(optimizer.flat, 0)
    before = snapshot(optimizer)
    optimizer.step(0.0, LOSS, 1)
    optimizer.reset()
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(optimizer).items())


@every_optimizer
def test_learns(kind, tmp_path, fake_text):
    name = next(name for name, one in OPTIMIZERS.items() if one is kind)
    folder = run(tmp_path / "run", "60steps", optimizer=name, lr=3e-2 if kind is Muon else 3e-3)
    losses = [row["heldout_loss"] for row in rows(folder, "heldout_loss")]
    assert losses[-1] < losses[0] - 0.5


# StableAdamW


def stable_step(p, g, m, v, step: int, lr: float, decay: float) -> float:
    """Algorithm 2 of arXiv:2304.13013 on one tensor, in place; the factor on the learning rate."""
    m.mul_(0.9).add_(g, alpha=0.1)
    v.mul_(0.98).add_(g.square(), alpha=0.02)
    corrected = v / (1 - 0.98**step)
    share = 1 / max(1.0, float((g.square() / corrected.clamp(min=1e-16)).mean().sqrt()))
    p.sub_(lr * share * decay * p + lr * share * (m / (1 - 0.9**step)) / (corrected.sqrt() + 1e-8))
    return share


def test_stable_adamw_follows_its_formula():
    """The gradient of the third update is a hundred times larger, in half of the tensors."""
    optimizer = optimizer_of(StableAdamW)
    flat = optimizer.flat
    truth = {name: view.double() for name, view in flat.views(flat.master)}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in truth.items()}
    for step in range(1, 5):
        drawn = fill_gradient(flat, step)
        shares = []
        for index, (name, view) in enumerate(flat.views(flat.grad)):
            view.mul_(100.0 if step == 3 and index % 2 else 1.0)
            decay = 0.1 if view.dim() >= 2 else 0.0
            shares.append(stable_step(truth[name], view.double(), *moments[name], step, 1e-2, decay))
        optimizer.step(1e-2, LOSS, 1)
        torch.testing.assert_close(optimizer.segment_lr, torch.tensor(shares), rtol=1e-5, atol=0)
        if step == 3:  # v holds 2 % of the outlier by now, a third of it after the bias correction
            assert all((share < 0.8) == bool(index % 2) for index, share in enumerate(shares))
    assert len(shares) == len(drawn)
    for name, view in flat.views(flat.master):
        torch.testing.assert_close(view, truth[name].float(), rtol=1e-5, atol=1e-6)


# Muon


def exactly_orthogonalised(x: torch.Tensor) -> torch.Tensor:
    """The polynomial on the singular values, by a decomposition in float64."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True).clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        s = a * s + b * s**3 + c * s**5
    return u @ (s[..., None] * vh)


@pytest.mark.parametrize("shape", [(1, 48, 48), (3, 16, 40), (2, 40, 16), (1, 1, 8)])
def test_orthogonalised_is_the_polynomial_of_the_singular_values(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 7
    exact = exactly_orthogonalised(x)
    values = torch.linalg.svdvals(exact)
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    steepness = NEWTON_SCHULZ[0] ** NEWTON_SCHULZ_STEPS  # how much the polynomial can magnify a rounding
    error = (orthogonalised(x) - exact).abs().max()
    assert error < steepness * torch.finfo(torch.float32).eps
    assert torch.equal(orthogonalised(torch.zeros(shape)), torch.zeros(shape))


def matrices(flat: FlatParameters, buffer: torch.Tensor) -> dict[tuple[str, int], torch.Tensor]:
    """Muon's matrices: a linear layer's that hold several, one by one."""
    found = {}
    for name, view in flat.views(buffer[: flat.hidden_end]):
        parts = 3 if "Wqkv" in name else 2 if "Wi" in name else 1
        found |= {(name, index): part for index, part in enumerate(view.chunk(parts))}
    return found


def test_muon_is_as_close_to_its_formula_as_torchs_own():
    """Three updates in bfloat16 against float64 and beside torch.optim.Muon, which always multiplies in bfloat16."""
    optimizer = optimizer_of(Muon, torch.bfloat16)
    flat = optimizer.flat
    truth = {key: part.double() for key, part in matrices(flat, flat.master).items()}
    momentum = {key: torch.zeros_like(part) for key, part in truth.items()}
    stock = {key: torch.nn.Parameter(part.clone()) for key, part in matrices(flat, flat.master).items()}
    options = {"lr": 1e-2, "weight_decay": 0.1, "momentum": MOMENTUM, "adjust_lr_fn": "match_rms_adamw"}
    torchs = torch.optim.Muon(stock.values(), **options)
    for step in range(3):
        fill_gradient(flat, step)
        for key, part in matrices(flat, flat.grad).items():
            stock[key].grad = part.clone()
            g, m = part.double(), momentum[key]
            m.lerp_(g, 1 - MOMENTUM)
            scale = 0.2 * math.sqrt(max(g.shape))
            truth[key].mul_(1 - 1e-2 * 0.1).sub_(1e-2 * scale * exactly_orthogonalised(g.lerp(m, MOMENTUM)))
        optimizer.step(1e-2, LOSS, 1)
        torchs.step()
    ours = matrices(flat, flat.master)
    assert len(ours) == 2 * (3 + 1 + 2 + 1) + 1 and not any("embeddings" in name for name, _ in ours)
    error, theirs = (
        max(float((found[key].detach() - true).abs().max()) for key, true in truth.items()) for found in (ours, stock)
    )
    assert error <= 2 * theirs + torch.finfo(torch.float32).eps
    assert error < 0.05 * 3 * 1e-2  # of three steps of the size of an AdamW step


def test_muon_leaves_the_rest_to_adamw():
    muon, adamw = optimizer_of(Muon), optimizer_of(AdamW)
    for step in range(3):
        for optimizer in (muon, adamw):
            fill_gradient(optimizer.flat, step)
            optimizer.step(1e-2, LOSS, 1)
    end = muon.flat.hidden_end
    assert torch.equal(muon.flat.master[end:], adamw.flat.master[end:])
    assert not torch.equal(muon.flat.master[:end], adamw.flat.master[:end])
    assert {name.split(".", 1)[1] for name in muon.state() if name.startswith("exp_avg.")} == {
        name for name, (begin, _) in muon.flat.places.items() if begin >= end
    }


# The average


def test_the_average_follows_the_weights():
    optimizer = optimizer_of(ema_decay=0.5)
    truth = optimizer.flat.master.double()
    for step in range(1, 13):
        fill_gradient(optimizer.flat, step)
        optimizer.step(1e-2, LOSS, 1)
        decay = min(0.5, (1 + step) / (10 + step))
        truth = decay * truth + (1 - decay) * optimizer.flat.master.double()
    torch.testing.assert_close(optimizer.average.values, truth.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_model_has_the_average_inside_the_block_and_its_own_weights_after_it(dtype):
    optimizer = optimizer_of(dtype=dtype, ema_decay=0.9)
    fill_gradient(optimizer.flat, 0)
    optimizer.step(1e-2, LOSS, 1)
    before = snapshot(optimizer)
    with pytest.raises(KeyError), optimizer.averaged():
        assert torch.equal(optimizer.flat.master, before["average"])
        if dtype != torch.float32:
            assert torch.equal(optimizer.flat.half, before["average"][: optimizer.flat.matrices_end].to(dtype))
        raise KeyError
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(optimizer).items())


def test_evaluation_and_checkpoint_give_the_average(tmp_path, fake_text):
    plain, folder = run(tmp_path / "plain", "20steps"), run(tmp_path / "averaged", "20steps", ema_decay=0.95)
    trained, averaged = weights(plain), weights(folder)
    assert all(torch.equal(averaged[name], tensor) for name, tensor in trained.items()), "training is the same"
    model, _ = checkpoint.load_model(folder)
    loss, _ = evaluate(model, heldout_batches(small_config(), None, torch.device("cpu")))
    assert rows(folder, "heldout_loss")[-1]["heldout_loss"] == pytest.approx(loss, rel=1e-6)
    assert rows(plain, "heldout_loss")[-1]["heldout_loss"] != pytest.approx(loss, rel=1e-3)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, averaged[f"ema.{name}"]) and not torch.equal(parameter, trained[name])


def test_muons_rate_moves_the_hidden_matrices_alone():
    plain, faster = (optimizer_of(Muon, rate=rate, weight_decay=0.0) for rate in (1.0, 3.0))
    before, end = plain.flat.master.clone(), plain.flat.hidden_end
    for optimizer in (plain, faster):
        fill_gradient(optimizer.flat, 0)
        optimizer.step(1e-2, LOSS, 1)
    moved, further = (optimizer.flat.master - before for optimizer in (plain, faster))
    assert moved[:end].abs().max() > 1e-3 and torch.equal(moved[end:], further[end:])
    assert torch.allclose(3 * moved[:end], further[:end], atol=1e-6)
