"""The systems that bench.step lets train in turn: their settings, and those of a CPU. gpu_systems.py holds the rest."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from cramfast.config import ModelConfig

SYSTEMS = {
    "cpu": ("cramfast", "transformers", "transformers compiled"),
    "cuda": ("cramfast", "transformers compiled", "packed FlashAttention compiled"),
}
SIZES = {  # on a GPU those of the base recipe
    "cpu": {"layers": 4, "width": 256, "heads": 4, "feedforward": 512, "vocab_size": 16384, "batch_sequences": 64},
    "cuda": {"batch_sequences": 384},
}
MASK_FRACTION = 0.3
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.01}
MAX_NORM = 0.5


@dataclass(frozen=True)
class Options:
    """Measure useful tokens a second, peak memory and time by phase of whole training steps.

    Where no size is given it is 4 layers of 256 on a CPU and the base recipe on a GPU.
    """

    data: tuple[str, ...] = ()
    """Text to train on: files, folders or globs; none: documentation text found on this machine."""
    documents: Literal["lines", "blocks"] = "lines"
    """What a document is: a line, or a block of lines."""
    sequence_len: int = 128
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""
    layers: int | None = None
    width: int | None = None
    heads: int | None = None
    feedforward: int | None = None
    vocab_size: int | None = None
    batch_sequences: int | None = None
    """Sequences in a padded batch: 64 on a CPU, 384 on a GPU; packed batches hold as many useful tokens."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of every system's matmuls; auto: what this device multiplies fastest."""
    kernels: str = "cpp"
    """Implementation of our operators on a GPU, as dispatch.override takes it."""
    systems: tuple[str, ...] = ()
    """Those to measure, ours first; none: all that the device has."""
    rounds: int = 5
    """Turns that each system gets."""
    seconds: float = 10.0
    """Least length of a turn."""
    results: Path | None = None
    """Append one JSON line for every system to this file."""

    def resolved(self) -> "Options":
        """With every value that was left to the device.

        Raises:
            UserError: a GPU was asked for and there is none.
        """
        from bench import machine
        from cramfast.recipes import base, choose_dtype

        device = machine.devices(self.device)[-1]
        sizes = SIZES[device]
        if device == "cuda":
            model = base(device).model
            names = ("layers", "width", "heads", "feedforward", "vocab_size")
            sizes = sizes | {name: getattr(model, name) for name in names}
        chosen = {name: size for name, size in sizes.items() if getattr(self, name) is None}
        dtype = choose_dtype(device) if self.dtype == "auto" else self.dtype
        return replace(self, device=device, dtype=dtype, systems=self.systems or SYSTEMS[device], **chosen)

    def model(self) -> ModelConfig:
        """The model that every system trains."""
        return ModelConfig(
            vocab_size=self.vocab_size,
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            feedforward=self.feedforward,
        )


class Sequences:
    """[CLS] ids [SEP] of every chunk of every document, as a stock data collator would see them."""

    def __init__(self, prepared: Path, sequence_len: int):
        from cramfast.text.prepared import PreparedText

        text = PreparedText(prepared, "train")
        body = sequence_len - 2
        self.items = []
        for begin, end in zip(text.offsets[:-1], text.offsets[1:], strict=True):
            for start in range(begin, end, body):
                ids = np.asarray(text.ids[start : min(end, start + body)])
                self.items.append(np.concatenate([[2], ids, [3]]).astype(np.int64))
        self.lengths = np.array([len(item) for item in self.items], dtype=np.float64)
        self.mean = float(self.lengths.mean())

    def packed_tokens(self, options: Options) -> int:
        """Useful tokens of a stock batch on average, in whole steps of 64: the size of a packed one."""
        return round(self.mean * options.batch_sequences / 64) * 64


