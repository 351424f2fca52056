"""The benchmarks as far as a CPU can prove them: timing by events on a pretended GPU, peers on tensors without memory,
verdicts on made-up rows."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import attention_peers, finetune, goals, peers, plan, step, test_kernels
from cramfast.errors import UserError
from cramfast.kernels.cases import CASES, on_device
from cramfast.runtime.stopwatch import COLD_BYTES, HEAD_START_S, Stopwatch, interleaved

ROOT = Path(__file__).resolve().parents[2]
WRITE_S = 0.7e-3
ROW = {"op": "attention", "shape": "S=854", "label": "all 128", "dtype": "bfloat16", "gpu": "card", "limit": "memory"}


class PretendedGpu:
    """A device that works off what was launched only when asked; its clock is in seconds."""

    def __init__(self, monkeypatch):
        self.clock, self.idle = 0.0, False
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                self.at = None

            def record(self):
                self.at = gpu.clock

            def query(self):
                return gpu.idle

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        class Cold:
            def zero_(self):
                gpu.clock += WRITE_S

        def empty(size, dtype, device):
            assert (size, dtype, device) == (COLD_BYTES, torch.uint8, "cuda")
            return Cold()

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch, "empty", empty)

    def work(self, seconds, waits=False):
        def run():
            self.clock += seconds
            self.idle = waits

        return run


def test_events_time_the_work_alone_with_a_head_start_and_a_cold_cache(monkeypatch):
    gpu = PretendedGpu(monkeypatch)
    watch = Stopwatch("cuda")
    assert watch.writes * WRITE_S >= HEAD_START_S
    before = gpu.clock
    assert watch.once(gpu.work(0.25)) == pytest.approx(0.25)
    assert gpu.clock - before == pytest.approx(0.25 + watch.writes * WRITE_S)
    works = {"ours": gpu.work(0.1), "waits": gpu.work(0.2, waits=True)}
    times, late = interleaved(watch, works, 3)
    assert times == {"ours": pytest.approx([0.1] * 3), "waits": pytest.approx([0.2] * 3)}
    assert late == {"ours": 0, "waits": 3}


def test_works_take_turns_within_each_round():
    order = []
    works = {name: lambda name=name: order.append(name) for name in ("peer", "ours")}
    times, late = interleaved(Stopwatch("cpu"), works, 2)
    assert order == ["peer", "ours"] * 3  # the first to warm up
    assert all(len(t) == 2 for t in times.values()) and not any(late.values())


def _meta_inputs(op, **shape):
    case = next(case for case in CASES if case.op == op)
    return on_device(case.make(**shape, seed=0), "meta")


@pytest.mark.parametrize("attend", [attention_peers.EfficientAttention.apply, attention_peers.flash_attention])
def test_packed_attention_is_called_as_this_torch_wants_it(attend):
    """Meta tensors have shapes and no numbers: arguments, devices and gradients are checked without a GPU."""
    inputs = _meta_inputs("attention", lengths=(17, 30), H=2, K=64, dtype=torch.float16, rotary=False)
    if attend is attention_peers.flash_attention:  # its gradient formula looks at the numbers
        assert attend(*inputs["qkv"].unbind(1), inputs["cu_seqlens"], 30).shape == (47, 2, 64)
        return
    gradients = attention_peers.packed(inputs, attend)()
    assert [g.shape for g in gradients] == [(47, 2, 64)] * 3


def test_packed_rotation_is_that_of_the_reference():
    from cramfast.kernels import reference

    case = next(case for case in CASES if case.op == "attention")
    inputs = case.make(lengths=(17, 0, 30), H=2, K=32, dtype=torch.float64, seed=0)

    def attend(q, k, v, cu_seqlens, longest):
        return reference.varlen_attention(torch.stack([q, k, v], 1), cu_seqlens, longest)

    torch.manual_seed(1)
    (theirs,) = attention_peers.packed(inputs, attend)()
    torch.manual_seed(1)
    qkv = inputs["qkv"].requires_grad_()
    (truth,) = torch.autograd.grad(reference.varlen_attention(**inputs), qkv, torch.randn_like(qkv[:, 0]))
    torch.testing.assert_close(theirs, truth)


def test_the_compiled_adamw_is_adamw(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    case = next(case for case in CASES if case.op == "adamw")
    inputs = case.make(P=64, segments=1, dtype=torch.float32, seed=0)
    inputs["segment_decay"] = torch.tensor([0.01])
    update = peers.adamw_compiled(inputs)
    update()
    cells = dict(zip(update.__code__.co_freevars, (c.cell_contents for c in update.__closure__), strict=True))
    from cramfast.kernels import reference

    truth = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    reference.adamw(**truth, beta1=0.9, beta2=0.98, eps=1e-8)
    for name in ("master", "exp_avg", "exp_avg_sq", "half"):
        torch.testing.assert_close(cells[name], truth[name])


def _rows(*pairs, **changed):
    """A row of ours and one a peer, with the peer's time divided by ours."""
    ours = ROW | {"implementation": "ours", "ms": 1.0, "ours_speedup": 1.0, "percent_of_copy": 61.0} | changed
    return [ours, *({**ours, "implementation": name, "ms": ratio, "ours_speedup": ratio} for name, ratio in pairs)]


