"""Curation: planted documents are found and nothing else, in every process alike; no duplicate crosses the split."""

import json
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest

from cramfast import errors
from cramfast import prepare as stage
from cramfast.config import Curation, TrainConfig, config_hash, from_json, to_json
from cramfast.errors import UserError
from cramfast.prepare import prepare
from cramfast.text import curation, minhash
from cramfast.text.curation import Curator, letter_share, repeated_share, summary
from cramfast.text.minhash import NearDuplicates, banding
from cramfast.text.prepared import read_manifest, verify
from cramfast.text.report import write_report

WORDS = [a + b for a in ("be", "ka", "lo", "ni", "ru", "ti") for b in ("n", "r", "st", "ll", "mp", "nd", "sk", "x")]
OPTIONS = {"vocab_size": 512}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def prose(rng, words=120):
    return " ".join(rng.choices(WORDS, k=words))


def changed(text, rng, words):
    """The text with some of its words replaced."""
    parts = text.split()
    for place in rng.sample(range(len(parts)), words):
        parts[place] = "other"
    return " ".join(parts)


def windows(text):
    plain = " " + " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
    return {plain[i : i + minhash.WINDOW_BYTES] for i in range(max(1, len(plain) - minhash.WINDOW_BYTES + 1))}


def jaccard(a, b):
    return len(windows(a) & windows(b)) / len(windows(a) | windows(b))


def verdicts(texts, **values):
    curator = Curator(Curation(**values))
    kept = list(curator.kept(iter(texts)))
    assert kept == [t for t, verdict in zip(texts, curator.verdicts, strict=True) if verdict == curation.KEPT]
    return list(curator.verdicts)


def test_signatures_estimate_the_jaccard_similarity():
    rng = random.Random(0)
    deviations = []
    for _ in range(400):
        text = prose(rng, 150)
        pair = [text, changed(text, rng, rng.randint(1, 20))]
        data = [each.encode() for each in pair]
        signatures = np.empty((2, minhash.HASHES), np.uint8)
        sizes = np.array([len(each) for each in data])
        minhash.sign(np.frombuffer(b"".join(data), np.uint8), sizes, np.empty(sizes.max() + 2, np.uint8), signatures)
        estimate = ((signatures[0] == signatures[1]).mean() - minhash.CHANCE) / (1 - minhash.CHANCE)
        truth = jaccard(*pair)
        # As many standard deviations off as the mean of HASHES independent draws would be.
        deviations.append((estimate - truth) / np.sqrt(truth * (1 - truth) / minhash.HASHES))
    assert abs(np.mean(deviations)) < 0.15 and 0.85 < np.std(deviations) < 1.15


def test_banding_compares_what_is_similar_enough():
    for similarity in (0.5, 0.6, 0.8, 0.95, 1.0):
        bands, rows = banding(similarity)
        assert bands * rows <= minhash.HASHES
        assert 1 - (1 - similarity**rows) ** bands >= minhash.RECALL


def test_near_duplicates_of_the_documents_kept_are_dropped_and_no_others():
    rng = random.Random(1)
    originals = [prose(rng) for _ in range(300)]
    close = [changed(text, rng, 1) for text in originals[:100]]
    middling = [changed(text, rng, 6) for text in originals[100:200]]  # most of them share a band, so are compared
    far = [changed(text, rng, 40) for text in originals[200:]]
    assert min(map(jaccard, close, originals)) > 0.88
    assert 0.5 < min(map(jaccard, middling, originals[100:])) < max(map(jaccard, middling, originals[100:])) < 0.73
    assert max(map(jaccard, far, originals[200:])) < 0.4
    found = verdicts(originals + close + middling + far, duplicates="near", similarity=0.8)
    assert found == [0] * 300 + [curation.NEAR] * 100 + [0] * 200


def test_the_first_of_equal_or_similar_documents_stays_and_a_dropped_one_draws_no_others():
    rng = random.Random(2)
    a = prose(rng, 200)
    b = changed(a, rng, 6)
    c = changed(b, rng, 6)
    assert jaccard(a, b) > 0.7 > 0.66 > jaccard(a, c)
    assert verdicts([a, b, c], duplicates="near", similarity=0.66) == [0, curation.NEAR, 0]
    assert verdicts([a, a, b, a], duplicates="exact") == [0, curation.EXACT, 0, curation.EXACT]
    # Case, punctuation and white space are no difference for "near", and every one is for "exact".
    spelled = a.upper().replace(" ", ",\n")
    assert verdicts([a, spelled], duplicates="exact") == [0, 0]
    assert verdicts([a, spelled], duplicates="near", similarity=1.0) == [0, curation.NEAR]


