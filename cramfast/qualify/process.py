"""The child of child.py as its parent sees it: started, asked, listened to with a limit, and ended for certain."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from cramfast.qualify import agreement, child

NAME = "cramfast.qualify.child"
START_S = 60  # until a fresh process has imported torch and answered
STAGE_S = 15  # for one stage of an implementation, a compilation among it
# For stages that have reason to take longer. That of PTX is shorter than the whole trial, as a hang may be there too.
LONG_S = dict.fromkeys((child.TRUTH, *agreement.PARTS), 60) | {child.LOAD: 30}
KILL_S = 5  # until a killed process is gone; one that waits for a lost device never is
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "TORCH_NCCL")

# Modules that register implementations of their own; the child imports them too.
MODULES: list[str] = []


class Ended(Exception):
    """The child is gone, or was ended.

    Attributes:
        stage: the last one it began: (task, implementation, what), or () before the first.
        why: for people, as "crashed (SIGABRT)".
        late: the parent's time was up, which says nothing against the implementation.
    """

    def __init__(self, stage: tuple[str, ...], why: str, late: bool = False):
        super().__init__(why)
        self.stage, self.why, self.late = stage, why, late


class Child:
    """One process, and no trace of it after the with block.

    Args:
        device: number of the GPU.
        end: time.monotonic() at which the parent's patience ends.
        stage_s, start_s: seconds that a stage which is not in LONG_S, and the first answer, may take.
    """

    def __init__(self, device: int, end: float, stage_s: float = STAGE_S, start_s: float = START_S):
        self.end, self.stage_s, self.start_s = end, stage_s, start_s
        limit = max(1, int(end - time.monotonic()) + 10)
        path = os.pathsep.join(filter(None, sys.path))
        kept = {k: v for k, v in os.environ.items() if not k.startswith(TORCHRUN)}
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115, closed by __exit__
        self.process = subprocess.Popen(
            [sys.executable, "-m", child.__name__, str(device), str(limit)],
            env=kept | {"PYTHONPATH": path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            start_new_session=True,
        )  # fmt: skip
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.process.stdout, selectors.EVENT_READ)
        self.pending, self.answered, self.killed = b"", False, False

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *exception) -> None:
        self.kill()
        self.selector.close()
        self.process.stdout.close()
        self.errors.close()

    def kill(self) -> None:
        """End the child and what it has started: the group that it alone leads, and that stays its own until it is
        waited for. One that does not go within KILL_S is left to itself."""
        if self.process.returncode is None and not self.killed:
            self.killed = True
            os.killpg(self.process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(KILL_S)
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass

    def ask(self, kind: str, **content: Any) -> Iterator[dict[str, Any]]:
        """The child's messages about a job, stages included, until it is done.

        Raises:
            Ended: it ended, or is ended here because it took too long.
        """
        stage: tuple[str, ...] = ()
        job = json.dumps({"kind": kind, "modules": MODULES, "content": content})
        try:
            self.process.stdin.write(job.encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self.ended(stage) from None
        while True:
            message = self.message(stage)
            stage = tuple(message.get("begin", stage))
            if message.get("done"):
                return
            yield message

    def message(self, stage: tuple[str, ...]) -> dict[str, Any]:
        """The next one."""
        patience = LONG_S.get(stage[2], self.stage_s) if stage else self.stage_s
        patience = patience if self.answered else self.start_s
        until = min(time.monotonic() + patience, self.end)
        while b"\n" not in self.pending:
            if not self.selector.select(max(0.0, until - time.monotonic())):
                self.kill()
                if late := time.monotonic() >= self.end:
                    raise Ended(stage, "the time was up", late)
                raise Ended(stage, f"hung: no answer within {patience:g} s")
            if not (read := os.read(self.process.stdout.fileno(), 1 << 16)):
                raise self.ended(stage)
            self.pending += read
        line, _, self.pending = self.pending.partition(b"\n")
        self.answered = True
        return json.loads(line)

    def ended(self, stage: tuple[str, ...]) -> Ended:
        """How it ended by itself."""
        until = time.monotonic() + KILL_S
        # Not waited for yet: until then nobody else gets its number, by which what it has started is ended too.
        while not os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
            if time.monotonic() > until:
                self.kill()
                return Ended(stage, "closed its output and did not end")
            time.sleep(0.01)
        self.kill()
        status = self.process.returncode
        if status < 0:
            name = signal.Signals(-status).name
            late = name == "SIGALRM"
            return Ended(stage, f"crashed ({name})", late)
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").strip().splitlines()
        return Ended(stage, f"ended ({said[-1]})" if said else f"ended with status {status}")
