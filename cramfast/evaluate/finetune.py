"""Fine-tuning on the packed kernels: the documents of a batch lie end to end, none is padded."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cramfast.config import require
from cramfast.evaluate.checkpoints import Checkpoint
from cramfast.evaluate.examples import Examples
from cramfast.model.encoder import Encoder
from cramfast.optim.adamw import AdamW, FlatParameters

MAX_LEN = 128  # tokens of an example, as in the paper
DEV_TOKENS = 8192  # tokens of one forward pass over a development set
ROUNDING = 32  # of a batch's tokens: oneDNN compiles a matmul for every new length, 5 of 23 ms of an update of CoLA


@dataclass(frozen=True)
class Protocol:
    """How every task is trained; the defaults are the paper's (Geiping and Goldstein, arXiv:2212.14034)."""

    epochs: int = 5
    batch: int = 16
    """Examples of one update."""
    lr: float = 4e-5
    warmup: float = 0.1
    """Share of the updates in which the rate rises from 0; it then falls along half a cosine."""
    max_len: int | None = None
    """Tokens of an example; of a pair, the longer part is cut first. By default 128, or the model's length where that
    is less."""
    dropout: float = 0.1
    """Of the normalised embedding, of the output of every attention and feed-forward block before it joins the
    stream, and of the pooled vector before the classifier; attention weights are not dropped."""

    def __post_init__(self):
        for key in ("epochs", "batch"):
            require(getattr(self, key) >= 1, f"{key}={getattr(self, key)}", "use 1 or more")
        require(0 < self.lr < math.inf, f"lr={self.lr}", "use a finite value above 0")
        require(0 <= self.warmup <= 1, f"warmup={self.warmup}", "use 0 to 1")
        require(self.max_len is None or self.max_len >= 8, f"max_len={self.max_len}", "use 8 or more")
        require(0 <= self.dropout < 1, f"dropout={self.dropout}", "use 0 up to, not including, 1")

    def at(self, longest: int) -> "Protocol":
        """The protocol with the length that is used on a model that takes `longest` tokens.

        Raises:
            UserError: a longer one was asked for.
        """
        if self.max_len is None:
            return replace(self, max_len=min(MAX_LEN, longest))
        require(self.max_len <= longest, f"max_len={self.max_len}", f"use {longest} or less: the model's")
        return self

    def notes(self) -> list[str]:
        """What a table says below its scores of a length that is not the paper's."""
        if self.max_len in (None, MAX_LEN):
            return []
        return [f"Examples are cut to {self.max_len} tokens; published scores use {MAX_LEN}."]

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of update `step` of `steps`, the first being 0, as transformers' cosine schedule has it."""
        rising = int(self.warmup * steps)
        if step < rising:
            return self.lr * step / rising
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


@dataclass(frozen=True)
class Encoded:
    """Token ids of every example, special tokens included, and the labels."""

    ids: list[np.ndarray]
    labels: np.ndarray


@dataclass(frozen=True)
class Fit:
    """Attributes:
    predictions: for each development set, the class or value of every example after the last epoch.
    encoder: the tuned encoder.
    seconds: of training, without scoring.
    steps: updates made.
    skipped: updates left out because the gradient was not finite.
    """

    predictions: list[np.ndarray]
    encoder: Encoder
    seconds: float
    steps: int
    skipped: int


