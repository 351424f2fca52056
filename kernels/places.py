"""Where the tokens of a packed batch belong: computed on the device, once a batch, for all layers.

Dimension letters: N tokens of all sequences end to end, S sequences, K head width; B blocks of Q queries see W keys.
"""

from functools import cached_property

import torch


class Places:
    """What attention derives from `cu_seqlens` alone. Nothing is computed before it is asked for, and nothing twice.

    Args:
        cu_seqlens: (S + 1,), int32, as varlen_attention takes them.
        tokens: N.
        max_seqlen: length in tokens that no sequence exceeds.
    """

    def __init__(self, cu_seqlens, tokens, max_seqlen):
        self.cu_seqlens, self.tokens, self.max_seqlen = cu_seqlens, tokens, max_seqlen
        self._rotary, self._bias = {}, {}

    @cached_property
    def row_N(self):
        """(N,) int32, each token's own row."""
        return torch.arange(self.tokens, dtype=torch.int32, device=self.cu_seqlens.device)

    @cached_property
    def own_N(self):
        """(N,) whether a row belongs to a sequence."""
        return self.row_N < self.cu_seqlens[-1]

    @cached_property
    def position_N(self):
        """(N,) int64, place of each token in its sequence; any below max_seqlen for rows of none."""
        sequence_N = torch.searchsorted(self.cu_seqlens, self.row_N, right=True, out_int32=True) - 1
        return (self.row_N - self.cu_seqlens[sequence_N]).clamp(max=max(self.max_seqlen - 1, 0)).long()

    def rotary(self, tables, dtype):
        """(cos, sin), each (N, K / 2), of every token's position, from (cos, sin) by position."""
        key = id(tables[0]), dtype
        if key not in self._rotary:
            # Beside them the tables themselves, so that no other tensor gets their id.
            self._rotary[key] = tables, tuple(table[self.position_N].to(dtype) for table in tables)
        return self._rotary[key][1]

    def blocks(self, window):
        """(queries a block, keys on either side of it that they can see) of padded attention, multiples of 16."""
        reach = max(min(self.max_seqlen, self.tokens) - 1, 0)
        reach = reach if window is None else min(window, reach)
        halo = -(-reach // 16) * 16
        return max(64, -(-halo // 64) * 64), halo

    def bias(self, window, dtype):
        """(B, 1, Q, W): 0 where a block's query may look at a key, -inf elsewhere.

        Rows of no sequence look at one another, so that no row is without a key: a softmax over nothing is NaN.
        """
        if (window, dtype) not in self._bias:
            block, halo = self.blocks(window)
            count = -(-self.tokens // block)
            device = self.cu_seqlens.device
            row = torch.arange(-halo, count * block + halo, dtype=torch.int32, device=device)
            sequence = torch.searchsorted(self.cu_seqlens, row, right=True, out_int32=True)
            queries_BQ = sequence[halo : halo + count * block].view(count, block)
            keys_BW = sequence.unfold(0, block + 2 * halo, block)
            hidden_BQW = queries_BQ[:, :, None] != keys_BW[:, None, :]
            if window is not None:
                key, query = torch.arange(block + 2 * halo, device=device), torch.arange(block, device=device) + halo
                hidden_BQW |= (query[:, None] - key[None, :]).abs() > window
            bias_BQW = torch.zeros(hidden_BQW.shape, dtype=dtype, device=device)
            self._bias[window, dtype] = bias_BQW.masked_fill_(hidden_BQW, float("-inf"))[:, None]
        return self._bias[window, dtype]
