"""The largest microbatch that the memory holds."""

import gc
import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from cramfast.errors import UserError

Result = TypeVar("Result")
WHOLE_ROWS = 8  # tokens: a size is a multiple, but for those that divide the microbatch that was asked for
LOST = 1000  # an update may hold one token in so many less than was asked for, no more
MOST_TRIALS = 3  # between the size that fits and twice that


class OutOfMemoryTogether(torch.OutOfMemoryError):
    """The memory of at least one of several processes was too small, and all know it."""


def size_of_part(tokens: int, parts: int) -> int:
    """Tokens of a microbatch when one of `tokens` is split into so many equal ones; 0 where an update would then hold
    fewer tokens than was asked for, but for one in a thousand."""
    if tokens % parts == 0:
        return tokens // parts
    size = tokens // parts // WHOLE_ROWS * WHOLE_ROWS
    return size if LOST * (tokens - parts * size) <= tokens else 0


def smaller(tokens: int, failed: int, least: int) -> list[int]:
    """Numbers of parts beyond the one that failed, up to its double, whose size is `least` or more."""
    return [parts for parts in range(failed + 1, 2 * failed + 1) if size_of_part(tokens, parts) >= least]


def fitting(
    run: Callable[[int], Result],
    trial: Callable[[int], object],
    tokens: int,
    least: int,
    error: type[Exception] = torch.OutOfMemoryError,
) -> Result:
    """run(tokens); when that runs out of memory, run with the largest smaller size that fits, again and again.

    A microbatch is split into 2, 4, 8, ... parts until one fits, then the least number of parts between that and half
    of it is looked for, so that an update keeps its tokens.

    Args:
        run: starts from what is on disk, so that nothing of a failed attempt is needed.
        trial: the part of `run` that shows whether a size fits; changes nothing on disk.
        tokens: size of the microbatches in the first attempt.
        least: a smaller size makes no sense.
        error: what both raise when the memory is too small.

    Raises:
        UserError: the least size does not fit either.
    """
    parts = 1
    while True:
        done, result = attempt(run, size_of_part(tokens, parts), error)
        if done:
            return result
        parts = fewest_parts(trial, tokens, parts, least, error)
        size = size_of_part(tokens, parts)
        print(f"out of memory; going on from what is saved, in microbatches of {size} tokens", file=sys.stderr)


def fewest_parts(trial: Callable[[int], object], tokens: int, failed: int, least: int, error: type[Exception]) -> int:
    """The least number of parts that fits, after `failed` did not.

    Raises:
        UserError: no allowed size fits.
    """
    while choices := smaller(tokens, failed, least):
        fits = choices.pop()
        if not choices:
            return fits  # nothing lies between: whether it fits shows in the run itself
        if not attempt(trial, size_of_part(tokens, fits), error)[0]:
            failed = fits
            continue
        for _ in range(MOST_TRIALS):
            if not choices:
                break
            middle = choices[len(choices) // 2]
            if attempt(trial, size_of_part(tokens, middle), error)[0]:
                fits, choices = middle, [parts for parts in choices if parts < middle]
            else:
                choices = [parts for parts in choices if parts > middle]
        return fits
    raise UserError(
        f"out of memory with microbatches of {size_of_part(tokens, failed)} tokens, and fewer than {least} cannot be — "
        "free the GPU of other work, or use a smaller model or --sequence-len"
    )


def attempt(work: Callable[[int], Result], size: int, error: type[Exception]) -> tuple[bool, Result | None]:
    """(whether work(size) had memory enough, what it returned); nothing of a failed one is left in memory."""
    try:
        return True, work(size)
    except error:
        pass  # first leave the handler: its traceback keeps every tensor of the failed attempt alive
    gc.collect()
    torch.cuda.empty_cache()
    return False, None
