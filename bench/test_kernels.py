"""Throughput of every operator beside its peers, in turn within each round, so that all share the weather; on the GPU
if there is one, else on the CPU."""

import functools
import statistics
import time

import pytest
import torch
from test_ops import assert_reproduces_reference

from bench import goals, machine
from bench.peers import peers
from cramfast.kernels import dispatch
from cramfast.kernels.cases import CASES, on_device
from cramfast.recipes import cpu_multiplies_bfloat16
from cramfast.runtime.stopwatch import Stopwatch, interleaved

ROUNDS = 15
PEER_FAULTS = (RuntimeError, TypeError, ValueError, AttributeError, ImportError)  # out of memory is a RuntimeError


def _dtypes(op: str, device: str) -> tuple[torch.dtype, ...]:
    if op == "adamw":  # its update is float32 whatever the copy is
        return (torch.float32,)
    if device == "cpu":  # bfloat16 only where the processor multiplies it: a loop on one core takes its place elsewhere
        return (torch.bfloat16, torch.float32) if cpu_multiplies_bfloat16() else (torch.float32,)
    return (torch.bfloat16, torch.float16) if torch.cuda.get_device_capability() >= (8, 0) else (torch.float16,)


def _resized(shapes_of, asked: str):
    """The first shape of every operator that has all of these sizes, with them changed."""
    pairs = [pair.partition("=") for pair in asked.split()]
    if not all(value.isdigit() for _, _, value in pairs):
        raise pytest.UsageError(f"--sizes {asked}: write NAME=NUMBER, as 'D=256 F=512'")
    sizes = {name: int(value) for name, _, value in pairs}
    found = {op: ({**shapes[0], **sizes},) for op, shapes in shapes_of.items() if sizes.keys() <= shapes[0].keys()}
    if not found:
        raise pytest.UsageError(
            f"--sizes {asked}: no operator has {' and '.join(sizes)}; bench/goals.py has the shapes"
        )
    return found


def pytest_generate_tests(metafunc):
    device = machine.devices(metafunc.config.getoption("--device"))[-1]
    cases = {case.op: case for case in CASES}
    shapes_of = {op: case.bench_shapes for op, case in cases.items()} if device == "cpu" else goals.SHAPES
    if asked := metafunc.config.getoption("--sizes"):
        shapes_of = _resized(shapes_of, asked)
    points = [
        (rank, pytest.param(device, cases[op], shape, dtype, index, id=f"{op}-{index}-{str(dtype)[6:]}"))
        for op, shapes in shapes_of.items()
        for index, shape in enumerate(shapes)
        for rank, dtype in enumerate(_dtypes(op, device))
    ]
    if device == "cuda":  # one dtype after the other: a run that is cut short has the whole of the first
        points.sort(key=lambda point: point[0])
    metafunc.parametrize(("device", "case", "shape", "dtype", "index"), [point for _, point in points])


def _text(shape) -> str:
    parts = dict(shape)
    if "lengths" in parts:
        lengths = parts.pop("lengths")
        parts = {"S": len(lengths), "mean": round(sum(lengths) / len(lengths)), "max": max(lengths)} | parts
    return " ".join(f"{k}={v}" for k, v in parts.items())


@functools.cache
def _fault(op: str, dtype: torch.dtype, device: str) -> str:
    """What the operator's own tests say of it in this dtype on this device; "" if they are green."""
    case = next(case for case in CASES if case.op == op)
    for shape in case.test_shapes:
        try:
            assert_reproduces_reference(device, case, shape, dtype)
        except (AssertionError, RuntimeError, ValueError) as error:
            return f"{dict(shape)}: {error}"
    return ""


def _times_on_cpu(works, benchmark, rounds):
    """Medians by name; the peers run in the setup of each round of ours."""
    others = {name: work for name, work in works.items() if name != "ours"}
    for work in others.values():
        work()  # compile and warm up
    times = {name: [] for name in others}

    def run_others():
        for name, work in others.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)

    benchmark.pedantic(works["ours"], setup=run_others, rounds=rounds, warmup_rounds=1)
    return {"ours": benchmark.stats.stats.median} | {n: statistics.median(t) for n, t in times.items()}


def _faulty_peers(works) -> dict[str, str]:
    """Peers that fail on their first run, each with its message; a peer's fault must not cost us our own number."""
    faults = {}
    for name, work in works.items():
        try:
            work()
        except PEER_FAULTS as error:
            if name == "ours":
                raise
            faults[name] = str(error).strip().splitlines()[0]
    return faults


def _times_on_cuda(works, rounds):
    """Medians by name, rounds in which the device waited for the host by name, and faults of peers by name."""
    faults = _faulty_peers(works)
    times, late = interleaved(Stopwatch("cuda"), {n: w for n, w in works.items() if n not in faults}, rounds)
    return {name: statistics.median(t) for name, t in times.items()}, late, faults


def test_throughput(device, case, shape, dtype, index, request, smoke, record, without_kernel):
    if smoke and index > 0:
        pytest.skip("smoke: only the first shape")
    if case.op in without_kernel:
        pytest.skip(f"{case.op}: {without_kernel[case.op]}")
    common = {"op": case.op, "shape": _text(shape), "dtype": str(dtype).removeprefix("torch.")}
    if fault := _fault(case.op, dtype, device):
        record(common | _on_gpu(device, case, shape, dtype) | {"implementation": "ours", "ms": None, "tests": fault})
        pytest.fail(f"no number for an operator that is wrong: {fault}")
    inputs = on_device(case.make(**shape, dtype=dtype, seed=0), device)
    torch._dynamo.reset()
    works = peers(case, inputs)
    if request.config.getoption("--ours-only"):
        works = {"ours": works["ours"]}
    if smoke:
        works.pop("torch.compile", None)
    rounds, late, faults = 2 if smoke else ROUNDS, {}, {}
    if device == "cpu":
        medians = _times_on_cpu(works, request.getfixturevalue("benchmark"), rounds)
    else:
        medians, late, faults = _times_on_cuda(works, rounds)
    moved, flops = case.bytes_moved(**shape, dtype=dtype), case.flops(**shape, dtype=dtype)
    copy, matmul = machine.copy_bytes_per_s(device), machine.matmul_flops(dtype, device)
    common |= _on_gpu(device, case, shape, dtype)
    for name, median in medians.items():
        row = common | {
            "implementation": name,
            "ms": median * 1e3,
            "ours_speedup": median / medians["ours"],
            "gb_per_s": moved / median / 1e9,
            "percent_of_copy": 100 * moved / median / copy,
            "gflop_per_s": flops / median / 1e9,
            "percent_of_matmul": 100 * flops / median / matmul,
        }
        record(row | ({"late_rounds": late[name], "rounds": rounds} if late else {}))
    for name, message in faults.items():
        record(common | {"implementation": name, "ms": None, "fault": message})


def _on_gpu(device, case, shape, dtype) -> dict[str, str]:
    """What a row of a GPU says besides: the shape's name, what bounds it by this machine's own peaks, which
    implementation ours is, and that its tests passed (a row of an operator whose tests are red says so instead)."""
    if device == "cpu":
        return {}
    memory = case.bytes_moved(**shape, dtype=dtype) / machine.copy_bytes_per_s(device)
    matmul = case.flops(**shape, dtype=dtype) / machine.matmul_flops(dtype, device)
    return {
        "label": goals.label(shape),
        "limit": "memory" if memory > matmul else "matmul",
        "kernels": dispatch.choose(case.op, device, dtype).implementation,
        "tests": "passed",
    }