class Cramfast:
    """Our step: packed microbatch of as many useful tokens as the stock batch has on average."""

    def __init__(self, options: Options, prepared: Path):
        import torch

        from cramfast.batches.loader import BatchSource
        from cramfast.model.encoder import Encoder
        from cramfast.optim.adamw import AdamW, FlatParameters
        from cramfast.runtime.allocator import keep_freed_memory

        keep_freed_memory()  # as cramfast.train does
        tokens = Sequences(prepared, options.sequence_len).packed_tokens(options)
        self.source = BatchSource(
            prepared, split="train", sequence_len=options.sequence_len, batch_tokens=tokens, seed=0
        )
        torch.manual_seed(0)
        self.model = Encoder(options.model())
        self.flat = FlatParameters(self.model, getattr(torch, options.dtype))
        self.optimizer = AdamW(
            self.flat,
            beta1=ADAMW["betas"][0],
            beta2=ADAMW["betas"][1],
            eps=ADAMW["eps"],
            weight_decay=ADAMW["weight_decay"],
            max_norm=MAX_NORM,
        )
        self.index = 0

    def step(self, phases: dict[str, float]) -> int:
        epoch, index = divmod(self.index, self.source.batches(0))
        start = time.perf_counter()
        batch = self.source.batch(epoch, min(index, self.source.batches(epoch) - 1), MASK_FRACTION)
        data = time.perf_counter()
        loss = self.model.loss(batch)
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        self.optimizer.step(ADAMW["lr"], loss.detach(), 1.0)
        end = time.perf_counter()
        self.index += 1
        _add(phases, data=data - start, forward=forward - data, backward=backward - forward, optimizer=end - backward)
        return batch.tokens


class Transformers:
    """The stock step: ModernBertForMaskedLM, padded batches in random order, autocast, clip, fused AdamW."""

    padded_length: int | None = None  # None: to the longest of the batch

    def __init__(self, options: Options, prepared: Path, compiled: bool):
        import torch
        from transformers import ModernBertConfig, ModernBertForMaskedLM

        self.torch = torch
        torch.manual_seed(0)
        config = ModernBertConfig(
            vocab_size=options.vocab_size,
            hidden_size=options.width,
            intermediate_size=options.feedforward,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            max_position_embeddings=options.sequence_len,
            global_attn_every_n_layers=1,
            pad_token_id=0,
            bos_token_id=2,
            cls_token_id=2,
            eos_token_id=3,
            sep_token_id=3,
            attn_implementation="sdpa",
            reference_compile=False,
        )
        self.model = ModernBertForMaskedLM(config).train()
        self.run = torch.compile(self.model, dynamic=True) if compiled else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, **ADAMW)
        self.vocab_size, self.dtype, self.batch_sequences = options.vocab_size, options.dtype, options.batch_sequences
        self.sequences = Sequences(prepared, options.sequence_len).items
        self.random = np.random.default_rng(0)
        self.order = np.empty(0, dtype=np.int64)

    def batch(self):
        torch = self.torch
        if len(self.order) < self.batch_sequences:
            self.order = self.random.permutation(len(self.sequences))
        chosen, self.order = self.order[: self.batch_sequences], self.order[self.batch_sequences :]
        rows = [self.sequences[i] for i in chosen]
        ids = np.zeros((len(rows), self.padded_length or max(map(len, rows))), dtype=np.int64)
        for row, items in zip(ids, rows, strict=True):
            row[: len(items)] = items
        ids = torch.from_numpy(ids)
        attention = (ids != 0).long()
        chosen = (torch.rand(ids.shape) < MASK_FRACTION) & (ids > 4)
        labels = torch.where(chosen, ids, -100)
        draw = torch.rand(ids.shape)
        ids = torch.where(chosen & (draw < 0.8), 4, ids)
        ids = torch.where(chosen & (draw >= 0.9), torch.randint(5, self.vocab_size, ids.shape), ids)
        return ids, attention, labels

    def step(self, phases: dict[str, float]) -> int:
        torch = self.torch
        start = time.perf_counter()
        ids, attention, labels = self.batch()
        data = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype == "bfloat16"):
            loss = self.run(input_ids=ids, attention_mask=attention, labels=labels).loss
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        end = time.perf_counter()
        _add(phases, data=data - start, forward=forward - data, backward=backward - forward, optimizer=end - backward)
        return int(attention.sum())


def _add(phases: dict[str, float], **seconds: float) -> None:
    for name, value in seconds.items():
        phases[name] = phases.get(name, 0.0) + value
