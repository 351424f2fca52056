"""Calls of the floor, counted on tensors without memory: what can be worked out by hand."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cramfast import plan
from cramfast.cost import counted
from cramfast.cost.cards import find_card
from cramfast.cost.forecast import called, floor_forecast, forecast
from cramfast.kernels import dispatch
from cramfast.recipes import starting_config

LENGTHS = (100, 28, 64, 64)


def calls_of(work, *shapes, lengths=(), dtype=torch.float32):
    tensors = [torch.empty(shape, device="meta", dtype=dtype, requires_grad=True) for shape in shapes]
    with counted.Calls(lengths) as calls, counted.Fused(calls):
        work(*tensors)
    return calls


def test_calls_are_counted_and_views_are_not():
    calls = calls_of(lambda x: (x.t()[1:] + 1).unsqueeze(0).sum(), (4, 6))
    assert calls.counts == {"add": 1, "sum": 1} and calls.bytes == 4 * (20 + 20 + 20 + 1)


def test_what_is_only_written_is_not_read():
    calls = calls_of(lambda x, y: x.detach().copy_(y.detach()), (8, 4), (8, 4))
    assert [(call.name, call.bytes) for call in calls.calls] == [("copy_", 2 * 8 * 4 * 4)]
    calls = calls_of(lambda x, y: x.detach().add_(y.detach()), (8, 4), (8, 4))
    assert calls.bytes == 3 * 8 * 4 * 4


def test_products_have_flops_both_ways():
    calls = calls_of(lambda x, w: F.linear(x, w).sum().backward(), (5, 7), (3, 7))
    assert sum(call.flops for call in calls.calls) == 3 * 2 * 5 * 7 * 3 and calls.counts["mm"] == 3


@pytest.mark.parametrize(
    ("chip", "dtype", "window", "name"),
    [
        ("sm_75", torch.float16, None, "torch_efficient"),
        ("sm_86", torch.bfloat16, None, "torch_varlen"),
        ("sm_75", torch.float16, 16, "padded"),
    ],
)
def test_attention_has_the_flops_of_its_seven_products(chip, dtype, window, name):
    H, K, N = 2, 64, sum(LENGTHS)
    assert counted.implementations(chip, dtype, window is not None)["attention"] == name
    attend = dispatch.IMPLEMENTATIONS["attention"][name].function
    offsets = torch.empty(len(LENGTHS) + 1, dtype=torch.int32, device="meta")

    def work(qkv):
        with torch.device("meta"):
            attend(qkv, offsets, 100, None, window).sum().backward()

    calls = calls_of(work, (N, 3, H, K), lengths=LENGTHS, dtype=dtype)
    flops = sum(call.flops for call in calls.calls)
    if name == "padded":  # blocks of 64 queries, each beside 16 keys on either side
        assert flops == 7 * 2 * (N // 64) * 64 * (64 + 2 * 16) * K * H
        assert (
            calls.counts["scaled_dot_product_attention"] == calls.counts["scaled_dot_product_attention_backward"] == 1
        )
    else:
        assert flops == 7 * 2 * sum(n * n for n in LENGTHS) * K * H


def test_nothing_can_be_read_from_the_device():
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.empty(3, dtype=torch.int32, device="meta").tolist()


def test_counting_leaves_the_choice_as_it_was():
    before = {op: dispatch.choose(op, "cpu", torch.float32) for op in dispatch.OPERATORS}
    dispatch.settle("glu", "cuda", torch.float16, "cpp", "a test")
    try:
        with dispatch.on_card("sm_86"):
            assert dispatch.architecture("cuda") == "sm_86"
            assert dispatch.pick("glu", torch.empty(1, device="meta"))[0] == "stock"
            assert dispatch.pick("glu", torch.empty(1))[0] == before["glu"].implementation
        assert dispatch.choose("glu", "cuda", torch.float16).implementation == "cpp"
        assert dispatch.pick("glu", torch.empty(1, device="meta"))[0] == "reference"
    finally:
        dispatch.unsettle()
    assert before == {op: dispatch.choose(op, "cpu", torch.float32) for op in dispatch.OPERATORS}


def test_adamw_reads_and_writes_its_buffers_and_the_copy():
    calls = counted.adamw(1000, 900, torch.float16)
    whole = 4 * 1000
    assert calls.counts["lerp_"] == 2 and calls.bytes > 7 * whole
    assert calls.bytes - counted.adamw(1000, 900, torch.float32).bytes == 900 * (4 + 2)


def test_calls_of_a_name_stand_together_each_at_its_bound():
    card = find_card("RTX 2080 Ti")
    calls = calls_of(lambda x, w: F.linear(x, w).sum().backward(), (4096, 4096), (4096, 4096), dtype=torch.float16)
    (product,) = (line for line in called(calls, card) if line.part.name == "mm")
    assert product.part.count == 3 and product.bound_by == "tensor cores"
    assert product.seconds == pytest.approx(3 * 2 * 4096**3 / card.tensor_flops)
    (added,) = (line for line in called(calls_of(lambda x: x + 1, (1 << 20,)), card))
    assert added.seconds == pytest.approx(8 * (1 << 20) / card.bandwidth)


@pytest.mark.parametrize(
    ("name", "operators"),
    [
        ("RTX 2080 Ti", "attention torch_efficient, the rest stock"),
        ("RTX A6000", "attention torch_varlen, the rest stock"),
    ],
)
def test_a_plan_names_operators_and_gives_the_floor(name, operators):
    made = plan.make_plan(plan.parse(["--gpu", name]))
    rows = {row[0]: row[1:] for row in plan.summary(made)}
    assert "cpp for all" in rows["tokens/s"][1] and operators in rows["tokens/s of the floor"][1]
    figures = (rows[row][0].removeprefix("at most ") for row in ("tokens/s", "tokens/s of the floor"))
    ours, floor = (float(figure.replace(",", "")) for figure in figures)
    assert 0.3 * ours < floor < ours


def test_the_floor_names_the_form_of_local_layers():
    config = starting_config("base", None, "cuda")
    model = replace(config.model, layers=2, window=32, global_every=2)
    arguments = plan.parse(["--gpu", "RTX 2080 Ti"])
    made = plan.make_plan(replace(arguments, config=replace(arguments.config, model=model)))
    (row,) = (row for row in plan.summary(made) if row[0] == "tokens/s of the floor")
    assert "attention torch_efficient, local attention padded, the rest stock" in row[2]


def test_the_floor_takes_as_many_products_as_ours():
    config = plan.parse(["--gpu", "RTX A6000"]).config
    card = find_card("RTX A6000")
    config = replace(config, model=replace(config.model, layers=3))
    lines = floor_forecast(config, card, 8192).microbatch
    ours = forecast(config, card, 8192, {})
    assert sum(line.seconds for line in lines) > ours.microbatch_s
    calls = counted.microbatch(config.model, "sm_86", torch.bfloat16, (128,) * 64, 128, 2048)
    products = sum(call.flops for call in calls.calls if call.name == "mm")
    D, N, M, V, hidden = config.model.width, 8192, 2048, config.model.vocab_size, config.model.feedforward
    layer = 3 * D + D + 2 * hidden + hidden
    whole = 6 * D * (N * (2 * layer + 3 * D) + M * (layer - 3 * D + V + (D if config.model.head else 0)))
    # The loss makes its gradients with the logits: as many products.
    assert products == whole
