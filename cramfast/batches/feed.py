"""Microbatches on their way from the loader to the device, and the fixed held-out set."""

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cramfast.batches.loader import Batch, BatchSource, LengthenedSource, Prefetcher, Source
from cramfast.config import ModelConfig, TrainConfig
from cramfast.model.electra import Discriminator, detection_flops_per_token
from cramfast.model.encoder import Encoder, flops_per_token
from cramfast.runtime.distributed import ALONE, Team
from cramfast.runtime.ranges import Range

HELDOUT_MASK_FRACTION = 0.15  # BERT's, whatever the recipe trains with, so that held-out losses compare between recipes
LOGIT_ROWS = 1024  # rows scored at once in an evaluation; bounds its memory


class Slot:
    """Room for one batch, page-locked on the host and again on the device.

    Attributes:
        host, on_device: the batch's tensors by name.
        copied: the device has its copy, the host's may be written again.
        computed: what was enqueued on the device's copy is done, it may be written again.
    """

    def __init__(self, backend):
        self.host: dict[str, Tensor] = {}
        self.on_device: dict[str, Tensor] = {}
        self.copied, self.computed = backend.Event(), backend.Event()

    def fits(self, tensors: dict[str, Tensor]) -> bool:
        return {k: v.shape for k, v in self.host.items()} == {k: v.shape for k, v in tensors.items()}


class Upload:
    """Batches to a GPU through page-locked memory, on a stream of their own: a copy runs beside the computation on the
    batch before.

    Two slots take turns. A batch given out is valid until the next but one is asked for, and asking for the fifth waits
    until the first is computed: so far can the host run ahead of the device.
    """

    def __init__(self, device: torch.device):
        self.device, self.backend = device, torch.get_device_module(device)
        self.stream = self.backend.Stream()
        self.slots = [Slot(self.backend), Slot(self.backend)]
        self.given_out: Slot | None = None

    def __call__(self, batch: Batch) -> Batch:
        """The batch with its tensors on the device; the host waits for no copy of it."""
        tensors = tensors_of(batch)
        compute = self.backend.current_stream()
        if self.given_out is not None:
            self.given_out.computed.record(compute)  # all work on that batch has been enqueued by now
        slot = self.given_out = self.slots[0]
        self.slots.reverse()
        slot.copied.synchronize()
        if not slot.fits(tensors):
            self.allocate(slot, tensors)
        for name, tensor in tensors.items():
            slot.host[name].copy_(tensor)
        self.stream.wait_event(slot.computed)
        with self.backend.stream(self.stream):
            for name in tensors:
                slot.on_device[name].copy_(slot.host[name], non_blocking=True)
            slot.copied.record(self.stream)
        compute.wait_event(slot.copied)
        return replace(batch, **slot.on_device)

    def allocate(self, slot: Slot, tensors: dict[str, Tensor]) -> None:
        """Room for other shapes: at the start, and when the share of masked tokens moves on."""
        locked = self.device.type == "cuda"
        slot.host = {k: torch.empty(v.shape, dtype=v.dtype, pin_memory=locked) for k, v in tensors.items()}
        slot.on_device = {k: torch.empty(v.shape, dtype=v.dtype, device=self.device) for k, v in tensors.items()}
        # The memory may have been something else's until now, in work that is still running.
        self.stream.wait_stream(self.backend.current_stream())


class Feed:
    """Training microbatches from a position (epoch, index) on, prepared ahead by a thread; closes with its context.

    Several processes go through the same microbatches together and each takes its own (loader.Prefetcher), so that the
    position does not depend on their number.

    Attributes:
        position: (epoch, index) of the next microbatch.
    """

    def __init__(
        self, source: Source, model: ModelConfig, device: torch.device, position: tuple[int, int],
        objective: str = "mlm", team: Team = ALONE,
    ):  # fmt: skip
        self.source, self.model, self.position, self.objective = source, model, position, objective
        self.rank, self.world = team.rank, team.world
        self.upload = None if device.type == "cpu" else Upload(device)
        self.ahead: Prefetcher | None = None
        self.masked = None

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *exception) -> None:
        if self.ahead is not None:
            self.ahead.close()

    def share(self, microbatches: int, masked: float, lengthened: bool = False) -> Iterator[tuple[Batch, float, bool]]:
        """This process's of the next so many microbatches, as from next(), and whether it is the last of them."""
        own = None
        for _ in range(microbatches):
            if (batch := self.take(masked, lengthened)) is not None:
                if own is not None:
                    yield *self.given(own), False
                own = batch
        if own is not None:
            yield *self.given(own), True

    def next(self, masked: float, lengthened: bool = False) -> tuple[Batch, float]:
        """The next microbatch in a process alone, on the device, and the FLOPs of training on it."""
        return self.given(self.take(masked, lengthened))

    @Range("data")
    def take(self, masked: float, lengthened: bool) -> Batch | None:
        """The next microbatch, with this share of its tokens masked, on the CPU; None if another process takes it.

        A new share discards what was prepared ahead, and so does the first that is asked for `lengthened`: from there
        on the sequences of a LengthenedSource are long.
        """
        if lengthened and self.position != (further := self.source.lengthened(self.position)):
            self.position, self.masked = further, None
        if self.masked != masked:
            self.__exit__()
            ahead = Prefetcher(self.source, masked, position=self.position, rank=self.rank, world=self.world)
            self.ahead, self.masked = ahead, masked
        batch = next(self.ahead)
        self.position = self.ahead.position
        return batch

    def given(self, batch: Batch) -> tuple[Batch, float]:
        """A batch on its way to the device, and its FLOPs."""
        flops = batch_flops(self.model, batch, self.objective)
        return batch if self.upload is None else self.upload(batch), flops


