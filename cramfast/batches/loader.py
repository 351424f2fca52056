"""Prepared text on disk -> static-shape microbatches; any of them can be rebuilt from nothing."""

import queue
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tokenizers import Tokenizer

from cramfast.batches import pack
from cramfast.errors import UserError
from cramfast.text.prepared import PreparedText
from cramfast.text.specials import CLS, FIRST_WORD, MASK, SEP

IGNORED = -100  # target of an unused row; cross-entropy's usual mark
FULL_ENOUGH = 0.94  # a microbatch fuller than this has exactly M masked tokens; only the last of an epoch is not


@dataclass(frozen=True)
class Batch:
    """One microbatch; the shapes never change within a run.

    Attributes:
        ids_N: (N,) int32, masked input; [PAD] after the last sequence, belonging to none.
        cu_seqlens: (S_max + 1,) int32, padded with the final offset: empty sequences.
        masked_index_M: (M,) int64, distinct: ascending positions to predict, then others where too few tokens qualify.
        target_M: (M,) int64, the tokens there; -100 in rows left over.
        max_seqlen: sequence_len, which no sequence exceeds.
        tokens: those that are not padding.
    """

    ids_N: torch.Tensor
    cu_seqlens: torch.Tensor
    masked_index_M: torch.Tensor
    target_M: torch.Tensor
    max_seqlen: int
    tokens: int


