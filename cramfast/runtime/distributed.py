"""Several processes that train one model, as torchrun starts them: who this one is, and what they tell each other.

Numbers that the hosts know go through gloo, so that no GPU is waited for; tensors go through NCCL on GPUs and gloo on
CPUs (sharding.py moves gradients and weights). A process alone tells nobody, and pays for nothing.
"""

import contextlib
import math
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from cramfast.errors import INTERRUPTED, UserError
from cramfast.runtime.interrupt import Interrupt

Result = TypeVar("Result")
CPU = torch.device("cpu")
WAIT = timedelta(days=7)  # for process 0, which prepares text; the end of a process is noticed at once all the same
PATIENCE_S = 25.0  # torchrun kills what is there 30 seconds after its SIGTERM


class Team:
    """A process alone: every exchange gives back what it was given.

    Attributes:
        rank, world: this process's number, and how many there are.
        run_dir: the run's folder once it is known, for messages.
    """

    rank, world = 0, 1
    run_dir: Path | None = None

    @property
    def alone(self) -> bool:
        return self.world == 1

    @property
    def threads(self) -> int:
        """CPU threads that are this process's share; 0 leaves the choice to torch."""
        return 0

    def use(self, device: str) -> None:
        """Take this process's own GPU, where the run is on GPUs.

        Raises:
            UserError: the machine has fewer than processes.
        """

    def connect(self, device: torch.device) -> None:
        """Exchange one number there, so that what the exchanges themselves take of the memory is taken."""

    def watch(self, interrupt: Interrupt) -> None:
        """Let exchanges know that a signal has asked to stop."""

    def first(self, work: Callable[[], Result]) -> Result:
        """What `work` gives in process 0, the only one that does it; its UserError or exit is everybody's."""
        return work()

    def added(self, *values: float) -> tuple[float, ...]:
        """Each host number summed over the processes, in its own type: a bool says whether it is True in any."""
        return values

    def of_first(self, value: float) -> float:
        """Process 0's host number."""
        return value

    def gathered(self, values: Tensor) -> Tensor:
        """(world, ...): every process's tensor; no host waits for a GPU."""
        return values[None]

    def total(self, values: Tensor) -> Tensor:
        """The sum over the processes, the same bits in each."""
        return values


ALONE = Team()


