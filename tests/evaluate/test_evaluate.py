"""cramfast.evaluate on tiny models and made-up data; faults in the data must be named, scores must be right."""

import json
import sys

import numpy as np
import pytest
import torch
from tiny_run import SENTENCES, make_run, tiny_config, toy
from transformers import AutoModelForMaskedLM

from cramfast.errors import UserError
from cramfast.evaluate import __main__ as commandline
from cramfast.evaluate import blimp, checkpoints, masked, owntask, perplexity
from cramfast.export import export
from cramfast.session import checkpoint
from cramfast.session.record import read_record
from cramfast.text.tally import Tally
from cramfast.text.tokenizer import for_text

pytestmark = pytest.mark.usefixtures("one_thread")
LOCAL = {"window": 16, "global_every": 2, "rope_theta_global": 160000.0, "rope_theta_local": 5000.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run") / "model", tiny_config(**LOCAL))


@pytest.fixture(scope="module")
def exported(run):
    return export(run, run / "hf").path


@pytest.fixture(scope="module")
def model(run):
    return checkpoints.load(run)


def stock_log_probability(stock, ids, place):
    """log p of the token at `place` when it alone is [MASK], by transformers, unpadded and alone in its batch."""
    hidden = [4 if i == place else token for i, token in enumerate(ids)]
    with torch.no_grad():
        logits = stock(input_ids=torch.tensor([hidden])).logits[0, place].double()
    return float(logits.log_softmax(-1)[ids[place]])


# What can be evaluated


@pytest.mark.parametrize(
    "changes",
    [LOCAL, {"head": False}, {"head": False, "norm_bias": True}, {"activation": "silu"}, {"global_every": 3}],
    ids=str,
)
def test_an_exported_folder_is_the_same_model(tmp_path, changes):
    run = make_run(tmp_path / "run", tiny_config(**changes))
    one = checkpoints.load(checkpoint.newest(run))
    assert (one.name, one.run_dir) == (checkpoints.load(run).name, run)
    ours, theirs = checkpoints.load(run), checkpoints.load(export(run, tmp_path / "out", check=False).path)
    assert theirs.encoder.config.head == ours.encoder.config.head
    sequence = masked.Hidden([2, 4, *range(9, 99), 4, 3], [1, 92], [10, 12])
    for mine, its in zip(*(masked.log_probabilities(m, [sequence]) for m in (ours, theirs)), strict=True):
        assert np.array_equal(mine, its)


def test_own_form_is_read_too(tmp_path):
    run = make_run(tmp_path / "run", tiny_config(positions="sinusoidal"))
    loaded = checkpoints.load(export(run, tmp_path / "out").path)
    assert loaded.encoder.config.positions == "sinusoidal" and loaded.run_dir is None


def edit_config(exported, folder, **changes):
    folder.mkdir()
    for path in exported.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    written = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in written.items() if v is not None}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "a bert model"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_activation": "relu"}, "hidden_activation='relu'"),
        ({"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"] * 2}, "period"),
        ({"num_hidden_layers": 4}, "does not fit"),
        ({"hidden_size": None}, "no key 'hidden_size'"),
        ({"classifier_activation": "linear"}, "linear head that is not the identity"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_models_that_are_refused(exported, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        checkpoints.load(edit_config(exported, tmp_path / "m", **changes))


def test_old_and_new_config_keys_say_the_same(exported, tmp_path):
    whole = checkpoints.load(exported).encoder.config
    old = {"layer_types": None, "rope_parameters": None}
    new = {"global_attn_every_n_layers": None, "global_rope_theta": None, "local_rope_theta": None}
    for number, missing in enumerate((old, new)):
        assert checkpoints.load(edit_config(exported, tmp_path / str(number), **missing)).encoder.config == whole


def test_nothing_to_evaluate(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        checkpoints.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoints.load(tmp_path)


def test_pickled_weights_are_never_opened(exported, tmp_path):
    folder = edit_config(exported, tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled weights are never opened"):
        checkpoints.load(folder)


# Perplexity


def test_loss_is_that_of_transformers(model, exported):
    masks = perplexity.Masks(fraction=0.3, sequence_len=16)
    result = perplexity.measure(model, SENTENCES, masks)
    stock = AutoModelForMaskedLM.from_pretrained(exported, attn_implementation="sdpa").eval()
    losses, right = [], 0
    for encoding, chosen, _ in perplexity.hide(model, SENTENCES, masks):
        ids = np.array(encoding.ids)
        for begin in range(0, len(ids), 14):
            part = [2, *(4 if i in chosen else ids[i] for i in range(begin, min(begin + 14, len(ids)))), 3]
            places = [i for i in chosen if begin <= i < begin + 14]
            with torch.no_grad():
                logits = stock(input_ids=torch.tensor([part])).logits[0].double()
            losses += [-float(logits[i - begin + 1].log_softmax(-1)[ids[i]]) for i in places]
            right += sum(int(logits[i - begin + 1].argmax()) == ids[i] for i in places)
    assert result.hidden == len(losses) > 20
    assert result.loss == pytest.approx(np.mean(losses), abs=1e-4)
    assert result.accuracy == pytest.approx(right / len(losses))


def test_masks_do_not_depend_on_the_length_and_change_with_the_seed(model):
    def hidden(**changes):
        masks = perplexity.Masks(fraction=0.3, **changes)
        return [chosen.tolist() for _, chosen, _ in perplexity.hide(model, SENTENCES, masks)]

    assert hidden(sequence_len=16) == hidden(sequence_len=64)
    assert hidden(seed=0) != hidden(seed=1)


def other_tokenizer():
    from cramfast.text.tokenizer import train_tokenizer

    return train_tokenizer(SENTENCES * 50, "bpe", 512)


def test_words_are_the_same_for_every_tokenizer(model):
    other = checkpoints.Checkpoint(model.folder, "other", model.encoder, other_tokenizer(), None, None)
    masks = perplexity.Masks(unit="words", fraction=0.4)
    ours, theirs = ([text for _, _, text in perplexity.hide(m, SENTENCES, masks)] for m in (model, other))
    assert ours == theirs and sum(map(len, ours)) > 100
    results = {m.name: perplexity.measure(m, SENTENCES, masks) for m in (model, other)}
    assert len({r.masks for r in results.values()}) == 2
    assert "the same words were hidden" in perplexity.table(results, masks).notes[0]
    tokens = perplexity.Masks()
    results = {m.name: perplexity.measure(m, SENTENCES, tokens) for m in (model, other)}
    assert "use --unit words" in perplexity.table(results, tokens).notes[0]


def test_whole_words_are_hidden_whole(model):
    masks = perplexity.Masks(unit="words", fraction=0.3)
    for text, (encoding, chosen, hidden) in zip(SENTENCES, perplexity.hide(model, SENTENCES, masks), strict=True):
        words = {text[: encoding.offsets[i][0] + 1].count(" ") for i in chosen}
        every = {i for i, (start, _) in enumerate(encoding.offsets) if text[: start + 1].count(" ") in words}
        assert every == set(chosen.tolist())
        assert hidden == "".join(text.split(" ")[word] for word in sorted(words))


def test_special_tokens_written_in_a_text_are_text(run):
    texts = ["the cat [MASK] sat [SEP] on [PAD] the [CLS] mat [UNK] " * 20] * 10
    models = [checkpoints.load(run)]
    models.append(checkpoints.Checkpoint(run, "other", models[0].encoder, for_text(other_tokenizer()), None, None))
    for model in models:
        targets, spans = [], []
        for encoding, chosen, text in perplexity.hide(model, texts, perplexity.Masks(fraction=0.3)):
            targets += np.array(encoding.ids)[chosen].tolist()
            spans.append(text)
        assert len(targets) > 100 and min(targets) >= 5
        assert "M" in "".join(spans) or "mask" in "".join(spans).lower()


def test_perplexity_reads_as_training_does_and_says_what_it_left_out(tmp_path, run, monkeypatch, capsys):
    words = ("perplexity", run, "--threads", 1, "--dtype", "float32", "--out", tmp_path / "out.json", "--data")
    (tmp_path / "a.train").write_bytes("\n".join(f"Größe {text}" for text in SENTENCES).encode("latin-1") + b"\n")
    flags = ("--format", "text", "--encoding", "latin-1", "--documents", "lines")
    assert "nats/character" in command(monkeypatch, capsys, *words, tmp_path / "a.train", *flags)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES) + "no row\n")
    arguments = map(str, ("evaluate", *words, tmp_path / "b.jsonl", "--skip-malformed", 1))
    monkeypatch.setattr(sys, "argv", list(arguments))
    commandline.main()
    assert "note: " in (said := capsys.readouterr().err) and "1 malformed rows left out" in said
    with pytest.raises(UserError, match="skip_malformed=-1 is not possible"):
        perplexity.Arguments((run,), (str(tmp_path / "b.jsonl"),), skip_malformed=-1).run(None)


def test_perplexity_refuses(model):
    with pytest.raises(UserError, match="takes 128 tokens"):
        perplexity.measure(model, SENTENCES, perplexity.Masks(sequence_len=200))
    with pytest.raises(UserError, match="too short"):
        perplexity.measure(model, ["a"], perplexity.Masks(fraction=1e-9))
    with pytest.raises(UserError, match="seed=-1 is not possible"):
        perplexity.Masks(seed=-1)
    arguments = perplexity.Arguments((model.folder,), ("no-such.txt",), characters=-5)
    with pytest.raises(UserError, match="characters=-5 is not possible"):
        arguments.run(None)


# BLiMP


def pairs_file(path, rows=3):
    written = [
        {"sentence_good": SENTENCES[i], "sentence_bad": SENTENCES[i] + " so", "UID": f"p{i % 2}",
         "linguistics_term": "binding", "field": "syntax"}
        for i in range(rows)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in written))
    return path


def test_pseudo_log_likelihood_is_that_of_transformers(model, exported):
    stock = AutoModelForMaskedLM.from_pretrained(exported, attn_implementation="sdpa").eval()
    # Two that share a hidden copy, one that is there twice.
    sentences = ["light travels faster than sound !", "light travels faster than summer !", SENTENCES[0]]
    ours = blimp.pseudo_log_likelihoods(model, [*sentences, SENTENCES[0]])
    assert list(ours) == sentences
    for sentence, found in ours.items():
        ids = model.tokenizer.encode(sentence).ids
        expected = sum(stock_log_probability(stock, ids, place) for place in range(1, len(ids) - 1))
        assert found == pytest.approx(expected, abs=1e-3)


def test_blimp_counts_ties_as_errors(model):
    tie = blimp.Paradigm("p", "binding", "syntax", [("LIGHT travels", "light travels")])
    result = blimp.score(model, tie)
    assert (result.ties, result.accuracy, result.pairs) == (1, 0.0, 1)
    assert any("1 pairs tied" in note for note in blimp.table(model, {"p": result}).notes)


def test_blimp_file(tmp_path):
    path = pairs_file(tmp_path / "b.jsonl", 5)
    assert [len(p.pairs) for p in blimp.read_blimp(path)] == [3, 2]
    assert [len(p.pairs) for p in blimp.read_blimp(path, 1)] == [1, 1]
    for line, message in (
        ('{"UID": "x"}', "b.jsonl:6: no key 'sentence_good'"),
        ("{", "b.jsonl:6: no JSON object"),
        (
            '{"sentence_good": "", "sentence_bad": "b", "UID": "x", "linguistics_term": "t", "field": "f"}',
            "6: a sentence",
        ),
    ):
        pairs_file(path, 5)
        with path.open("a") as file:
            file.write(line + "\n")
        with pytest.raises(UserError, match=message):
            blimp.read_blimp(path)


# The commands


def write_glue(folder, rows=40):
    for name in ("CoLA", "RTE", "MNLI-lite"):
        (folder / name).mkdir(parents=True)
    for split in ("train", "dev"):
        cola_rows = [f"src{i % 2}\t{i % 3 % 2}\t\t{SENTENCES[i % 8]} {i}" for i in range(rows)]
        rte = [f"{i}\t{SENTENCES[i % 8]}\tlight {i}\t{('entailment', 'not_entailment')[i % 2]}" for i in range(rows)]
        nli = [f"{i}\tlight\tsound {i}\t{('entailment', 'neutral', 'contradiction')[i % 3]}" for i in range(rows)]
        (folder / "CoLA" / f"{split}.tsv").write_text("\n".join(cola_rows) + "\n")
        (folder / "RTE" / f"{split}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *rte]) + "\n")
        header = "index\tsentence1\tsentence2\tgold_label"
        (folder / "MNLI-lite" / f"{split}.tsv").write_text("\n".join([header, *nli]) + "\n")
    return folder


def command(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, words)])
    commandline.main()
    return capsys.readouterr().out