def test_other_scripts_and_very_short_documents():
    chinese = "".join(map(chr, np.random.default_rng(0).integers(0x4E00, 0x9000, 300)))
    edited = chinese[:150] + "很" + chinese[151:]
    assert verdicts([chinese, edited, chinese[::-1]], duplicates="near") == [0, curation.NEAR, 0]
    assert verdicts(["yes", "no", "Yes!", "…", "\ud800"], duplicates="near") == [0, 0, curation.NEAR, 0, 0]


def test_a_bucket_that_everything_falls_into():
    """Boilerplate puts all documents into some buckets; the table finds similar ones all the same."""
    rng = random.Random(4)
    boilerplate = prose(rng, 60)
    texts = [boilerplate + " " + prose(rng, 60) for _ in range(500)]
    found = verdicts(texts + texts, duplicates="near", similarity=0.9)
    assert found[:500] == [0] * 500 and set(found[500:]) == {curation.EXACT}
    index = NearDuplicates(0.9)
    assert (index.find(texts, range(500))[0] == -1).all()
    assert index.find([t.upper() for t in texts], range(500, 1000))[0].tolist() == list(range(500))


def test_the_table_grows_without_forgetting():
    rng = random.Random(5)
    texts = [prose(rng, 30) for _ in range(3000)]
    whole, pieces = NearDuplicates(0.8), NearDuplicates(0.8)
    both = texts + texts[::-1]
    at_once = whole.find(both, range(6000))[0]
    parts = [pieces.find(both[i : i + 100], range(i, i + 100))[0] for i in range(0, 6000, 100)]
    assert np.array_equal(at_once, np.concatenate(parts))
    assert at_once[3000:].tolist() == list(range(2999, -1, -1))


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("abc 12", 0.6),
        ("Größe", 1.0),
        ("नमस्ते", 1.0),
        ("日本語。", 0.75),
        ("123 456", 0.0),
        ("e\u0301a", 1.0),
        ("<b>", 1 / 3),
    ],
)
def test_letters_of_every_script_count(text, share):
    assert letter_share(text) == pytest.approx(share)


def test_repeated_lines_count_by_their_characters():
    assert repeated_share("abcd\nabcd\nxy") == pytest.approx(0.4)
    assert repeated_share("abcd\n\n\n  abcd \n") == pytest.approx(0.5)
    assert repeated_share("one line") == 0


def test_plain_rules_drop_what_is_below_or_above_and_keep_the_border():
    texts = ["abcde12345", "abcd123456", "words and words", "line\nline\nline", "line\nline"]
    few, many = curation.FEW_LETTERS, curation.REPEATED_LINES
    assert verdicts(texts, min_letters=0.5) == [0, few, 0, 0, 0]
    assert verdicts(texts, max_repeated_lines=0.5) == [0, 0, 0, many, 0]
    assert verdicts(texts) == [0] * 5


def planted(folder):
    """A text with planted documents, and how many each step should find."""
    rng = random.Random(6)
    texts = [". ".join(prose(rng, 20) for _ in range(rng.randint(4, 9))) + "." for _ in range(400)]
    extra = texts[:30] + [changed(text, rng, 1) for text in texts[30:70]]
    extra += [" ".join(str(rng.randrange(10**6)) for _ in range(40)) for _ in range(11)]
    extra += [f"Part {i} begins\n" + "subscribe to the letter\n" * 9 for i in range(7)]
    extra += [" ".join("-".join(rng.choices("qzxjvw", k=7)) for _ in range(60)) for _ in range(13)]
    texts += extra
    rng.shuffle(texts)
    (folder / "a.txt").write_text("\n\n".join(texts))
    return str(folder / "a.txt")


ALL = Curation(min_letters=0.5, max_repeated_lines=0.3, duplicates="near", similarity=0.8, max_tokens_per_char=0.6)


