"""Microbatches: static shapes, exact masks, rebuilt from nothing, every token once an epoch; damage is named."""

import random
import shutil
import threading

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from cramfast.batches.feed import Feed
from cramfast.batches.loader import BatchSource, LengthenedSource, Prefetcher
from cramfast.config import ModelConfig
from cramfast.errors import UserError
from cramfast.prepare import prepare
from cramfast.text.prepared import PreparedText, verify

N, L, FRACTION = 1024, 64, 0.3


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    words = [
        f"{a}{b}" for a in ("ba", "ke", "lo", "mi", "ru", "sta", "tre") for b in ("n", "r", "st", "ll", "mp", "nd")
    ]
    documents = (" ".join(rng.choices(words, k=rng.randint(1, 300))) for _ in range(400))
    (folder / "a.txt").write_text("\n\n".join(documents) + "\n\n日本 ☃ unknowable" + "x" * 200)
    return prepare((str(folder / "a.txt"),), folder / "out", vocab_size=512)


def source(prepared, split="train", **options):
    return BatchSource(prepared, split, **{"sequence_len": L, "batch_tokens": N, "seed": 1} | options)


def same(a, b):
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(
        vars(a).values(), vars(b).values(), strict=True))  # fmt: skip


def truth(batch):
    """The ids before masking."""
    ids = batch.ids_N.clone()
    real = batch.target_M >= 0
    ids[batch.masked_index_M[real]] = batch.target_M[real].int()
    return ids


@pytest.mark.parametrize("masking", ["bert", "all_mask"])
def test_shapes_are_static_and_masks_exact(prepared, masking):
    batches = source(prepared, masking=masking)
    # Several epochs: all places outside the text have one key, which most epochs would not choose anyway.
    for epoch, index in ((e, i) for e in range(8) for i in range(batches.batches(e))):
        batch = batches.batch(epoch, index, FRACTION)
        last = index == batches.batches(epoch) - 1
        M = round(FRACTION * N)
        assert batch.ids_N.shape == (N,) and batch.ids_N.dtype == torch.int32
        assert batch.cu_seqlens.shape == (batches.max_sequences + 1,) and batch.cu_seqlens.dtype == torch.int32
        assert batch.masked_index_M.shape == batch.target_M.shape == (M,) and batch.target_M.dtype == torch.int64
        steps = batch.cu_seqlens.diff()
        assert batch.tokens == batch.cu_seqlens[-1] and steps.min() >= 0 and steps.max() <= L == batch.max_seqlen
        assert (batch.ids_N[batch.tokens :] == 0).all()
        rows = int((batch.target_M >= 0).sum())
        assert rows == (M if not last or batch.tokens > 0.94 * N else round(FRACTION * batch.tokens))
        assert (batch.target_M[:rows] >= 5).all() and (batch.target_M[rows:] == -100).all()
        assert (batch.masked_index_M[:rows].diff() > 0).all() and len(batch.masked_index_M.unique()) == M
        masked = batch.ids_N[batch.masked_index_M[:rows]]
        assert ((masked >= 4) & (masked < batches.word_count)).all()
        assert masking == "bert" or (masked == 4).all()
        ids = truth(batch)
        starts = batch.cu_seqlens[:-1][steps > 0].long()
        assert (ids[starts] == 2).all() and (ids[batch.cu_seqlens[1:][steps > 0].long() - 1] == 3).all()
        assert int((ids[: batch.tokens] == 2).sum() + (ids[: batch.tokens] == 3).sum()) == 2 * len(starts)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_token_of_every_document_comes_once_an_epoch(prepared, split):
    text = PreparedText(prepared, split)
    batches = source(prepared, split)
    for epoch in (0, 1):
        found = []
        for index in range(batches.batches(epoch)):
            batch = batches.batch(epoch, index, FRACTION)
            ids = truth(batch)[: batch.tokens].numpy()
            found += [tuple(row[1:-1]) for row in np.split(ids, batch.cu_seqlens[1:-1].numpy()) if len(row)]
        documents = (text.ids[a:b] for a, b in zip(text.offsets, text.offsets[1:], strict=False))
        expected = [tuple(d[i : i + L - 2]) for d in documents for i in range(0, len(d), L - 2)]
        assert sorted(found) == sorted(expected)


