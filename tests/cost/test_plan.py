"""Predictions: what can be worked out by hand, counted in a real step, or read back from made-up measurements."""

import json
from dataclasses import replace

import pytest
import torch

from bench.plan import random_batch
from cramfast import plan
from cramfast.config import to_json
from cramfast.cost import calibration, counted, footprint, measurements
from cramfast.cost.calibration import Efficiency
from cramfast.cost.cards import Card, find_card
from cramfast.cost.forecast import forecast, read_law
from cramfast.cost.roofline import Part, masked_tokens, microbatch_parts, muon_parameters, update_parts
from cramfast.errors import UserError
from cramfast.kernels import dispatch
from cramfast.model.encoder import Encoder
from cramfast.optim.flat import FlatParameters
from cramfast.optim.make import OPTIMIZERS, make_optimizer
from cramfast.optim.schedule import microbatches
from cramfast.recipes import resolve, starting_config
from cramfast.session.budget import Budget
from cramfast.session.memory import size_of_part

CPU = Card("some processor", 2e10, 1e11, 1e11, 8 << 30, None, "a test")
LAW = {"E": 1.5, "A": 400.0, "alpha": 0.3, "B": 900.0, "beta": 0.25}
FIT = {"count": "total", "law": LAW, "ranges": {"N": [1e6, 1e8], "D": [1e7, 1e9]}}


@pytest.fixture
def config():
    """A batch of four microbatches, at the end of a ramp."""
    mini = starting_config("mini", None, "cpu")
    return resolve(replace(mini, batch_tokens=4 * mini.microbatch_tokens, device="cpu", dtype="float32"))


def test_time_is_the_bound_over_the_efficiency(config):
    exact = forecast(config, CPU, 4096, {})
    halved = forecast(config, CPU, 4096, {"attention": Efficiency(0.5, "a test"), "loss": Efficiency(0.25, "a test")})
    for before, after in zip(exact.microbatch, halved.microbatch, strict=True):
        slower = {"attention": 2, "loss": 4}.get(before.part.name, 1)
        assert after.seconds == pytest.approx(slower * before.seconds)
    qkv = next(line for line in exact.microbatch if line.part.name == "qkv matrix")
    assert qkv.seconds == pytest.approx(4 * 6 * 4096 * 256 * 768 / 1e11) and qkv.bound_by == "arithmetic"
    assert exact.step_s(3) == pytest.approx(3 * exact.microbatch_s + exact.update_s)


def test_an_efficiency_is_found_by_name_before_operator(config):
    known = {"linear": Efficiency(0.5, "all"), "qkv matrix": Efficiency(0.25, "this one")}
    found = {line.part.name: line.efficiency.source for line in forecast(config, CPU, 4096, known).microbatch}
    assert (found["qkv matrix"], found["output matrix"], found["loss"]) == ("this one", "all", "")


def test_a_run_in_steps_adds_up_step_by_step(config):
    made = forecast(config, CPU, 4096, {})
    counts = [microbatches(step / 1000, 4096, config.batch_tokens, config.ramp_fraction) for step in range(1000)]
    tokens, seconds, steps = made.run(Budget("steps", 1000))
    assert steps == pytest.approx(1000)
    assert tokens == pytest.approx(4096 * sum(counts), rel=2e-3)
    assert seconds == pytest.approx(sum(made.step_s(count) for count in counts), rel=2e-3)


def test_budgets_of_one_run_agree(config):
    """Without a ramp every unit describes the same run."""
    made = forecast(replace(config, ramp_fraction=0.0), CPU, 4096, {})
    tokens, seconds, steps = made.run(Budget("seconds", 3600.0))
    assert seconds == pytest.approx(3600) and tokens == pytest.approx(3600 * made.tokens_per_s(4))
    for unit, amount in (("tokens", tokens), ("flops", tokens * made.flops_per_token), ("steps", steps)):
        assert made.run(Budget(unit, amount)) == pytest.approx((tokens, seconds, steps))


def test_halved_microbatches_keep_the_batch(config):
    whole, half = forecast(config, CPU, 4096, {}), forecast(config, CPU, 2048, {})
    assert half.run(Budget("steps", 100))[0] == pytest.approx(whole.run(Budget("steps", 100))[0])


