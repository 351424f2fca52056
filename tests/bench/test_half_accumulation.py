"""bench/half_accumulation.py: sums are rounded as numpy rounds them, and only linear layers have them."""

import numpy as np
import pytest
import torch
from fake_loader import FakeSource, small_config

from bench import half_accumulation
from bench.half_accumulation import SYSTEMS, losses, product_in_half, train_by
from cramfast.errors import UserError
from cramfast.kernels import linear
from cramfast.model import encoder
from cramfast.model.encoder import Encoder


def added_by_numpy(x_NK, weight_KE):
    """Four products at a time, added to a float16 sum."""
    x_NK, weight_KE = (tensor.half().float().numpy() for tensor in (x_NK, weight_KE))
    total_NE = np.zeros((x_NK.shape[0], weight_KE.shape[1]), np.float16)
    for k in range(0, x_NK.shape[1], 4):
        terms = [x_NK[:, j, None] * weight_KE[j] for j in range(k, k + 4)]
        with np.errstate(over="ignore"):
            total_NE = (total_NE.astype(np.float32) + ((terms[0] + terms[1]) + (terms[2] + terms[3]))).astype(
                np.float16
            )
    return torch.from_numpy(total_NE.astype(np.float32))


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-5, 30.0])  # 1e-5: subnormal sums; 30: some overflow
def test_sums_are_rounded_as_numpy_rounds_them(size):
    g = torch.Generator().manual_seed(0)
    x_NK, weight_KE = (size * torch.randn(shape, generator=g) for shape in ((33, 128), (128, 40)))
    x_NK[0] *= 100 if size == 30.0 else 1
    expected = added_by_numpy(x_NK, weight_KE)
    assert torch.equal(product_in_half(x_NK, weight_KE), expected)
    assert expected.isinf().any() == (size == 30.0)


def gradients_with(monkeypatch, system):
    """Gradients of a small model inside train_by(), as its training would see them."""
    found = {}

    def train_once(config, prepared, budget):
        torch.manual_seed(0)
        model = Encoder(config.model)
        model.loss(FakeSource(None, "train", sequence_len=16, batch_tokens=64, seed=0).batch(0, 0, 0.25)).backward()
        found.update({name: p.grad for name, p in model.named_parameters()})

    monkeypatch.setattr(half_accumulation, "train_once", train_once)
    train_by(system, small_config(), None, None)
    return found


def test_only_the_products_change_and_they_change_little(monkeypatch):
    before = linear.product, linear.input_gradient, encoder.linear
    plain, half, sums = (gradients_with(monkeypatch, system) for system in SYSTEMS)
    assert (linear.product, linear.input_gradient, encoder.linear) == before
    for other in (half, sums):
        errors = [float((other[name] - plain[name]).norm() / plain[name].norm()) for name in plain]
        assert 1e-5 < max(errors) < 0.02
    assert any(not torch.equal(half[name], sums[name]) for name in plain)


def test_differences_are_those_of_the_same_seed():
    rows = [
        {"system": system, "seed": seed, "heldout_loss": 5.0 + seed + 0.25 * place, "skipped": place}
        for place, system in enumerate(SYSTEMS)
        for seed in (0, 1)
    ]
    table = losses(rows)
    assert [row[2] for row in table.rows] == ["-0.250 ± 0.000", "+0.000 ± 0.000", "+0.250 ± 0.000"]
    assert [row[3:] for row in table.rows] == [["0", "2"], ["2", "2"], ["4", "2"]]


@pytest.mark.parametrize("words", ["--tokens 0", "--seeds 0", "--width 100", "--width -64", "--threads -1"])
def test_ranges_are_checked_before_anything_is_written(monkeypatch, tmp_path, words):
    monkeypatch.setattr(half_accumulation.stages, "prepare_text", lambda config: pytest.fail("prepared"))
    monkeypatch.setattr("sys.argv", ["half", "--results", str(tmp_path / "rows.jsonl"), *words.split()])
    with pytest.raises(UserError, match=f"^{words} is not possible — use "):
        half_accumulation.main()
    assert not list(tmp_path.iterdir())
