"""The systems that bench.step lets train in turn on a GPU. None waits for the device within a turn."""

from pathlib import Path

import torch

from bench import machine
from bench.packed_encoder import PackedEncoder
from bench.systems import ADAMW, MASK_FRACTION, MAX_NORM, Options, Sequences, Transformers
from cramfast.batches.feed import Feed
from cramfast.batches.loader import BatchSource
from cramfast.config import TrainConfig
from cramfast.errors import UserError
from cramfast.model.encoder import Encoder
from cramfast.optim.adamw import AdamW, FlatParameters
from cramfast.session.ledger import Clock
from cramfast.session.microbatch import Microbatch, capture_graph, graph_choice

GPU = torch.device("cuda")


def packed_batches(options: Options, prepared: Path) -> Feed:
    """Microbatches of as many useful tokens as the stock batch has on average, built ahead and uploaded aside."""
    tokens = Sequences(prepared, options.sequence_len).packed_tokens(options)
    source = BatchSource(prepared, "train", sequence_len=options.sequence_len, batch_tokens=tokens, seed=0)
    return Feed(source, options.model(), GPU, (0, 0))


class Cramfast:
    """Our step as cramfast.train takes it: one microbatch, replayed from a CUDA graph, and one update."""

    def __init__(self, options: Options, prepared: Path):
        missing = machine.take_kernels(options.kernels)
        if missing:
            reasons = "; ".join(f"{op}: {reason}" for op, reason in missing.items())
            raise UserError(f"--kernels {options.kernels}: {reasons} — build with nvcc, or name another implementation")
        config = TrainConfig(
            model=options.model(), sequence_len=options.sequence_len, device="cuda", dtype=options.dtype
        )
        torch.manual_seed(0)
        model = Encoder(config.model).to(GPU)
        self.optimizer = AdamW(
            FlatParameters(model, getattr(torch, options.dtype)),
            beta1=ADAMW["betas"][0],
            beta2=ADAMW["betas"][1],
            eps=ADAMW["eps"],
            weight_decay=ADAMW["weight_decay"],
            max_norm=MAX_NORM,
        )
        capture = capture_graph if graph_choice(config)[0] else None
        self.microbatch = Microbatch(model, self.optimizer, Clock(GPU), capture)
        self.feed = packed_batches(options, prepared)

    def step(self) -> int:
        batch, _ = self.feed.next(MASK_FRACTION)
        loss_sum = self.microbatch.loss_sum.zero_()
        self.microbatch.run(batch)
        self.optimizer.step(ADAMW["lr"], loss_sum, 1)
        return batch.tokens


class Trained:
    """What both stock systems do around their loss: autocast, loss scale in float16, clip, fused AdamW."""

    def prepare(self, model: torch.nn.Module, options: Options) -> None:
        self.model, self.dtype = model.to(GPU), getattr(torch, options.dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, **ADAMW)
        self.scaler = torch.amp.GradScaler("cuda", enabled=self.dtype == torch.float16)

    def update(self, loss_of) -> None:
        with torch.autocast("cuda", dtype=self.dtype, enabled=self.dtype != torch.float32):
            loss = loss_of()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


class PaddedTransformers(Transformers, Trained):
    """The stock step, every batch padded to sequence_len so that one compilation serves all of them."""

    def __init__(self, options: Options, prepared: Path, compiled: bool):
        super().__init__(options, prepared, compiled=False)
        self.padded_length = options.sequence_len
        self.prepare(self.model, options)
        self.run = torch.compile(self.model, dynamic=False) if compiled else self.model

    def step(self) -> int:
        batch = self.batch()
        tokens = int(batch[1].sum())
        ids, attention, labels = (t.pin_memory().to(GPU, non_blocking=True) for t in batch)
        self.update(lambda: self.run(input_ids=ids, attention_mask=attention, labels=labels).loss)
        return tokens


class Packed(Trained):
    """The same model on packed batches: stock modules, FlashAttention over offsets, one compiled graph."""

    def __init__(self, options: Options, prepared: Path):
        torch.manual_seed(0)
        self.prepare(PackedEncoder(options.model()), options)
        self.run = torch.compile(self.model.loss, dynamic=False, fullgraph=True)
        self.feed = packed_batches(options, prepared)

    def step(self) -> int:
        batch, _ = self.feed.next(MASK_FRACTION)
        inputs = (batch.ids_N, batch.cu_seqlens, batch.masked_index_M, batch.target_M, batch.max_seqlen)
        self.update(lambda: self.run(*inputs))
        return batch.tokens


def build(name: str, options: Options, prepared: Path):
    """One system by its name.

    Raises:
        UserError: no such system on a GPU, or our operators have no such implementation.
    """
    if name == "cramfast":
        return Cramfast(options, prepared)
    if name in ("transformers", "transformers compiled"):
        return PaddedTransformers(options, prepared, compiled=name.endswith("compiled"))
    if name == "packed FlashAttention compiled":
        return Packed(options, prepared)
    raise UserError(f"--systems {name}: not known on a GPU — see python -m bench.step --help")