def test_a_batch_is_a_pure_function(prepared):
    first, second = source(prepared), source(prepared)
    order = [(1, 3), (0, 0), (2, 1), (0, 0), (1, 3)]
    kept = [first.batch(*at, FRACTION) for at in order]
    assert all(same(a, second.batch(*at, FRACTION)) for a, at in zip(kept, reversed(order), strict=True)
               if at == order[order.index(at)] and at == (2, 1))  # fmt: skip
    for batch, at in zip(kept, order, strict=True):
        assert same(batch, source(prepared).batch(*at, FRACTION))
    assert not same(kept[1], source(prepared, seed=2).batch(0, 0, FRACTION))
    assert not same(first.batch(0, 0, FRACTION), first.batch(1, 0, FRACTION))


def members_of(batches, epoch=0):
    members, _ = batches.plan(epoch)
    return [batches.ids[batches.starts[c] : batches.starts[c] + batches.lengths[c]] for c in members]


@pytest.mark.parametrize("tokenizer", ["wordpiece", "bpe"])
def test_sequences_of_many_sentences_or_common_words_come_first(tmp_path, tokenizer):
    rng = random.Random(1)
    common, rare = ["the", "of", "and", "to"], [f"{a}{b}" for a in "bcdfgh" for b in "aeiou"]
    documents = [" ".join(rng.choices(rng.choice((common, common, rare)), k=19)) for _ in range(9000)]
    dots = [rng.randint(0, 9) for _ in documents]
    text = (" ".join(w + "." * (i < n) for i, w in enumerate(d.split())) for d, n in zip(documents, dots, strict=True))
    (tmp_path / "a.txt").write_text("\n\n".join(text))
    folder = prepare((str(tmp_path / "a.txt"),), tmp_path / "out", vocab_size=512, tokenizer=tokenizer)
    names = Tokenizer.from_file(str(folder / "tokenizer.json")).id_to_token
    stops = np.array(
        [sum(names(int(i)).count(".") for i in ids) for ids in members_of(source(folder, order="sentences"))]
    )
    assert stops.sum() > 30_000 and stops[:1000].min() > stops[-1000:].max()
    assert np.corrcoef(stops, np.arange(len(stops)))[0, 1] < -0.95
    batches = source(folder, order="likelihood")
    share = np.bincount(batches.ids) / len(batches.ids)
    likelihood = np.array([np.log(share[ids]).mean() for ids in members_of(batches)])
    perfect = np.sort(likelihood)[::-1]  # the packer fills gaps with neighbours, so the order bends a little
    assert np.abs(likelihood - perfect).mean() < 0.1 * np.abs(likelihood[::-1] - perfect).mean()
    for order in ("sentences", "likelihood"):
        one, two = (source(folder, order=order) for _ in range(2))
        assert same(one.batch(0, 7, FRACTION), two.batch(0, 7, FRACTION))
        assert not same(one.batch(0, 7, FRACTION), one.batch(1, 7, FRACTION))  # equal ones are shuffled anew


def test_other_masks_in_another_epoch_for_the_same_tokens(prepared):
    batches = source(prepared, shuffle=False)
    a, b = batches.batch(0, 0, FRACTION), batches.batch(1, 0, FRACTION)
    assert torch.equal(truth(a), truth(b)) and not torch.equal(a.masked_index_M, b.masked_index_M)
    small, large = (set(batches.batch(0, 0, f).masked_index_M.tolist()) for f in (0.15, 0.3))
    assert small < large  # a schedule of the fraction only adds masks


