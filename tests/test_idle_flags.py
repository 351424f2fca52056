"""Flags that change nothing with the others are refused: whoever gives one expects that it counts."""

import pytest

from cramfast.commandline import IDLE, parse
from cramfast.config import TrainConfig, flatten
from cramfast.errors import UserError
from cramfast.scaling import plan as plans


@pytest.mark.parametrize(
    ("flags", "counts"),
    [
        (["--muon-rate", "3"], ["--optimizer", "muon"]),
        (["--short-fraction", "0.3"], ["--short-sequence-len", "64"]),
        (["--muon_rate=3"], ["--optimizer", "muon"]),
        (["--probe-pairs", "3"], ["--probe-data", "blimp.jsonl"]),
        (["--curation.similarity", "0.9"], ["--curation.duplicates", "near"]),
        (["--model.window", "32"], ["--model.global-every", "3"]),
        (["--model.rope-theta-local", "5000"], ["--model.global-every", "3"]),
        (["--model.rope-theta-global", "5000", "--model.positions", "sinusoidal"], None),
        (["--model.vocab-size", "1024", "--tokenizer", "kmer:3"], None),
        (["--profile-steps", "90:93", "--budget", "80steps"], None),
    ],
)
def test_a_flag_without_effect_is_refused(flags, counts):
    with pytest.raises(UserError, match=r"--[a-z.-]+ .*— (leave it out, or )?use ") as refused:
        parse(["--preset", "mini", "--device", "cpu", *flags])
    assert flags[0].partition("=")[0].replace("_", "-") in str(refused.value)
    if counts:
        parse(["--preset", "mini", "--device", "cpu", *flags, *counts])


def test_a_preset_or_a_recipe_may_set_what_has_no_effect():
    parse(["--preset", "tiny", "--device", "cpu"])
    parse(["--preset", "tiny", "--device", "cpu", "--recipe", "crammed"])


@pytest.mark.parametrize("name", ["smoke", "cpu"])
def test_what_a_scaling_plan_asks_for_is_taken(tmp_path, name):
    for job in plans.expand(plans.read_plan(name, "cpu"), tmp_path, "cpu", threads=1, dtype="float32"):
        parse([*plans.flags(job.config), "--run-dir", str(tmp_path / "run")])


def test_the_keys_exist():
    assert IDLE.keys() <= flatten(TrainConfig()).keys()
