"""The predictions in docs/profiling.md: what the command prints, and what can be worked out by hand."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import fusion
from bench.roofline import CARDS, bound, markdown
from cramfast.cost.cards import Card, find_card
from cramfast.cost.footprint import state_bytes
from cramfast.cost.roofline import (
    ORTHOGONALISE,
    cost,
    microbatch_parts,
    muon_parameters,
    muon_parts,
    parameter_count,
    update_parts,
)
from cramfast.kernels.cases import CASES
from cramfast.model.encoder import Encoder, flops_per_token
from cramfast.optim.muon import STACKED
from cramfast.recipes import PRESETS, resolve

DOCS = Path(__file__).resolve().parents[2] / "docs" / "profiling.md"


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_the_page_holds_what_the_command_prints():
    assert markdown() in DOCS.read_text(encoding="utf-8"), "run python -m bench.roofline and paste its table"


def test_every_operator_is_there():
    rows = [cells(line) for line in markdown().splitlines()[2:]]
    assert {row[0] for row in rows} == {case.op for case in CASES}
    assert {row[6] for row in rows} == {"memory", "tensor cores"}


def test_rows_by_hand():
    rows = {tuple(cells(line)[:2]): cells(line)[2:] for line in markdown().splitlines()[2:]}
    moved = 8 * 16384 * 768 * 2  # x, residual -> y, stream; dy, dstream, stream -> dx; two bytes each
    assert rows["layernorm", "16,384 × 768"] == [
        f"{moved / 1e6:.0f}", "0.3", "1.2", f"{moved / 616e3:.0f}", "memory", f"{moved / 768e3:.0f}", "memory",
        f"{moved / 4.8e6:.0f}", "memory",
    ]  # fmt: skip
    flops = 9 * 2 * 32 * 512**2 * 64 * 12  # two products forward, seven backward
    long = rows["attention", "32 sequences of 512, 12 heads"]
    # q, k, v -> out; q, k, v, out, dout -> dq; q, k, v, dout -> dk, dv
    assert long[0] == f"{(4 + 6 + 6) * 32 * 512 * 768 * 2 / 1e6:,.0f}"
    expected = [(f"{flops / rate:,.0f}", "tensor cores") for rate in (53.8e6, 154.8e6, 989e6)]
    assert long[3:] == [cell for pair in expected for cell in pair]


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_the_slower_of_the_two_bounds(card):
    assert bound(card, "glu", card.bandwidth, 0.5 * card.plain_flops).by == "memory"
    later = bound(card, "glu", card.bandwidth, 2 * card.plain_flops)
    assert (later.seconds, later.by) == (2.0, "float32 units")
    assert bound(card, "attention", card.bandwidth, 2 * card.tensor_flops).by == "tensor cores"


def test_a_cpu_has_one_rate():
    cpu = Card("cpu", 1e10, 1e11, 1e11, 1 << 30, None, "here")
    assert bound(cpu, "glu", 0, 1e11).by == bound(cpu, "attention", 0, 1e11).by == "arithmetic"


def test_only_a_gpu_walks_over_tiles_and_only_beyond_128():
    heads = {"H": 2, "K": 64}
    for lengths, on_gpu, products in (((512,), True, 9), ((512,), False, 7), ((128,), True, 7), ((129, 7), True, 9)):
        _, flops = cost("attention", {"lengths": lengths, **heads}, torch.float16, on_gpu)
        assert flops == products * 2 * sum(n * n for n in lengths) * 64 * 2


@pytest.mark.parametrize("preset", PRESETS)
def test_the_parts_are_the_model(preset):
    """Their products of matrices add up to what flops_per_token counts, which test_model.py holds to the paper."""
    config, tokens = resolve(PRESETS[preset]("cpu")), 20000
    counted = 0
    for part in microbatch_parts(config, tokens):
        if part.op in ("linear", "layernorm_glu", "cross_entropy"):
            counted += part.count * cost(part.op, part.shape, torch.float32, False)[1]
    expected = tokens * flops_per_token(config.model, config.mask_fraction, mean_len=0.0)
    assert counted == pytest.approx(expected, rel=1e-9)


def test_parts_of_a_model_with_local_layers():
    config = PRESETS["base"]("cpu")
    config = replace(config, dtype="float32", model=replace(config.model, global_every=3, first_norm=True))
    parts = {part.name: part for part in microbatch_parts(config, 1024)}
    assert (parts["attention"].count, parts["local attention"].count) == (6, 10)  # layers 0, 3, ... 15
    assert parts["local attention"].shape["window"] == 64 and "window" not in parts["attention"].shape
    assert parts["norms"].count == 17 and parts["norm, matrix, gate"].count == 15
    assert update_parts(config)[0].shape == {"P": parameter_count(config.model)}


@pytest.mark.parametrize("preset", ["tiny", "base", "crammed_bert"])
def test_muons_parts_are_its_matrices(preset):
    """Shape by shape what FlatParameters puts before the embedding table, and AdamW has the rest."""
    config = replace(PRESETS[preset]("cpu"), optimizer="muon", dtype="bfloat16")
    with torch.device("meta"):
        model = Encoder(config.model)
    hidden = {name: p for name, p in model.named_parameters() if p.dim() == 2 and "embeddings" not in name}
    expected = Counter()
    for name, weight in hidden.items():
        stacked = next((parts for suffix, parts in STACKED.items() if name.endswith(suffix)), 1)
        expected[stacked, weight.shape[0] // stacked, weight.shape[1]] += 1
    counted = Counter()
    for part in muon_parts(config):
        counted[tuple(part.shape[key] for key in "BRC")] += part.count
    assert counted == expected
    total = sum(weight.numel() for weight in hidden.values())
    assert muon_parameters(config) == total
    assert update_parts(config)[0].shape == {"P": parameter_count(config.model) - total}
    adamw = replace(config, optimizer="adamw")
    assert muon_parameters(adamw) == 0 and state_bytes(adamw) - state_bytes(config) == 4 * total


def test_newton_schulz_by_hand():
    """Of two matrices of 2 x 3: the Gram matrix, its square, and that times the matrix."""
    shape = {"B": 2, "R": 3, "C": 2}
    moved, flops = cost("orthogonalise", shape, torch.bfloat16, True)
    assert flops == 5 * 2 * 2 * (2 * 3 * 2 + 2 * 2 * 2 + 2 * 2 * 3)
    # matrix to Gram matrix, that to the polynomial, both to the next matrix
    assert moved == 5 * 2 * 2 * ((6 + 4) + (4 + 4) + (4 + 6 + 6))
    assert cost(ORTHOGONALISE[torch.float32], shape, torch.float16, True) == (2 * moved, flops)


def test_float16_has_its_products_of_muon_in_float32():
    card = find_card("RTX 2080 Ti")
    for dtype, by in (("float16", "float32 units"), ("bfloat16", "tensor cores")):
        config = replace(PRESETS["base"]("cuda"), optimizer="muon", dtype=dtype)
        for part in muon_parts(config):
            assert bound(card, part.op, *cost(part.op, part.shape, torch.float16, True)).by == by


def test_work_grows_with_the_tokens_but_not_the_update():
    small, large = (
        {tuple(cells(line)[:1]): cells(line) for line in markdown(tokens).splitlines()[2:]} for tokens in (16384, 65536)
    )
    assert small[("adamw",)] == large[("adamw",)] and small[("glu",)] != large[("glu",)]


def test_the_decision_holds_the_predicted_rates_of_the_fused_matmul():
    page = DOCS.parent / "decisions" / "0012-fused-feed-forward.md"
    assert fusion.markdown() in page.read_text(encoding="utf-8"), "run python -m bench.fusion and paste its table"


def test_the_needed_rate_by_hand():
    """At the needed rate both ways take as long; N D = 8, N F = 16, F D = 2 values."""
    forward = fusion.Forward(N=8, D=1, F=2)
    card = replace(CARDS[0], bandwidth=1 / fusion.BANDWIDTH_SHARE, tensor_flops=0.05)  # slow tensor cores
    library_s = forward.flops / 0.04
    assert forward.parts_s(card) == pytest.approx(8 * 8 + library_s + 6 * 16)
    fused_s = 6 * 8 + 8 * 2 + library_s / forward.needed(card)
    assert fused_s == pytest.approx(forward.parts_s(card))
    slow_memory = replace(card, tensor_flops=1e9)
    assert forward.parts_s(slow_memory) == pytest.approx(8 * 8 + (2 * 8 + 4 * 2 + 4 * 16) + 6 * 16)
    assert fusion.Forward(N=1, D=8, F=8).needed(slow_memory) is None  # folding the weight alone takes longer
