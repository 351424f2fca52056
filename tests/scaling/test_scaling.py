"""Plans, the table and the pages: what is asked for is run once, what was killed goes on, the page stands alone."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from test_report import Tags

from cramfast.commandline import parse
from cramfast.config import TrainConfig, config_hash
from cramfast.cost.losslaw import Law
from cramfast.errors import UserError
from cramfast.scaling import claims, fit, report, runner, table
from cramfast.scaling import plan as plans
from cramfast.scaling.claims import Rates, gain, measured_gain, predicted_gain, verdict
from cramfast.scaling.plan import Plan, Size
from cramfast.scaling.run import Arguments, Calibration, fitted_into, run_s, with_interval
from cramfast.scaling.runner import Job, Runner


@pytest.mark.parametrize("name", list(plans.PLANS))
def test_shapes_of_a_size_have_equal_parameters(name, tmp_path):
    plan = plans.read_plan(name, "cpu")
    runs = plans.expand(plan, tmp_path, "cpu")
    for size in {run.size for run in runs}:
        counts = [plans.parameters(run.config.model)[0] for run in runs if run.size == size]
        assert max(counts) / min(counts) < 1.03
    assert len({run.name for run in runs}) == len(runs)
    assert all(run.config.lr == plans.learning_rate(run.config.model.width, plan.lr) for run in runs)


@pytest.mark.parametrize("preset", ["tiny", "crammed_bert"])
def test_parameters_are_those_of_the_model(preset):
    import torch

    from cramfast.model.encoder import Encoder
    from cramfast.recipes import starting_config

    base = plans.replace(
        starting_config(preset, None, "cpu").model, vocab_size=512, norm_bias=False, positions="rotary"
    )
    model = plans.shaped(base, "3x64")
    with torch.device("meta"):
        built = Encoder(model)
    total = sum(p.numel() for p in built.parameters())
    assert plans.parameters(model) == (total, total - 512 * 64)


def test_the_command_line_gives_the_config_of_the_plan(tmp_path):
    made = plans.expand(plans.read_plan("smoke", "cpu"), tmp_path, "cpu", threads=1, dtype="float32")[3].config
    parsed = parse([*plans.flags(made), "--run-dir", str(tmp_path / "run")]).config
    assert parsed == made and config_hash(parsed) == config_hash(made)


def test_a_plan_in_toml_is_the_plan(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'preset = "tiny"\nlr = 1e-3\nminutes = 5\nevaluations = 3\nsettings = { batch_tokens = 16384 }\n'
        '[[sizes]]\nshapes = ["2x64", "3x64"]\ntokens = [1e5, 2e5]\nseeds = [0, 1]\n'
    )
    size = Size(("2x64", "3x64"), (1e5, 2e5), (0, 1))
    expected = Plan("mine", (size,), "tiny", lr=1e-3, minutes=5, settings={"batch_tokens": 16384}, evaluations=3)
    assert plans.read_plan(str(path), "cpu") == expected
    assert plans.from_dict(plans.to_json(expected), "x") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("minutes = 5\n", r"\[\[sizes\]\]"),
        ('[[sizes]]\nshapes = ["2x64"]\ntokens = [1e5]\nspeed = 3\n', "speed"),
        ('hurry = true\n[[sizes]]\nshapes = ["2x64"]\ntokens = [1e5]\n', "hurry"),
        ('[[sizes]]\nshapes = ["2x64"]\n', "tokens"),
        ('[[sizes]]\nshapes = ["2 by 64"]\ntokens = [1e5]\n', "2 by 64"),
        ('[[sizes]]\nshapes = ["2x70"]\ntokens = [1e5]\n', "multiple of 32"),
        ('[[sizes]]\nshapes = ["2x64", "2x512"]\ntokens = [1e5]\n', "cannot have"),
        ('[[sizes]]\nshapes = ["2x64"]\ntokens = [1e5, 1e5]\n', "twice"),
        ('settings = { lr = 1 }\n[[sizes]]\nshapes = ["2x64"]\ntokens = [1e5]\n', "settings.lr"),
        ("[[sizes]\n", "TOML"),
    ],
)
def test_a_faulty_plan_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        plans.expand(plans.read_plan(str(path), "cpu"), tmp_path, "cpu")
    assert "\n" not in str(error.value)


def test_budgets_shrink_until_the_plan_fits(tmp_path):
    plan = Plan("p", (Size(("2x64",), (1e5, 2e5)),), preset="tiny")
    found = {"2x64": Calibration(token_s=1e-3, evaluation_s=2.0)}

    def seconds(plan):
        return sum(run_s(run, found, 10.0, 3) for run in plans.expand(plan, tmp_path, "cpu"))

    assert seconds(plan) == pytest.approx(2 * (10 + 2 * 2) + 300)
    assert fitted_into(plan, seconds, 0) == plan and fitted_into(plan, seconds, 1000) == plan
    short = fitted_into(plan, seconds, 100)
    assert 85 < seconds(short) <= 100
    assert short.sizes[0].tokens[1] == pytest.approx(2 * short.sizes[0].tokens[0], rel=0.05)
    with pytest.raises(UserError, match="do not fit"):
        fitted_into(plan, seconds, 20)
    run = with_interval(plans.expand(plan, tmp_path, "cpu")[0], found, 4)
    assert run.config.eval_interval == 25.0


def row(name="a", N=1e6, D=1e6, loss=5.0, **more) -> dict:
    """A row as the table has it."""
    x = np.geomspace(4e3, D, 48)
    return {
        "name": name, "size": 0, "shape": "4x256", "reference": True, "budget_tokens": int(D), "parameters": int(N),
        "body_parameters": int(N / 2), "width": 256, "seed": 0, "tokens": int(D), "flops": 6 * N * D,
        "seconds": D * N / 1e10, "tokens_per_s": 1e10 / N, "loss": loss, "corpus_tokens": 10**7, "device": "a CPU",
        "threads": 2, "dtype": "float32", "versions": {"cramfast": "0"}, "config_hash": "f" * 12,
        "heldout": {"tokens": [0.0, D], "seconds": [0.0, 1.0], "flops": [0.0, 6 * N * D], "loss": [9.0, loss]},
        "training": {"tokens": x.tolist(), "loss": (loss + 10 * x**-0.2 - 10 * D**-0.2).tolist()},
    } | more  # fmt: skip


def grid(shapes: bool = True) -> list[dict]:
    """Runs of three sizes by three budgets, and of a second shape of the middle size."""
    law = Law(2.0, 300.0, 800.0, 0.35, 0.37)
    rows = []
    for size, N in enumerate((1e6, 4e6, 1.6e7)):
        for D in (1e6, 4e6, 1.6e7):
            name = f"{size}x64"
            rows.append(row(f"{name}-{D:.0f}", N, D, float(law.loss(N, D)), size=size, shape=name))
    if shapes:
        for seed in (0, 1):
            rows.append(row(f"9x32-{seed}", 4e6, 1.6e7, 4.6, size=1, shape="9x32", reference=False, seed=seed))
        rows.append(row("1x64-again", 4e6, 1.6e7, float(law.loss(4e6, 1.6e7)), size=1, shape="1x64", seed=1))
    return rows


def write(folder, rows):
    folder.mkdir(exist_ok=True)
    for each in rows:
        table.append(folder, each)


def test_a_row_cut_off_by_a_kill_is_written_anew(tmp_path):
    write(tmp_path, [row("a"), row("b")])
    path = tmp_path / table.TABLE
    path.write_text(path.read_text()[:-40])
    assert [r["name"] for r in table.read_table(tmp_path)] == ["a"]
    table.append(tmp_path, row("b"))
    assert [r["name"] for r in table.read_table(tmp_path)] == ["a", "b"]
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(UserError, match="line 1"):
        table.read_table(tmp_path)


def test_fit_and_report_of_a_table(tmp_path):
    write(tmp_path / "p", grid())
    fit.Arguments(tmp_path / "p", fit.Options(samples=10, hold_out=2)).run(Console(quiet=True))
    found = json.loads((tmp_path / "p" / fit.FIT_FILE).read_text())
    assert found["law"]["alpha"] == pytest.approx(0.35, rel=0.02) and len(found["bootstrap"]) == 10
    assert all(abs(p["error"]) < 0.002 for p in found["predictions"]) and len(found["predictions"]) == 2
    assert found["shifts"][0]["shape"] == "9x32" and found["advice"]["hours"][0]["N"] > 0
    entries = [{"name": "graph capture", "obstacle": "needs a GPU"}]
    settings = {"shape": "1x64", "dtype": "float32", "device": "a CPU", "rounds": 3, "seconds": 5, "seeds": 3}
    (tmp_path / "p" / claims.CLAIMS_FILE).write_text(json.dumps({"settings": settings, "claims": entries}))
    paths = report.write_report(tmp_path / "p")
    assert {path.name for path in paths} == {"report.html", "loss.png", "collapse.png", "fit.png", "sizes.png"}
    page = paths[0].read_text()
    for part in ("needs a GPU", "9x32", "alpha", "8 hours", "beyond", "f" * 12):
        assert part in page, part
    tags = Tags()
    tags.feed(page.replace("<img", "<br"))  # which Tags knows to stand alone
    assert "http" not in page.replace("http://www.w3.org", "") and not tags.open


def test_fit_refuses_what_it_cannot_use(tmp_path):
    for rows, message in (
        ([], "no runs.jsonl"),
        (grid()[:4], "too few"),
        ([*grid(), row("odd", device="another")], "machines or precisions"),
        ([*grid(), row("odd") | {"loss": None}], "odd has no loss"),
    ):
        folder = tmp_path / message.split()[0]
        write(folder, rows)
        with pytest.raises(UserError, match=message):
            fit.fit_folder(folder, fit.Options(samples=3))


RATES = Rates([200.0, 210, 190], [100.0, 100, 100], [200.0, 210, 190], [100.0, 100, 100], 10, 10)


def test_gain_and_predicted_gain():
    value, (low, high) = gain(RATES.useful_on, RATES.useful_off)
    assert value == 2.0 and 1.9 <= low <= 2.0 <= high <= 2.1
    law = Law(2.0, 300.0, 800.0, 0.35, 0.37)
    predicted = predicted_gain(law, [law] * 50, 4_000_000, RATES, 100.0)
    assert predicted[0] == pytest.approx(law.loss(4e6, 1e4) - law.loss(4e6, 2e4))
    assert predicted[1] < predicted[0] < predicted[2]


@pytest.mark.parametrize(
    ("predicted", "measured", "seeds", "word"),
    [
        ((0.1, 0.08, 0.12), (0.11, 0.05, 0.2), 3, "confirmed"),
        ((0.1, 0.08, 0.12), (0.3, 0.2, 0.4), 3, "refuted"),
        ((0.1, 0.08, 0.12), (-0.1, -0.2, 0.0), 3, "refuted"),
        ((0.1, 0.08, 0.12), (0.05, -0.1, 0.2), 3, "undecided"),
        ((0.1, 0.08, 0.12), (0.11, 0.05, 0.2), 2, "undecided"),
        ((0.1, 0.08, 0.12), None, 0, "undecided"),
        (None, (0.11, 0.05, 0.2), 3, "undecided"),
    ],
)
def test_verdicts(predicted, measured, seeds, word):
    assert verdict(predicted, measured, seeds)[0] == word


def test_measured_gain_pairs_seeds():
    claim = claims.Claim("c", ("padding",))
    losses = {((), 0): 4.0, (("padding",), 0): 4.3, ((), 1): 4.1, (("padding",), 1): 4.5, ((), 2): 3.0}
    rows = [{"switches": list(names), "seed": seed, "loss": loss} for (names, seed), loss in losses.items()]
    measured, seeds = measured_gain(claim, rows)
    assert seeds == 2 and measured[0] == pytest.approx(0.35) and measured[1] < 0.35 < measured[2]


def test_jobs_train_a_shared_side_once_a_seed():
    (run,) = plans.expand(Plan("p", (Size(("1x64",), (8192,)),)), Path("text"), "cpu", dtype="float32")
    config = run.config
    chosen = [c for c in claims.claims_of(config) if not c.obstacle(config)]
    jobs = claims.jobs_of(chosen, run, claims.Options(seconds=5, seeds=3), 1.0)
    assert len({job.name for job in jobs}) == len(jobs) and sum(job.switches == () for job in jobs) == 3
    assert {c.name: c.obstacle(config) for c in claims.claims_of(config)}["graph capture"] == "needs a GPU"


def test_under_another_optimizer_what_takes_adamws_place_is_listed_and_nothing_else_falls():
    settings = {"optimizer": "muon", "microbatch_tokens": 1024}
    (run,) = plans.expand(
        Plan("p", (Size(("1x64",), (8192,)),), settings=settings), Path("text"), "cpu", dtype="float32"
    )
    obstacles = {c.name: c.obstacle(run.config) for c in claims.claims_of(run.config)}
    assert obstacles["fused AdamW over flat buffers"] == "needs optimizer=adamw, the plan has muon"
    possible = [c for c in claims.claims_of(run.config) if not obstacles[c.name]]
    names = {job.switches for job in claims.jobs_of(possible, run, claims.Options(), 1.0)}
    everything = max(names, key=len)
    assert {"biases", "padding", "dropout"} < set(everything) and "per_tensor_adamw" not in everything
    assert "per_tensor_adamw" in max((c.off for c in claims.claims_of(TrainConfig(device="cpu"))), key=len)


def entry(name: str, seeds: int, rounds: int) -> dict:
    """A claim as claims.json has it."""
    rates = {"useful_on": [2.0] * rounds}
    gains = {"slots_gain": [2, 2, 2], "useful_gain": [2, 2, 2], "predicted": None, "measured": None}
    return {"name": name, "rates": rates, "seeds": seeds, "verdict": "undecided", "why": "few"} | gains


def test_claims_asked_for_alone_leave_the_others_in_place():
    settings = {"shape": "1x64", "seconds": 5.0, "dtype": "float32", "device": "a CPU", "tokens": [10, 20]}
    before = {"settings": settings, "claims": [entry("a", 3, 7), {"name": "b", "obstacle": "needs a GPU"}]}
    now = {"settings": settings | {"tokens": [15, 30]}, "claims": [entry("a", 6, 5), entry("c", 3, 7)]}
    both = claims.merged(before, now)
    assert [claim["name"] for claim in both["claims"]] == ["a", "b", "c"] and both["claims"][0]["seeds"] == 6
    assert both["settings"]["tokens"] == [10, 30]
    assert "5 to 7 interleaved" in (note := claims.table(both).notes[0]) and "3 to 6 seeds" in note
    assert claims.merged({}, now) == now
    for key in ("shape", "seconds", "dtype", "device"):
        assert claims.merged(before | {"settings": settings | {key: "another"}}, now) == now


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    from cramfast.prepare import prepare

    folder = tmp_path_factory.mktemp("text")
    random = np.random.default_rng(0)
    words = [f"w{i}x" for i in range(400)]
    (folder / "text.txt").write_text("\n\n".join(" ".join(random.choice(words, 60)) for _ in range(600)))
    return prepare((str(folder / "text.txt"),), folder / "out", vocab_size=512)


def test_a_run_is_done_once_and_a_killed_one_goes_on(tmp_path, prepared, monkeypatch):
    """Stopped, resumed, and in the end the same as one that was never disturbed."""
    settings = {"microbatch_tokens": 256, "batch_tokens": 256, "heldout_tokens": 1024, "checkpoint_interval": 0.001}
    plan = Plan("p", (Size(("1x64",), (8192,)),), "tiny", settings=settings)
    (run,) = plans.expand(plan, prepared, "cpu", threads=1)
    model = plans.replace(run.config.model, vocab_size=512)
    job = Job("a", plans.replace(run.config, model=model), 1.0, {"size": 0, "shape": "1x64"})
    monkeypatch.setattr(runner, "POLL_S", 0.1)
    progress = Runner(tmp_path / "killed", Console(quiet=True)).train(job)
    while next(progress)[0] < 0.2:
        pass
    progress.close()  # ends the process, as an interrupt does
    assert 0.2 <= runner.last_row(tmp_path / "killed" / "runs" / "a")[0] < 1
    rows = [Runner(tmp_path / name, Console(quiet=True)).work([job])[0] for name in ("killed", "whole")]
    same = ("loss", "tokens", "flops", "updates", "training", "config_hash", "parameters")
    assert [rows[0][key] for key in same] == [rows[1][key] for key in same]
    assert not (tmp_path / "killed" / "runs" / "a" / "checkpoints").exists()
    assert not (tmp_path / "killed" / "runs" / "a" / "hf").exists()
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a finished run was started again"))
    assert Runner(tmp_path / "killed", Console(quiet=True)).work([job]) == rows[:1]
    (tmp_path / "killed" / table.TABLE).unlink()  # killed between the end of the run and its row
    assert Runner(tmp_path / "killed", Console(quiet=True)).work([job]) == rows[:1]


def test_a_failed_run_says_why(tmp_path, prepared):
    (run,) = plans.expand(Plan("p", (Size(("1x64",), (8192,)),), "tiny"), tmp_path / "nowhere", "cpu")
    with pytest.raises(UserError, match="its training failed") as error:
        Runner(tmp_path, Console(quiet=True)).work([Job("a", run.config, 1.0, {})])
    assert "nowhere" in str(error.value) and "a.log" in str(error.value)


def test_the_trainer_takes_every_kind_of_switch(tmp_path, prepared):
    """Encoder, source, optimizer, kernels and config replaced at once, in the loop itself."""
    plan = Plan("p", (Size(("1x64",), (2048,)),), "tiny", settings={"microbatch_tokens": 512, "batch_tokens": 512})
    (run,) = plans.expand(plan, prepared, "cpu", threads=1, dtype="float32")
    names = (*claims.OFF, "dropout", "length_512")
    config = claims.Variant(names).config(run.config)
    labels = {"size": 0, "shape": "1x64"}
    (row,) = Runner(tmp_path, Console(quiet=True)).work([Job("off", config, 1.0, labels, names)])
    assert row["parameters"] == plans.parameters(config.model)[0] - (8192 - 512) * 64 + 3 * 64 + 64 + 2 * 128 + 64
    assert row["kernels"]["glu"] == "reference" and row["tokens"] >= 2048 and row["loss"] < 8


TINY = {"microbatch_tokens": 256, "batch_tokens": 256, "heldout_tokens": 1024}


def test_claims_of_two_shapes_in_a_folder_have_runs_of_their_own(tmp_path, prepared):
    plan = Plan("p", (Size(("1x64",), (8192,)), Size(("2x64",), (8192,))), "tiny", settings=TINY)
    times = {shape: {"token_s": 1e-4, "evaluation_s": 0.1} for shape in ("1x64", "2x64")}
    settings = {"plan": plans.to_json(plan), "data": str(prepared), "device": "cpu", "dtype": "float32", "threads": 1}
    (tmp_path / "plan.json").write_text(json.dumps(settings | {"calibration": times, "start_s": 1.0}))
    for shape in times:
        options = claims.Options(shape, only=("sparse",), rounds=1, round_s=0.01, seconds=0.2, seeds=1)
        claims.Arguments(tmp_path, options).run(Console(quiet=True))
    rows = table.read_table(tmp_path / "claims", claims.CLAIMS_TABLE)
    assert [(row["shape"], row["layers"]) for row in rows] == [("1x64", 1)] * 2 + [("2x64", 2)] * 2
    assert [row["name"] for row in rows] == [f"{s}-{x}-0.2s-s0" for s in times for x in ("all-on", "dense_prediction")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": 2}, "threads=1, not 2 — ask for 1, or choose another --out"),
        ({"minutes": 5.0}, "plan.minutes=0.0, not 5.0"),
        ({"data": ("more.txt",)}, "data[0]='text.txt', not 'more.txt'"),
        ({"data": ("text.txt", "more.txt")}, "data=['text.txt'], not ['text.txt', 'more.txt']"),
        ({"dtype": "bfloat16"}, "dtype='float32', not 'bfloat16'"),
        ({"plan": "cpu"}, "plan.name='smoke', not 'cpu'"),
    ],
)
def test_a_plan_goes_on_as_it_began(tmp_path, changes, message):
    """Another value is refused with both; no --data takes the stored text, also in a plan.json of the first release."""
    plan = plans.to_json(plans.smoke("cpu"))
    asked = {"plan": plan, "data": ["text.txt"], "device": "cpu", "dtype": "float32"}
    runs = plans.expand(plans.smoke("cpu"), tmp_path, "cpu")
    stored = {
        "asked": asked, "plan": plan, "data": str(tmp_path), "device": "cpu", "dtype": "float32", "threads": 1,
        "start_s": 1.0, "calibration": {s: {"token_s": 1e-4, "evaluation_s": 0.1} for s in {run.shape for run in runs}},
        "estimates_s": {run.name: 1.0 for run in runs}, "corpus_tokens": 10**6,
    }  # fmt: skip
    (tmp_path / "plan.json").write_text(json.dumps(stored))
    same = {"plan": "smoke", "out": tmp_path, "device": "cpu", "dtype": "float32", "threads": 1, "estimate": True}
    Arguments(**same).run(Console(quiet=True))
    Arguments(**same, data=("text.txt",)).run(Console(quiet=True))
    with pytest.raises(UserError) as error:
        Arguments(**(same | changes)).run(Console(quiet=True))
    assert message in str(error.value)
