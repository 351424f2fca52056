"""Preparing text: complete or not there at all, the same bytes for the same text, and errors a user can mend."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from cramfast import prepare as stage
from cramfast.config import Curation, read_config
from cramfast.errors import UserError, command
from cramfast.prepare import prepare
from cramfast.runtime.progress import Stages
from cramfast.session.runfolder import COPIED
from cramfast.text import lines, prepared, splits
from cramfast.text.corpus import Corpus
from cramfast.text.curation import Curator
from cramfast.text.files import find_files
from cramfast.text.prepared import PreparedText, read_manifest, verify
from cramfast.text.specials import UNK
from cramfast.text.survey import Survey, digest

CORPUS = Path(__file__).resolve().parents[3] / "shared" / "data" / "corpus" / "small.txt.xz"
OPTIONS = {"vocab_size": 512}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_text(path, documents=200, seed=0):
    rng = random.Random(seed)
    words = [a + b for a in ("be", "ka", "lo", "ni") for b in ("n", "r", "st", "ll", "mp", "nd", "sk")]
    text = (". ".join(" ".join(rng.choices(words, k=9)) for _ in range(rng.randint(1, 9))) for _ in range(documents))
    path.write_text("\n\n".join(text) + "\n")
    return str(path)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}


def test_what_is_stored_is_the_text(tmp_path):
    data = write_text(tmp_path / "a.txt")
    seen = []
    folder = prepare((data,), tmp_path / "out", **OPTIONS, progress=lambda *call: seen.append(call))
    verify(folder)
    assert {stage for stage, _, _ in seen} == {"reading text", "training the tokenizer", "writing ids"}
    manifest, tokenizer = read_manifest(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    split = {name: PreparedText(folder, name) for name in ("train", "heldout")}
    stored = [tokenizer.decode(list(t.ids[a:b])) for t in split.values()
              for a, b in zip(t.offsets, t.offsets[1:], strict=False)]  # fmt: skip
    original = [" ".join(d.split()) for d in (tmp_path / "a.txt").read_text().split("\n\n")]
    assert sorted(stored) == sorted(original)
    for name, text in split.items():
        assert manifest["splits"][name] == {
            "documents": len(text.offsets) - 1,
            "words": manifest["splits"][name]["words"],
            "tokens": len(text.ids),
            "characters": manifest["splits"][name]["characters"],
        }
    assert (
        sum(s["characters"] for s in manifest["splits"].values()) == len((tmp_path / "a.txt").read_text()) - 2 * 199 - 1
    )
    assert sum(s["words"] for s in manifest["splits"].values()) == len((tmp_path / "a.txt").read_text().split())
    counts = np.bincount(split["train"].ids)
    share = counts[counts > 0] / counts.sum()
    assert manifest["unigram_entropy_nats"] == pytest.approx(-(share * np.log(share)).sum())
    lines = (folder / "heldout.txt").read_text().splitlines()
    assert lines and all(line in " ".join((tmp_path / "a.txt").read_text().split()) for line in lines)


def test_the_same_text_gives_the_same_bytes(tmp_path):
    data = write_text(tmp_path / "a.txt")
    one, two = (prepare((data,), tmp_path / name, **OPTIONS) for name in ("one", "two"))
    assert contents(one) == contents(two)
    assert (one / "manifest.json").read_bytes() == (two / "manifest.json").read_bytes()


def test_heldout_documents_are_chosen_by_their_text(tmp_path):
    text = Path(write_text(tmp_path / "a.txt", 400)).read_text()
    documents = text.strip().split("\n\n")
    (tmp_path / "b.txt").write_text("\n\n".join(reversed(documents + documents)))
    options = OPTIONS | {"documents": "blocks", "heldout_fraction": 0.2}
    held = []
    for name in ("a", "b"):
        folder = prepare((str(tmp_path / f"{name}.txt"),), tmp_path / name, **options)
        held.append(read_manifest(folder)["splits"]["heldout"]["documents"])
    assert held[1] == 2 * held[0]  # whatever the order and however often a document comes
    assert 0.14 < held[0] / 400 < 0.26
    other = read_manifest(prepare((str(tmp_path / "a.txt"),), tmp_path / "c", **options | {"seed": 5}))
    assert 0.14 < other["splits"]["heldout"]["documents"] / 400 < 0.26


def test_a_byte_of_the_hash_puts_every_document_on_its_side(tmp_path):
    documents = Corpus((write_text(tmp_path / "a.txt", 3000),))
    survey = Survey(documents, Curator(Curation()), 0, 0.3, lambda *progress: None)
    assert survey.unit == 0 and {-1, 0, 1} == set(survey.groups)
    parts = [survey.parts(index, text) for index, text in enumerate(documents)]
    assert parts == [[(survey.heldout[digest(text, 0) >> 48], text)] for text in documents]
    held = sum(len(text) for ((heldout, text),) in parts if heldout)
    assert 0.3 <= held / survey.characters < 0.301


@pytest.mark.parametrize("fraction", [0.0001, 0.9999])
def test_both_splits_hold_something(tmp_path, fraction):
    folder = prepare((write_text(tmp_path / "a.txt", 3),), tmp_path / "out", **OPTIONS, heldout_fraction=fraction)
    assert all(split["documents"] for split in read_manifest(folder)["splits"].values())


@pytest.mark.skipif(not CORPUS.exists(), reason="the shared corpus is not on this machine")
def test_a_small_corpus_holds_out_enough_to_measure(tmp_path):
    manifest = read_manifest(prepare((str(CORPUS),), tmp_path / "out", vocab_size=8192))
    assert 20_000 < manifest["splits"]["heldout"]["tokens"] < 0.08 * manifest["splits"]["train"]["tokens"]
    assert 6 < manifest["unigram_entropy_nats"] < 8


def test_the_cache_is_used_again_only_for_the_same_complete_text(tmp_path):
    data = write_text(tmp_path / "a.txt")
    first = prepare((data,), None, **OPTIONS)
    written = (first / "train.ids").stat().st_mtime_ns
    assert prepare((data,), None, **OPTIONS) == first and (first / "train.ids").stat().st_mtime_ns == written
    assert prepare((data,), None, **OPTIONS | {"seed": 1}) != first
    whole = (first / "train.ids").read_bytes()
    for damaged in (b"cut", whole[:100] + b"\xff" + whole[101:]):
        (first / "train.ids").write_bytes(damaged)
        assert prepare((data,), None, **OPTIONS) == first  # made again
        verify(first)
    write_text(tmp_path / "a.txt", seed=1)
    assert prepare((data,), None, **OPTIONS) != first
    assert prepare((str(first),), None) == first  # a prepared folder is taken as it is


def test_the_key_is_that_of_the_text_before_it_was_read(tmp_path):
    data = write_text(tmp_path / "a.txt")
    folder = prepare((data,), None, **OPTIONS, progress=lambda *call: os.utime(data, (0, 0)))
    assert read_manifest(folder)["key"] == folder.name
    assert prepare((data,), None, **OPTIONS) != folder


def test_tokens_are_counted_in_pieces(tmp_path, monkeypatch):
    text = PreparedText(prepare((write_text(tmp_path / "a.txt"),), tmp_path / "out", **OPTIONS), "train")
    expected = np.bincount(text.ids, minlength=text.manifest["vocab_size"])
    for size in (len(text.ids) + 1, len(text.ids), 1000, 7):
        monkeypatch.setattr(prepared, "COUNTED_AT_ONCE", size)
        assert (text.counts() == expected).all() and text.counts().sum() == len(text.ids)


def test_a_given_tokenizer_is_used(tmp_path):
    data = write_text(tmp_path / "a.txt")
    first = prepare((data,), tmp_path / "one", **OPTIONS | {"tokenizer": "bpe"})
    second = prepare((data,), tmp_path / "two", tokenizer=str(first / "tokenizer.json"), vocab_size=32768)
    assert contents(first) == contents(second)


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_a_genome_of_one_line_is_cut_into_documents_and_none_of_it_is_lost(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(lines, "LONGEST_PIECE", 20_000)
    (tmp_path / "genome.txt").write_text("".join(random.Random(0).choices("ACGT", k=200_000)))
    folder = prepare((str(tmp_path / "genome.txt"),), tmp_path / "out", vocab_size=8192, tokenizer=kind)
    manifest = read_manifest(folder)
    splits = manifest["splits"].values()
    assert manifest["lost_share"] == 0 and sum(split["characters"] for split in splits) == 200_000
    assert sum(split["tokens"] for split in splits) < 200_000 / 4
    assert not (PreparedText(folder, "train").ids == UNK).any()


def test_a_folder_of_text_may_have_its_own_manifest(tmp_path):
    write_text(tmp_path / "text.txt")
    (tmp_path / "manifest.json").write_text("{}")
    folder = prepare((str(tmp_path),), None, **OPTIONS)
    verify(folder)
    assert read_manifest(folder)["sources"] == [tmp_path.name]


def test_what_cramfast_wrote_beside_the_text_is_not_taken_for_text(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    write_text(texts / "a.txt")
    cached, out = prepare((str(texts),), None, **OPTIONS), texts / "prepared"
    assert prepare((str(texts),), out, **OPTIONS) == out
    assert contents(out) == contents(cached)
    run, killed = texts / "runs" / "first", texts / ".prepared.1.partial"
    for folder, names in ((run, COPIED), (killed, ("tokenizer.json", "heldout.txt"))):
        folder.mkdir(parents=True)
        for name in names:
            shutil.copyfile(cached / name, folder / name)
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    assert prepare((str(texts),), None, **OPTIONS) == cached
    assert prepare((str(texts),), out, **OPTIONS) == out
    assert find_files((str(texts / "**" / "*.*"),)) == [texts / "a.txt"]
    assert find_files((str(out / "heldout.txt"),)) == [out / "heldout.txt"]  # asked for by its name


def test_a_run_is_no_text(tmp_path):
    folder = prepare((write_text(tmp_path / "a.txt"),), tmp_path / "run", **OPTIONS)
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"run: a run, which keeps no text — name the text, or go on with --resume"):
        prepare((str(folder),), None, **OPTIONS)


@pytest.mark.parametrize("beside", ["other", "a.txt"])
def test_a_prepared_folder_is_refused_beside_other_text(tmp_path, beside):
    folder = prepare((write_text(tmp_path / "a.txt"),), tmp_path / "out", **OPTIONS)
    shutil.copytree(folder, tmp_path / "other")
    with pytest.raises(UserError, match=r"out: a prepared folder or a run, which cannot be read as text — name the"):
        prepare((str(tmp_path / "out"), str(tmp_path / beside)), None, **OPTIONS)


def test_a_prepared_folder_is_not_prepared_into_another(tmp_path):
    made = prepare((write_text(tmp_path / "a.txt"),), tmp_path / "made", **OPTIONS)
    assert prepare((str(made),), None) == prepare((str(made),), tmp_path / "made") == made
    with pytest.raises(UserError, match="made: prepared already — train on it as it is"):
        prepare((str(made),), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_occupied_folder_is_left_alone(tmp_path, monkeypatch):
    data = write_text(tmp_path / "a.txt")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=r"^\.: you are in it"):
        prepare((data,), Path("."), **OPTIONS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.doc").write_text("years of work")
    with pytest.raises(UserError, match="out: not empty"):
        prepare((data,), tmp_path / "out", **OPTIONS)
    prepared = prepare((data,), tmp_path / "other", **OPTIONS)
    with pytest.raises(UserError, match="other: not empty"):
        prepare((data,), prepared, **OPTIONS | {"seed": 1})
    assert (tmp_path / "out" / "thesis.doc").exists()
    verify(prepared)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 1000}, "vocab_size=1000"),
        ({"heldout_fraction": 1.5}, "heldout_fraction=1.5"),
        ({"seed": -1}, "seed=-1"),
        ({"tokenizer": "sentencepiece"}, "sentencepiece"),
        ({"tokenizer": "kmer:12"}, "kmer:12.* is no k-mer tokenizer"),
    ],
)
def test_impossible_options(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        prepare((write_text(tmp_path / "a.txt"),), tmp_path / "out", **OPTIONS | options)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(("text", "message"), [("", "no text"), ("\n \n\n", "no text"), ("one document", "a single")])
def test_too_little_text(tmp_path, text, message):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        prepare((str(tmp_path / "a.txt"),), tmp_path / "out", **OPTIONS)


def test_a_full_disk_keeps_nothing_and_says_so(tmp_path, monkeypatch):
    def full(self, ids, lengths, texts):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(splits.SplitWriter, "append", full)
    with pytest.raises(UserError, match="the disk is full"):
        prepare((write_text(tmp_path / "a.txt"),), tmp_path / "out", **OPTIONS)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "cramfast.prepare", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_preparation_leaves_nothing_half_valid(tmp_path, how):
    data = tmp_path / "a.txt"
    data.write_text(Path(write_text(tmp_path / "b.txt", 2000)).read_text() * 300)
    process = start("--data", data, "--out", tmp_path / "out", "--vocab-size", 512)
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".out.*.partial")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(how)
    _, error = process.communicate(timeout=30)
    assert process.returncode == (130 if how == signal.SIGINT else -how), error
    assert "Traceback" not in error and not (tmp_path / "out").exists()
    prepare((str(tmp_path / "b.txt"),), tmp_path / "out", **OPTIONS)
    assert not list(tmp_path.glob(".out.*"))  # also what the killed one could not remove


def test_two_processes_preparing_the_same_text(tmp_path):
    data = write_text(tmp_path / "a.txt", 2000)
    both = [start("--data", data, "--vocab-size", 512) for _ in range(2)]
    for process in both:
        output, error = process.communicate(timeout=240)
        assert process.returncode == 0, error
        assert "unigram entropy" in output
    (folder,) = (tmp_path / "cache" / "cramfast" / "prepared").iterdir()
    verify(folder)


@pytest.mark.parametrize("files", [None, [], {"train.ids": None}, {"train.ids": {"bytes": 3}}])
def test_a_manifest_without_sizes_or_checksums_is_named(tmp_path, files):
    folder = prepare((str(write_text(tmp_path / "a.txt", 300)),), tmp_path / "out", **OPTIONS)
    manifest = read_manifest(folder) | {"files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json: files: .* — "):
        verify(folder)


def test_a_config_without_its_keys_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json: no key 'preset' — restore"):
        read_config(tmp_path / "config.json")


def test_what_another_process_finishes_meanwhile_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data, holds, asked = (str(write_text(tmp_path / "a.txt", 300)),), stage._holds, []

    def finished_just_after(folder, key):
        found = holds(folder, key)
        asked.append(found)
        if len(asked) == 1:
            (prepare(data, None, **OPTIONS) / "theirs").touch()
        return found

    monkeypatch.setattr(stage, "_holds", finished_just_after)
    assert (prepare(data, None, **OPTIONS) / "theirs").exists() and asked == [False, False]


def run(monkeypatch, capsys, *arguments):
    """Exit status and standard error of the command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, arguments)])
    try:
        command(stage.main)
    except SystemExit as end:
        return end.code, capsys.readouterr().err
    return 0, capsys.readouterr().err