def test_every_command_on_a_run(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "run", tiny_config())
    export(run, run / "hf", check=False)
    data = write_glue(tmp_path / "glue")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(SENTENCES))
    common = ("--threads", 1, "--dtype", "float32")

    out = command(monkeypatch, capsys, "perplexity", run, "--data", text, *common)
    assert "nats/character" in out and "perplexity.json" in out
    glue_words = ("glue", run, "--data", data, "--seeds", 2, *common)
    out = command(monkeypatch, capsys, *glue_words, "--tasks", "cola")
    assert "unofficial (40, 40 rows)" in out and "mean of" not in out
    out = command(monkeypatch, capsys, *glue_words, "--tasks", "rte")
    stored = json.loads((run / "evaluations/glue-cramming.json").read_text())
    assert set(stored["tasks"]) == {"cola", "rte"}  # the second call adds to the first
    assert len(stored["tasks"]["cola"]["predictions"]["cola"]) == 2
    out = command(monkeypatch, capsys, *glue_words, "--protocol", "mnli-start", "--tasks", "rte", "mnli-lite")
    assert "start from the weights tuned on MNLI" in out
    out = command(monkeypatch, capsys, "blimp", run, "--data", pairs_file(tmp_path / "b.jsonl"), *common)
    assert "Not the whole set" in out
    out = command(monkeypatch, capsys, "cola", run, "--data", data)
    page = (run / "cola.html").read_text()
    assert "src0" in page and "binding" in page and "http" not in page

    tables = read_record(run).scores
    assert [t.title.split(":")[0].split(",")[0] for t in tables] == [
        "BLiMP",
        "GLUE",
        "GLUE",
        "Masked-language-model loss",
    ]
    report, card = (run / "report.html").read_text(), (run / "hf/README.md").read_text()
    for table in tables:
        assert table.title in report and table.title in card
    assert card.count("## Scores") == 1 and card.index("## Scores") < card.index("## Data")


