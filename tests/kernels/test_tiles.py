"""AMX tiles are state of a thread that torch's own products use too."""

import pytest
import torch

import cramfast.kernels as operators
from cramfast.kernels import extension
from cramfast.kernels.cases import CASES


@pytest.mark.skipif(extension.cpu_isa != "amx_bf16", reason=f"this build runs {extension.cpu_isa}, not AMX")
def test_torchs_products_before_and_after_attention_are_the_same():
    (case,) = (case for case in CASES if case.op == "attention")
    inputs = case.make(lengths=(70, 33, 128), H=2, K=64, dtype=torch.bfloat16, seed=0)
    inputs["qkv"].requires_grad_()
    left, right = (torch.randn(256, 256, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (1, 2))
    before, first = left @ right, operators.varlen_attention(**inputs)
    first.backward(torch.ones_like(first))
    between = left @ right
    again = operators.varlen_attention(**inputs)
    assert torch.equal(before, between) and torch.equal(first, again)
