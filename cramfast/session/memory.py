"""The largest of a microbatch, its half, its quarter, ... that the memory holds."""

import gc
import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from cramfast.errors import UserError

Result = TypeVar("Result")


class OutOfMemoryTogether(torch.OutOfMemoryError):
    """The memory of at least one of several processes was too small, and all know it."""


def halving(
    run: Callable[[int], Result], tokens: int, least: int, error: type[Exception] = torch.OutOfMemoryError
) -> Result:
    """run(tokens); when that runs out of memory, run with half of it, again and again.

    Args:
        run: starts from what is on disk, so that nothing of a failed attempt is needed.
        tokens: size of the microbatches in the first attempt.
        least: a smaller size makes no sense.
        error: what `run` raises when the memory is too small.

    Raises:
        UserError: the least size does not fit either.
    """
    while True:
        try:
            return run(tokens)
        except error:
            pass  # first leave the handler: its traceback keeps every tensor of the failed attempt alive
        if tokens // 2 < least:
            raise UserError(
                f"out of memory with microbatches of {tokens} tokens, and fewer than {least} cannot be — "
                "free the GPU of other work, or use a smaller model or --sequence-len"
            )
        tokens //= 2
        print(f"out of memory; going on from what is saved, in microbatches of {tokens} tokens", file=sys.stderr)
        gc.collect()
        torch.cuda.empty_cache()
