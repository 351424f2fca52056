"""What a microbatch launches on a card that nobody has measured: the goal, and the table of the page."""

from dataclasses import replace

import pytest
import torch

from bench import launches
from cramfast.recipes import starting_config


@pytest.fixture(scope="module")
def base():
    return starting_config("base", None, "cuda").model


@pytest.mark.parametrize(("architecture", "dtype"), launches.CARDS)
def test_the_goal_holds_for_any_number_of_sequences(base, architecture, dtype):
    found = {n: launches.microbatch(base, architecture, dtype, n) for n in (100, 854, 3000)}
    counts = {n: calls.counts.total() for n, calls in found.items()}
    assert len(set(counts.values())) == 1 and 0 < counts[854] <= launches.GOAL
    assert not {"_local_scalar_dense", "nonzero", "item"} & found[854].counts.keys()


def test_local_layers_too(base):
    """The padded form, where no other takes a window: a mask that was made once a layer would add calls to each."""
    counts = []
    for layers in (3, 6, 9):
        model = replace(base, window=32, global_every=3, layers=layers)
        counts.append(launches.microbatch(model, "sm_75", torch.float16, 854).counts.total())
    assert counts[2] - counts[1] == counts[1] - counts[0] < 3 * launches.GOAL / base.layers


def test_the_loop_takes_calls_for_every_sequence():
    assert launches.loop(200) - launches.loop(100) == 100 * (launches.loop(101) - launches.loop(100)) > 0


def test_the_page_has_this_table(base):
    page = launches.PAGE.read_text(encoding="utf-8").split(launches.BEGIN)[1].split(launches.END)[0].strip()
    if f"torch {torch.__version__.split('+')[0]} " not in page:
        pytest.skip("the page was written with another torch, whose operators are others")
    assert page == launches.table(base)
