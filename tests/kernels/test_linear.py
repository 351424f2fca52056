"""Half-precision accumulation: allowed around two of the three products of a linear layer, and around nothing else."""

import pytest
import torch
import torch.nn.functional as F
from fake_loader import FakeSource, small_config
from torch.utils._python_dispatch import TorchDispatchMode

from cramfast.errors import UserError
from cramfast.kernels import layernorm_glu, linear
from cramfast.model.encoder import Encoder
from cramfast.recipes import resolve

N, D, E = 24, 16, 40


@pytest.fixture
def allowed():
    linear.allow_half_accumulation(True)
    yield
    linear.allow_half_accumulation(False)


class Products(TorchDispatchMode):
    """Every matrix product that runs, as (rows, terms of a sum, columns, whether the flag was set)."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default:
            flag = torch.backends.cuda.matmul.allow_fp16_accumulation
            self.seen.append((args[0].shape[0], args[0].shape[1], args[1].shape[1], flag))
        return function(*args, **(kwargs or {}))


def tensors(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    shapes = (N, D), (E, D), (N, E)
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def gradients(function, x, weight, dy):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = function(x, weight)
    return (y.detach(), *torch.autograd.grad(y, (x, weight), dy))


def test_the_flag_stands_around_forward_and_input_gradient_alone(allowed):
    with Products() as products:
        gradients(linear.linear, *tensors())
    assert sorted(products.seen) == sorted([(N, D, E, True), (N, E, D, True), (E, N, D, False)])
    assert not torch.backends.cuda.matmul.allow_fp16_accumulation


def test_without_permission_it_is_torchs_own():
    with Products() as products:
        gradients(linear.linear, *tensors())
    assert len(products.seen) == 3 and not any(flag for *_, flag in products.seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_those_of_torch(allowed, dtype):
    for ours, theirs in zip(
        gradients(linear.linear, *tensors(dtype)), gradients(F.linear, *tensors(dtype)), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_the_flag_is_put_back_when_a_product_fails(allowed):
    with pytest.raises(RuntimeError):
        linear.product(torch.ones(2, 3), torch.ones(4, 5))
    assert not torch.backends.cuda.matmul.allow_fp16_accumulation


def test_layernorm_glu_has_it_too(allowed):
    x = torch.randn(N, D, requires_grad=True)
    weight = torch.randn(2 * E, D, requires_grad=True)
    with Products() as products:
        h, _ = layernorm_glu(x, torch.ones(D), None, weight)
        h.sum().backward()
    assert sorted(products.seen) == sorted([(N, D, 2 * E, True), (N, 2 * E, D, True), (2 * E, N, D, False)])


def test_the_whole_model_uses_it_but_for_the_decoder(allowed):
    config = small_config().model
    batch = FakeSource(None, "train", sequence_len=16, batch_tokens=64, seed=0).batch(0, 0, 0.25)
    torch.manual_seed(0)
    model = Encoder(config)
    with Products() as products:
        model.loss(batch).backward()
    of_decoder = [seen for seen in products.seen if 64 in seen[:3] and 16 in seen[:3]]
    assert sum(flag for *_, flag in products.seen) == 2 * (4 * config.layers + 1)  # Wqkv, Wo, Wi, Wo; the head's dense
    assert of_decoder, "the decoder's products are seen"
    with_it = [parameter.grad.clone() for parameter in model.parameters()]
    linear.allow_half_accumulation(False)
    model.zero_grad()
    model.loss(batch).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(with_it, model.parameters(), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_float16_can_have_it(dtype):
    with pytest.raises(UserError, match=f"half_accumulation with dtype={dtype} .*--dtype float16"):
        small_config(half_accumulation=True, dtype=dtype)
    with pytest.raises(UserError, match="half_accumulation"):
        resolve(small_config(half_accumulation=True, dtype="auto", device="cpu"))
    assert small_config(half_accumulation=True, dtype="float16").half_accumulation
