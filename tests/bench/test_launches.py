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
    counts = {n: sum(calls.calls.values()) for n, (calls, _) in found.items()}
    assert len(set(counts.values())) == 1 and 0 < counts[854] <= launches.GOAL
    calls, used = found[854]
    assert "reference" not in used.values() and set(used) >= {
        "attention",
        "layernorm",
        "layernorm_glu",
        "cross_entropy",
    }
    assert not {"_local_scalar_dense", "nonzero", "item"} & calls.calls.keys()


def test_local_layers_too(base):
    """The padded form, where no other takes a window: a mask that was made once a layer would add calls to each."""
    counts = []
    for layers in (3, 6, 9):
        model = replace(base, window=32, global_every=3, layers=layers)
        counts.append(sum(launches.microbatch(model, "sm_75", torch.float16, 854)[0].calls.values()))
    assert counts[2] - counts[1] == counts[1] - counts[0] < 3 * launches.GOAL / base.layers


def test_the_counter_counts_and_leaves_views_out():
    with launches.Calls() as calls:
        x = torch.empty(4, 6, device="meta")
        (x.t()[1:] + 1).unsqueeze(0).sum()
    assert dict(calls.calls) == {"add": 1, "sum": 1}
    assert calls.bytes == 4 * (20 + 20 + 20 + 1)
    assert launches.loop(200) - launches.loop(100) == 100 * (launches.loop(101) - launches.loop(100))


def test_what_reads_from_the_device_fails():
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.empty(3, dtype=torch.int32, device="meta").tolist()


def test_the_page_has_this_table(base):
    page = launches.PAGE.read_text(encoding="utf-8").split(launches.BEGIN)[1].split(launches.END)[0].strip()
    if f"torch {torch.__version__.split('+')[0]} " not in page:
        pytest.skip("the page was written with another torch, whose operators are others")
    assert page == launches.table(base)