def test_own_task(tmp_path, run, monkeypatch, capsys):
    lines = [
        "first\tmood",
        *(
            f"{' '.join(text)}\t{('calm', 'wild')[int(label)]}"
            for text, label in zip(toy(2).texts, toy(2).labels, strict=True)
        ),
    ]
    train, dev = tmp_path / "mood.tsv", tmp_path / "dev.tsv"
    train.write_text("\n".join(lines) + "\n")
    dev.write_text("\n".join(lines[:21]) + "\n")
    words = ("task", run, "--task-file", train, dev, "--label", "mood", "--out", tmp_path / "o.json", "--threads", 1)
    out = command(monkeypatch, capsys, *words, "--metric", "f1", "--lr", "2e-3", "--dtype", "float32", "--seeds", 1)
    stored = json.loads((tmp_path / "o.json").read_text())
    assert stored["settings"]["classes"] == ["calm", "wild"] and stored["tasks"]["mood"]["scores"]["mood"][0] > 0.8
    counts = [sum(line.endswith(name) for line in lines) for name in ("calm", "wild")]
    assert [c["train"] for c in stored["tasks"]["mood"]["classes"].values()] == counts
    assert stored["settings"]["max_len"] == 128 and stored["tasks"]["mood"]["shown_metric"] == "f1 of wild"
    assert f"class 0 'calm': {counts[0]} in train, " in out and "f1 of wild" in out
    calm = command(monkeypatch, capsys, *words, "--metric", "f1", "--positive", "calm", "--seeds", 1, "--epochs", 1)
    assert "f1 of calm" in calm
    with pytest.raises(UserError, match=r"positive='sad' is not possible — give it with --metric f1 and one of two"):
        command(monkeypatch, capsys, *words, "--metric", "f1", "--positive", "sad")
    assert "own task" in out and not (run / "evaluations").exists()
    with pytest.raises(UserError, match=r"max_len=129 is not possible — use 128 or less"):
        command(monkeypatch, capsys, *words, "--metric", "f1", "--max-len", 129)
    with pytest.raises(UserError, match=r"mood\.tsv:1: no column 'label'"):
        owntask.read_pair(train, dev, (), "label", False, Tally())
    with pytest.raises(UserError, match=r"mood\.tsv:2: label 'calm' is no number"):
        owntask.read_pair(train, dev, (), "mood", True, Tally())
    dev.write_text("first\tmood\na text\tangry\n")
    with pytest.raises(UserError, match=r"dev\.tsv:2: label 'angry' is none of calm, wild"):
        owntask.read_pair(train, dev, (), "mood", False, Tally())
    train.write_text("a\tb\tc\tmood\nx\ty\tz\tcalm\n")
    with pytest.raises(UserError, match="3 columns beside the label"):
        owntask.read_pair(train, dev, (), "mood", False, Tally())
    train.write_text("first\tmood\n" + "".join(f"x\t{i / 7}\n" for i in range(20)))
    with pytest.raises(UserError, match="use --metric pearson"):
        owntask.read_pair(train, dev, (), "mood", False, Tally())


