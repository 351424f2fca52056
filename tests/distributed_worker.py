"""Runs on several processes, forked from one that has imported torch: `python distributed_worker.py FOLDER`.

Every rank gets the environment that torchrun gives; what it prints goes to FOLDER/NAME.RANK.txt, the exit statuses of
each run to FOLDER/statuses.json. Tests look at the folders.
"""

import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import fake_loader
import torch
import torch.fx.experimental.symbolic_shapes  # what every rank would import otherwise
import torch.utils.tensorboard
from fake_loader import FakeSource

from cramfast import train
from cramfast.batches import feed
from cramfast.config import TrainConfig
from cramfast.errors import UserError, command
from cramfast.runtime import distributed
from cramfast.runtime.distributed import Team
from cramfast.session import checkpoint
from cramfast.session.budget import Budget, Progress

STEPS = "14steps"  # two epochs of seven microbatches and more
MAX_NORM = TrainConfig.max_norm
NUDGES = (-2, -1, 1, 2)
# bfloat16: the master is whole only when saved. Replaced tokens: a backward pass in another order than the buckets.
OPTIONS = {
    "adamw": {},
    "stable_adamw": {"optimizer": "stable_adamw", "ema_decay": 0.9},
    "muon": {"optimizer": "muon", "ema_decay": 0.9, "objective": "rtd"},
    "bfloat16": {"optimizer": "muon", "ema_decay": 0.9, "dtype": "bfloat16"},
}


class HalfWay(Budget):
    """The schedule of 14 steps, spent after 6."""

    def fraction(self, progress: Progress) -> float:
        return 1.0 if progress.step >= 6 else super().fraction(progress)


HALF = HalfWay("steps", 14)


class Failing(FakeSource):
    """Rank 1 finds a damaged file in the second epoch."""

    rank = 0

    def batch(self, epoch, index, mask_fraction):
        if self.rank == 1 and (epoch, index) == (1, 1):
            raise UserError("train.ids: damaged — prepare again")
        return super().batch(epoch, index, mask_fraction)


class Full(FakeSource):
    """On rank 1 a microbatch of 256 tokens does not fit, from microbatch 5 on."""

    rank = 0

    def batch(self, epoch, index, mask_fraction):
        if self.rank == 1 and self.tokens == 256 and index == 5:
            raise torch.OutOfMemoryError("no room")
        return super().batch(epoch, index, mask_fraction)


def nudged(folder: Path, team: Team) -> None:
    """bfloat16-1 again, by one process, its clipping off by one rounding of float32 and by two, up and down.

    Half precision makes of such a last bit, which the order of a sum decides too, what bfloat16 can show: products of
    other rounded matrices. How much that is depends on the machine's own matmuls.
    """
    for place, ulps in enumerate(NUDGES):
        options = OPTIONS["bfloat16"] | {"max_norm": MAX_NORM * (1 + ulps * 2.0**-23)}
        fake_loader.run(folder.with_name(f"bfloat16-nudged{place}"), STEPS, team, **options)


def failing(folder: Path, team: Team) -> None:
    Failing.rank, feed.BatchSource = team.rank, Failing
    fake_loader.run(folder, STEPS, team)


def full(folder: Path, team: Team) -> None:
    Full.rank, feed.BatchSource = team.rank, Full
    fake_loader.run(folder, STEPS, team)


