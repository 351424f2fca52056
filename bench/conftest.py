"""Options, the closing table, and one JSON line a number."""

import json
from pathlib import Path

import pytest

from bench import machine
from cramfast.allocator import keep_freed_memory

ROWS: list[dict] = []

keep_freed_memory()  # as the trainer does; every peer in this process has it too


def pytest_addoption(parser):
    parser.addoption("--smoke", action="store_true", help="two rounds of the smallest shape: does it run at all")
    parser.addoption("--results", type=Path, help="append one JSON line for every number to this file")


@pytest.fixture
def smoke(request) -> bool:
    return request.config.getoption("--smoke")


@pytest.fixture
def record():
    return ROWS.append


def pytest_terminal_summary(terminalreporter, config):
    if not ROWS:
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="forward + backward, medians of interleaved rounds", title_justify="left")
    for column in (
        "operator",
        "shape",
        "dtype",
        "implementation",
        "ms",
        "ours is",
        "GB/s",
        "% copy",
        "GFLOP/s",
        "% mm",
    ):
        table.add_column(column, justify="left" if column in ("operator", "shape", "implementation") else "right")
    for row in ROWS:
        table.add_row(
            row["op"],
            row["shape"],
            row["dtype"],
            row["implementation"],
            f"{row['ms']:.3f}",
            "" if row["implementation"] == "ours" else f"{row['ours_speedup']:.2f}x",
            f"{row['gb_per_s']:.1f}",
            f"{row['percent_of_copy']:.0f}",
            f"{row['gflop_per_s']:.0f}",
            f"{row['percent_of_matmul']:.0f}",
        )
    Console(width=150).print(table)
    path = config.getoption("--results")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as out:
            for row in ROWS:
                out.write(json.dumps(row | machine.description()) + "\n")