@pytest.mark.parametrize("preset", ["tiny", "mini", "crammed_bert"])
def test_what_the_forward_pass_keeps(preset):
    """Against the storages that autograd really holds, parameters left out."""
    config = replace(starting_config(preset, None, "cpu"), dtype="float32")
    config = replace(config, model=replace(config.model, layers=min(4, config.model.layers)))
    model, batch = Encoder(config.model), random_batch(config, 512)
    FlatParameters(model)
    held = {}

    def keep(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.loss(batch)
    for parameter in model.parameters():
        held.pop(parameter.untyped_storage().data_ptr(), None)
    assert loss.requires_grad and sum(held.values()) == pytest.approx(footprint.kept_bytes(config, 512), rel=0.02)


@pytest.mark.parametrize(("chip", "dtype"), [("sm_75", "float16"), ("sm_86", "bfloat16")])
def test_what_the_floor_keeps(chip, dtype):
    """Counted where torch sees no GPU: the storages that the floor's operators save, on tensors without memory."""
    config = replace(starting_config("base", None, "cuda"), device="cuda", dtype=dtype)
    config = replace(config, model=replace(config.model, layers=6))
    model, batch = counted.without_memory(
        config.model, getattr(torch, dtype), (128,) * 64, 128, masked_tokens(config, 64 * 128)
    )
    held = {}

    def keep(tensor):
        held[tensor.untyped_storage()._cdata] = tensor  # which keeps the storage, so that no other gets its address
        return tensor

    with (
        dispatch.on_card(chip),
        torch.device("meta"),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        loss = model.loss(batch)
    for parameter in model.parameters():
        held.pop(parameter.untyped_storage()._cdata, None)
    found = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    assert loss.requires_grad and found == pytest.approx(footprint.kept_bytes(config, 64 * 128), rel=0.02)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_stays_between_steps(config, name):
    half = replace(config, dtype="bfloat16", optimizer=name)
    optimizer = make_optimizer(half, Encoder(half.model))
    flat, moments = optimizer.flat, [buffer for buffer, _ in optimizer.buffers().values()]
    stays = sum(t.nbytes for t in (flat.master, flat.grad, flat.half, *moments))
    assert footprint.state_bytes(half) == pytest.approx(stays, rel=1e-3)
    assert footprint.state_bytes(replace(half, ema_decay=0.999)) == pytest.approx(stays + flat.master.nbytes, rel=1e-3)


def test_the_largest_microbatch_fits_and_one_sequence_more_does_not(config):
    largest = footprint.largest_microbatch(config, 2 << 30, 300 << 20)
    assert footprint.training_bytes(config, largest, 300 << 20) <= 2 << 30
    assert footprint.training_bytes(config, largest + config.sequence_len, 300 << 20) > 2 << 30
    assert footprint.largest_microbatch(config, 100 << 20, 300 << 20) == 0


def test_microbatches_are_the_largest_that_fit():
    arguments = plan.parse(["--gpu", "RTX 2080 Ti"])
    card, config = find_card("RTX 2080 Ti"), arguments.config
    tokens = plan.fitting_microbatch(config, card, footprint.CONTEXT_BYTES)
    usable = plan.USABLE_MEMORY * card.memory_bytes
    parts = round(config.microbatch_tokens / tokens)
    assert parts > 2 and tokens == size_of_part(config.microbatch_tokens, parts)
    assert footprint.training_bytes(config, tokens, footprint.CONTEXT_BYTES) <= usable
    larger = size_of_part(config.microbatch_tokens, parts - 1)
    assert footprint.training_bytes(config, larger, footprint.CONTEXT_BYTES) > usable


@pytest.mark.parametrize(
    ("op", "shape", "share", "reduced"),
    [
        ("linear", {"N": 8192, "D": 64, "E": 64}, 0.25, {"N": 2048}),
        ("linear", {"N": 8192, "D": 64, "E": 64}, 0.001, {"N": 512}),
        ("linear", {"N": 300, "D": 64, "E": 64}, 0.5, {"N": 300}),
        ("linear", {"N": 8192, "D": 64, "E": 64}, 3.0, {"N": 8192}),
        ("cross_entropy", {"M": 2458, "D": 64, "V": 32768}, 0.12, {"M": 256}),  # a chunk of logits in float32
        ("attention", {"lengths": (8, 9, 10, 11), "H": 1, "K": 32}, 0.3, {"lengths": (8, 9)}),
        ("adamw", {"P": 100_000}, 0.0, {"P": 512}),
        ("orthogonalise", {"B": 2, "R": 64, "C": 32}, 0.0, {}),
    ],
)
def test_parts_are_measured_on_fewer_rows(op, shape, share, reduced):
    assert calibration.fewer_rows(Part("a part", op, shape), share, torch.float32, "cpu").shape == shape | reduced


def test_a_measured_efficiency_is_the_bound_over_the_median(config, monkeypatch):
    config = replace(config, optimizer="muon")
    parts = microbatch_parts(config, 1024) + update_parts(config)

    def timed(watch, works, rounds):
        for run in works.values():
            run()
        return {name: [0.5, 9.0, 0.25] for name in works}, {}

    monkeypatch.setattr(calibration, "interleaved", timed)
    monkeypatch.setattr(calibration, "PART_S", 1e-9)  # the fewest rows
    found = calibration.measure(CPU, parts, torch.float32)
    assert found.keys() == {part.name for part in parts if part.op != "copy"}
    assert found["qkv matrix"].value == pytest.approx(6 * 512 * 256 * 768 / 1e11 / 0.5)


def test_efficiencies_from_rows_of_a_benchmark():
    card = find_card("RTX A6000")
    row = {
        "op": "layernorm", "dtype": "bfloat16", "implementation": "ours", "ms": 1.0, "gb_per_s": 384.0,
        "gflop_per_s": 400.0, "percent_of_matmul": 0.5, "gpu": "NVIDIA RTX A6000", "commit": "abc",
    }  # fmt: skip
    loss = row | {"op": "cross_entropy", "gb_per_s": 1.0, "gflop_per_s": 77400.0, "percent_of_matmul": 96.75}
    left_out = [
        row | {"gpu": "NVIDIA H200", "gb_per_s": 768.0}, row | {"implementation": "eager", "gb_per_s": 768.0},
        row | {"dtype": "float16", "gb_per_s": 768.0}, row | {"ms": None},
        {key: value for key, value in row.items() if key != "gpu"} | {"gb_per_s": 768.0},
    ]  # fmt: skip
    found = measurements.row_efficiencies([row, row | {"gb_per_s": 192.0}, loss, *left_out], card, "bfloat16")
    assert {op: efficiency.value for op, efficiency in found.items()} == pytest.approx(
        {"layernorm": 0.5, "cross_entropy": 0.5, "linear": 80 / 154.8}
    )


@pytest.mark.parametrize("line", ['{"system": "cramfast", "tokens_per_s": 1.0}', "[1]", "3"])
def test_results_of_another_benchmark_are_refused(tmp_path, line):
    """Rows that are none would leave a prediction without what was measured, in silence."""
    path = tmp_path / "step.jsonl"
    path.write_text('{"op": "glu", "implementation": "ours"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"step\.jsonl: not of pytest bench/"):
        measurements.read_rows([path])


def recorded(folder, config, steps, **run):
    """A run's folder with `steps` of (microbatches, tokens, seconds) so far."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_json(config)))
    described = {"device": CPU.name, "threads": torch.get_num_threads(), "matmul_peak_flops": 1e11} | run
    rows = [{"run": described | {"microbatch_tokens": config.microbatch_tokens}}]
    for step, (count, tokens, seconds) in enumerate(steps, 1):
        rows.append({"step": step, "microbatches": count, "tokens": tokens, "seconds": seconds})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_recorded_runs_are_predicted_at_their_own_steps(config, tmp_path):
    small = replace(config, microbatch_tokens=1024)
    recorded(tmp_path / "ours", small, [(1, 1024, 2.0), (3, 4096, 7.0)])
    recorded(tmp_path / "wider", replace(config, model=replace(config.model, layers=5)), [(1, 4096, 2.0)])
    recorded(tmp_path / "elsewhere", config, [(1, 4096, 2.0)], device="another processor")
    recorded(tmp_path / "threads", config, [(1, 4096, 2.0)], threads=99)
    (found,) = measurements.comparisons(tmp_path, config, CPU, {})
    made = forecast(small, CPU, 1024, {})
    assert found.name == "ours" and found.measured == pytest.approx(4096 / 7)
    assert found.predicted == pytest.approx(4096 / (made.step_s(1) + made.step_s(3)))
    assert found.error == pytest.approx(found.predicted / found.measured - 1)


def test_the_law(tmp_path):
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(FIT | {"rms_residual": 0.01}))
    law = read_law(path)
    assert law.loss(16**10, 16**8) == pytest.approx(1.5 + 400 / 16**3 + 900 / 16**2)
    outside = [law.extrapolates(*point) for point in ((1e7, 1e8), (1e9, 1e8), (1e7, 1e6))]
    assert outside == [False, True, True]
    model = starting_config("mini", None, "cpu").model
    assert law.size(model) - replace(law, count="body").size(model) == 8192 * 256
    shown = plan.expected_loss(law, starting_config("mini", None, "cpu"), 1e12)
    assert shown[0] == f"{law.loss(law.size(model), 1e12):.3f}" and "outside" in shown[1]


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        json.dumps(LAW),
        json.dumps({"law": LAW}),
        json.dumps(FIT | {"law": LAW | {"E": None}}),
        json.dumps(FIT | {"law": LAW | {"beta": float("nan")}}),
    ],
)
def test_what_is_no_law(tmp_path, text):
    path = tmp_path / "fit.json"
    path.write_text(text)
    with pytest.raises(UserError, match="--fit"):
        read_law(path)
    with pytest.raises(UserError, match="unreadable"):
        read_law(tmp_path / "missing.json")


def test_precision_follows_the_card():
    assert plan.parse(["--gpu", "T4"]).config.dtype == "float16"
    assert plan.parse(["--gpu", "A6000"]).config.dtype == "bfloat16"
    with pytest.raises(UserError, match="use --dtype float16"):
        plan.parse(["--gpu", "T4", "--dtype", "bfloat16"])


@pytest.mark.parametrize("flags", [("--objective", "rtd"), ("--short-sequence-len", "64")])
def test_what_is_not_counted_is_refused(flags):
    with pytest.raises(UserError, match=f"{flags[0]}.*not counted"):
        plan.parse(["--gpu", "T4", *flags])


def test_memory_of_muons_update_lies_beside_that_of_a_graph(config):
    muon = replace(config, optimizer="muon", device="cuda")
    pass_bytes = footprint.kept_bytes(muon, 512) + footprint.working_bytes(muon, 512)
    hidden = 8 * muon_parameters(muon)
    assert footprint.training_bytes(muon, 512, 7) == 7 + footprint.state_bytes(muon) + pass_bytes + hidden
    on_cpu = replace(muon, device="cpu")
    pass_bytes = footprint.kept_bytes(on_cpu, 512) + footprint.working_bytes(on_cpu, 512)
    assert footprint.training_bytes(on_cpu, 512, 7) == 7 + footprint.state_bytes(muon) + max(pass_bytes, hidden)


def printed(capsys, *flags):
    plan.show(plan.make_plan(plan.parse([str(flag) for flag in flags])))
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_a_card_without_measurements_gets_upper_bounds(capsys, tmp_path):
    text = printed(capsys, "--gpu", "RTX 2080 Ti", "--budget", "24h", "--runs", tmp_path)
    assert "tokens/s at most" in text and "tokens at most" in text and "MFU at most" in text
    assert "expected loss no fit" in text and "error not known" in text and "in 24.00 h" in text
    text = printed(capsys, "--gpu", "RTX 2080 Ti", "--budget", "2e9tokens", "--runs", tmp_path)
    assert "tokens 2 B in at least" in text


def test_a_run_whose_name_looks_like_markup(capsys, tmp_path):
    made = plan.make_plan(plan.parse(["--gpu", "A6000", "--runs", str(tmp_path)]))
    plan.show(replace(made, compared=[measurements.Comparison("run[/v1]", 1.0, 1.0, "alone")]))
    assert "run run[/v1]" in capsys.readouterr().out


def test_the_machine_at_hand(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "ROUNDS", 1)
    monkeypatch.setattr(calibration, "machine_at_hand", lambda device, dtype: CPU)
    (tmp_path / "fit.json").write_text(json.dumps(FIT))
    sizes = ["--microbatch-tokens", 256, "--batch-tokens", 256, "--device", "cpu", "--dtype", "float32"]
    text = printed(capsys, "--preset", "tiny", *sizes, "--fit", tmp_path / "fit.json", "--runs", tmp_path)
    assert "all parts measured" in text and "at most" not in text and "no fit" not in text
    assert "microbatches of 256" in text and "limit" in text


def test_the_peaks_of_this_machine():
    card = calibration.machine_at_hand("cpu", torch.float32)
    assert card.bandwidth > 1e8 and card.tensor_flops == card.plain_flops > 1e8 and card.memory_bytes > 1 << 28
