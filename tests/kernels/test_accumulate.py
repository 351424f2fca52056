"""Gradients that go straight to their float32 place: in one order, rounded once, and what autograd would give."""

import pytest
import torch

from cramfast.kernels import extension
from cramfast.kernels.accumulate import accumulate, accumulate_rows, compiled_for
from cramfast.model.encoder import TokenLookup
from cramfast.optim.flat import FlatParameters

pytestmark = pytest.mark.skipif(extension.module is None, reason=extension.missing_reason)
DTYPES = [torch.float32, torch.bfloat16]


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 17, 16384, 40001])
def test_values_are_added_with_one_rounding(threads, dtype, size):
    total, values = random(size), random(size, dtype=dtype, seed=1)
    expected = (total.double() + values.double()).float()
    accumulate(total, values)
    assert torch.equal(total, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (300, 64), (300, 200)])
def test_rows_are_added_in_their_order(threads, dtype, rows, width):
    ids_N = torch.randint(0, 7, (rows,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    total_VD, rows_ND = random(7, width), random(rows, width, dtype=dtype, seed=1)
    expected_VD = total_VD.clone()
    for token, row_D in zip(ids_N.tolist(), rows_ND, strict=True):
        expected_VD[token] += row_D.float()
    accumulate_rows(total_VD, ids_N, rows_ND)
    assert torch.equal(total_VD, expected_VD)


@pytest.mark.parametrize(
    ("total", "values", "message"),
    [
        (torch.zeros(4, 4), torch.zeros(4, 5), "total: expected shape"),
        (torch.zeros(4, dtype=torch.float64), torch.zeros(4), "total: expected torch.float32"),
        (torch.zeros(4, 4).t(), torch.zeros(4, 4), "total: not contiguous"),
    ],
)
def test_what_does_not_fit_is_refused(total, values, message):
    with pytest.raises(ValueError, match=message):
        accumulate(total, values)


def test_what_the_loops_do_not_take_is_left_to_torch():
    assert not compiled_for(torch.zeros(4, dtype=torch.float16))
    pieces = random(9, 8, dtype=torch.bfloat16)
    for values in (random(8, 4, dtype=torch.float16), pieces[1:].t()[:4].t(), pieces.flatten()[1:33].view(8, 4)):
        total = random(8, 4, seed=1)
        expected = total + values.float()
        accumulate(total, values)  # float16; not contiguous; not on 16 bytes
        assert torch.equal(total, expected)


def tied(dtype, direct):
    """Gradient of a table that is looked up and multiplied with, as encoder and decoder do, after two microbatches."""
    table = torch.nn.Embedding(50, 24)
    table.weight.data.copy_(random(50, 24))
    flat = FlatParameters(torch.nn.ModuleDict({"table": table}), dtype)
    assert table.weight.row_sums.data_ptr() == flat.grad.data_ptr()
    if not direct:
        del table.weight.row_sums
    ids_N = torch.randint(0, 9, (64,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    for _ in range(2):
        out_ND = TokenLookup.apply(ids_N, table.weight)
        (out_ND @ table.weight.t()).float().square().mean().backward()
        assert table.weight.grad is None
    return flat.grad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_a_table_gets_what_autograd_would_give_it(dtype, tolerance):
    """bfloat16: autograd rounds the sum of the rows, and its sum with the other gradient; float32 sums do not."""
    ours, theirs = tied(dtype, direct=True), tied(dtype, direct=False)
    assert float((ours - theirs).norm() / theirs.norm()) < tolerance
    assert torch.equal(ours, tied(dtype, direct=True))


def test_a_table_that_is_only_looked_up_gets_its_rows():
    table = torch.nn.Embedding(5, 16)
    flat = FlatParameters(torch.nn.ModuleDict({"table": table}))
    TokenLookup.apply(torch.tensor([3, 3, 1]), table.weight).sum().backward()  # int64 too
    assert flat.grad.view(5, 16)[:, 0].tolist() == [0.0, 1.0, 0.0, 2.0, 0.0]