class BatchSource:
    """Microbatches of one split as a pure function of (seed, epoch, index, mask_fraction).

    Args:
        folder: a prepared folder.
        split: "train" or "heldout".
        sequence_len: longest sequence in tokens, [CLS] and [SEP] included.
        batch_tokens: N.
        masking: "bert" (80 % [MASK], 10 % random, 10 % kept) or "all_mask".
        shuffle: False keeps the order of the text.
        order: by what shuffled chunks are sorted then: "sentences", "." tokens of a chunk, most first (the paper's
            order); "likelihood", mean log-probability of its tokens by their share of the split, commonest first.
        max_sequences: S_max; None takes twice what the text needs on average.
    """

    def __init__(
        self,
        folder: Path,
        split: str = "train",
        *,
        sequence_len: int,
        batch_tokens: int,
        seed: int,
        masking: Literal["bert", "all_mask"] = "bert",
        shuffle: bool = True,
        order: Literal["shuffled", "sentences", "likelihood"] = "shuffled",
        max_sequences: int | None = None,
    ):
        text = PreparedText(folder, split)
        self.ids = text.ids
        self.word_count = text.manifest["word_count"]
        self.starts, self.lengths = pack.chunk_documents(np.asarray(text.offsets), sequence_len)
        if len(self.lengths) == 0:
            raise UserError(f"{folder}: the {split} split holds no text — prepare more")
        if batch_tokens < sequence_len:
            raise UserError(f"batch_tokens={batch_tokens} is less than sequence_len={sequence_len} — use more")
        mean = float(self.lengths.mean()) + pack.SPECIALS_PER_SEQUENCE
        self.max_sequences = max_sequences or min(batch_tokens // 2, int(2 * batch_tokens / mean) + 8)
        self.sequence_len, self.batch_tokens, self.seed = sequence_len, batch_tokens, seed
        self.masking, self.shuffle = masking, shuffle
        self.scores = None if order == "shuffled" else self._scores(folder, text, order)
        self._plans: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def _scores(self, folder: Path, text: PreparedText, order: str) -> np.ndarray:
        """What chunks are sorted by, (chunks,), the greatest first."""
        if order == "sentences":
            # Most tokenizers cut at every sign, but byte-level ones join some: ").", ".\n".
            vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
            weights = np.zeros(max(vocabulary.values()) + 1, np.int64)
            for token, index in vocabulary.items():
                weights[index] = token.count(".")
        else:
            counts = text.counts()
            weights = np.round(2**20 * np.log2(np.maximum(counts, 1) / len(self.ids))).astype(np.int64)
        sums = np.empty(len(self.lengths), np.int64)
        pack.sum_weights(self.ids, self.starts, self.lengths, weights, sums)
        return sums if order == "sentences" else sums / self.lengths

    def plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(members, batch_offsets) of an epoch; the last two are kept, in a dict never changed, as threads may call."""
        key = epoch if self.shuffle else 0
        plans = self._plans
        if key not in plans:
            made = pack.plan_epoch(
                self.lengths, self.batch_tokens, self.max_sequences, self.seed, key, self.shuffle, self.scores
            )
            self._plans = {k: v for k, v in plans.items() if k == key - 1} | {key: made}
            return made
        return plans[key]

    def batches(self, epoch: int) -> int:
        """Microbatches in this epoch; every chunk is in exactly one."""
        return len(self.plan(epoch)[1]) - 1

    def batch(self, epoch: int, index: int, mask_fraction: float) -> Batch:
        """Rebuild one microbatch; M = round(mask_fraction * N) of its tokens, one at least, are to be predicted.

        Every document is in exactly one microbatch of an epoch, so the last one of an epoch is partly padding; then
        only that share of its real tokens is predicted, and the rows left over are marked unused.

        Raises:
            IndexError: no such microbatch in this epoch.
        """
        members, offsets = self.plan(epoch)
        if not 0 <= index < len(offsets) - 1:
            raise IndexError(f"epoch {epoch} has {len(offsets) - 1} microbatches, not {index + 1}")
        N, M = self.batch_tokens, max(1, round(mask_fraction * self.batch_tokens))
        ids = np.zeros(N, np.int32)
        cu_seqlens = np.empty(self.max_sequences + 1, np.int32)
        places = np.empty(N, np.int64)
        chosen_chunks = members[offsets[index] : offsets[index + 1]]
        used = pack.fill(self.ids, self.starts, self.lengths, chosen_chunks, ids, cu_seqlens, places, CLS, SEP)
        # The last microbatch of an epoch may be half empty; masking M of its tokens would hide nearly all of them.
        wanted = M if used > FULL_ENOUGH * N else round(mask_fraction * int(used))
        masked, target = self._mask(ids, places, epoch, M, max(1, wanted))
        tensors = (torch.from_numpy(a) for a in (ids, cu_seqlens, masked, target))
        return Batch(*tensors, max_seqlen=self.sequence_len, tokens=int(used))

    def _mask(
        self, ids: np.ndarray, places: np.ndarray, epoch: int, M: int, wanted: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Choose exactly `wanted` ordinary words (fewer only where there are fewer), hide them in `ids`.

        Returns:
            (M,) positions and (M,) words there, filled up as `Batch` says.
        """
        # A word that the tokenizer could not split is [UNK]; predicting it would teach nothing.
        eligible = (places >= 0) & (ids >= FIRST_WORD)
        keys, positions = np.empty(len(ids), np.uint64), np.empty(len(ids), np.int64)
        count = pack.mask_keys(places, eligible, self.seed, epoch, keys, positions)
        keys, positions = keys[:count], positions[:count]
        if count > wanted:
            smallest = np.sort(np.argpartition(keys, wanted)[:wanted])
            keys, positions = keys[smallest], positions[smallest]
        target = np.full(M, IGNORED, np.int64)
        target[: len(positions)] = ids[positions]
        others = np.delete(np.arange(len(ids)), positions)[: M - len(positions)]
        masked = np.concatenate([positions, others])
        pack.replace_masked(ids, positions, keys, MASK, FIRST_WORD, self.word_count, self.masking == "all_mask")
        return masked, target


class LengthenedSource:
    """Microbatches of short sequences, then of long ones, each with epochs of their own.

    Long epochs are numbered from LONG on, so that a position (epoch, index) says by itself which they are of, and any
    microbatch is rebuilt from it as before.
    """

    LONG = 1 << 20  # more epochs than a run has

    def __init__(self, short: BatchSource, long: BatchSource):
        self.short, self.long = short, long

    def batches(self, epoch: int) -> int:
        """As BatchSource.batches."""
        return self.long.batches(epoch - self.LONG) if epoch >= self.LONG else self.short.batches(epoch)

    def batch(self, epoch: int, index: int, mask_fraction: float) -> Batch:
        """As BatchSource.batch."""
        if epoch >= self.LONG:
            return self.long.batch(epoch - self.LONG, index, mask_fraction)
        return self.short.batch(epoch, index, mask_fraction)

    def lengthened(self, position: tuple[int, int]) -> tuple[int, int]:
        """Where long sequences go on from a position: there, or at the start of their first epoch."""
        return max(position, (self.LONG, 0))


Source = BatchSource | LengthenedSource


class Prefetcher:
    """Iterates over microbatches without end, built ahead by one thread.

    Of several processes (`rank` of `world`) each builds the microbatches whose index is its rank modulo their number;
    for those of others `next` gives None.

    Attributes:
        position: (epoch, index) of the microbatch that `next` gives next.

    Raises, from `next`: whatever building the microbatch raised.
    """

    def __init__(
        self, source: Source, mask_fraction: float, position: tuple[int, int] = (0, 0), depth: int = 4,
        rank: int = 0, world: int = 1,
    ):  # fmt: skip
        self.position, self.rank, self.world = position, rank, world
        self._ready: queue.Queue = queue.Queue(maxsize=depth * world)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(source, mask_fraction, position), daemon=True)
        self._thread.start()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> Batch | None:
        if self._closed.is_set():
            raise StopIteration
        result, following = self._ready.get()
        if isinstance(result, BaseException):
            self.close()
            raise result
        self.position = following
        return result

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._closed.set()
        while self._thread.is_alive():  # it may be waiting for a free place
            try:
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.05)

    def _work(self, source: Source, mask_fraction: float, position: tuple[int, int]) -> None:
        epoch, index = position
        try:
            while not self._closed.is_set():
                if index >= source.batches(epoch):
                    epoch, index = epoch + 1, 0
                own = index % self.world == self.rank
                batch = source.batch(epoch, index, mask_fraction) if own else None
                index += 1
                following = (epoch, index) if index < source.batches(epoch) else (epoch + 1, 0)
                self._ready.put((batch, following))
        except BaseException as error:  # handed to the reader, which raises it
            self._ready.put((error, None))
            if not isinstance(error, Exception):
                raise
