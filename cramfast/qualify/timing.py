"""How long what qualified takes beside the floor: in turn, so that all share the weather."""

import statistics
import time
from collections.abc import Callable

from cramfast.runtime.stopwatch import Stopwatch, Work

ROUNDS = 15
SECONDS = 0.7  # for one operator
HOPELESS = 5.0  # times slower than the best after one round: dropped


def compared(
    works: dict[str, Work],
    watch: Stopwatch,
    tell: Callable[[str], None],
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
) -> dict[str, float]:
    """Median seconds of each work; the hopeless have those of one round. `tell` is called before each one's first."""
    end = time.monotonic() + seconds
    times: dict[str, list[float]] = {}
    for name, work in works.items():
        tell(name)
        work()
        times[name] = [watch.once(work)]
    best = min(min(each) for each in times.values())
    running = {name: work for name, work in works.items() if times[name][0] <= HOPELESS * best}
    for _ in range(rounds - 1):
        if time.monotonic() > end:
            break
        for name, work in running.items():
            times[name].append(watch.once(work))
    return {name: statistics.median(each) for name, each in times.items()}
