"""A batch source without files, of cramfast.loader's interface: sentences of a tiny language in which each token fixes
the next, so that a model learns it in seconds."""

import numpy as np
import torch

from cramfast.loader import Batch

FIRST = 5  # ids below are the special tokens
MASK = 4
WORDS = 59


class FakeSource:
    def __init__(self, prepared, split, *, sequence_len, batch_tokens, seed, masking="bert", shuffle=True):
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
    def __init__(self, source, mask_fraction, position):
        self.source, self.mask_fraction, self.position = source, mask_fraction, position

    def __next__(self):
        epoch, index = self.position
        batch = self.source.batch(epoch, index, self.mask_fraction)
        self.position = (epoch, index + 1) if index + 1 < self.source.batches(epoch) else (epoch + 1, 0)
        return batch

    def close(self):
        pass
