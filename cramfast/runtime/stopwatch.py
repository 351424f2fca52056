"""Seconds that a piece of work takes: the wall clock on a CPU, events on a GPU."""

import math
import statistics
import time
from collections.abc import Callable

import torch

Work = Callable[[], object]
HEAD_START_S = 3e-3  # more than any peer needs to launch its kernels
COLD_BYTES = 512 << 20  # several times the largest L2


class Stopwatch:
    """Times work on "cpu" or "cuda".

    On a GPU every round first writes a buffer of 512 MiB often enough to keep the device busy for 3 ms. That leaves
    none of the inputs in L2, and the host launches the work meanwhile, so that events around it see the device's
    time alone, as in a replayed graph. Where the host was late all the same (work that waits for the device inside
    itself), `late` counts it.

    Attributes:
        late: rounds on a GPU in which the device had to wait for the host.
    """

    def __init__(self, device: str):
        self.device, self.late = device, 0
        if device == "cuda":
            self.cold = torch.empty(COLD_BYTES, dtype=torch.uint8, device=device)
            self.cold.zero_()
            write_s = statistics.median(self._events(self.cold.zero_) for _ in range(5))
            self.writes, self.late = math.ceil(HEAD_START_S / write_s), 0

    def seconds(self, work: Work, rounds: int) -> list[float]:
        """Seconds of each round, after one round to warm up."""
        work()
        return [self.once(work) for _ in range(rounds)]

    def once(self, work: Work) -> float:
        """Seconds of one round; waits for the device."""
        if self.device == "cpu":
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        for _ in range(self.writes):
            self.cold.zero_()
        return self._events(work)

    def _events(self, work: Work) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        self.late += start.query()  # passed already: the device was not busy until everything was launched
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def interleaved(watch: Stopwatch, works: dict[str, Work], rounds: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Every work once a round, in turn, so that all share the weather; (seconds by name, late rounds by name)."""
    times: dict[str, list[float]] = {name: [] for name in works}
    late = dict.fromkeys(works, 0)
    for work in works.values():
        work()
    for _ in range(rounds):
        for name, work in works.items():
            before = watch.late
            times[name].append(watch.once(work))
            late[name] += watch.late - before
    return times, late
