"""The predictions in docs/profiling.md: what the command prints, and what can be worked out by hand."""

from pathlib import Path

import pytest

from bench import fusion
from bench.roofline import CARDS, bound, markdown
from cramfast.kernels.cases import CASES

DOCS = Path(__file__).resolve().parent.parent / "docs" / "profiling.md"


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
    flops = 7 * 2 * 32 * 512**2 * 64 * 12  # two products forward, five backward
    long = rows["attention", "32 sequences of 512, 12 heads"]
    expected = [(f"{flops / rate:,.0f}", "tensor cores") for rate in (53.8e6, 154.8e6, 989e6)]
    assert long[3:] == [cell for pair in expected for cell in pair]


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_the_slower_of_the_two_bounds(card):
    assert bound(card, "glu", card.bandwidth, 0.5 * card.plain_flops).by == "memory"
    later = bound(card, "glu", card.bandwidth, 2 * card.plain_flops)
    assert (later.seconds, later.by) == (2.0, "float32 units")
    assert bound(card, "attention", card.bandwidth, 2 * card.tensor_flops).by == "tensor cores"


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
    card = fusion.Card("slow tensor cores", bandwidth=1 / fusion.BANDWIDTH_SHARE, tensor_flops=0.05, plain_flops=1.0)
    library_s = forward.flops / 0.04
    assert forward.parts_s(card) == pytest.approx(8 * 8 + library_s + 6 * 16)
    fused_s = 6 * 8 + 8 * 2 + library_s / forward.needed(card)
    assert fused_s == pytest.approx(forward.parts_s(card))
    slow_memory = fusion.Card("no arithmetic", bandwidth=card.bandwidth, tensor_flops=1e9, plain_flops=1.0)
    assert forward.parts_s(slow_memory) == pytest.approx(8 * 8 + (2 * 8 + 4 * 2 + 4 * 16) + 6 * 16)
    assert fusion.Forward(N=1, D=8, F=8).needed(slow_memory) is None  # folding the weight alone takes longer
