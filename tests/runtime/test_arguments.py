"""Keys that two commands have go by either name in both."""

import sys
from dataclasses import fields

import pytest

from cramfast import commandline, plan, prepare
from cramfast.config import TrainConfig, flatten
from cramfast.errors import UserError
from cramfast.runtime.arguments import VOCABULARY, under_one_name

SHORT, LONG = VOCABULARY


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--vocab-size", "512"], ["--b", "512"]),
        (["--vocab_size=512", "--seed", "1"], ["--b=512", "--seed", "1"]),
        (["--b", "512"], ["--b", "512"]),
        (["--b", "512", "--vocab-size=512"], ["--b", "512", "--b=512"]),
        (["--data", "vocab-size", "a_b", "--text_key", "x_y"], ["--data", "vocab-size", "a_b", "--text_key", "x_y"]),
        (["--vocab-size"], ["--b"]),
        ([], []),
    ],
)
def test_renamed(words, expected):
    assert under_one_name(words, {SHORT: "--b"}) == expected


def test_the_programs_own_words(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--vocab-size", "512"])
    assert under_one_name(None, {SHORT: LONG}) == [LONG, "512"]


@pytest.mark.parametrize(
    "words",
    [
        ["--vocab-size", "512", "--model.vocab-size", "1024"],
        ["--model.vocab_size=1024", "--seed", "3", "--vocab_size", "512"],
    ],
)
@pytest.mark.parametrize("renamed", [{SHORT: LONG}, {LONG: SHORT}], ids=["train", "prepare"])
def test_two_values_are_refused(words, renamed):
    with pytest.raises(UserError, match="are one key — give it once") as refusal:
        under_one_name(words, renamed)
    message = str(refusal.value)
    assert "--vocab-size 512" in message and "--model.vocab-size 1024" in message and "\n" not in message


@pytest.mark.parametrize("name", VOCABULARY)
def test_train_and_plan_take_both_names(tmp_path, name):
    words = ["--preset", "tiny", "--device", "cpu", name, "512"]
    request = commandline.parse([*words, "--run-dir", str(tmp_path / "run")])
    assert request.config.model.vocab_size == 512
    assert plan.parse(words).config.model.vocab_size == 512


@pytest.mark.parametrize("name", VOCABULARY)
def test_prepare_takes_both_names(tmp_path, monkeypatch, name):
    (tmp_path / "text.txt").write_text("\n\n".join(f"Part {i} of a short story about a dog." for i in range(300)))
    asked = {}

    def caught(*args, **options):
        asked.update(options)
        raise UserError("enough")

    monkeypatch.setattr(prepare, "prepare", caught)
    monkeypatch.setattr(sys, "argv", ["prepare", "--data", str(tmp_path / "text.txt"), f"{name}=512"])
    with pytest.raises(UserError, match="enough"):
        prepare.main()
    assert asked["vocab_size"] == 512


def test_every_key_that_both_commands_have_has_a_name_in_common():
    """What prepare has and train has not: where it writes, and --verify."""
    of_train = {f"--{key.replace('_', '-')}" for key in flatten(TrainConfig())}
    of_prepare = {f"--{key.replace('_', '-')}" for key in flatten(prepare.Options())}
    assert of_prepare - of_train == {"--out", "--verify", SHORT} and LONG in of_train
    # No key of the model's own part is called as one of prepare's, but for the vocabulary's.
    last = {f"--{field.name.replace('_', '-')}" for field in fields(TrainConfig().model)}
    assert last & of_prepare == {SHORT}