def test_cola_says_what_it_needs(tmp_path, run, monkeypatch, capsys):
    data = write_glue(tmp_path / "glue")
    with pytest.raises(UserError, match=r"^--data hf:nyu-mll/glue: not read here — give a folder .*CoLA/dev\.tsv"):
        command(monkeypatch, capsys, "cola", run, "--data", "hf:nyu-mll/glue")
    with pytest.raises(UserError, match="no CoLA scores") as raised:
        command(monkeypatch, capsys, "cola", run, "--data", data)
    exported = tmp_path / "hf"
    exported.mkdir()
    (exported / "config.json").write_text("{}")
    (exported / "model.safetensors").touch()
    with pytest.raises(UserError, match="no run folder — name the run that the model comes from"):
        command(monkeypatch, capsys, "cola", exported, "--data", data)
    hint = str(raised.value).split("run python -m cramfast.evaluate ")[1]
    assert hint == f"glue {run} --data {data} --tasks cola"


@pytest.mark.parametrize(
    ("name", "said"),
    [("cola", "hf:NAME, which is not read here"), ("glue", "Cut off, mnli-start never goes on"), ("task", "--name")],
)
def test_help_says_what_is_not_obvious(monkeypatch, capsys, name, said):
    with pytest.raises(SystemExit):
        command(monkeypatch, capsys, name, "--help")
    assert said in " ".join(word for word in capsys.readouterr().out.split() if word != "│")
