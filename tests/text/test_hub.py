"""Datasets are keyed by what they hold: a local folder's files, or the revision of the hub."""

import sys
from types import SimpleNamespace

import pytest

from cramfast.commandline import parse
from cramfast.prepare import prepare
from cramfast.text import hub
from cramfast.text.prepared import read_manifest

ROWS = [{"text": f"A document with the number {number} of some words"} for number in range(300)]


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """The calls of load_dataset; a hub whose revision a test sets, or that does not answer."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls = []

    def load_dataset(name, config, *, split, streaming, revision=None):
        calls.append((name, revision))
        return iter(ROWS)

    class HfApi:
        sha = "first"

        def dataset_info(self, name, timeout):
            if HfApi.sha is None:
                raise ConnectionError("offline")
            return SimpleNamespace(sha=HfApi.sha)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=HfApi))
    hub.revision.cache_clear()
    yield SimpleNamespace(calls=calls, api=HfApi)
    hub.revision.cache_clear()


def prepared(source="hf:someone/texts"):
    hub.revision.cache_clear()  # as in another process
    return prepare((source,), None, vocab_size=512)


def test_another_revision_is_another_text(asked):
    first = prepared()
    assert set(asked.calls) == {("someone/texts", "first")} and prepared() == first
    assert read_manifest(first)["revisions"] == {"hf:someone/texts": "first"}
    asked.api.sha = "second"
    second = prepared()
    assert second != first and asked.calls[-1] == ("someone/texts", "second")


def test_a_hub_that_does_not_answer_is_said_with_the_date_of_the_text(asked, capsys):
    asked.api.sha = None
    first = prepared()
    assert set(asked.calls) == {("someone/texts", None)} and "the hub does not answer" not in capsys.readouterr().err
    assert prepared() == first
    assert "hf:someone/texts: the hub does not answer, so this is its text as of 20" in capsys.readouterr().err


def test_a_local_folder_is_keyed_by_its_place_and_files(asked, tmp_path, monkeypatch):
    keys = []
    for name in ("one", "two"):
        (tmp_path / name / "ds").mkdir(parents=True)
        (tmp_path / name / "ds" / "a.csv").write_text("text\nwords\n")
        monkeypatch.chdir(tmp_path / name)
        keys.append(prepared("hf:ds"))
        assert parse(["--device", "cpu", "--data", "hf:ds"]).config.data == (f"hf:{tmp_path / name / 'ds'}",)
    assert prepared("hf:ds") == keys[1] != keys[0]
    (tmp_path / "two" / "ds" / "a.csv").write_text("text\nother words\n")
    assert prepared("hf:ds") not in keys
    assert {revision for _, revision in asked.calls} == {None}
    assert hub.located("hf:ds:config:train") == f"hf:{tmp_path / 'two' / 'ds'}:config:train"
    assert hub.located("hf:someone/texts::train") == "hf:someone/texts::train"
