"""Throughput of every operator beside its peers; each round runs the peers, then ours, so all share the weather."""

import statistics
import time

import pytest
import torch

import cramfast.kernels
from bench import machine
from bench.peers import peers
from cramfast.kernels import reference
from cramfast.kernels.cases import CASES
from cramfast.recipes import cpu_multiplies_bfloat16

# bfloat16 only where the processor multiplies it: torch's own matmul takes a loop on one core elsewhere.
STORED = (torch.bfloat16, torch.float32) if cpu_multiplies_bfloat16() else (torch.float32,)
DTYPES = {"adamw": (torch.float32,)}
ROUNDS = 15


def _shapes():
    for case in CASES:
        for index, shape in enumerate(case.bench_shapes):
            for dtype in DTYPES.get(case.op, STORED):
                yield pytest.param(case, shape, dtype, index, id=f"{case.op}-{index}-{str(dtype)[6:]}")


def _label(shape) -> str:
    parts = dict(shape)
    if "lengths" in parts:
        lengths = parts.pop("lengths")
        parts = {"S": len(lengths), "mean": round(sum(lengths) / len(lengths)), "max": max(lengths)} | parts
    return " ".join(f"{k}={v}" for k, v in parts.items())


def _refuse_a_wrong_operator(case):
    """No number for an operator that does not reproduce its reference."""
    inputs = case.make(**case.test_shapes[0], dtype=torch.float32, seed=0)
    ours, truth = case.run(cramfast.kernels, inputs), case.run(reference, inputs)
    for o, t in zip(ours, truth, strict=True):
        torch.testing.assert_close(o, t, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("case", "shape", "dtype", "index"), list(_shapes()))
def test_throughput(case, shape, dtype, index, benchmark, smoke, record):
    if smoke and (index > 0 or shape.get("P", 0) > 10_000_000):
        pytest.skip("smoke: only the first shape")
    _refuse_a_wrong_operator(case)
    inputs = case.make(**shape, dtype=dtype, seed=0)
    torch._dynamo.reset()
    works = peers(case, inputs)
    if smoke:
        works.pop("torch.compile", None)
    ours = works.pop("ours")
    for work in works.values():
        work()  # compile and warm up
    times: dict[str, list[float]] = {name: [] for name in works}

    def run_peers():
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)

    benchmark.pedantic(ours, setup=run_peers, rounds=2 if smoke else ROUNDS, warmup_rounds=1)
    medians = {"ours": benchmark.stats.stats.median} | {n: statistics.median(t) for n, t in times.items()}
    moved, flops = case.bytes_moved(**shape, dtype=dtype), case.flops(**shape, dtype=dtype)
    for name, median in medians.items():
        row = {
            "op": case.op,
            "shape": _label(shape),
            "dtype": str(dtype).removeprefix("torch."),
            "implementation": name,
            "ms": median * 1e3,
            "ours_speedup": median / medians["ours"],
            "gb_per_s": moved / median / 1e9,
            "percent_of_copy": 100 * moved / median / machine.copy_bytes_per_s(),
            "gflop_per_s": flops / median / 1e9,
            "percent_of_matmul": 100 * flops / median / machine.matmul_flops(dtype),
        }
        record(row)
        benchmark.extra_info[name] = row
