"""Uploads on a simulated GPU whose streams run as late and in as bad an order as the events allow."""

import contextlib
import random
from collections import deque

import pytest
import torch
from fake_loader import small_config

from cramfast.batches import feed
from cramfast.batches.feed import Upload
from cramfast.batches.loader import Batch

plain_copy = torch.Tensor.copy_


class Machine:
    """What torch.cuda offers Upload. Work waits in its stream until the host has to wait or `drain` is called; then
    streams take turns by chance, or `starved` runs only when nothing else can."""

    def __init__(self, seed: int, starved: str | None = None, ignored: str | None = None):
        self.chance, self.starved, self.ignored = random.Random(seed), starved, ignored
        self.streams: dict[str, Stream] = {"compute": Stream(self, "compute")}
        self.current = self.streams["compute"]

    def Stream(self):
        return self.streams.setdefault("copy", Stream(self, "copy"))

    def Event(self):
        return Event(self)

    def current_stream(self):
        return self.current

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def advance(self) -> bool:
        """Run one piece of work; False when none can run."""
        ready = [s for s in self.streams.values() if s.work and s.work[0][0]()]
        preferred = [s for s in ready if s.name != self.starved] or ready
        if not preferred:
            return False
        self.chance.choice(preferred).work.popleft()[1]()
        return True

    def drain(self) -> None:
        while self.advance():
            pass
        assert not any(s.work for s in self.streams.values()), "a stream waits for ever"


class Stream:
    def __init__(self, machine: Machine, name: str):
        self.machine, self.name, self.work = machine, name, deque()

    def enqueue(self, run, ready=lambda: True) -> None:
        self.work.append((ready, run))

    def wait_event(self, event) -> None:
        if event.recorded and self.machine.ignored != f"{self.name} waits":
            mark = event.recorded
            self.enqueue(lambda: None, ready=lambda: mark["done"])

    def wait_stream(self, other) -> None:
        event = Event(self.machine)
        event.record(other)
        self.wait_event(event)


class Event:
    def __init__(self, machine: Machine):
        self.machine, self.recorded = machine, None

    def record(self, stream: Stream) -> None:
        mark = self.recorded = {"done": False}
        stream.enqueue(lambda: mark.update(done=True))

    def synchronize(self) -> None:
        while self.recorded and not self.recorded["done"] and self.machine.ignored != "host waits":
            assert self.machine.advance()


def batch(number: int, masked: int = 4) -> Batch:
    ids = torch.full((16,), number, dtype=torch.int32)
    places = torch.full((masked,), number)
    return Batch(ids, torch.full((5,), number, dtype=torch.int32), places, places + 1, max_seqlen=8, tokens=16)


def upload_and_compute(monkeypatch, machine: Machine, batches: list[Batch]) -> list[tuple]:
    """What a computation, enqueued behind each upload, finds in the batch by the time it runs."""

    def copy(self, source, non_blocking=False):
        if non_blocking:
            machine.current.enqueue(lambda: plain_copy(self, source))
            return self
        return plain_copy(self, source)

    monkeypatch.setattr(torch, "get_device_module", lambda device: machine)
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    upload, found = Upload(torch.device("cpu")), []

    def compute(given: Batch) -> None:
        found.append((given.ids_N.unique().tolist(), len(given.target_M), given.target_M.unique().tolist()))

    for one in batches:
        given = upload(one)
        machine.current_stream().enqueue(lambda given=given: compute(given))
    machine.drain()
    return found


BATCHES = [batch(number, masked=4 if number < 7 else 3) for number in range(12)]
EXPECTED = [([number], 4 if number < 7 else 3, [number + 1]) for number in range(12)]


@pytest.mark.parametrize("starved", [None, "compute", "copy"])
@pytest.mark.parametrize("seed", range(5))
def test_each_computation_sees_its_own_batch(monkeypatch, seed, starved):
    assert upload_and_compute(monkeypatch, Machine(seed, starved), BATCHES) == EXPECTED


@pytest.mark.parametrize(
    ("ignored", "starved"), [("compute waits", "copy"), ("copy waits", "compute"), ("host waits", "copy")]
)
def test_none_of_the_three_waits_can_be_left_out(monkeypatch, ignored, starved):
    """The simulation is strict enough to miss each of them."""
    assert upload_and_compute(monkeypatch, Machine(0, starved, ignored), BATCHES) != EXPECTED


def test_the_host_runs_at_most_four_batches_ahead(monkeypatch):
    """That bound is what keeps the wall clock of a budget honest between two log points."""
    machine, lead = Machine(0, starved="compute"), []
    monkeypatch.setattr(torch, "get_device_module", lambda device: machine)
    upload, done = Upload(torch.device("cpu")), []
    for number in range(12):
        upload(batch(number))
        lead.append(number - len(done))
        machine.current_stream().enqueue(lambda number=number: done.append(number))
    assert max(lead) == 3 and lead[-4:] == [3] * 4


def test_the_shapes_of_torch_cpu_serve_as_well():
    """The same code without streams: what a feed on a machine without GPU would do."""
    upload = Upload(torch.device("cpu"))
    for number in range(5):
        given = upload(batch(number))
        assert given.ids_N.unique().tolist() == [number] and given.tokens == 16 and given.max_seqlen == 8


def test_a_feed_on_the_cpu_copies_nothing(monkeypatch, fake_text):
    source = feed.BatchSource(None, "train", sequence_len=16, batch_tokens=64, seed=0)
    made = source.batch(0, 0, 0.25)
    monkeypatch.setattr(source, "batch", lambda *position: made)
    with feed.Feed(source, small_config().model, torch.device("cpu"), (0, 0)) as feeding:
        assert feeding.next(0.25)[0] is made
