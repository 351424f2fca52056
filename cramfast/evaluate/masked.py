"""How probable a model finds hidden tokens: the packed forward pass that perplexity and BLiMP share."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cramfast.errors import UserError
from cramfast.evaluate.checkpoints import Checkpoint
from cramfast.loader import Batch

BATCH_TOKENS = 8192  # tokens of one forward pass; larger ones leave the cache and are no faster on a CPU
LOGIT_ROWS = 1024  # rows of the decoder's output held at once


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


@torch.no_grad()
def log_probabilities(model: Checkpoint, sequences: Sequence[Hidden]) -> tuple[np.ndarray, np.ndarray]:
    """(log p in nats, whether it was the most probable token) of every target, sequence by sequence.

    Both are one-dimensional, float64 and bool, as long as all `targets` together. Only the hidden positions go through
    the decoder.

    Raises:
        UserError: the model's decoder was never trained.
    """
    if not model.encoder.fills_masks:
        raise UserError(f"{model.folder}: trained by replaced-token detection, so it fills no masks — use glue or task")
    device = model.encoder.final_norm.weight.device
    bias_V = None if model.decoder_bias is None else model.decoder_bias.to(device)
    found, best = [], []
    for batch in batches(sequences, device):
        hidden_MD = model.encoder.masked_hidden(batch)
        for rows_D, target in zip(hidden_MD.split(LOGIT_ROWS), batch.target_M.split(LOGIT_ROWS), strict=True):
            logits_MV = model.encoder.logits(rows_D).float()
            if bias_V is not None:
                logits_MV += bias_V
            hit = logits_MV.gather(1, target[:, None])[:, 0]
            found.append((hit - logits_MV.logsumexp(1)).cpu())
            best.append((logits_MV.argmax(1) == target).cpu())
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
