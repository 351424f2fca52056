"""bench.choose: from rows of benchmarks to what dispatch takes unasked. The numbers here are made up."""

import json

import pytest

from bench import choose
from cramfast.errors import UserError
from cramfast.kernels import dispatch

ROW = {
    "op": "glu", "shape": "N=8 F=4", "dtype": "bfloat16", "implementation": "ours", "kernels": "cpp", "tests": "passed",
    "ms": 2.0, "capability": "sm_90", "gpu": "NVIDIA H200", "torch": "2.13.0", "commit": "abc1234",
}  # fmt: skip
REFERENCE = ROW | {"kernels": "reference", "ms": 6.0}


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "measured.json"
    path.write_text('{"rows": []}\n')
    return path


def chosen(table, tmp_path, *rows) -> list[dict]:
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    choose.main([str(results), "--table", str(table)])
    return json.loads(table.read_text())["rows"]


def test_relative_times_are_geometric_means_over_the_shapes(table, tmp_path):
    triton = ROW | {"kernels": "triton"}
    other = {"shape": "N=9 F=4"}
    rows = (ROW, ROW | other | {"ms": 8.0}, triton | {"ms": 1.0}, triton | other | {"ms": 4.0}, REFERENCE,
            REFERENCE | other | {"ms": 6.0})  # fmt: skip
    peer = {"op": "glu", "implementation": "eager", "ms": 0.1, "capability": "sm_90"}
    (row,) = chosen(table, tmp_path, *rows, peer)
    assert row["relative_time"] == {"triton": 1.0, "cpp": 2.0, "reference": 3.0}
    assert (row["op"], row["architecture"], row["dtype"], row["device"]) == ("glu", "sm_90", "bfloat16", "NVIDIA H200")


@pytest.mark.parametrize("fault", ({"tests": "output 0: error 3, allowed 1"}, {"ms": None}))
def test_a_red_implementation_is_refused_however_fast(table, tmp_path, capsys, fault):
    triton = ROW | {"kernels": "triton", "ms": 0.1}
    (row,) = chosen(table, tmp_path, ROW, REFERENCE, triton, triton | {"shape": "N=9 F=4"} | fault)
    assert set(row["relative_time"]) == {"cpp", "reference"}
    assert "triton left out, its tests were red" in capsys.readouterr().out


def test_nothing_is_chosen_without_a_green_reference(table, tmp_path, capsys):
    for rows in ((ROW,), (ROW, REFERENCE | {"tests": "failed"})):
        with pytest.raises(UserError, match="no row to choose by"):
            chosen(table, tmp_path, *rows)
        assert "no row of stock PyTorch" in capsys.readouterr().out
    assert json.loads(table.read_text()) == {"rows": []}


def test_the_floor_is_a_baseline_where_the_loop_cannot_run(table, tmp_path):
    floor = REFERENCE | {"op": "attention", "kernels": "padded"}
    (row,) = chosen(table, tmp_path, ROW | {"op": "attention"}, floor)
    assert row["relative_time"].keys() == {"cpp", "padded"}
    (row, _) = chosen(table, tmp_path, ROW, REFERENCE | {"kernels": "stock"})[::-1]
    assert row["relative_time"].keys() == {"cpp", "stock"}


def test_an_implementation_measured_on_fewer_shapes_is_left_out(table, tmp_path, capsys):
    (row,) = chosen(table, tmp_path, ROW, REFERENCE, REFERENCE | {"shape": "N=9 F=4"})
    assert set(row["relative_time"]) == {"reference"} and "cpp left out, measured on 1 of 2" in capsys.readouterr().out


def test_new_rows_replace_old_ones_of_the_same_place_only(table, tmp_path):
    chosen(table, tmp_path, ROW, REFERENCE)
    chosen(table, tmp_path, ROW | {"capability": "sm_86"}, REFERENCE | {"capability": "sm_86"})
    rows = chosen(table, tmp_path, ROW | {"ms": 12.0}, REFERENCE)
    assert [row["architecture"] for row in rows] == ["sm_86", "sm_90"]
    assert rows[1]["relative_time"] == {"reference": 1.0, "cpp": 2.0} and len(table.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((ROW, REFERENCE | {"gpu": "NVIDIA H100"}), "gpu NVIDIA H100 and NVIDIA H200"),
        ((ROW, REFERENCE | {"commit": "def"}), "commit abc1234 and def"),
        (({k: v for k, v in ROW.items() if k != "tests"},), "row 1: no 'tests'"),
        ((ROW | {"kernels": "fast"},), "unknown glu=fast"),
    ],
)
def test_rows_that_cannot_be_compared_are_refused(table, tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        chosen(table, tmp_path, *rows)


def test_files_that_cannot_be_read_are_named(table, tmp_path):
    with pytest.raises(UserError, match=r"nowhere.jsonl: unreadable"):
        choose.main([str(tmp_path / "nowhere.jsonl"), "--table", str(table)])
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text('{"op": ')
    with pytest.raises(UserError, match=r"damaged.jsonl: damaged JSON"):
        choose.main([str(damaged), "--table", str(table)])


def test_dispatch_tries_first_what_was_fastest(table, tmp_path, monkeypatch):
    chosen(table, tmp_path, ROW | {"op": "attention", "kernels": "torch_efficient"}, REFERENCE | {"op": "attention"})
    monkeypatch.setattr(dispatch, "MEASURED", table)
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    dispatch.measured.cache_clear()
    import torch

    try:
        assert dispatch.candidates("attention", "cuda", torch.bfloat16)[0] == "torch_efficient"
        assert dispatch.candidates("attention", "cuda", torch.float16)[0] != "torch_efficient"
    finally:
        dispatch.measured.cache_clear()
