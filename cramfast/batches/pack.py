"""Packing and masking: which chunks share a microbatch, and which of its tokens are predicted. Pure functions.

A document is cut into chunks that fit a sequence with its [CLS] and [SEP]; a chunk is never cut again. Each epoch
shuffles or sorts the chunks and packs them best-fit into microbatches of N tokens. All of it depends on (seed, epoch)
alone.
"""

import numba
import numpy as np

from cramfast.runtime.counter_random import mix

SPECIALS_PER_SEQUENCE = 2  # [CLS] and [SEP]
POOL = 4096  # chunks the packer chooses from; all lengths up to 512 occur among them in ordinary text
TRIED_THIRDS = 64  # sizes tried as the first of three; bounds the search


def chunk_documents(offsets: np.ndarray, sequence_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut documents into chunks of sequence_len - 2 tokens and one of the rest; no token is lost.

    Full chunks rather than equal ones: they see the most context and fill a microbatch without a gap, and the rests,
    few and of every length, close the gaps there are. Equal chunks of long documents, all slightly shorter than a
    sequence, left 3.3 % of 4096 slots empty at length 512 on Wikipedia; full ones leave none.

    Args:
        offsets: (documents + 1,) int64, token offsets of the documents.

    Returns:
        (starts, lengths): int64 and int32, of every chunk, in the order of the text.
    """
    body = sequence_len - SPECIALS_PER_SEQUENCE
    sizes = np.diff(offsets)
    pieces = -(-sizes // body)
    document = np.repeat(np.arange(len(sizes)), pieces)
    rank = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = rank * body
    return offsets[:-1][document] + begin, np.minimum(sizes[document] - begin, body).astype(np.int32)


def plan_epoch(
    lengths: np.ndarray,
    batch_tokens: int,
    max_sequences: int,
    seed: int,
    epoch: int,
    shuffle: bool,
    scores: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Pack every chunk once.

    Args:
        lengths: (chunks,) int32, tokens without specials.
        batch_tokens: N, slots of a microbatch.
        max_sequences: S_max, most sequences in one.
        scores: (chunks,), the greatest first, equal ones in the order they have without; as nearly as the packing
            allows, which chooses among POOL neighbours.

    Returns:
        (members, batch_offsets): microbatch b holds chunks members[batch_offsets[b]:batch_offsets[b + 1]].
    """
    if shuffle:
        # PCG64DXSM: the field's common samplers are biased at hundreds of millions of items (ModernBERT, 2412.13663).
        # Its raw numbers are the same in every version of numpy, which Generator.permutation does not promise.
        order = np.argsort(np.random.PCG64DXSM((seed, epoch)).random_raw(len(lengths)), kind="stable")
    else:
        order = np.arange(len(lengths), dtype=np.int64)
    if scores is not None:
        order = order[np.argsort(-scores[order], kind="stable")]
    slots = lengths + np.int32(SPECIALS_PER_SEQUENCE)
    members, ends = _pack(order, slots, batch_tokens, max_sequences, POOL, int(slots.max(initial=1)))
    return members, np.concatenate([[0], ends])


@numba.njit(cache=True, nogil=True)
def sum_weights(ids, starts, lengths, weights, sums):
    """Add up the weights of the tokens of each chunk.

    Args:
        weights: (V,) int64: whole numbers, so that a sum has no rounding and sorts alike on every machine.
        sums: (chunks,) int64 to write.
    """
    for c in range(len(starts)):
        total = 0
        for i in range(starts[c], starts[c] + lengths[c]):
            total += weights[ids[i]]
        sums[c] = total


@numba.njit(cache=True, nogil=True)
def _pack(order, slots, batch_tokens, max_sequences, pool, longest):
    """Fill one microbatch at a time: the oldest chunk of the pool while any three would fit, then the one, two or
    three that fit exactly, else the longest that fits.

    The pool is a ring of `pool` places over the shuffled order; places of equal length are doubly linked, oldest
    first, so that both choices and the removal take constant time.
    """
    n = len(order)
    first = np.full(longest + 1, -1, np.int64)
    last = np.full(longest + 1, -1, np.int64)
    following = np.full(pool, -1, np.int64)
    previous = np.full(pool, -1, np.int64)
    present = np.zeros(pool, np.bool_)
    members = np.empty(n, np.int64)
    ends = np.empty(n, np.int64)
    head = tail = packed = batches = 0
    while packed < n:
        left, sequences = batch_tokens, 0
        while sequences < max_sequences:
            while head < tail and not present[head % pool]:
                head += 1
            while tail < n and tail - head < pool:  # refill
                place, size = tail % pool, slots[order[tail]]
                present[place] = True
                following[place], previous[place] = -1, last[size]
                if last[size] >= 0:
                    following[last[size] % pool] = tail
                else:
                    first[size] = tail
                last[size] = tail
                tail += 1
            if head == tail:
                break
            if left >= 3 * longest:
                chosen = head
            else:
                size = _best_size(first, last, left, longest)
                if size == 0:
                    break
                chosen = first[size]
            place, size = chosen % pool, slots[order[chosen]]
            before, after = previous[place], following[place]
            if before >= 0:
                following[before % pool] = after
            else:
                first[size] = after
            if after >= 0:
                previous[after % pool] = before
            else:
                last[size] = before
            present[place] = False
            members[packed] = order[chosen]
            packed += 1
            sequences += 1
            left -= size
        ends[batches] = packed
        batches += 1
    return members, ends[:batches]


@numba.njit(cache=True, nogil=True)
def _pair(first, last, left, longest):
    """The larger of two present sizes that add up to `left`, or 0."""
    for size in range(min(left - 1, longest), (left - 1) // 2, -1):
        other = left - size
        present = other <= longest and first[size] >= 0 and first[other] >= 0
        if present and (size != other or first[size] != last[size]):
            return size
    return 0


@numba.njit(cache=True, nogil=True)
def _best_size(first, last, left, longest):
    """The size that closes a gap of `left` slots best: alone, with one or two more, or the largest; 0: none fits."""
    if left <= longest and first[left] >= 0:
        return left
    largest = min(left, longest)
    while largest > 0 and first[largest] < 0:
        largest -= 1
    if largest == 0 or left > 3 * longest:
        return largest
    size = _pair(first, last, left, longest)
    if size > 0:
        return size
    tried, size = 0, largest
    while size > 0 and tried < TRIED_THIRDS:
        if first[size] >= 0 and first[size] != last[size]:
            tried += 1
            if _pair(first, last, left - size, longest) > 0:
                return size
        size -= 1
    return largest


@numba.njit(cache=True, nogil=True)
def fill(ids, starts, lengths, members, out, offsets, places, cls, sep):
    """Write [CLS] chunk [SEP] of every member and return the tokens used.

    Args:
        out: (N,) int32, zero ([PAD]) before.
        offsets: (S_max + 1,) int32; padded with the last offset.
        places: (N,) int64, the token's place in `ids`, or -1 for specials and padding.
    """
    used = 0
    places[:] = -1
    offsets[0] = 0
    for s in range(len(members)):
        start, length = starts[members[s]], lengths[members[s]]
        out[used] = cls
        for i in range(length):
            out[used + 1 + i] = ids[start + i]
            places[used + 1 + i] = start + i
        used += length + 2
        out[used - 1] = sep
        offsets[s + 1] = used
    offsets[len(members) + 1 :] = used
    return used


@numba.njit(cache=True, nogil=True)
def mask_keys(places, eligible, seed, epoch, keys, positions):
    """A random 64-bit key for each token that may be masked, from (seed, epoch, place); returns how many there are.

    Args:
        places: (N,) from `fill`.
        eligible: (N,) bool.
        keys, positions: (N,) uint64 and int64 to write.
    """
    # One is added to seed and place, because mix(0) is 0, the key that is always among the chosen.
    stream = mix((np.uint64(seed) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(epoch))
    count = 0
    for i in range(len(places)):
        if eligible[i]:
            keys[count] = mix(stream + (np.uint64(places[i]) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
            positions[count] = i
            count += 1
    return count


@numba.njit(cache=True, nogil=True)
def replace_masked(out, chosen, keys, mask, first_word, word_count, all_mask):
    """Hide the chosen tokens: 80 % [MASK], 10 % a random word, 10 % kept; or [MASK] always."""
    for i in range(len(chosen)):
        draw = mix(keys[i] + np.uint64(1))
        action = draw % np.uint64(10)
        if all_mask or action < 8:
            out[chosen[i]] = mask
        elif action == 8:
            out[chosen[i]] = first_word + np.int64((draw >> np.uint64(8)) % np.uint64(word_count - first_word))
