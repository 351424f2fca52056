"""Options, the closing tables, and one JSON line a number, written as soon as there is one."""

from pathlib import Path

import pytest

from bench import goals, machine, tables
from cramfast.kernels import dispatch
from cramfast.runtime.allocator import keep_freed_memory

ROWS: list[dict] = []
COLUMNS = ("operator", "shape", "dtype", "implementation", "ms", "ours is", "GB/s", "% copy", "GFLOP/s", "% mm")
TEXT_COLUMNS = ("operator", "shape", "implementation")

keep_freed_memory()  # as the trainer does; every peer in this process has it too


def pytest_addoption(parser):
    parser.addoption("--smoke", action="store_true", help="two rounds of the smallest shape: does it run at all")
    parser.addoption("--ours-only", action="store_true", help="without peers: rows for python -m bench.choose")
    parser.addoption("--sizes", default="", help="change these in every shape that has them, as 'D=256 F=512'")
    parser.addoption("--text", action="append", default=[], help="text of test_throughput_claims.py, as --data")
    parser.addoption("--results", type=Path, help="append one JSON line for every number to this file")


@pytest.fixture
def smoke(request) -> bool:
    return request.config.getoption("--smoke")


@pytest.fixture(scope="session")
def without_kernel(request):
    """{operator: why no kernel of ours runs it}; on a GPU the others run the implementation of --kernels."""
    if machine.devices(request.config.getoption("--device"))[-1] == "cpu":
        yield {}
        return
    yield machine.take_kernels(request.config.getoption("--kernels"))
    dispatch.override("all", "auto")


@pytest.fixture
def record(request):
    """Keep a row for the tables, and append it to --results at once: a run that is cut short loses nothing."""
    path = request.config.getoption("--results")
    device = machine.devices(request.config.getoption("--device"))[-1]

    def keep(row):
        row = row | machine.description(device)
        ROWS.append(row)
        if path:
            tables.append(path, row)

    return keep


def _cells(row: dict) -> tuple[str, ...]:
    start = (row["op"], row.get("label") or row["shape"], row["dtype"], row["implementation"])
    if row["ms"] is None:
        return (*start, row.get("fault", row["tests"])[:60])
    return (
        *start,
        f"{row['ms']:.3f}",
        "" if row["implementation"] == "ours" else f"{row['ours_speedup']:.2f}x",
        f"{row['gb_per_s']:.1f}",
        f"{row['percent_of_copy']:.0f}",
        f"{row['gflop_per_s']:.0f}",
        f"{row['percent_of_matmul']:.0f}",
    )


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(width=150)
    table = Table(title="forward + backward, medians of interleaved rounds", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in TEXT_COLUMNS else "right")
    for row in ROWS:
        table.add_row(*_cells(row))
    console.print(table)
    judged = [v for v in goals.verdicts(ROWS) if v.goal.what != "step"]
    if any(v.case for v in judged):
        table = Table("operator", "goal", "case", "measured", title="goals", title_justify="left")
        for verdict in judged:
            table.add_row(verdict.goal.what, verdict.goal.text(), verdict.case, verdict.text())
        console.print(table)
