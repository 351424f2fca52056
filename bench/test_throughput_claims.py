"""Every throughput modification switched off, one at a time: tokens/s beside the step that has them all.

`pytest bench/test_throughput_claims.py` measures mini on --text or documentation found on this machine; what a gain in
tokens/s is worth in loss needs a plan of runs: python -m cramfast.scaling claims, which also keeps the figures. A speed
is measured here, never asserted.
"""

import math
from dataclasses import replace

import pytest

from bench import machine
from cramfast.config import TrainConfig
from cramfast.errors import UserError
from cramfast.prepare import prepare
from cramfast.recipes import plain, resolve
from cramfast.scaling.claims import claims_of, gain, measure

ROUNDS, ROUND_S = 7, 2.0
CLAIMS = [claim.name for claim in claims_of(TrainConfig(device="cuda", dtype="float16"))]


@pytest.fixture(scope="module")
def setting(request):
    """(config, prepared text) of the preset that suits the device, and the table to print at the end."""
    from rich.console import Console
    from rich.table import Table

    device = machine.devices(request.config.getoption("--device"))[-1]
    config = resolve(plain("small" if device == "cuda" else "mini", device))
    table = Table(title=f"on {machine.description(device)['device']}, {config.dtype}", title_justify="left")
    for number, column in enumerate(("with it", "tokens/s", "tokens/s, times", "useful tokens/s, times")):
        table.add_column(column, justify="right" if number else "left")
    try:
        prepared = prepare(tuple(request.config.getoption("--text")), None, vocab_size=config.model.vocab_size)
    except UserError as error:  # a machine with hardly any Python packages
        pytest.skip(f"{error}, here --text")
    yield config, prepared, table
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        Console(width=120).print("\n", table)


@pytest.mark.parametrize("place", range(len(CLAIMS)), ids=CLAIMS)
def test_throughput(place, setting, smoke):
    config, prepared, table = setting
    claim = claims_of(config)[place]  # half precision has another name on each device
    if why := claim.obstacle(config):
        table.add_row(claim.name, "", "", why)
        pytest.skip(why)
    rounds, seconds = (2, 0.05) if smoke else (ROUNDS, ROUND_S)
    if smoke:
        config = replace(config, microbatch_tokens=512, batch_tokens=512)
    rates = measure(claim, config, prepared, rounds, seconds)
    assert all(math.isfinite(rate) and rate > 0 for rate in (*rates.useful_on, *rates.useful_off))
    assert abs(rates.parameters_on / rates.parameters_off - 1) < 0.01, "not at a constant number of parameters"
    slots, useful = (gain(getattr(rates, f"{kind}_on"), getattr(rates, f"{kind}_off")) for kind in ("slots", "useful"))
    cells = ("{:.2f} ({:.2f} to {:.2f})".format(value, *between) for value, between in (slots, useful))
    table.add_row(claim.name, f"{sorted(rates.useful_on)[len(rates.useful_on) // 2]:,.0f}", *cells)