class Classifier(nn.Module):
    """Mean of the final states of a sequence, prediction head, dropout, linear: as stock ModernBERT classifies."""

    def __init__(self, encoder: Encoder, outputs: int, dropout: float):
        super().__init__()
        self.encoder = encoder
        self.encoder.dropout = dropout
        self.classifier = nn.Linear(encoder.config.width, outputs)
        nn.init.normal_(self.classifier.weight, 0.0, 0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, ids_N: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """(S, outputs) float32 scores of packed sequences; rows after the last one belong to none."""
        hidden_ND = self.encoder(ids_N, cu_seqlens, max_seqlen)
        lengths_S = cu_seqlens.diff()
        sequence_N = torch.repeat_interleave(torch.arange(len(lengths_S), device=ids_N.device), lengths_S)
        hidden_ND = hidden_ND[: len(sequence_N)]
        sums_SD = hidden_ND.new_zeros(len(lengths_S), hidden_ND.shape[1], dtype=torch.float32)
        mean_SD = sums_SD.index_add(0, sequence_N, hidden_ND.float()) / lengths_S[:, None]
        pooled_SD = self.encoder.drop(self.encoder.transform(mean_SD.to(hidden_ND.dtype)))
        return F.linear(pooled_SD, self.classifier.weight).float() + self.classifier.bias


def encode(model: Checkpoint, examples: Examples, max_len: int) -> Encoded:
    """[CLS] text [SEP], or [CLS] first [SEP] second [SEP], of at most max_len tokens, which the model takes."""
    parts = list(zip(*examples.texts, strict=True))
    columns = [
        [encoding.ids for encoding in model.tokenizer.encode_batch(list(part), add_special_tokens=False)]
        for part in parts
    ]
    rows = []
    for pieces in zip(*columns, strict=True):
        ids = [model.cls]
        for kept in cut_pieces(pieces, max_len - 1 - len(pieces)):
            ids += [*kept, model.sep]
        rows.append(np.array(ids, np.int32))
    return Encoded(rows, np.array(examples.labels))


def cut_pieces(pieces: Sequence[list[int]], room: int) -> list[list[int]]:
    """One or two pieces cut to `room` tokens in all: tokens go from the longer one first."""
    if len(pieces) == 1:
        return [pieces[0][:room]]
    first, second = pieces
    shorter = min(len(first), len(second), room // 2)
    if len(first) <= len(second):
        return [first[: max(shorter, room - len(second))], second[: room - shorter]]
    return [first[: room - shorter], second[: max(shorter, room - len(first))]]


def packed(rows: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor, int]:
    """(ids_N, cu_seqlens, max_seqlen) of the rows end to end, and after them up to ROUNDING - 1 tokens of no row."""
    lengths = [len(row) for row in rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = np.zeros(-(-offsets[-1] // ROUNDING) * ROUNDING, np.int32)
    np.concatenate(rows, out=ids[: offsets[-1]])
    return torch.from_numpy(ids).to(device), torch.from_numpy(offsets).to(device), max(lengths)


def fit(
    encoder: Encoder, classes: int, train: Encoded, dev: Sequence[Encoded], protocol: Protocol, seed: int,
    device: torch.device, dtype: torch.dtype, progress: Callable[[int, int], None] = lambda done, total: None,
) -> Fit:  # fmt: skip
    """Train a copy of the encoder with a new classifier, and predict every development set.

    Args:
        encoder: left as it is.
        classes: how many; 0 for regression under squared error.
        seed: decides classifier, order of the examples and dropout.
        progress: told (updates made, updates in all).
    """
    steps_per_epoch = -(-len(train.ids) // protocol.batch)
    steps = protocol.epochs * steps_per_epoch
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        model = Classifier(copy.deepcopy(encoder), max(1, classes), protocol.dropout).to(device).train()
        flat = FlatParameters(model, dtype)
        optimizer = AdamW(flat, beta1=0.9, beta2=0.98, eps=1e-6, weight_decay=0.0, max_norm=0.0)
        skipped = torch.zeros((), device=device)
        began = time.perf_counter()
        for step, rows in enumerate(shuffled(len(train.ids), protocol, seed)):
            scores = model(*packed([train.ids[row] for row in rows], device))
            loss = loss_of(scores, torch.from_numpy(train.labels[rows]).to(device), classes)
            loss.backward()
            optimizer.step(protocol.rate(step, steps), loss.detach(), 1.0)
            skipped += optimizer.scalars[4]
            progress(step + 1, steps)
        lost = int(skipped)  # waits for the device, so that its time is counted
        seconds = time.perf_counter() - began
        model.eval()
        predictions = [predict(model, part, classes, device) for part in dev]
    model.encoder.dropout = 0.0
    return Fit(predictions, model.encoder, seconds, steps, lost)


def shuffled(examples: int, protocol: Protocol, seed: int) -> Iterator[np.ndarray]:
    """The rows of every batch, each epoch in a new order; the last batch of an epoch may be smaller."""
    for epoch in range(protocol.epochs):
        order = np.argsort(np.random.PCG64DXSM((seed, epoch)).random_raw(examples), kind="stable")
        yield from (order[begin : begin + protocol.batch] for begin in range(0, examples, protocol.batch))


def loss_of(scores: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean cross-entropy over classes, or mean squared error where there are none."""
    if classes:
        return F.cross_entropy(scores, labels.long())
    return F.mse_loss(scores[:, 0], labels.float())


@torch.no_grad()
def predict(model: Classifier, part: Encoded, classes: int, device: torch.device) -> np.ndarray:
    """(examples,) classes or values."""
    found, begin, used = [], 0, 0
    for end, row in enumerate(part.ids, 1):
        used += len(row)
        if used >= DEV_TOKENS or end == len(part.ids):
            found.append(model(*packed(part.ids[begin:end], device)).cpu())
            begin, used = end, 0
    scores = torch.cat(found)
    return (scores.argmax(1) if classes else scores[:, 0].double()).numpy()
