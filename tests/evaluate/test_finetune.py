"""Fine-tuning: the classifier is that of transformers, the protocol that of the paper, and a fit learns and repeats."""

import numpy as np
import pytest
import torch
from test_evaluate import LOCAL
from tiny_run import SENTENCES, make_run, tiny_config, toy
from transformers import AutoModelForSequenceClassification

from cramfast.errors import UserError
from cramfast.evaluate import checkpoints, examples, finetune, scores
from cramfast.export import export

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("run") / "model", tiny_config(**LOCAL))
    return export(run, run / "hf").path


@pytest.fixture(scope="module")
def model(exported):
    return checkpoints.load(exported.parent)


def test_classifier_is_that_of_transformers(model, exported):
    """Loss gradient too: what is trained is what stock transformers would train."""
    stock = AutoModelForSequenceClassification.from_pretrained(
        exported, num_labels=3, attn_implementation="sdpa"
    ).eval()
    ours = finetune.Classifier(checkpoints.load(exported).encoder, 3, 0.1).eval()
    ours.classifier.load_state_dict(stock.classifier.state_dict())
    rows = [np.array(model.tokenizer.encode(text).ids, np.int32) for text in SENTENCES[:3]]
    ids_N, cu_seqlens, longest = finetune.packed(rows, torch.device("cpu"))
    assert len(ids_N) % finetune.ROUNDING == 0 and len(ids_N) > cu_seqlens[-1]  # the rest is of no sentence
    mine = ours(ids_N, cu_seqlens, longest)
    for row, scores_3 in zip(rows, mine, strict=True):
        theirs = stock(input_ids=torch.tensor(row[None].astype(np.int64))).logits[0]
        assert torch.allclose(scores_3, theirs, atol=1e-4)
    labels = torch.tensor([0, 2, 1])
    finetune.loss_of(mine, labels, 3).backward()
    lists = [stock(input_ids=torch.tensor(row[None].astype(np.int64))).logits[0] for row in rows]
    torch.nn.functional.cross_entropy(torch.stack(lists), labels).backward()
    theirs = dict(stock.model.named_parameters())
    for name, parameter in ours.encoder.named_parameters():
        if not name.startswith("head."):
            assert torch.allclose(parameter.grad, theirs[name].grad, atol=1e-4), name


def test_rate_of_the_protocol():
    from transformers import get_cosine_schedule_with_warmup

    protocol = finetune.Protocol()
    assert (protocol.epochs, protocol.batch, protocol.lr, protocol.dropout) == (5, 16, 4e-5, 0.1)
    assert (protocol.at(512).max_len, protocol.at(128).notes()) == (128, [])
    assert protocol.at(64).max_len == 64
    assert protocol.at(64).notes() == ["Examples are cut to 64 tokens; published scores use 128."]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=4e-5)
    schedule = get_cosine_schedule_with_warmup(optimizer, 5, 57)
    for step in range(57):
        assert protocol.rate(step, 57) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0}, {"batch": 0}, {"lr": 0.0}, {"lr": float("inf")}, {"warmup": 1.1}, {"warmup": float("nan")},
        {"max_len": 7}, {"dropout": 1.0}, {"dropout": -0.1},
    ],
    ids=str,
)  # fmt: skip
def test_protocols_that_are_refused(wrong):
    ((key, value),) = wrong.items()
    with pytest.raises(UserError, match=f"^{key}={value} is not possible — use "):
        finetune.Protocol(**wrong)
    finetune.Protocol(epochs=1, batch=1, warmup=1.0, max_len=8, dropout=0.0)


@pytest.mark.parametrize(("first", "second"), [(3, 3), (10, 2), (2, 10), (10, 10), (5, 7), (0, 20)])
def test_pairs_are_cut_as_tokenizers_cuts_them(first, second):
    pieces = [list(range(first)), list(range(100, 100 + second))]
    cut = finetune.cut_pieces(pieces, 10)
    while len(pieces[0]) + len(pieces[1]) > 10:
        max(pieces[::-1], key=len).pop()
    assert sum(map(len, cut)) == sum(map(len, pieces)) and all(
        abs(len(a) - len(b)) <= 1 for a, b in zip(cut, pieces, strict=True)
    )
    assert finetune.cut_pieces([list(range(30))], 10) == [list(range(10))]


def test_pair_encoding(model):
    encoded = finetune.encode(model, examples.Examples([("light", "sound !")], [0.0]), 128)
    ids = [model.tokenizer.encode(text, add_special_tokens=False).ids for text in ("light", "sound !")]
    assert encoded.ids[0].tolist() == [2, *ids[0], 3, *ids[1], 3]


@pytest.mark.parametrize("classes", [2, 0])
def test_fit_learns_repeats_and_leaves_the_encoder_alone(model, classes):
    data = finetune.encode(model, toy(classes), 128)
    protocol = finetune.Protocol(epochs=8, lr=2e-3)
    before = {name: p.clone() for name, p in model.encoder.named_parameters()}
    state = torch.random.get_rng_state()

    def once(seed):
        return finetune.fit(model.encoder, classes, data, [data], protocol, seed, torch.device("cpu"), torch.float32)

    done, again, other = once(0), once(0), once(1)
    assert done.steps == 8 * 4 and done.skipped == 0
    assert np.array_equal(done.predictions[0], again.predictions[0])
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = [fit.encoder.embeddings.tok_embeddings.weight for fit in (done, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    metric = scores.accuracy if classes else scores.pearson
    assert metric(data.labels.tolist(), done.predictions[0].tolist()) > 0.9
    assert all(torch.equal(p, before[name]) for name, p in model.encoder.named_parameters())
    assert model.encoder.dropout == done.encoder.dropout == 0


def test_dropout_is_on_in_training_only(model):
    classifier = finetune.Classifier(checkpoints.load(model.folder).encoder, 2, 0.5)
    batch = finetune.packed([np.array([2, 9, 10, 3], np.int32)], torch.device("cpu"))
    assert not torch.equal(classifier.train()(*batch), classifier(*batch))
    assert torch.equal(classifier.eval()(*batch), classifier(*batch))
