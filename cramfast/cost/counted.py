"""What stock PyTorch's operators take on a GPU, the floor of every run there, counted call by call without one.

A microbatch and an update run on torch's "meta" tensors, which have shapes and no memory, by the implementations that a
card takes unasked (kernels.dispatch.on_card). Each operator call gives its tensors' bytes and, if it is a matrix
product or attention, its FLOPs. Views and allocations launch nothing and are left out; so is what a call costs to
launch, since a CUDA graph replays them. Nothing can be read from a meta tensor: a choice that waits for the device
fails here.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cramfast.batches.loader import Batch
from cramfast.config import ModelConfig
from cramfast.kernels import dispatch, stock
from cramfast.kernels.cases import CASES
from cramfast.model.encoder import Encoder

ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "_unsafe_view")
OVERWRITTEN = ("copy_", "fill_", "zero_")  # write their first argument and do not read it
FACTORS = {"mm": (0, 1), "addmm": (1, 2), "addmm_": (1, 2)}  # matrix product -> its two factors among the arguments
# Attention -> products of queries, keys and values in it, of the seven that the Case counts.
ATTENTION = {
    "_varlen_attn": 2,
    "_varlen_attn_backward": 5,
    "_efficient_attention_forward": 2,
    "_efficient_attention_backward": 5,
}
PADDED = "scaled_dot_product_attention"
_ATTENTION_FLOPS = next(case.flops for case in CASES if case.op == "attention")


@dataclass(frozen=True)
class Call:
    """One operator call: the bytes of the tensors that it takes and gives, and its FLOPs on tensor cores."""

    name: str
    bytes: int
    flops: int = 0


class Calls(TorchDispatchMode):
    """Every operator call that launches work while this is entered.

    Args:
        lengths: of the sequences that attention sees, in tokens; its FLOPs follow from them.
    """

    def __init__(self, lengths: Sequence[int] = ()):
        super().__init__()
        self.lengths, self.calls = tuple(lengths), list[Call]()

    @property
    def counts(self) -> Counter[str]:
        """Calls by name."""
        return Counter(call.name for call in self.calls)

    @property
    def bytes(self) -> int:
        """Of all calls."""
        return sum(call.bytes for call in self.calls)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        if not function.is_view and name not in ALLOCATIONS:
            moved = (*args[name in OVERWRITTEN :], *(result if isinstance(result, tuple) else (result,)))
            self.calls.append(Call(name, nbytes(*moved), self._flops(name, args)))
        return result

    def _flops(self, name: str, args: Sequence) -> int:
        if name in FACTORS:
            left, right = (args[index] for index in FACTORS[name])
            return 2 * left.numel() * right.shape[1]
        if name in ATTENTION:
            *_, heads, width = next(arg.shape for arg in args if isinstance(arg, torch.Tensor))
            window = next((arg[0] for arg in args if isinstance(arg, list) and arg and arg[0] >= 0), None)
            whole = _ATTENTION_FLOPS(self.lengths, heads, width, None, window=window)
            return whole * ATTENTION[name] // 7
        return 0


def nbytes(*values) -> int:
    """Of those that are tensors."""
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


class Fused(TorchFunctionMode):
    """Padded attention as one call each way, into `calls`: a meta tensor would take the form that keeps the scores,
    where a GPU takes one that does not."""

    def __init__(self, calls: Calls):
        super().__init__()
        self.calls = calls

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        return _FusedAttention.apply(self.calls.calls, *args, kwargs["attn_mask"])


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, calls, q_BHQK, k_BHWK, v_BHWK, bias_B1QW):
        ctx.calls, ctx.product = calls, 2 * q_BHQK.numel() * k_BHWK.shape[2]
        ctx.save_for_backward(q_BHQK, k_BHWK, v_BHWK, bias_B1QW)
        calls.append(Call(PADDED, nbytes(q_BHQK, k_BHWK, v_BHWK, bias_B1QW, q_BHQK), 2 * ctx.product))
        return torch.empty_like(q_BHQK)

    @staticmethod
    def backward(ctx, dout_BHQK):
        q_BHQK, k_BHWK, v_BHWK, bias_B1QW = ctx.saved_tensors
        moved = nbytes(q_BHQK, k_BHWK, v_BHWK) * 2 + nbytes(dout_BHQK, dout_BHQK, bias_B1QW)
        ctx.calls.append(Call(PADDED + "_backward", moved, 5 * ctx.product))
        return None, torch.empty_like(q_BHQK), torch.empty_like(k_BHWK), torch.empty_like(v_BHWK), None


def microbatch(
    model: ModelConfig, chip: str, dtype: torch.dtype, lengths: Sequence[int], longest: int, masked: int
) -> Calls:
    """Calls of one forward and backward pass on a card of architecture `chip`, as "sm_86".

    Args:
        lengths: of the packed sequences, in tokens.
        longest: length that no sequence exceeds.
        masked: tokens that are predicted.
    """
    with dispatch.on_card(chip), torch.device("meta"):
        encoder, batch = without_memory(model, dtype, lengths, longest, masked)
        with Calls(lengths) as calls, Fused(calls):
            encoder.loss(batch).backward()
    return calls


def without_memory(
    model: ModelConfig, dtype: torch.dtype, lengths: Sequence[int], longest: int, masked: int
) -> tuple[Encoder, Batch]:
    """A model with matrices of `dtype` and a batch for it, as microbatch() takes them, on the "meta" device."""
    tokens = sum(lengths)
    with torch.device("meta"):
        encoder = Encoder(model)
        for parameter in encoder.parameters():
            if parameter.dim() >= 2:
                parameter.data = parameter.data.to(dtype)
        return encoder, Batch(
            torch.empty(tokens, dtype=torch.int32), torch.empty(len(lengths) + 1, dtype=torch.int32),
            torch.empty(masked, dtype=torch.long), torch.empty(masked, dtype=torch.long), longest, tokens,
        )  # fmt: skip


def adamw(parameters: int, matrices: int, dtype: torch.dtype) -> Calls:
    """Calls of one update of so many parameters, of which `matrices` have a copy in half precision.

    Args:
        dtype: of that copy; float32 has none.
    """
    with torch.device("meta"):
        buffers = [torch.empty(parameters) for _ in range(4)]
        half = None if dtype == torch.float32 else torch.empty(matrices, dtype=dtype)
        segments = [torch.empty(1, dtype=torch.int64), torch.empty(1), torch.empty(1)]
        with Calls() as calls:
            stock.adamw(*buffers, half, *segments, torch.empty(5), beta1=0.9, beta2=0.98, eps=1e-8, max_norm=1.0)
    return calls


def implementations(chip: str, dtype: torch.dtype, windowed: bool = False) -> dict[str, str]:
    """Operator -> the implementation of it that those calls are."""
    with dispatch.on_card(chip):
        return {op: dispatch.floor(op, "cuda", dtype, windowed) for op in dispatch.OPERATORS}