class Processes(Team):
    """One of several processes under torchrun; leave() its context with an error, and one of them alone says it.

    Attributes:
        local_rank, local_world: as rank and world, on this machine.
        hosts: the gloo group of the host numbers; its exchanges may overtake those of tensors.
        newest: gives the newest checkpoint in a run's folder, or None, for messages.
    """

    def __init__(self, newest: Callable[[Path], Path | None]):
        self.newest = newest
        store, self.rank, self.world = next(rendezvous("env://"))
        # torchrun's store outlives a restart, and with it the addresses of processes that are gone
        life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"cramfast/{life}/{self.world}", store)
        self.local_rank, self.local_world = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.world)
        self.interrupt = Interrupt()
        self.hosts = dist.new_group(backend="gloo", timeout=WAIT)

    @property
    def threads(self) -> int:
        return max(1, len(os.sched_getaffinity(0)) // self.local_world)

    def use(self, device: str) -> None:
        if device != "cuda":
            return
        if self.local_world > torch.cuda.device_count():
            raise UserError(
                f"{self.local_world} processes on a machine with {torch.cuda.device_count()} GPUs — use "
                f"torchrun --nproc-per-node {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(self.local_rank)

    def connect(self, device: torch.device) -> None:
        with self.losses_named():  # NCCL allocates at its first exchange, which must not be after a graph's capture
            self.wait(dist.all_reduce(torch.zeros(1, device=device), async_op=True), device)

    def first(self, work: Callable[[], Result]) -> Result:
        result = error = None
        if self.rank == 0:
            try:
                result = work()
            except (UserError, KeyboardInterrupt, SystemExit) as caught:
                error = caught
        told = pickle.dumps((result, error)) if self.rank == 0 else b""
        told = bytearray(told.ljust(int(self.of_first(len(told)))))
        with self.losses_named():
            self.wait(dist.broadcast(torch.frombuffer(told, dtype=torch.uint8), 0, group=self.hosts, async_op=True))
        result, error = pickle.loads(told)  # what a process of this run has just written
        if error is not None:
            raise error
        return result

    def added(self, *values: float) -> tuple[float, ...]:
        sums = self.host_values(*values).sum(0).tolist()
        return tuple(type(value)(total) for value, total in zip(values, sums, strict=True))

    def of_first(self, value: float) -> float:
        return self.host_values(value)[0].item()

    def host_values(self, *values: float) -> Tensor:
        """(world, len(values)) float64."""
        own = torch.tensor(values, dtype=torch.float64)
        every = torch.empty(self.world, len(values), dtype=torch.float64)
        with self.losses_named():
            self.wait(dist.all_gather(list(every), own, group=self.hosts, async_op=True))
        return every

    def gathered(self, values: Tensor) -> Tensor:
        every = values.new_empty(self.world, *values.shape)
        with self.losses_named():
            self.wait(dist.all_gather(list(every), values, async_op=True), values.device)
        return every

    def total(self, values: Tensor) -> Tensor:
        return self.gathered(values).sum(0)  # added up in the order of ranks everywhere

    def wait(self, work: dist.Work, device: torch.device = CPU) -> None:
        """Until an exchange is done; of one on GPUs, only the stream waits.

        A send to a process that was killed may never end, in gloo. torchrun then sends SIGTERM to the others, whose
        handlers run once a second here. An exchange that a stop leaves unanswered for PATIENCE_S is given up; in an
        orderly one all answer.

        Raises:
            RuntimeError: it failed, or is given up.
        """
        asked = math.inf
        while device.type == "cpu" and not work.is_completed():
            try:
                work.wait(timedelta(seconds=1))
            except RuntimeError:
                if work.is_completed():
                    break  # whether it failed, or was done as the second ended, the wait below says
                if self.interrupt.requested:
                    asked = min(asked, time.monotonic())
                if time.monotonic() - asked > PATIENCE_S:
                    raise RuntimeError("it does not answer") from None
        work.wait()

    def watch(self, interrupt: Interrupt) -> None:
        self.interrupt = interrupt

    @contextlib.contextmanager
    def losses_named(self) -> Iterator[None]:
        """Around every exchange: one that another process no longer answers is a UserError."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).rpartition("] ")[2].split(". ")[0].strip()
            raise UserError(
                f"another process of this run has ended ({reason}), so all do; {self.what_stays()}"
            ) from error

    def what_stays(self) -> str:
        """What the run's folder holds, and how to go on."""
        if self.run_dir and self.newest(self.run_dir):
            return f"the newest checkpoint in {self.run_dir} is intact — go on with --resume {self.run_dir}"
        if self.run_dir and (self.run_dir / "config.json").exists():  # by now the same command would find it taken
            return f"no checkpoint was written yet — begin again with --resume {self.run_dir}"
        return "training had not begun — give the same command again"

    def speaks_first(self) -> bool:
        """Whether no other process has asked this before."""
        try:
            return self.store.add("spoken", 1) == 1
        except RuntimeError:  # the process that kept count is gone
            return True

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """The first process with something to say is the one whose message shows; the others leave in silence."""
        if error is None:
            dist.destroy_process_group()
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, for another's end, must not cut the message off
        if isinstance(error, KeyboardInterrupt) and isinstance(error.__context__, UserError):
            error = error.__context__  # on the way here it has
        if isinstance(error, UserError | KeyboardInterrupt | torch.OutOfMemoryError):
            if not self.speaks_first():
                raise SystemExit(INTERRUPTED if isinstance(error, KeyboardInterrupt) else 2) from None
            if isinstance(error, torch.OutOfMemoryError):
                raise UserError(
                    f"process {self.rank} ran out of memory outside a microbatch — go on with --resume and "
                    "fewer processes on this machine, or start a smaller model"
                ) from None
            raise error


@contextlib.contextmanager
def team(newest: Callable[[Path], Path | None]) -> Iterator[Team]:
    """The processes that torchrun started this one among, or this one alone; only process 0 prints inside.

    `newest` is checkpoint.newest, whose module is built on this one.
    """
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield ALONE
        return
    with Processes(newest) as processes, silenced(processes.rank > 0):
        yield processes


@contextlib.contextmanager
def silenced(silent: bool) -> Iterator[None]:
    """Nothing that Python prints inside is seen."""
    if not silent:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield


def restarted() -> bool:
    """Whether torchrun has started this process in place of one that ended."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def may_restart() -> bool:
    """Whether torchrun will, when one ends."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