def test_a_tiny_text_still_makes_a_batch(tmp_path):
    (tmp_path / "a.txt").write_text("one two three\n\nfour five six\n")
    folder = prepare((str(tmp_path / "a.txt"),), tmp_path / "out", vocab_size=512)
    for split in ("train", "heldout"):
        batches = source(folder, split)
        assert batches.batches(0) == 1
        batch = batches.batch(0, 0, FRACTION)
        assert 0 < (batch.target_M >= 0).sum() < batch.tokens - 2


def test_sequences_lengthen_once_and_a_position_alone_says_how_long_they_are(prepared):
    short, long = source(prepared, sequence_len=16), source(prepared)
    both = LengthenedSource(short, long)
    beyond = both.LONG + 1
    assert (both.batches(1), both.batches(beyond)) == (short.batches(1), long.batches(1))
    assert same(both.batch(1, 2, FRACTION), short.batch(1, 2, FRACTION))
    assert same(both.batch(beyond, 2, FRACTION), long.batch(1, 2, FRACTION))
    with Feed(both, ModelConfig(), torch.device("cpu"), (0, 3)) as feed:
        batches = [feed.next(FRACTION, lengthened)[0] for lengthened in (False, False, True, True, False)]
        position = feed.position
    wanted = [short.batch(0, i, FRACTION) for i in (3, 4)] + [long.batch(0, i, FRACTION) for i in (0, 1, 2)]
    assert all(map(same, batches, wanted)) and [b.max_seqlen for b in batches] == [16, 16, L, L, L]
    with Feed(both, ModelConfig(), torch.device("cpu"), position) as feed:  # resumed, also with a larger budget
        assert same(feed.next(FRACTION, False)[0], long.batch(0, 3, FRACTION))


def test_prefetcher_gives_the_same_batches_across_epochs_and_closes(prepared):
    batches = source(prepared)
    count = batches.batches(0)
    before = threading.active_count()
    with Prefetcher(batches, FRACTION, position=(0, count - 2)) as ahead:
        for at in ((0, count - 2), (0, count - 1), (1, 0), (1, 1)):
            assert ahead.position == at
            assert same(next(ahead), batches.batch(*at, FRACTION))
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(ahead)


def test_prefetcher_hands_errors_to_the_reader_and_ends(prepared):
    class Broken(BatchSource):
        def batch(self, epoch, index, mask_fraction):
            if index == 2:
                raise OSError("disk gone")
            return super().batch(epoch, index, mask_fraction)

    before = threading.active_count()
    ahead = Prefetcher(Broken(prepared, sequence_len=L, batch_tokens=N, seed=0), FRACTION)
    next(ahead), next(ahead)
    with pytest.raises(OSError, match="disk gone"):
        next(ahead)
    assert threading.active_count() == before


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "short":
        path.write_bytes(data[:-2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("name", ["train.ids", "train.offsets.npy"])
@pytest.mark.parametrize("how", ["missing", "short", "changed"])
def test_damaged_files_are_named_with_the_remedy(prepared, tmp_path, name, how):
    folder = tmp_path / "copy"
    shutil.copytree(prepared, folder)
    verify(folder)
    damage(folder / name, how)
    with pytest.raises(UserError, match=rf"{name}.*run python -m cramfast\.prepare again"):
        verify(folder) if how == "changed" else PreparedText(folder, "train")


def test_a_manifest_that_is_missing_damaged_or_foreign(prepared, tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json: missing"):
        PreparedText(tmp_path, "train")
    texts = {
        "{": "damaged JSON",
        '{"version": 99}': "version 99",
        "[]": "version None",
        '{"version": 1}': "no key 'key'",
    }
    for text, message in texts.items():
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=message):
            PreparedText(tmp_path, "train")


def test_impossible_requests(prepared):
    with pytest.raises(UserError, match="no split 'test'"):
        source(prepared, "test")
    with pytest.raises(UserError, match="batch_tokens=32"):
        source(prepared, batch_tokens=32)
    with pytest.raises(IndexError):
        source(prepared).batch(0, 10**6, FRACTION)
