"""Two processes that settle their kernels together: python team_worker.py FOLDER; in "other" their cards differ."""

import sys
from dataclasses import asdict
from pathlib import Path

import made_up
import torch
from distributed_worker import ranks, wait
from fake_loader import small_config
from test_resolve import FakeTrial

from cramfast.kernels import dispatch
from cramfast.qualify import cache, resolve
from cramfast.runtime.distributed import Team


def settle(folder: Path, team: Team) -> None:
    made_up.install()
    made_up.CANDIDATES["attention"] = ("right",)
    resolve.Trial = FakeTrial
    if folder.name == "other" and team.rank == 1:
        cache.card = lambda device: {"card": "another", "capability": "sm_86", "driver": "1"}
    folder.mkdir(exist_ok=True)
    resolve.resolve(small_config(), folder, folder, None, team)
    found = asdict(dispatch.choose("attention", "cpu", torch.float32))["implementation"]
    (folder / f"{team.rank}.txt").write_text(f"{found} {len(FakeTrial.tried)}")


if __name__ == "__main__":
    where = Path(sys.argv[1])
    statuses = [wait(ranks(where, name, 2, settle)) for name in ("same", "other")]
    (where / "statuses.txt").write_text(str(statuses))