def test_every_step_counts_what_it_dropped(tmp_path):
    folder = prepare((planted(tmp_path),), tmp_path / "out", **OPTIONS, curation=ALL)
    verify(folder)
    manifest = read_manifest(folder)
    dropped = {step: counts["documents"] for step, counts in manifest["curation"]["dropped"].items()}
    assert dropped == {
        "few letters": 11, "repeated lines": 7, "exact duplicates": 30, "near-duplicates": 40, "many tokens": 13
    }  # fmt: skip
    assert sum(split["documents"] for split in manifest["splits"].values()) == 400
    assert len(summary(manifest)) == 5 and "near-duplicates: 40 documents dropped (7.98%" in summary(manifest)[3]
    findings = json.loads((folder / "curation.json").read_text())
    assert {name: len(shown) for name, shown in findings["examples"].items()} == dict.fromkeys(dropped, 5)
    for example in findings["examples"]["near-duplicates"]:
        assert ("other" in example["text"]) != ("other" in example["original"])
    assert sum(findings["similarities"]) == 40


def test_off_means_that_nothing_is_dropped(tmp_path):
    folder = prepare((planted(tmp_path),), tmp_path / "out", **OPTIONS)
    manifest = read_manifest(folder)
    assert manifest["curation"]["dropped"] == {} and summary(manifest) == []
    assert sum(split["documents"] for split in manifest["splits"].values()) == 501


def test_no_duplicate_of_a_heldout_document_is_in_training(tmp_path):
    rng = random.Random(7)
    names = [f"doc{i:04d}" for i in range(300)]
    texts = [f"{name} {prose(rng)}" for name in names]
    copies = [changed(text, rng, 1) for text in texts for _ in range(2)]
    copies = [
        f"{text.split()[0]} {copy.split(' ', 1)[1]}" for text, copy in zip(np.repeat(texts, 2), copies, strict=True)
    ]
    everything = texts + copies
    rng.shuffle(everything)
    (tmp_path / "a.txt").write_text("\n\n".join(everything))

    def sides(curated):
        from tokenizers import Tokenizer

        from cramfast.text.prepared import PreparedText

        folder = prepare((str(tmp_path / "a.txt"),), tmp_path / f"out-{curated.duplicates}", vocab_size=2048,
                         heldout_fraction=0.2, curation=curated)  # fmt: skip
        decode = Tokenizer.from_file(str(folder / "tokenizer.json")).decode
        split = {}
        for name in ("train", "heldout"):
            text = PreparedText(folder, name)
            pairs = zip(text.offsets, text.offsets[1:], strict=False)
            split[name] = [decode(text.ids[a:b].tolist()).split()[0] for a, b in pairs]
        return split

    kept = sides(Curation(duplicates="near", similarity=0.7))
    assert len(kept["heldout"]) > 30 and not set(kept["heldout"]) & set(kept["train"])
    assert sorted(kept["train"] + kept["heldout"]) == names
    assert len(set(sides(Curation())["heldout"]) & set(sides_train(tmp_path))) > 30  # the leak that this closes


def sides_train(tmp_path):
    """First words of the uncurated training split."""
    from tokenizers import Tokenizer

    from cramfast.text.prepared import PreparedText

    folder = tmp_path / "out-keep"
    decode = Tokenizer.from_file(str(folder / "tokenizer.json")).decode
    text = PreparedText(folder, "train")
    return [decode(text.ids[a:b].tolist()).split()[0] for a, b in zip(text.offsets, text.offsets[1:], strict=False)]


def command(*arguments, seed="0", **options):
    environment = os.environ | {"PYTHONHASHSEED": seed, "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "cramfast.prepare", *map(str, arguments)],
        capture_output=True, text=True, env=environment, timeout=120, **options,
    )  # fmt: skip


FLAGS = ("--curation.min-letters", 0.5, "--curation.max-repeated-lines", 0.3, "--curation.duplicates", "near",
         "--curation.max-tokens-per-char", 0.6, "--vocab-size", 512)  # fmt: skip


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_process_makes_the_same_bytes_the_page_included(tmp_path, monkeypatch):
    data = planted(tmp_path)
    for seed in ("1", "2"):
        done = command("--data", data, "--out", tmp_path / seed, *FLAGS, seed=seed)
        assert done.returncode == 0, done.stderr
    one, two = contents(tmp_path / "1"), contents(tmp_path / "2")
    assert one == two and "report.html" in one
    for line in (
        "few letters: 11",
        "repeated lines: 7",
        "exact duplicates: 30",
        "near-duplicates: 40",
        "many tokens: 13",
    ):
        assert line in done.stdout
    monkeypatch.setattr(curation, "BATCH_CHARACTERS", 1000)  # nor does it matter what was judged together
    folder = prepare((data,), tmp_path / "3", **OPTIONS, curation=ALL)
    write_report(folder)
    assert contents(folder) == one


