"""Microbatches on their way from the loader to the device, and the fixed held-out set."""

from dataclasses import fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cramfast.config import ModelConfig, TrainConfig
from cramfast.loader import Batch, BatchSource, Prefetcher
from cramfast.model import Encoder, flops_per_token

HELDOUT_MASK_FRACTION = 0.15  # BERT's, whatever the recipe trains with, so that held-out losses compare between recipes
LOGIT_ROWS = 1024  # rows scored at once in an evaluation; bounds its memory


class Feed:
    """Training microbatches from a position (epoch, index) on, prepared ahead by a thread; closes with its context.

    Attributes:
        position: (epoch, index) of the next microbatch.
    """

    def __init__(self, source: BatchSource, model: ModelConfig, device: torch.device, position: tuple[int, int]):
        self.source, self.model, self.device, self.position = source, model, device, position
        self.ahead: Prefetcher | None = None
        self.masked = None

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *exception) -> None:
        if self.ahead is not None:
            self.ahead.close()

    def next(self, masked: float) -> tuple[Batch, float]:
        """The next microbatch, with this share of its tokens masked, and the FLOPs of training on it.

        A new share discards what was prepared ahead.
        """
        if self.masked != masked:
            self.__exit__()
            self.ahead, self.masked = Prefetcher(self.source, masked, position=self.position), masked
        batch = next(self.ahead)
        self.position = self.ahead.position
        return to_device(batch, self.device), batch_flops(self.model, batch)


def training_source(config: TrainConfig, prepared: Path) -> BatchSource:
    """The training split, packed and masked as the recipe says."""
    return BatchSource(
        prepared,
        "train",
        sequence_len=config.sequence_len,
        batch_tokens=config.microbatch_tokens,
        seed=config.seed,
        masking=config.masking,
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`; the copy overlaps with what runs there."""
    if device.type == "cpu":
        return batch
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
    moved = {k: v.to(device, non_blocking=True) for k, v in tensors.items() if isinstance(v, Tensor)}
    return replace(batch, **moved)


def batch_flops(model: ModelConfig, batch: Batch) -> float:
    """FLOPs of one forward and backward pass over the useful tokens of a batch on the CPU."""
    lengths_S = batch.cu_seqlens.diff().to(torch.float64)
    mean_len = float(lengths_S.square().sum()) / batch.tokens  # each token attends to its own sequence
    return batch.tokens * flops_per_token(model, len(batch.target_M) / batch.tokens, mean_len)


def heldout_batches(config: TrainConfig, prepared: Path, device: torch.device) -> list[Batch]:
    """The same held-out tokens under the same masks, whenever and by whomever they are asked for."""
    source = BatchSource(
        prepared,
        "heldout",
        sequence_len=config.sequence_len,
        batch_tokens=config.microbatch_tokens,
        seed=0,
        masking="bert",
        shuffle=False,
    )
    count = min(source.batches(0), max(1, config.heldout_tokens // config.microbatch_tokens))
    return [to_device(source.batch(0, index, HELDOUT_MASK_FRACTION), device) for index in range(count)]


@torch.no_grad()
def evaluate(model: Encoder, batches: list[Batch]) -> tuple[float, float]:
    """(mean cross-entropy in nats, share predicted right) over the masked tokens of `batches`.

    Plain PyTorch from the hidden states on: an independent look at what the loss kernel reports.
    """
    device = model.final_norm.weight.device
    loss, right, count = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(3))
    for batch in batches:
        hidden_MD = model.masked_hidden(batch)
        for rows_D, target in zip(hidden_MD.split(LOGIT_ROWS), batch.target_M.split(LOGIT_ROWS), strict=True):
            logits_MV = model.logits(rows_D).float()
            loss += F.cross_entropy(logits_MV, target, ignore_index=-100, reduction="sum")
            right += (logits_MV.argmax(-1) == target).sum()
            count += (target >= 0).sum()
    return (loss / count).item(), (right / count).item()
