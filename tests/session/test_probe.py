"""The BLiMP probe of a training run: what it records, that it costs no budget and changes no bit, what it refuses."""

import json
from types import SimpleNamespace

import pytest
from fake_loader import FIRST, WORDS, rows, run, same_bits, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import HalfWay
from tokenizers import Tokenizer, models, pre_tokenizers

from cramfast import stages, train
from cramfast.errors import UserError
from cramfast.evaluate import blimp, probe
from cramfast.report import render
from cramfast.session import ledger
from cramfast.session.metrics import Display
from cramfast.session.record import read_record

pytestmark = pytest.mark.usefixtures("fake_text")


def sentence(start: int, step: int = 7) -> str:
    """Six words of the language of fake_loader, which goes on in steps of 7; with another step, not of it."""
    return " ".join(f"w{(start + step * place) % WORDS}" for place in range(6))


@pytest.fixture
def probed(tmp_path):
    """Options of a run that is probed on two paradigms of six pairs."""
    path = tmp_path / "pairs.jsonl"
    keys = {"linguistics_term": "order", "field": "syntax"}
    written = [
        keys | {"sentence_good": sentence(start), "sentence_bad": sentence(start, 8), "UID": f"p{start % 2}"}
        for start in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in written))
    return {"probe_data": str(path), "probe_pairs": 5}


def folder(tmp_path, name):
    """A folder to train in, with the tokenizer that prepared text has."""
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4} | {f"w{i}": FIRST + i for i in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (tmp_path / name).mkdir()
    tokenizer.save(str(tmp_path / name / "tokenizer.json"))
    return tmp_path / name


def accuracies(place):
    return [row.get("blimp_accuracy") for row in rows(place, "heldout_loss")]


@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.5}, {"objective": "rtd"}], ids=str)
def test_changes_no_bit_of_the_training(tmp_path, probed, changes):
    plain = run(folder(tmp_path, "plain"), "6steps", eval_interval=1e-9, **changes)
    other = run(folder(tmp_path, "probed"), "6steps", eval_interval=1e-9, **changes, **probed)
    assert same_bits(weights(plain), weights(other))
    assert [row["loss"] for row in rows(plain)] == [row["loss"] for row in rows(other)]
    assert accuracies(plain) == [None] * 7 and all(0 <= share <= 1 for share in accuracies(other))


def test_learns_and_is_shown(tmp_path, probed, capsys):
    place = run(folder(tmp_path, "run"), "150steps", eval_interval=1e9, **probed)
    before, after = accuracies(place)
    assert before <= 0.9 < after
    board = EventAccumulator(str(place / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("blimp_accuracy")] == [0, 150]
    page = render(read_record(place))
    assert f"<b>{100 * after:.1f} %</b><span>BLiMP probe, mean over paradigms</span>" in page
    assert f"BLiMP {after:.1%}" not in capsys.readouterr().err  # the last evaluation comes after the last line
    with Display() as display:
        display.evaluation = {"heldout_loss": 3.25, "blimp_accuracy": 0.625}
        display.step({"step": 1, "loss": 4.0, "tokens_per_s": 1.0, "mfu": 0.5}, 1.0, 0.0)
    assert "held-out 3.250  BLiMP 62.5%" in capsys.readouterr().err


def test_survives_a_resume(tmp_path, probed):
    whole = run(folder(tmp_path, "whole"), "24000tokens", **probed)
    halves = folder(tmp_path, "halves")
    run(halves, HalfWay("tokens", 24000), **probed)
    run(halves, "24000tokens", **probed)
    assert accuracies(halves)[-1] == accuracies(whole)[-1] and same_bits(weights(whole), weights(halves))
    run(halves, "25000tokens", probe_data="")  # a resumed run may leave it out, and take it up again
    assert accuracies(halves)[-1] is None


def test_costs_no_budget(tmp_path, probed, monkeypatch):
    clock = SimpleNamespace(now=0.0)

    def look_at_it():
        clock.now += 0.001
        return clock.now

    def slow(model, paradigm):
        clock.now += 1000
        return blimp.ParadigmScore("order", "syntax", 5, 0.5, 0)

    monkeypatch.setattr(ledger, "time", SimpleNamespace(perf_counter=look_at_it))
    monkeypatch.setattr(probe, "score", slow)
    place = run(folder(tmp_path, "run"), "0.05s", eval_interval=0.01, **probed)
    assert clock.now > 4000 and len(accuracies(place)) >= 4
    assert 0.05 <= rows(place)[-1]["seconds"] < 0.1


def test_faults_are_named_before_the_text_is_prepared(tmp_path, probed, monkeypatch):
    monkeypatch.setattr(stages, "prepare_text", lambda config: pytest.fail("too late"))

    def start(data, *more):
        words = ["train", "--preset", "tiny", "--device", "cpu", "--run-dir", str(tmp_path / "new")]
        monkeypatch.setattr("sys.argv", [*words, "--probe-data", str(data), *more])
        train.main()

    with pytest.raises(UserError, match=r"nowhere: no such file — give BLiMP"):
        start(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no pairs"):
        start(tmp_path / "empty")
    (tmp_path / "empty" / "a.jsonl").write_text('{"UID": "x"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:1: no key 'sentence_good'"):
        start(tmp_path / "empty")
    with pytest.raises(UserError, match="probe_pairs=-1"):
        start(probed["probe_data"], "--probe-pairs", "-1")
    assert not (tmp_path / "new").exists()


def test_a_folder_is_its_files(tmp_path, probed):
    whole = tmp_path / "pairs.jsonl"
    (tmp_path / "data").mkdir()
    for number, line in enumerate(whole.read_text().splitlines()):
        (tmp_path / "data" / f"{number:02}.jsonl").write_text(line + "\n")
    (tmp_path / "data" / "README.md").write_text("not a pair\n")
    assert blimp.read_blimp(tmp_path / "data") == blimp.read_blimp(whole)