def test_a_preparation_that_was_interrupted_is_made_again_to_the_same_bytes(tmp_path, monkeypatch):
    data = planted(tmp_path)
    whole = contents(prepare((data,), tmp_path / "whole", **OPTIONS, curation=ALL))
    judge, calls = Curator.judge, []

    def interrupted(self, texts):
        calls.append(len(texts))
        if len(calls) == 20:
            raise KeyboardInterrupt
        return judge(self, texts)

    monkeypatch.setattr(curation, "BATCH_CHARACTERS", 1000)
    with monkeypatch.context() as patched:
        patched.setattr(Curator, "judge", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare((data,), tmp_path / "out", **OPTIONS, curation=ALL)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    assert contents(prepare((data,), tmp_path / "out", **OPTIONS, curation=ALL)) == whole


def test_the_cache_tells_curations_apart(tmp_path):
    data = planted(tmp_path)
    plain = prepare((data,), None, **OPTIONS)
    exact = prepare((data,), None, **OPTIONS, curation=Curation(duplicates="exact"))
    assert plain != exact and prepare((data,), None, **OPTIONS, curation=Curation(duplicates="exact")) == exact
    assert prepare((str(exact),), None, curation=Curation(duplicates="exact")) == exact
    with pytest.raises(UserError, match=r"curation\.duplicates=near with .* was prepared with another"):
        prepare((str(exact),), None, curation=Curation(duplicates="near"))
    assert config_hash(TrainConfig()) != config_hash(TrainConfig(curation=Curation(duplicates="exact")))
    config = TrainConfig(curation=ALL, order="sentences")
    assert from_json(TrainConfig, to_json(config)) == config


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("min-letters", 1.5, "curation.min_letters=1.5 is not possible"),
        ("max-repeated-lines", -1, "curation.max_repeated_lines=-1.0 is not possible"),
        ("similarity", 0.2, "curation.similarity=0.2 is not possible"),
        ("max-tokens-per-char", 25, "curation.max_tokens_per_char=25.0 is not possible"),
    ],
)
def test_impossible_values_are_one_line(tmp_path, monkeypatch, capsys, flag, value, message):
    (tmp_path / "a.txt").write_text("some\n\ntext")
    monkeypatch.setattr(sys, "argv", ["prepare", "--data", str(tmp_path / "a.txt"), f"--curation.{flag}", str(value)])
    with pytest.raises(SystemExit) as end:
        errors.command(stage.main)
    said = capsys.readouterr().err
    assert end.value.code == 2 and message in said and len(said.splitlines()) == 1, said


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_letters": 1.0}, r"no text of 3 documents left by --curation"),
        ({"duplicates": "exact"}, r"a single document of 3 documents left by --curation"),
        ({"max_tokens_per_char": 0.01}, r"\(--curation dropped 3 of 3\) — add documents, or loosen --curation"),
    ],
)
def test_a_curation_that_leaves_too_little_says_so(tmp_path, values, message):
    (tmp_path / "a.txt").write_text("\n\n".join(["number 1 of 2"] * 3 if "duplicates" in values else
                                                [f"number {i} of 2" for i in range(3)]))  # fmt: skip
    with pytest.raises(UserError, match=message):
        prepare((str(tmp_path / "a.txt"),), tmp_path / "out", **OPTIONS, curation=Curation(**values))


def test_text_that_changes_under_the_hands_is_noticed(tmp_path, monkeypatch):
    data = planted(tmp_path)
    finish = Curator.finish

    def cut(self):
        (tmp_path / "a.txt").write_text("only\n\nthree\n\nleft")
        finish(self)

    monkeypatch.setattr(Curator, "finish", cut)
    with pytest.raises(UserError, match="3 documents where there were 501"):
        prepare((data,), tmp_path / "out", **OPTIONS)


SLOW = """
import time
from cramfast.text.curation import ahead
from cramfast.errors import command
def source():
    yield 1
    print("waiting", flush=True)
    time.sleep(600)
command(lambda: print(list(ahead(source()))))
"""


def test_an_interrupt_waits_for_no_slow_source():
    with subprocess.Popen([sys.executable, "-c", SLOW], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"waiting\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
            assert process.stderr.read().decode().strip() == "interrupted"
        finally:
            process.kill()


def test_what_fails_while_it_is_made_ahead_fails_where_it_is_used():
    def source():
        yield 1
        raise UserError("text.txt: damaged")

    made = curation.ahead(source())
    assert next(made) == 1
    with pytest.raises(UserError, match="damaged"):
        next(made)
