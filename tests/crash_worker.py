"""Runs that are stopped by signals, each in a forked child: `python crash_worker.py FOLDER kill|signals LIVES
OPTIONS`, JSON out; OPTIONS is a JSON object of config keys.

Torch is imported once, on one thread, before any fork: a child would hang on the threads it does not inherit. So is
what the loop imports when it begins; else most lives would end in that import.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import fake_loader
import torch
import torch.utils.tensorboard

from cramfast.session import checkpoint

OPTIONS = json.loads(sys.argv[4])
BUDGET = "200steps"  # far more than 24 short lives reach, on a fast machine too


def child(folder: Path, interval: float, text: str = BUDGET) -> int:
    """Fork a process that resumes or starts the run; exit status 0 at its end, 3 after an orderly stop."""
    pid = os.fork()
    if pid:
        return pid
    try:
        checkpoint.sweep(folder)
        fake_loader.run(folder, text, checkpoint_interval=interval, batch_tokens=512, **OPTIONS)
        status = 0
    except AssertionError:  # train() came back before the budget was spent
        status = 3
    except KeyboardInterrupt:
        status = 4
    finally:
        sys.stderr.flush()
    os._exit(status)


def wait_for(condition, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.0005)
    return condition()


def unfinished(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints").glob(checkpoint.UNFINISHED + "*")}


def kills(folder: Path, lives: int) -> dict:
    """Kill at random moments, every other time inside a save; then let the run end."""
    chance, in_save, steps, early = random.Random(1), 0, [], 0
    (folder / "checkpoints").mkdir(parents=True)
    for life in range(lives):
        leftover = unfinished(folder)
        pid = child(folder, 1e-9)
        if life % 2:
            time.sleep(chance.uniform(0.0, 0.25))
        else:
            wait_for(lambda before=leftover: unfinished(folder) - before)
            time.sleep(chance.uniform(0.0, 0.003))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        early += not os.WIFSIGNALED(status)
        in_save += bool(unfinished(folder))
        newest = checkpoint.newest(folder)
        steps.append(int(newest.name[-8:]) if newest else 0)
    _, status = os.waitpid(child(folder, 1e9), 0)  # saves at its end alone, like the run it is compared with
    return {"in_save": in_save, "steps": steps, "early": early, "status": os.waitstatus_to_exitcode(status)}


def interrupted(folder: Path, number: int, times: int) -> int:
    """Send a signal once the third step is recorded; the exit status."""
    pid = child(folder, 1e9, "100000steps")
    log = folder / "metrics.jsonl"
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 4)
    for _ in range(times):
        os.kill(pid, number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(folder: Path, what: str, lives: int) -> dict:
    torch.set_num_threads(1)
    fake_loader.install(setattr)
    if what == "kill":
        _, status = os.waitpid(child(folder / "whole", 1e9), 0)
        return {"whole": os.waitstatus_to_exitcode(status)} | kills(folder / "killed", lives)
    return {name: interrupted(folder / name, getattr(signal, name), 1) for name in ("SIGINT", "SIGTERM", "SIGHUP")}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
