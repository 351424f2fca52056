"""Named ranges in a profile: data, forward, backward, optimizer, and every layer where that is asked for.

Without a marker nothing is marked, and a range costs two looks at an empty list.
"""

from contextlib import ContextDecorator
from typing import Protocol

import torch


class Marker(Protocol):
    """Where ranges go."""

    def push(self, name: str) -> None: ...

    def pop(self) -> None: ...


class Nvtx:
    """Ranges that nsys and ncu show."""

    def push(self, name: str) -> None:
        torch.cuda.nvtx.range_push(name)

    def pop(self) -> None:
        torch.cuda.nvtx.range_pop()


class Trace:
    """Ranges in the trace of torch.profiler."""

    def __init__(self):
        self.open: list[torch.profiler.record_function] = []

    def push(self, name: str) -> None:
        self.open.append(torch.profiler.record_function(name))
        self.open[-1].__enter__()

    def pop(self) -> None:
        self.open.pop().__exit__(None, None, None)


markers: list[Marker] = []


class Range(ContextDecorator):
    """What runs inside, or inside the decorated function, carries this name in a profile."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> "Range":
        for marker in markers:
            marker.push(self.name)
        return self

    def __exit__(self, *exception) -> None:
        for marker in reversed(markers):
            marker.pop()