def _spoken(rows):
    return {(v.goal.bound, v.goal.over): v for v in goals.verdicts(rows) if v.goal.what == rows[0]["op"]}


def test_goals_say_reached_or_missed_by_how_much():
    found = _spoken(_rows(("FlashAttention-2 varlen", 1.4), ("efficient attention varlen", 2.5)))
    flash = found[1.5, ("FlashAttention-2 varlen",)]
    assert not flash.reached and flash.text() == "1.40×, missed by 0.10"
    efficient = found[2.0, ("efficient attention varlen",)]
    assert efficient.reached and efficient.text() == "2.50×, reached"
    assert found[60, ()].text() == "61.00 %, reached"


def test_goals_are_judged_by_the_fastest_peer_and_only_where_they_speak():
    rows = _rows(("eager", 3.0), ("torch.compile", 0.9), op="glu", label="", percent_of_copy=50.0)
    found = _spoken(rows)
    assert found[1.0, ("eager", "torch.compile", "Liger")].text() == "0.90×, missed by 0.10"
    bound_by_matmul = _spoken(_rows(("FlashAttention-2 varlen", 1.4), label="all 512", limit="matmul"))
    assert bound_by_matmul[60, ()].text() == "not measured"
    assert bound_by_matmul[0.8, ("FlashAttention-2 varlen",)].text() == "1.40×, reached"
    assert bound_by_matmul[1.5, ("FlashAttention-2 varlen",)].text() == "not measured"
    on_cpu = [{k: v for k, v in row.items() if k != "gpu"} for row in _rows()]
    assert {v.value for v in goals.verdicts(on_cpu)} == {None}


def test_a_peer_that_failed_has_no_time_and_decides_nothing():
    rows = _rows(("efficient attention varlen", 2.5))
    rows.append(ROW | {"implementation": "FlashAttention-2 varlen", "ms": None, "fault": "out of memory"})
    assert _spoken(rows)[1.5, ("FlashAttention-2 varlen",)].text() == "not measured"


def test_shapes_on_a_gpu_are_named_and_fit_their_cases():
    cases = {case.op: case for case in CASES}
    assert set(goals.SHAPES) == set(cases)
    labels = [goals.label(shape) for shape in goals.SHAPES["attention"]]
    assert labels == ["real mixture, 16-128", "all 128", "all 512", "real mixture, 16-128, rotary"]
    for op, shapes in goals.SHAPES.items():
        for shape in shapes:
            assert cases[op].bytes_moved(**shape, dtype=torch.bfloat16) > 0
            assert cases[op].flops(**shape, dtype=torch.bfloat16) > 0


