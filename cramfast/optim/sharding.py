"""Which process updates which entries of the flat buffers; how gradients get there, and weights back to all.

Every process holds all weights and a whole gradient buffer, and the optimizer's state of its own entries alone. The
gradient of each bucket is reduced to the bucket's owner as soon as the update's last backward pass has completed it
(together a reduce-scatter); after the update each owner broadcasts its weights (together an all-gather).
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from cramfast.optim.flat import FlatParameters
from cramfast.runtime.distributed import Team

BUCKET = 6_553_600  # entries at most, 25 MiB as in torch's DistributedDataParallel


@dataclass(frozen=True)
class Part:
    """A stretch of the flat buffers divided among the processes.

    Attributes:
        cuts: (world + 1,), ascending; process r owns the entries from cuts[r] on, up to cuts[r + 1].
        rank: whose `own` is.
    """

    cuts: tuple[int, ...]
    rank: int

    @property
    def own(self) -> slice:
        return slice(self.cuts[self.rank], self.cuts[self.rank + 1])

    @property
    def own_len(self) -> int:
        return self.own.stop - self.own.start


def divide(borders: Sequence[int], team: Team) -> Part:
    """The stretch from the first border to the last in equal shares, as near as cuts at borders alone allow."""
    begin, end = borders[0], borders[-1]
    shares = (begin + (end - begin) * rank // team.world for rank in range(team.world + 1))
    return Part(tuple(borders[bisect_left(borders, share)] for share in shares), team.rank)


@dataclass
class Bucket:
    """Consecutive entries of one owner; `unfinished` counts the parameters that the backward pass still works on."""

    begin: int
    end: int
    owner: int
    parameters: int = 0
    unfinished: int = field(default=0, init=False)


class Sharding:
    """The flat buffers among the processes; in a process alone, which owns all of them, nothing moves.

    Args:
        team: the processes.
        flat: parameters and gradients.
        parts: in order, without a gap, from the first entry to the last.
    """

    def __init__(self, team: Team, flat: FlatParameters, parts: list[Part]):
        self.team, self.flat, self.parts = team, flat, parts
        self.expecting, self.started = False, 0
        self.works: list[dist.Work] = []
        self.buckets: list[Bucket] = []
        self.buckets_of: dict[str, list[Bucket]] = {}
        if not team.alone:
            self.buckets = sorted(self.cut_buckets(), key=lambda each: (each.end > flat.hidden_end, -each.begin))
            for name, (begin, shape) in flat.places.items():
                overlaps = (b for b in self.buckets if b.begin < begin + shape.numel() and begin < b.end)
                self.buckets_of[name] = list(overlaps)
                for bucket in self.buckets_of[name]:
                    bucket.parameters += 1
            flat.gathered = self.finished

    def cut_buckets(self) -> Iterator[Bucket]:
        """Buckets never cross an owner's border or the end of the hidden matrices, which are complete first."""
        for part in self.parts:
            for owner, (begin, end) in enumerate(zip(part.cuts, part.cuts[1:], strict=False)):
                middle = min(max(begin, self.flat.hidden_end), end)
                for first, last in ((begin, middle), (middle, end)):
                    for place in range(first, last, BUCKET):
                        yield Bucket(place, min(place + BUCKET, last), owner)

    # Gradients

    def expect(self) -> None:
        """The next backward pass is the last of the update: what it completes is reduced at once."""
        self.expecting = True
        for bucket in self.buckets:
            bucket.unfinished = bucket.parameters

    def finished(self, name: str) -> None:
        """The gradient of this parameter is complete if the pass is the last. Buckets start in one order everywhere:
        hidden matrices from the last back, as a backward pass goes, then the rest."""
        if not self.expecting:
            return
        for bucket in self.buckets_of[name]:
            bucket.unfinished -= 1
        while self.started < len(self.buckets) and not self.buckets[self.started].unfinished:
            self.start_next()

    def start_next(self) -> None:
        bucket = self.buckets[self.started]
        self.started += 1
        with self.team.losses_named():
            gradient = self.flat.grad[bucket.begin : bucket.end]
            self.works.append(dist.reduce(gradient, dst=bucket.owner, async_op=True))

    def reduce(self) -> None:
        """Every owner has the sum of its entries' gradients; all processes call it once an update, whatever became of
        the update. The entries of others are left undefined."""
        while self.started < len(self.buckets):
            self.start_next()
        self.wait()
        self.expecting, self.started = False, 0

    def wait(self) -> None:
        """A host waits only where the tensors are on the CPU."""
        if self.works:
            with self.team.losses_named():
                for work in self.works:
                    self.team.wait(work, self.flat.grad.device)
            self.works = []

    # Weights

    def publish(self) -> None:
        """Give every process the weights of every owner that the model reads: half-precision matrices, vectors, and in
        float32 all of the master."""
        if self.team.alone:
            return
        flat = self.flat
        matrices_end = 0 if flat.half is None else flat.matrices_end
        for part in self.parts:
            for owner, (begin, end) in enumerate(zip(part.cuts, part.cuts[1:], strict=False)):
                middle = min(max(begin, matrices_end), end)
                if begin < middle:  # as bytes: not every backend knows bfloat16
                    self.broadcast(flat.half[begin:middle].view(torch.uint8), owner)
                if middle < end:
                    self.broadcast(flat.master[middle:end], owner)
        self.wait()

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        with self.team.losses_named():
            self.works.append(dist.broadcast(tensor, src=owner, async_op=True))

    # Own entries

    def own(self, buffer: Tensor) -> Tensor:
        """(own entries,) of a buffer laid out like the master, part by part; the buffer itself in a process alone."""
        return buffer if self.team.alone else torch.cat([buffer[part.own] for part in self.parts])

    def put(self, values: Tensor, buffer: Tensor) -> None:
        """The opposite of own()."""
        for part, values_of_part in zip(self.parts, self.split(values, self.parts), strict=True):
            buffer[part.own].copy_(values_of_part)

    def split(self, values: Tensor, parts: list[Part]) -> tuple[Tensor, ...]:
        """Own entries of several parts, part by part."""
        return values.split([part.own_len for part in parts])

    def pieces(self, values: Tensor, parts: list[Part]) -> Iterator[tuple[str, int, Tensor]]:
        """Own entries of `parts` by parameter: (name, place of the first within the parameter, 1-d view)."""
        for part, values_of_part in zip(parts, self.split(values, parts), strict=True):
            for name, (place, shape) in self.flat.places.items():
                begin, end = max(place, part.own.start), min(place + shape.numel(), part.own.stop)
                if begin < end:
                    yield name, begin - place, values_of_part[begin - part.own.start : end - part.own.start]

    def collect(self, values: Tensor, parts: list[Part]) -> Tensor:
        """All entries of `parts`, of which every process gives its own, on process 0's host; others get (0,).

        A process alone gets its values back, not a copy.
        """
        if self.team.alone:
            return values
        return torch.cat(
            [self.collect_part(own.cpu(), part) for own, part in zip(self.split(values, parts), parts, strict=True)]
        )

    def collect_part(self, own: Tensor, part: Part) -> Tensor:
        hosts, start = self.team.hosts, part.cuts[0]
        with self.team.losses_named():
            if part.rank > 0:
                if part.own_len:
                    dist.send(own, dst=0, group=hosts)
                return own[:0]
            whole = torch.empty(part.cuts[-1] - start)
            whole[: part.own_len] = own
            for owner, (begin, end) in enumerate(zip(part.cuts, part.cuts[1:], strict=False)):
                if owner > 0 and begin < end:
                    dist.recv(whole[begin - start : end - start], src=owner, group=hosts)
        return whole
