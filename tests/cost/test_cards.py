"""The table of cards: each row's figures follow from its chip, and a card is found by the names that people use."""

from collections import Counter

import pytest

from cramfast.cost.cards import CARDS, SHEETS_ALONE, find_card
from cramfast.errors import UserError

ROUNDING = 0.006  # 71 of 71.2 TFLOP/s is the coarsest


@pytest.mark.parametrize("card", [card for card in CARDS if card.chip], ids=lambda card: card.name)
def test_a_rows_figures_follow_from_its_chip(card):
    chip = card.chip
    assert card.bandwidth == pytest.approx(chip.bus * chip.gigabits / 8 * 1e9, rel=ROUNDING)
    assert card.tensor_flops == pytest.approx(chip.multiprocessors * chip.flops * chip.megahertz * 1e6, rel=ROUNDING)
    plain = chip.multiprocessors * 2 * chip.lanes * chip.megahertz * 1e6
    assert card.plain_flops == pytest.approx(plain, rel=0.1 if card.capability == (9, 0) else 1e-6, abs=0.051e12)
    assert card.source.startswith("NVIDIA ") and "{" not in card.source


def test_geforce_sums_in_float32_at_half_the_rate():
    """The same chip in both: GA102, AD102 and GB202, by multiprocessor and clock."""
    for geforce, workstation in (("RTX 3090", "RTX A6000"), ("RTX 4090", "RTX 6000 Ada"), ("RTX 5090", "RTX PRO 6000")):
        one, other = (find_card(name) for name in (geforce, workstation))
        assert one.capability == other.capability and 2 * one.chip.flops == other.chip.flops


def test_every_generation_is_there_and_no_name_twice():
    assert {card.capability for card in CARDS} == {(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)}
    assert max(Counter(card.name for card in CARDS).values()) == 1
    assert [card.name for card in SHEETS_ALONE] == ["H100 NVL", "B200"]
    assert {card.dtype for card in CARDS if card.capability == (7, 5)} == {"float16"}


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_card_is_found_by_its_own_name_and_the_drivers(card):
    for asked in (card.name, card.name.lower(), f"NVIDIA {card.name}", f"NVIDIA GeForce {card.name}".upper()):
        assert find_card(asked) is card


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("2080 ti", "RTX 2080 Ti"),
        ("rtx2080ti", "RTX 2080 Ti"),
        ("2080", "RTX 2080"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti Super"),
        ("h200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell"),
        ("Tesla T4", "T4"),
        ("a6000", "RTX A6000"),
    ],
)
def test_a_card_by_its_names(asked, name):
    assert find_card(asked).name == name


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        ("RTX 9090", "RTX 3090"),
        ("RTX 2085 Ti", "RTX 2080 Ti"),
        ("h300", "H"),
        ("RTX 5090 D", "RTX 5090"),
        ("RTX 3060 8GB", "RTX 3060"),
    ],
)
def test_an_unknown_card_names_the_nearest_and_the_known_ones(asked, near):
    with pytest.raises(UserError, match=rf"nearest: .*{near}.*; use one of T4, RTX 2060, .*, B200$") as caught:
        find_card(asked)
    assert "\n" not in str(caught.value)


def test_what_is_no_one_card_is_refused():
    with pytest.raises(UserError, match="not in the table — use one of T4"):
        find_card("")
    with pytest.raises(UserError, match="fits several — use one of RTX 2060"):
        find_card("rtx")
    with pytest.raises(UserError, match="a laptop's clocks"):
        find_card("NVIDIA GeForce RTX 3080 Laptop GPU")