def test_other_sizes_are_measured_on_request():
    found = test_kernels._resized(goals.SHAPES, "D=256 F=512")
    assert found == {"layernorm_glu": ({"N": goals.TOKENS, "D": 256, "F": 512},)}
    assert set(test_kernels._resized(goals.SHAPES, "D=256")) == {"layernorm", "layernorm_glu", "cross_entropy"}
    for asked, message in (("D", "write NAME=NUMBER"), ("D=big", "write NAME=NUMBER"), ("Z=3", "no operator has Z")):
        with pytest.raises(pytest.UsageError, match=message):
            test_kernels._resized(goals.SHAPES, asked)


@pytest.mark.parametrize("words", ["--seeds 0", "--limit -1", "--threads -1", "--tasks"])
def test_finetune_checks_its_ranges(monkeypatch, words):
    monkeypatch.setattr("sys.argv", ["finetune", "run", "--data", "glue", *words.split()])
    with pytest.raises(UserError, match=f"^{words}.* is not possible — "):
        finetune.main()


@pytest.mark.parametrize(
    ("module", "work", "words"),
    [(finetune, "export", ["run", "--data", "glue"]), (step, "measure", []), (plan, "measure", [])],
)
def test_results_that_cannot_be_written_are_found_before_the_work(monkeypatch, tmp_path, module, work, words):
    monkeypatch.setattr(module, work, lambda *arguments: pytest.fail("began"))
    monkeypatch.setattr("sys.argv", ["bench", *words, "--results", str(tmp_path)])
    with pytest.raises(UserError, match=f"^--results {tmp_path}: cannot be written .*Is a directory.* — name another"):
        module.main()


def test_finetune_knows_its_tasks_before_the_first_fit(monkeypatch):
    monkeypatch.setattr(finetune, "export", lambda *arguments: pytest.fail("began"))
    monkeypatch.setattr("sys.argv", ["finetune", "run", "--data", "glue", "--tasks", "rte", "rtf"])
    with pytest.raises(UserError, match="task 'rtf' does not exist"):
        finetune.main()


def test_clocks_and_driver_are_read_beside_the_card(monkeypatch):
    from bench import machine

    properties = SimpleNamespace(
        name="card", major=9, minor=0, multi_processor_count=132, total_memory=1 << 30, uuid="ab-12"
    )
    asked = []

    def run(command, **_):
        asked.append(command)
        return SimpleNamespace(stdout="580.159, 1980, 3201, 1980, 700.00\n")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(machine.shutil, "which", lambda _: "nvidia-smi")
    monkeypatch.setattr(machine.subprocess, "run", run)
    found = machine._gpu()
    assert (found["gpu"], found["capability"], found["driver"]) == ("card", "sm_90", "580.159")
    assert (found["sm_mhz"], found["memory_mhz"], found["watts"]) == ("1980", "3201", "700.00")
    assert "GPU-ab-12" in asked[0]


def test_the_path_of_a_gpu_runs_from_end_to_end(tmp_path):
    """On a pretended one, where the gate is wrong: it gets no number, the others do."""
    results = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "pytest", "bench/test_kernels.py", "-p", "pretended_gpu", "--smoke"]
    command += ["--device", "cuda", "-k", "bfloat16 or adamw", "--results", str(results)]
    paths = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "PRETENDED_FAULT": "1"}
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert results.exists(), answer.stdout + answer.stderr
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert {row["op"] for row in rows} == {case.op for case in CASES}, answer.stdout + answer.stderr
    (red,) = (row for row in rows if row["op"] == "glu")
    assert red["ms"] is None and "error" in red["tests"]
    assert answer.returncode == 1 and "no number for an operator that is wrong" in answer.stdout
    measured = next(row for row in rows if row["op"] == "layernorm" and row["implementation"] == "ours")
    assert measured["gpu"] == "pretended" and measured["capability"] == "sm_90" and measured["tests"] == "passed"
    assert measured["late_rounds"] == 2 and measured["limit"] in ("memory", "matmul") and measured["ms"] > 0
    assert "of the copy bandwidth" in answer.stdout
