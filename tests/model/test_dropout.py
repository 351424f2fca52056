"""Our dropout: which elements, how often, by what factor, from which random numbers."""

import pytest
import torch

from cramfast.model.dropout import dropout

RATE, SIZE = 0.1, 1 << 20


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def kept(x_N: torch.Tensor) -> torch.Tensor:
    """(N,) float64 of 0 and 1: which elements of ones are left."""
    return (x_N != 0).double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0, 1, 3, 4, 1023])
def test_elements_are_zero_or_divided_by_what_is_kept(dtype, size):
    x_N = torch.randn(size, dtype=dtype)
    out_N = dropout(x_N, 0.5)
    assert out_N.dtype == dtype
    assert torch.equal(out_N, torch.where(out_N == 0, 0, 2 * x_N))


def test_the_mean_stays():
    mean = dropout(torch.ones(SIZE, dtype=torch.float64), RATE).mean()
    assert abs(float(mean) - 1) < 5 * (RATE / (1 - RATE) / SIZE) ** 0.5


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.1, 0.9, 1 - 2**-20])
def test_each_of_the_four_of_a_random_number_is_dropped_at_the_rate(rate):
    kept_N4 = kept(dropout(torch.ones(SIZE), rate)).view(-1, 4)
    step = 2**-16  # to which a rate is rounded
    error = 5 * ((rate * (1 - rate) + step) / len(kept_N4)) ** 0.5 + step
    assert (kept_N4.mean(0) - (1 - rate)).abs().max() <= error


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 8, 256, 1 << 16])
def test_elements_are_dropped_independently(distance):
    centred_N = kept(dropout(torch.ones(SIZE), RATE)) - (1 - RATE)
    correlation = (centred_N[distance:] * centred_N[:-distance]).mean() / (RATE * (1 - RATE))
    assert abs(float(correlation)) < 5 / SIZE**0.5


def test_two_calls_are_independent_and_a_seed_repeats_both():
    torch.manual_seed(3)
    first, second = (kept(dropout(torch.ones(SIZE), RATE)) for _ in range(2))
    correlation = ((first - (1 - RATE)) * (second - (1 - RATE))).mean() / (RATE * (1 - RATE))
    assert abs(float(correlation)) < 5 / SIZE**0.5
    torch.manual_seed(3)
    assert torch.equal(kept(dropout(torch.ones(SIZE), RATE)), first)
    assert torch.equal(kept(dropout(torch.ones(SIZE), RATE)), second)


def test_the_gradient_passes_where_the_value_did():
    x_ND = torch.randn(7, 33).t().requires_grad_()  # not contiguous
    out_ND = dropout(x_ND, 0.5)
    (grad_ND,) = torch.autograd.grad(out_ND.sum(), x_ND)
    assert torch.equal(grad_ND, 2 * kept(out_ND.detach()).float())