def training_source(config: TrainConfig, prepared: Path, microbatch_tokens: int) -> Source:
    """The training split, packed into microbatches of this size and masked as the recipe says."""

    def packed(sequence_len: int) -> BatchSource:
        return BatchSource(
            prepared,
            "train",
            sequence_len=sequence_len,
            batch_tokens=microbatch_tokens,
            seed=config.seed,
            masking=config.masking,
            order=config.order,
        )

    if config.short_sequence_len == 0:
        return packed(config.sequence_len)
    return LengthenedSource(packed(config.short_sequence_len), packed(config.sequence_len))


def tensors_of(batch: Batch) -> dict[str, Tensor]:
    """The fields of a batch that are tensors, by name."""
    values = ((f.name, getattr(batch, f.name)) for f in fields(batch))
    return {name: value for name, value in values if isinstance(value, Tensor)}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    return replace(batch, **{name: tensor.to(device) for name, tensor in tensors_of(batch).items()})


def batch_flops(model: ModelConfig, batch: Batch, objective: str = "mlm") -> float:
    """FLOPs of one forward and backward pass over the useful tokens of a batch on the CPU."""
    lengths_S = batch.cu_seqlens.diff().to(torch.float64)
    mean_len = float(lengths_S.square().sum()) / batch.tokens  # each token attends to its own sequence
    each = detection_flops_per_token if objective == "rtd" else flops_per_token
    return batch.tokens * each(model, len(batch.target_M) / batch.tokens, mean_len)


def heldout_batches(config: TrainConfig, prepared: Path, device: torch.device, most: int = 0) -> list[Batch]:
    """The same held-out tokens under the same masks, whenever and by whomever they are asked for.

    Where memory made the training's microbatches smaller, `most` tokens and no more lie in a batch: the same
    sequences, in more batches.
    """
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
    batches = (source.batch(0, index, HELDOUT_MASK_FRACTION) for index in range(count))
    return [to_device(piece, device) for batch in batches for piece in pieces(batch, most or config.microbatch_tokens)]


def pieces(batch: Batch, most: int) -> Iterator[Batch]:
    """The batch in batches of at most `most` tokens, cut between sequences; the batch itself where it is no larger.

    `most` is no less than the longest sequence.
    """
    if len(batch.ids_N) <= most:
        yield batch
        return
    ends = batch.cu_seqlens.unique(sorted=True)
    begin = 0
    while begin < batch.tokens:
        end = int(ends[ends <= begin + most][-1])
        inside_M = (batch.masked_index_M >= begin) & (batch.masked_index_M < end)
        yield Batch(
            ids_N=batch.ids_N[begin:end].clone(),
            cu_seqlens=(ends[(ends >= begin) & (ends <= end)] - begin).to(batch.cu_seqlens.dtype),
            masked_index_M=batch.masked_index_M[inside_M] - begin,
            target_M=batch.target_M[inside_M],
            max_seqlen=batch.max_seqlen,
            tokens=end - begin,
        )
        begin = end


@torch.no_grad()
def detection_loss(model: Discriminator, batches: list[Batch], team: Team = ALONE) -> float:
    """Mean binary cross-entropy of replaced-token detection over every process's `batches`, in nats a token."""
    loss, tokens = torch.zeros(2, dtype=torch.float64, device=model.final_norm.weight.device)
    for batch in batches:
        loss += model.detection_loss(batch).double() * batch.tokens
        tokens += batch.tokens
    loss, tokens = team.total(torch.stack([loss, tokens])).tolist()
    return loss / tokens


@torch.no_grad()
def evaluate(model: Encoder, batches: list[Batch], team: Team = ALONE) -> tuple[float, float]:
    """(mean cross-entropy in nats, share predicted right) over the masked tokens of every process's `batches`.

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
    loss, right, count = team.total(torch.stack([loss, right, count])).tolist()
    return loss / count, right / count
