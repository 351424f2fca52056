"""What is switched off changes the speed, not the function: every variant against the encoder that it stands in for."""

import numpy as np
import pytest
import torch
from tiny_run import tiny_config

from cramfast.batches.loader import Batch
from cramfast.config import TrainConfig
from cramfast.errors import UserError
from cramfast.model.encoder import Encoder
from cramfast.optim.adamw import AdamW, FlatParameters
from cramfast.prepare import prepare
from cramfast.scaling import switches
from cramfast.scaling.claims import claims_of
from cramfast.scaling.switches import SWITCHES, Variant


def batch(lengths: tuple[int, ...], seed: int = 0) -> Batch:
    """Packed sequences with two empty ones and padding at the end, a third of the tokens masked."""
    random = np.random.default_rng(seed)
    ends = np.cumsum((0, *lengths))
    N = int(ends[-1]) + 5
    masked = np.sort(random.choice(int(ends[-1]), N // 3, replace=False))
    target = random.integers(5, 512, len(masked))
    target[-2:] = -100
    cu_seqlens = torch.tensor([*ends, ends[-1], ends[-1]], dtype=torch.int32)
    ids = torch.from_numpy(random.integers(5, 512, N).astype(np.int32))
    return Batch(ids, cu_seqlens, torch.from_numpy(masked), torch.from_numpy(target), 32, int(ends[-1]))


def model_of(names: tuple[str, ...], **changes) -> Encoder:
    """A variant's encoder with the weights that ours has, biases at random."""
    config = tiny_config(**changes)
    torch.manual_seed(1)
    ours = Encoder(config)
    model = Variant(names).encoder(config)
    model.load_state_dict(ours.state_dict(), strict=False)
    return model


def loss_and_gradients(model: Encoder, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    loss = model.loss(batch)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if "_bias" not in name}


SAME = ("separate_gate", "biases", "dense_prediction", "materialised_scores", "torch_attention")


@pytest.mark.parametrize("changes", [{}, {"global_every": 3, "window": 8}], ids=["global", "local"])
@pytest.mark.parametrize("names", [*((name,) for name in SAME), SAME[:4]], ids="+".join)
def test_loss_and_gradients_are_those_of_our_encoder(names, changes):
    """Biases are zero at the start, so that they change nothing yet."""
    made = batch((32, 7, 1, 20))
    loss, gradients = loss_and_gradients(model_of((), **changes), made)
    other, others = loss_and_gradients(model_of(names, **changes), made)
    assert other == pytest.approx(loss, rel=2e-6)
    for name, gradient in gradients.items():
        scale = gradient.abs().max().clamp(min=1e-6)
        assert float((others[name] - gradient).abs().max() / scale) < 2e-4, name


def test_biases_are_used_and_trained():
    model, made = model_of(("biases",)), batch((32, 7))
    before = float(model.loss(made).detach())
    biases = {name: p for name, p in model.named_parameters() if "_bias" in name}
    assert len(biases) == 4 * 3
    model.loss(made).backward()
    assert all(float(p.grad.abs().max()) > 0 for p in biases.values())
    for p in biases.values():
        torch.nn.init.normal_(p)
    assert abs(float(model.loss(made).detach()) - before) > 1e-3


def test_dropout_is_in_training_only():
    model, made = model_of(("dropout",)), batch((32, 7))
    first, second = (float(model.loss(made).detach()) for _ in range(2))
    assert first != second
    model.eval()
    assert float(model.loss(made).detach()) == pytest.approx(float(model_of(()).loss(made).detach()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_tensor_by_tensor_makes_the_same_updates(dtype):
    options = {"beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "weight_decay": 0.05, "max_norm": 0.5}
    made, masters, norms = batch((32, 20)), [], []
    for kind in (AdamW, switches.PerTensorAdamW):
        model = model_of(())
        optimizer = kind(FlatParameters(model, dtype), **options)
        optimizer.step(0.0, torch.zeros(()), 1)
        optimizer.reset()  # as train.start does
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            optimizer.flat.grad.copy_(torch.randn(optimizer.flat.grad.shape, generator=generator))
            loss = model.loss(made).detach()
            padding = torch.ones_like(optimizer.flat.grad, dtype=torch.bool)
            for _, view in optimizer.flat.views(padding):
                view.fill_(False)
            optimizer.flat.grad[padding] = 0
            optimizer.step(1e-2, loss, 2)
        masters.append(optimizer.flat.master)
        norms.append(optimizer.grad_norm)
        assert not optimizer.skipped and float(optimizer.scalars[1]) == 3
        if optimizer.flat.half is not None:
            assert torch.equal(optimizer.flat.half, masters[-1][: optimizer.flat.matrices_end].to(dtype))
        optimizer.flat.grad.fill_(float("nan"))
        optimizer.step(1e-2, loss, 1)
        assert optimizer.skipped and torch.equal(optimizer.flat.master, masters[-1])
    torch.testing.assert_close(*masters, rtol=1e-5, atol=1e-7)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    random = np.random.default_rng(0)
    words = [f"w{i}x" for i in range(400)]
    lines = (" ".join(random.choice(words, random.integers(2, 60))) for _ in range(600))
    (folder / "text.txt").write_text("\n".join(lines))
    return prepare((str(folder / "text.txt"),), folder / "out", vocab_size=512, documents="lines")


def sources(prepared, name: str):
    config = TrainConfig(sequence_len=32, microbatch_tokens=512, seed=0)
    return Variant(()).batches(config, prepared), Variant((name,)).batches(config, prepared)


def test_padding_holds_a_sequence_for_every_slot(prepared):
    _, source = sources(prepared, "padding")
    made = source.batch(0, 1, 0.3)
    lengths = made.cu_seqlens.diff()
    assert len(made.ids_N) == 512 and int((lengths > 0).sum()) == len(lengths) == 512 // 32
    assert int(lengths.sum()) == made.tokens < 0.95 * 512 and (made.ids_N[made.tokens :] == 0).all()
    predicted = made.masked_index_M[made.target_M >= 0]
    wanted = min(len(made.target_M), round(0.3 * made.tokens))
    assert len(predicted) == pytest.approx(wanted, abs=2) and int(predicted.max()) < made.tokens
    assert len(made.target_M) < 0.3 * 512  # padding is not predicted


def test_padding_holds_every_chunk_once(prepared):
    packed, padded = sources(prepared, "padding")
    count = [sum(source.batch(0, i, 0.3).tokens for i in range(source.batches(0))) for source in (packed, padded)]
    assert count[0] == count[1]


def test_naive_packing_crosses_documents(prepared):
    packed, naive = sources(prepared, "cross_document")
    one, other = packed.batch(0, 0, 0.3), naive.batch(0, 0, 0.3)
    lengths = other.cu_seqlens.diff()
    assert torch.equal(one.ids_N, other.ids_N) and one.tokens == other.tokens == int(lengths.sum())
    assert (lengths[: one.tokens // 32] == 32).all() and int(lengths.max()) == 32
    assert one.cu_seqlens.shape == other.cu_seqlens.shape


def test_every_claim_names_switches_that_combine():
    for device in ("cpu", "cuda"):
        for claim in claims_of(TrainConfig(device=device, dtype="float32")):
            for names in (claim.on, claim.off):
                variant = Variant(names)
                assert issubclass(variant.encoder, Encoder) and issubclass(variant.optimizers["adamw"], AdamW)
    assert {name for claim in claims_of(TrainConfig(device="cuda", dtype="float16")) for name in claim.off} <= set(
        SWITCHES
    )


def test_refuses_switches_that_do_not_go_together():
    with pytest.raises(UserError, match="take one"):
        Variant(("padding", "cross_document"))
    with pytest.raises(UserError, match="does not exist"):
        Variant(("pading",))
