"""What a training run takes from a folder of prepared text, and what must not contradict it."""

import json
from dataclasses import replace

import pytest
from test_prepare import OPTIONS, write_text

from cramfast import stages, train
from cramfast.commandline import parse
from cramfast.config import Curation, read_config, to_json
from cramfast.errors import UserError
from cramfast.model.encoder import Encoder
from cramfast.prepare import prepare


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_run_on_a_prepared_folder_records_how_that_was_prepared(tmp_path, capsys):
    data = write_text(tmp_path / "a.txt")
    folder = prepare((data,), tmp_path / "out", **OPTIONS | {"tokenizer": "bpe"})
    assert stages.as_prepared(asked(folder)).tokenizer == "bpe"
    assert "out was prepared with tokenizer=bpe, and stays so" in capsys.readouterr().out
    assert stages.as_prepared(asked(data)) == asked(data).config


def asked(data, *flags):
    """The request of a tiny run on this text."""
    return parse(["--preset", "tiny", "--device", "cpu", "--data", str(data), *flags])


def test_a_run_reads_as_it_is_told_and_a_prepared_folder_keeps_that(tmp_path, capsys):
    texts = (tmp_path / "a.txt", tmp_path / "notes.train")
    write_text(texts[0])
    texts[1].write_bytes(texts[0].read_bytes().replace(b"be", "bé".encode("latin-1")))
    flags = ("--format", "text", "--encoding", "latin-1", "--skip-malformed", "3")
    config = asked(texts[1], *flags).config
    assert (config.format, config.encoding, config.skip_malformed) == ("text", "latin-1", 3)
    prepared, _ = stages.prepare_text(config)
    assert stages.as_prepared(asked(prepared)).encoding == "latin-1"
    assert "encoding=latin-1, skip_malformed=3, and stays so" in capsys.readouterr().out.replace("\n", " ")
    with pytest.raises(UserError, match="skip_malformed=-1 is not possible"):
        asked(texts[1], "--skip-malformed", "-1")


def test_a_vocabulary_larger_than_the_presets_is_said_with_its_price(tmp_path, capsys):
    data = write_text(tmp_path / "a.txt")
    small = ("--model.vocab-size", "64")
    request = asked(prepare((data,), tmp_path / "out", **OPTIONS), *small)
    size = stages.prepare_text(stages.as_prepared(request))[1].model.vocab_size
    before, after = (sum(p.numel() for p in Encoder(replace(request.config.model, vocab_size=n)).parameters())
                     for n in (64, size))  # fmt: skip
    assert f"note: that makes {after / 1e3:.0f} k parameters instead of {before / 1e3:.0f} k — for the smaller " \
           "model, prepare the text with --vocab-size 64\n" in capsys.readouterr().out  # fmt: skip
    stages.prepare_text(asked(data).config)  # raw text yields fewer than were asked for
    tokenizer = ("--tokenizer", str(tmp_path / "out" / "tokenizer.json"))
    with pytest.raises(UserError, match=r"--model\.vocab-size has no effect here"):
        asked(data, *small, *tokenizer)
    stages.prepare_text(asked(data, *tokenizer).config)
    assert "model.vocab_size=" in (said := capsys.readouterr().out) and "note:" not in said


CURATED = Curation(duplicates="near", max_tokens_per_char=0.9)
FLAGS = ("--curation.duplicates", "near", "--curation.max-tokens-per-char=0.9")


@pytest.mark.parametrize("curation", [Curation(), CURATED])
@pytest.mark.parametrize("recipe", ["cramfast", "crammed"])
def test_a_prepared_folder_decides_how_it_is_curated_not_the_recipe(tmp_path, capsys, recipe, curation):
    folder = prepare((write_text(tmp_path / "a.txt"),), tmp_path / "out", **OPTIONS, curation=curation)
    config = stages.as_prepared(asked(folder, "--recipe", recipe))
    assert config.curation == curation and config.recipe == recipe
    same = recipe == "cramfast" and curation == Curation()
    assert same == ("note:" not in (said := capsys.readouterr().out))
    assert same or f"out was prepared with {'curation.duplicates=near, ' * (curation == CURATED)}curation.max_" in said
    assert prepare(config.data, None, curation=config.curation) == folder


def test_flags_must_not_contradict_how_a_folder_was_curated(tmp_path, capsys):
    folder = prepare((write_text(tmp_path / "a.txt"),), tmp_path / "out", **OPTIONS, curation=CURATED)
    for recipe in ("cramfast", "crammed"):
        assert stages.as_prepared(asked(folder, "--recipe", recipe, *FLAGS)).curation == CURATED
        assert "note:" not in capsys.readouterr().out
    crammed = ("--recipe", "crammed", "--curation.max_tokens_per_char", "0.3")  # which is what the recipe says, too
    for flags, said in (
        (("--curation.duplicates", "exact"), r"curation\.duplicates=exact .* was prepared with another, near — "),
        (("--curation.min-letters", "0.5"), r"curation\.min_letters=0\.5 .* was prepared with another, 0\.0 — "),
        (crammed, r"curation\.max_tokens_per_char=0\.3 .* was prepared with another, 0\.9 — "),
    ):
        with pytest.raises(UserError, match=said):
            stages.as_prepared(asked(folder, *flags))


def test_a_run_that_recorded_another_curation_than_its_folder_is_resumed(tmp_path, monkeypatch):
    folder = prepare((write_text(tmp_path / "a.txt"),), tmp_path / "out", **OPTIONS, curation=CURATED)
    monkeypatch.setattr(train, "train", lambda *_: True)
    monkeypatch.setattr(stages, "publish", lambda run_dir: None)
    run = tmp_path / "run"
    flags = ["--preset", "tiny", "--device", "cpu", "--data", str(folder), "--run-dir", str(run), "--resume", "auto"]
    monkeypatch.setattr("sys.argv", ["train", *flags])
    train.main()
    begun = read_config(run / "config.json")
    assert begun.curation == CURATED
    train.main()
    older = replace(begun, curation=Curation())
    (run / "config.json").write_text(json.dumps(to_json(older)))
    train.main()
    assert read_config(run / "config.json") == older
