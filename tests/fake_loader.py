"""A batch source without files, of cramfast.batches.loader's interface.

Sentences of a tiny language in which each token fixes the next, so that a model learns it in seconds.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from cramfast import train
from cramfast.batches import feed
from cramfast.batches.loader import Batch
from cramfast.config import ModelConfig, TrainConfig, to_json
from cramfast.runtime.distributed import ALONE, Team
from cramfast.session import checkpoint, runfolder
from cramfast.session.budget import Replay, parse_budget
from cramfast.session.metrics import MatmulPeak

FIRST = 5  # ids below are the special tokens
MASK = 4
WORDS = 59


class FakeSource:
    def __init__(
        self, prepared, split, *, sequence_len, batch_tokens, seed, masking="bert", shuffle=True, order="shuffled"
    ):
        self.len, self.tokens, self.seed = sequence_len, batch_tokens, seed + (split == "heldout") * 1000

    def batches(self, epoch):
        return 7

    def batch(self, epoch, index, mask_fraction):
        rng = np.random.default_rng((self.seed, epoch, index))
        lengths = []
        while self.tokens - sum(lengths) >= 4:
            lengths.append(min(int(rng.integers(4, self.len + 1)), self.tokens - sum(lengths)))
        rows = [FIRST + (rng.integers(WORDS) + 7 * np.arange(n)) % WORDS for n in lengths]
        ids = np.zeros(self.tokens, np.int32)
        used = sum(lengths)
        ids[:used] = np.concatenate(rows)
        offsets = np.full(self.tokens // 4 + 1, used, np.int32)
        offsets[: len(lengths) + 1] = np.cumsum([0, *lengths])
        masked = np.sort(rng.choice(used, round(mask_fraction * self.tokens), replace=False))
        target = ids[masked].astype(np.int64)
        ids[masked] = MASK
        tensors = (torch.from_numpy(a) for a in (ids, offsets, masked.astype(np.int64), target))
        return Batch(*tensors, max_seqlen=self.len, tokens=used)


class FakePrefetcher:
    def __init__(self, source, mask_fraction, position, rank=0, world=1):
        self.source, self.mask_fraction, self.position = source, mask_fraction, position
        self.rank, self.world = rank, world

    def __next__(self):
        epoch, index = self.position
        own = index % self.world == self.rank
        batch = self.source.batch(epoch, index, self.mask_fraction) if own else None
        self.position = (epoch, index + 1) if index + 1 < self.source.batches(epoch) else (epoch + 1, 0)
        return batch

    def close(self):
        pass


def small_config(**changes) -> TrainConfig:
    """2 layers of 64 on microbatches of 256 tokens; float32 on the CPU; saves and looks only at the end."""
    model = ModelConfig(vocab_size=64, layers=2, width=64, heads=2, feedforward=96, max_len=32)
    small = {"sequence_len": 16, "microbatch_tokens": 256, "batch_tokens": 1024, "heldout_tokens": 512, "lr": 3e-3}
    rare = {"eval_interval": 1e9, "checkpoint_interval": 1e9}
    return TrainConfig(**({"model": model, "device": "cpu", "dtype": "float32", **small, **rare} | changes))


def run(folder: Path, budget: str | Replay, team: Team = ALONE, **changes) -> Path:
    """Train in `folder` on the fake text, or go on there."""
    config = small_config(**changes)
    if team.rank == 0:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(to_json(config)))
    finished = train.train(config, folder, folder, parse_budget(budget) if isinstance(budget, str) else budget, team)
    assert finished
    return folder


def install(patch) -> None:
    """Put the fakes in place; `patch(module, name, value)` is monkeypatch.setattr or setattr."""
    patch(feed, "BatchSource", FakeSource)
    patch(feed, "Prefetcher", FakePrefetcher)
    peak = MatmulPeak(1e11, False)  # measuring takes half a second of every run
    patch(runfolder, "measure_matmul_peak", lambda dtype, device: peak)


def rows(folder: Path, key: str = "microbatches") -> list[dict]:
    """The rows of metrics.jsonl that have this key; by default the steps."""
    return [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if key in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The newest checkpoint's tensors, moments included, and the average of the weights as ema.NAME."""
    saved = checkpoint.newest(folder)
    average = load_file(saved / checkpoint.AVERAGE) if (saved / checkpoint.AVERAGE).exists() else {}
    tensors = load_file(saved / "model.safetensors") | load_file(saved / "optimizer.safetensors")
    return tensors | {f"ema.{name}": tensor for name, tensor in average.items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