def test_command_line_errors_are_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\nnot json\n')
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "a.bin").write_bytes(bytes(range(256)))
    (tmp_path / "photo.txt").write_bytes(b"\x89PNG\r\n\x1a\n\xff")
    for source, message in (("bad.jsonl", "bad.jsonl:2: not JSON"), ("binary", "no text in this folder"),
                            ("photo.txt", "photo.txt:1: byte 1"), ("none.txt", "no such file")):  # fmt: skip
        status, error = run(monkeypatch, capsys, "--data", tmp_path / source, "--out", tmp_path / "out")
        assert status == 2 and message in error and len(error.splitlines()) == 1
    status, error = run(monkeypatch, capsys, "--vocabsize", 5)
    assert status == 2 and "--vocab-size" in error and "python -m cramfast.prepare" in error


def test_verify_from_the_command_line(tmp_path, monkeypatch, capsys):
    folder = prepare((write_text(tmp_path / "a.txt"),), tmp_path / "out", **OPTIONS)
    assert json.loads((folder / "manifest.json").read_text())["sources"] == ["a.txt"]
    assert run(monkeypatch, capsys, "--verify", folder)[0] == 0
    with (folder / "train.ids").open("r+b") as file:
        file.write(b"\xff\xff")
    status, error = run(monkeypatch, capsys, "--verify", folder)
    assert status == 2 and "train.ids: contents changed" in error
    status, error = run(monkeypatch, capsys, "--verify", tmp_path / "a.txt")
    assert status == 2 and "cannot be read (Not a directory) — name a folder made by" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("name", ["out[v1]", "out[/v1]"])
def test_a_folder_whose_name_looks_like_markup(tmp_path, monkeypatch, capsys, name):
    data = ["--data", str(write_text(tmp_path / "a.txt")), "--vocab-size", "512"]
    monkeypatch.setattr(sys, "argv", ["prepare", *data, "--out", str(tmp_path / name)])
    for _ in range(2):  # made, and found again
        stage.main()
    output = capsys.readouterr().out
    assert output.count(f"train on it: python -m cramfast.train --data {tmp_path / name}\n") == 2
    assert f"using the prepared text in {tmp_path / name}\n" in output
    monkeypatch.setattr(sys, "argv", ["prepare", "--verify", str(tmp_path / name)])
    stage.main()
    assert f"{tmp_path / name}: every file" in capsys.readouterr().out


def test_a_stage_whose_name_looks_like_markup_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Stages() as stages:
        stages("using the prepared text in out[/v1]", 1, 1)
    assert "in out[/v1]" in capsys.readouterr().out
