"""Implementations of attention that are wrong in one way each, and a CPU that qualification takes for a card.

The child that tries them imports this module too (process.MODULES), and is changed as the parent is.
"""

import os
import sys
import time

import fake_loader
import torch

from cramfast.kernels import attention, dispatch, reference
from cramfast.qualify import process, resolve
from cramfast.session import kernelchoice

LENGTH = 129  # of the sequence that one of them gets wrong
SLOW_S = 0.3


class Spoilt(torch.autograd.Function):
    """The identity, with a gradient that is wrong in one row."""

    @staticmethod
    def forward(ctx, qkv, row):
        ctx.row = row
        return qkv.clone()

    @staticmethod
    def backward(ctx, dqkv):
        dqkv = dqkv.clone()
        dqkv[ctx.row] *= 1.2
        return dqkv, None


def one_row(qkv, cu_seqlens, *rest):
    at = (cu_seqlens.diff() == LENGTH).nonzero()
    qkv = Spoilt.apply(qkv, int(cu_seqlens[at[0, 0]]) + 3) if len(at) else qkv
    return reference.varlen_attention(qkv, cu_seqlens, *rest)


def aborts(*arguments):
    os.abort()


def hangs(*arguments):
    time.sleep(1000)


def raises(*arguments):
    raise RuntimeError("no such luck\nand more")


def leaves_nan(qkv, *rest):
    out = torch.empty(len(qkv), *qkv.shape[2:], dtype=qkv.dtype)
    written = reference.varlen_attention(qkv, *rest)
    return torch.cat([written[:-1], out[-1:]])


def outside(qkv, *rest):
    out = torch.empty(len(qkv), *qkv.shape[2:], dtype=qkv.dtype)
    room = out.untyped_storage().nbytes() // out.element_size()
    if (end := out.storage_offset() + out.numel()) < room:  # in guarded memory alone
        out.as_strided((1,), (1,), end).zero_()
    return reference.varlen_attention(qkv, *rest) + 0 * out.fill_(0.0)


def unsteady(qkv, *rest):
    noise = torch.randint(2, (), generator=torch.Generator().manual_seed(time.perf_counter_ns())) * 1e-7
    return reference.varlen_attention(qkv, *rest) * (1 + noise)


def into_input(qkv, cu_seqlens, *rest):
    out = reference.varlen_attention(qkv, cu_seqlens, *rest)
    qkv.data[0] += 1.0
    return out


remembered = {}


def remembers(qkv, cu_seqlens, *rest):
    """Keeps the offsets that it first saw of a shape, as a kernel might that works them out on the host."""
    kept = remembered.setdefault((tuple(qkv.shape), cu_seqlens.data_ptr()), cu_seqlens.clone())
    return reference.varlen_attention(qkv, kept, *rest)


def slow(*arguments):
    time.sleep(SLOW_S)
    return reference.varlen_attention(*arguments)


WHOLE = 256  # rows of small_config's microbatch, which no situation has


def departs_whole(qkv, *rest):
    return reference.varlen_attention(qkv, *rest) * (1.5 if len(qkv) == WHOLE else 1.0)


def aborts_whole(qkv, *rest):
    return aborts() if len(qkv) == WHOLE else reference.varlen_attention(qkv, *rest)


def right(qkv, cu_seqlens, max_seqlen, rotary=None, window=None, places=None):
    """The compiled kernel: right, and many times as fast as the loop."""
    cos, sin = rotary or (None, None)
    return attention._Attention.apply(qkv, cu_seqlens, max_seqlen, cos, sin, -1 if window is None else window)


MADE_UP = {
    each.__name__: each
    for each in (
        aborts, hangs, one_row, leaves_nan, outside, unsteady, into_input, remembers, raises, slow, right,
    )
}  # fmt: skip
settled = {}


def install(patch=setattr) -> None:
    """Register the made-up ones, and let dispatch treat the CPU as it treats a GPU: asked for, settled, floor."""
    made_up = {**MADE_UP, "departs_whole": departs_whole, "aborts_whole": aborts_whole}
    table = {name: dispatch.Implementation(lambda target: "", each) for name, each in made_up.items()}
    patch(dispatch, "IMPLEMENTATIONS", {**dispatch.IMPLEMENTATIONS})
    dispatch.IMPLEMENTATIONS["attention"] = {**dispatch.IMPLEMENTATIONS["attention"], **table}
    settle, unsettle, choose = dispatch.settle, dispatch.unsettle, dispatch.choose
    settled.clear()

    def as_settled(op, device, dtype, implementation, reason, windowed=False):
        settled[op, dtype, windowed] = implementation, reason
        settle(op, device, dtype, implementation, reason, windowed)

    def as_unsettled():
        settled.clear()
        unsettle()

    def chosen(op, device, dtype, windowed=False):
        choice = choose(op, device, dtype, windowed)
        if choice.reason == "asked for" or device != "cpu":
            return choice
        stock = "reference", "the floor"
        return dispatch.Choice(op, device, choice.dtype, *settled.get((op, dtype, windowed), stock))

    patch(dispatch, "settle", as_settled)
    patch(dispatch, "unsettle", as_unsettled)
    patch(dispatch, "choose", chosen)
    patch(dispatch, "floor", lambda op, device, dtype, windowed=False: "reference")
    patch(dispatch, "candidates", lambda op, *where: list(CANDIDATES.get(op, ())))
    patch(resolve, "needed", lambda config: not kernelchoice.stock_alone(config.kernels))
    patch(process, "MODULES", [__name__])
    patch(dispatch, "_picked", {})


# What the tests let be tried, through the environment, which the child inherits.
CANDIDATES = {"attention": tuple(filter(None, os.environ.get("MADE_UP", "right").split(",")))}

if getattr(sys.modules["__main__"], "__spec__", None) and sys.modules["__main__"].__spec__.name == process.NAME:
    install()
    fake_loader.install(setattr)