def full_disk(folder: Path, team: Team) -> None:
    """The first process's disk takes no more than a few kilobytes a file; no checkpoint is due before."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write past the limit fails, as on a full disk
    if team.rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
    fake_loader.run(folder, "1000steps", team)


def endless(folder: Path, team: Team) -> None:
    """Until a signal; a checkpoint after every step."""
    config = fake_loader.small_config(checkpoint_interval=1e-9, **OPTIONS["muon"])
    if not train.train(config, folder, folder, Budget("steps", 10**6), team):
        sys.exit(130)


def trained(*runs: tuple[str, str, Budget | str]) -> Callable[[Path, Team], None]:
    """Runs one after the other: (name of the folder, option, budget) of each."""

    def work(folder: Path, team: Team) -> None:
        for name, option, budget in runs:
            fake_loader.run(folder.with_name(name), budget, team, **OPTIONS[option])

    return work


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(port: int) -> int:
    """Fork what keeps the processes' store, as torchrun's agent does; it outlives every one of them."""
    if pid := os.fork():
        return pid
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)  # noqa: F841
    while True:
        signal.pause()


def child(folder: Path, name: str, work: Callable[[Path, Team], None], environment: dict[str, str]) -> int:
    """Fork one rank, of which errors.command takes care as in a command."""
    if pid := os.fork():
        return pid
    os.environ.update(environment)
    output = os.open(folder / f"{name}.{environment['RANK']}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1), os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)

    def main() -> None:
        with distributed.team(checkpoint.newest) as team:
            team.run_dir = folder / name
            work(folder / name, team)

    status = 1
    try:
        command(main)
        status = 0
    except SystemExit as ended:
        status = ended.code
    except BaseException:  # said, whatever it is: a fork must not go on in the code of its parent
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


def ranks(folder: Path, name: str, world: int, work: Callable[[Path, Team], None]) -> list[int]:
    """Start `world` ranks of a run; their process ids."""
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "TORCHELASTIC_RUN_ID": "test"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port := free_port())}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    each = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    return [serve(port), *(child(folder, name, work, environment) for environment in each)]


def wait(pids: list[int]) -> list[int]:
    """Exit statuses of the ranks, in order. As torchrun does, send SIGTERM to all when one has failed."""
    statuses, left = {}, set(pids[1:])
    while left:
        pid, status = os.wait()
        left.discard(pid)
        statuses[pid] = os.waitstatus_to_exitcode(status)
        if statuses[pid] == -signal.SIGKILL:
            for other in left:
                os.kill(other, signal.SIGTERM)
    os.kill(pids[0], signal.SIGKILL)
    os.waitpid(pids[0], 0)
    return [statuses[pid] for pid in pids[1:]]


def signalled(folder: Path, name: str, world: int, rank: int, number: int) -> list[int]:
    """An endless run; once its third checkpoint is there, one rank gets a signal."""
    (folder / name).mkdir()
    pids = ranks(folder, name, world, endless)
    end = time.monotonic() + 60
    while not list((folder / name / "checkpoints").glob("step-0000000[3-9]")) and time.monotonic() < end:
        time.sleep(0.002)
    os.kill(pids[1 + rank], number)
    return wait(pids)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    fake_loader.install(setattr)
    whole = {world: [(f"{option}-{world}", option, STEPS) for option in OPTIONS] for world in (1, 4)}
    work = {
        1: trained(*whole[1], ("stable_adamw-1-2", "stable_adamw", HALF)),
        2: trained(
            ("adamw-2", "adamw", STEPS), ("adamw-2-4", "adamw", HALF), ("stable_adamw-1-2", "stable_adamw", STEPS)
        ),
        4: trained(
            *whole[4], ("adamw-2-4", "adamw", STEPS), ("muon-4-1", "muon", HALF),
            ("bfloat16-4-4", "bfloat16", HALF), ("bfloat16-4-4", "bfloat16", STEPS),
        ),
    }  # fmt: skip
    statuses = {f"trained-{world}": wait(ranks(folder, f"trained-{world}", world, work[world])) for world in work}
    statuses["nudged"] = wait(ranks(folder, "nudged", 1, nudged))
    statuses["failing"] = wait(ranks(folder, "failing", 4, failing))
    statuses["full"] = wait(ranks(folder, "full", 2, full))
    statuses["full_disk"] = wait(ranks(folder, "full_disk", 2, full_disk))
    statuses["killed"] = signalled(folder, "killed", 4, 2, signal.SIGKILL)
    statuses["stopped"] = signalled(folder, "stopped", 2, 1, signal.SIGTERM)
    (folder / "statuses.json").write_text(json.dumps(statuses))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
