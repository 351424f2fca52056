"""The process in which implementations are tried: python -m cramfast.qualify.child, started by process.py.

A trap or a bad address leaves a CUDA context unusable, and a hang cannot be called back, so neither may happen in the
process that trains. It reads jobs, one line of JSON each, and writes lines of JSON: a stage before it begins, so that
an end without a word names it, and results. It ends with its input, with its parent, and by an alarm.
"""

import ctypes
import importlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch

import cramfast.kernels
from cramfast.config import TrainConfig, from_json
from cramfast.kernels import dispatch
from cramfast.qualify import agreement
from cramfast.qualify.candidates import Task
from cramfast.qualify.judge import REPEATS, Judge, evaluate
from cramfast.qualify.regime import Regime, Situation, situations
from cramfast.qualify.timing import compared
from cramfast.qualify.verdict import Verdict
from cramfast.runtime.stopwatch import Stopwatch

DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl
LOST_CONTEXT = 3  # exit status: after an error of the device nothing more can be tried here


@dataclass(frozen=True)
class Job:
    """One line to the child, in plain values.

    Attributes:
        kind: "operators" or "microbatch".
        modules: to import first; they may register implementations.
        operators: of the first kind: `tasks`, `regime`, `graph`, and what is known of them: `problems`, `seconds`.
        microbatch: of the second kind: `config`, `prepared`, `verdicts`, `one_by_one`.
    """

    kind: str
    modules: list[str]
    content: dict[str, Any]


class Speaker:
    """Writes messages, one line each, to where standard output went; what libraries print there goes to stderr."""

    def __init__(self, out: TextIO):
        self.out = out

    def __call__(self, **message: Any) -> None:
        self.out.write(json.dumps(message) + "\n")
        self.out.flush()

    def begin(self, *stage: str) -> None:
        self(begin=stage)


def try_operators(content: dict[str, Any], say: Speaker) -> None:
    """Judge and time every task that is not done yet."""
    regime = Regime(**content["regime"])
    for values in content["tasks"]:
        task = Task(values["op"], values["windowed"], values["floor"], tuple(values["tried"]))
        if task.name in content["seconds"]:
            continue
        cases = situations(task.op, regime, task.windowed)
        judge = Judge(task.op, cases, regime.device, content["graph"], content.get("repeats", REPEATS))
        known = dict(content["problems"].get(task.name, {}))
        for name in task.tried:
            if name in known:
                continue
            say.begin(task.name, name, "start")
            known[name] = judged(judge, task.name, name, say)
            say(judged=[task.name, name], problem=known[name])
            leave_if_lost(regime.device)
        right = [name for name in task.tried if known[name] == ""]
        say(timed=task.name, seconds=timed(task, right, cases[-1], regime.device, say) if right else {})


def judged(judge: Judge, task: str, implementation: str, say: Speaker) -> str:
    """The judge's word, or the error that kept it from one."""
    try:
        return judge.problem(implementation, lambda stage: say.begin(task, implementation, stage))
    except torch.OutOfMemoryError:
        return "needs more memory than there is"
    except Exception as error:  # whatever a candidate raises speaks against it
        text = str(error).strip().splitlines()
        return f"failed: {text[0] if text else type(error).__name__}"


def leave_if_lost(device: str) -> None:
    """End the process where an error has left the device's context unusable."""
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(error, file=sys.stderr)
            os._exit(LOST_CONTEXT)


def timed(task: Task, right: list[str], situation: Situation, device: str, say: Speaker) -> dict[str, float]:
    """Median seconds of a pass, of the floor and of what is right."""
    inputs = situation.make(0)

    def work(implementation: str) -> None:
        with dispatch.using(task.op, implementation, device=device):
            evaluate(task.op, cramfast.kernels, inputs, situation.cotangent)

    works: dict[str, Callable] = {name: partial(work, name) for name in (task.floor, *right)}
    return compared(works, Stopwatch(device), lambda name: say.begin(task.name, name, "timing"))


def try_microbatch(content: dict[str, Any], say: Speaker) -> None:
    """One microbatch by the floor and by the chosen set, from the run's own first weights."""
    config = from_json(TrainConfig, content["config"])
    verdicts = [Verdict(**values) for values in content["verdicts"]]
    prepared = content["prepared"] and Path(content["prepared"])
    say.begin("microbatch", "", "start")
    found = agreement.of_new_model(
        config, prepared, verdicts, content["one_by_one"], lambda name: say.begin("microbatch", name, "run")
    )
    say(departed=found)


KINDS = {"operators": try_operators, "microbatch": try_microbatch}


def main() -> None:
    """Answer jobs until there are no more; arguments: the device's number, seconds until the alarm."""
    device, limit = map(int, sys.argv[1:3])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process whatever it waits for
    signal.alarm(limit)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    say = Speaker(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
    if torch.cuda.is_available():
        torch.cuda.set_device(device)
    for line in sys.stdin:
        job = Job(**json.loads(line))
        for module in job.modules:
            importlib.import_module(module)
        KINDS[job.kind](job.content, say)
        say(done=True)


if __name__ == "__main__":
    main()
