"""How probable a model finds hidden tokens: what perplexity and BLiMP share."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from cramfast.batches.loader import Batch

BATCH_TOKENS = 8192  # tokens of one forward pass; larger ones leave the cache and are no faster on a CPU


@dataclass(frozen=True)
class Hidden:
    """One sequence with some of its tokens hidden.

    Attributes:
        ids: [CLS] ... [SEP], the hidden tokens already replaced by [MASK].
        places: where they are in `ids`, ascending; a place stands once for each target asked of it.
        targets: what may have been there.
    """

    ids: Sequence[int]
    places: Sequence[int]
    targets: Sequence[int]


class MaskedModel(Protocol):
    """What predicts hidden tokens: one of our encoders (checkpoints.Checkpoint) or any other (stock.StockModel).

    Attributes:
        name: for tables.
        run_dir: the run of ours that it belongs to, or None.
        tokenizer: adds and cuts nothing by itself.
        module: the network, to be placed on a device.
        cls, sep, mask, unk: token ids; `unk` is -1 where the tokenizer knows every text.
        max_len: longest sequence it takes, in tokens.
    """

    folder: Path
    name: str
    run_dir: Path | None
    tokenizer: Tokenizer

    @property
    def module(self) -> nn.Module: ...
    @property
    def cls(self) -> int: ...
    @property
    def sep(self) -> int: ...
    @property
    def mask(self) -> int: ...
    @property
    def unk(self) -> int: ...
    @property
    def max_len(self) -> int: ...

    def masked_logits(self, sequences: Sequence[Hidden]) -> Iterator[tuple[Tensor, Tensor]]:
        """(logits, (M, V) float32; targets, (M,) int64) of the hidden tokens, in order, some of them at a time."""

    def description(self) -> dict:
        """What the JSON of an evaluation says about the model."""


@torch.no_grad()
def log_probabilities(model: MaskedModel, sequences: Sequence[Hidden]) -> tuple[np.ndarray, np.ndarray]:
    """(log p in nats, whether it was the most probable token) of every target, sequence by sequence.

    Both are one-dimensional, float64 and bool, as long as all `targets` together.

    Raises:
        UserError: the model's decoder was never trained.
    """
    found, best = [], []
    for logits_MV, target_M in model.masked_logits(sequences):
        hit_M = logits_MV.gather(1, target_M[:, None])[:, 0]
        found.append((hit_M - logits_MV.logsumexp(1)).cpu())
        best.append((logits_MV.argmax(1) == target_M).cpu())
    if not found:
        return np.empty(0), np.empty(0, bool)
    return torch.cat(found).double().numpy(), torch.cat(best).numpy()


def batches(sequences: Sequence[Hidden], device: torch.device) -> Iterator[Batch]:
    """Packed batches of about BATCH_TOKENS, in the order of the sequences."""
    begin = used = 0
    for end, sequence in enumerate(sequences, 1):
        used += len(sequence.ids)
        if used >= BATCH_TOKENS or end == len(sequences):
            yield _batch(sequences[begin:end], device)
            begin, used = end, 0


def _batch(sequences: Sequence[Hidden], device: torch.device) -> Batch:
    lengths = np.array([len(s.ids) for s in sequences])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([np.asarray(s.ids, np.int32) for s in sequences])
    places = np.concatenate([np.asarray(s.places, np.int64) + o for s, o in zip(sequences, offsets, strict=False)])
    targets = np.concatenate([np.asarray(s.targets, np.int64) for s in sequences])

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device)

    return Batch(
        tensor(ids), tensor(offsets.astype(np.int32)), tensor(places), tensor(targets), int(lengths.max()), len(ids)
    )
