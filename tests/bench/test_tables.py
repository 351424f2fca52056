"""docs/performance.md: what the commands print, from the committed results."""

import json
from pathlib import Path

import pytest

from bench import roofline, tables
from cramfast.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "performance.md"
GPU = {
    "device": "cpu", "threads": 16, "isa": "avx512", "torch": "2.11", "python": "3.12", "gpu": "card", "sm_mhz": "1980",
    "capability": "sm_90", "driver": "580", "cuda": "13.0", "dtype": "bfloat16",
}  # fmt: skip
OURS = GPU | {
    "op": "glu", "shape": "N=8 F=4", "label": "", "implementation": "ours", "kernels": "cpp", "tests": "passed",
    "ms": 0.5, "ours_speedup": 1.0, "percent_of_copy": 86.4, "percent_of_matmul": 1.0, "limit": "memory",
}  # fmt: skip
STEP = GPU | {
    "layers": 16, "width": 768, "sequence_len": 128, "system": "cramfast", "tokens_per_s": 1e6, "ours_speedup": 1.0,
    "phases_ms": {"matmul": 20.0, "gaps": 0.4}, "launch_gaps": 1.5, "mfu": 47.0, "peak_bytes": 9e9,
}  # fmt: skip


def write(path: Path, *rows: dict) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_the_page_holds_what_the_command_writes():
    committed = tables.markdown((ROOT / "bench" / "results").glob("*.jsonl"))
    page = PAGE.read_text(encoding="utf-8")
    how = "python -m bench.tables bench/results/*.jsonl --write docs/performance.md"
    assert tables.written(page, committed) == page, how


def test_the_page_holds_the_predictions():
    assert roofline.markdown() in PAGE.read_text(encoding="utf-8"), "run python -m bench.roofline and paste its table"


def test_rows_of_a_gpu_become_tables_and_verdicts(tmp_path):
    peers = [
        OURS | {"implementation": "torch.compile", "ms": 0.6, "ours_speedup": 1.2},
        OURS | {"implementation": "Liger", "ms": None, "fault": "out of memory"},
        OURS | {"kernels": "triton", "ms": 0.1},  # for bench.choose
    ]
    operators = write(tmp_path / "a-operators.jsonl", OURS, *peers)
    failed = GPU | {"layers": 16, "width": 768, "sequence_len": 128, "system": "packed", "fault": "no memory"}
    steps = write(tmp_path / "b-step.jsonl", STEP, failed)
    lines = tables.markdown([steps, operators]).splitlines()
    assert "| glu | N=8 F=4 | bfloat16 | Liger out of memory | 0.5 | 86 | 1 |  | 1.20× |" in lines
    assert "| cramfast | 16 × 768, length 128 | matmul 20.0, gaps 0.4 | 1,000,000 |  | 9.00 | 47.0 | 1.5 |" in lines
    assert "| glu | ≥ 85 % of the copy bandwidth | N=8 F=4, bfloat16, card | 86.40 %, reached |" in lines
    assert "| step | ≥ 45 % MFU of the measured matmul peak | 16 × 768, bfloat16, card | 47.00 %, reached |" in lines
    assert "`a-operators.jsonl`: card (sm_90, 1980 MHz), driver 580, CUDA 13.0; torch 2.11, Python 3.12" in lines


def test_a_red_operator_is_named(tmp_path):
    red = {k: v for k, v in OURS.items() if k not in ("percent_of_copy", "percent_of_matmul", "ours_speedup")}
    path = write(tmp_path / "red.jsonl", red | {"ms": None, "tests": "error 3, allowed 1"})
    assert "| glu | N=8 F=4 | bfloat16 |  | tests red |  |  |  |  |" in tables.markdown([path])
    assert "| glu | ≥ 85 % of the copy bandwidth | N=8 F=4, bfloat16, card | not measured |" in tables.markdown([path])


def test_damaged_results_and_pages_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"op": 1}\n{"op"')
    with pytest.raises(UserError, match=r"rows.jsonl:2: damaged JSON"):
        tables.read(path)
    with pytest.raises(UserError, match=r"unreadable .* — give the file that a benchmark wrote"):
        tables.read(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match="needs one line"):
        tables.written("no marks", "table")
