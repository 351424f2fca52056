"""The process in which implementations are tried: python -m cramfast.qualify.child, started by process.py.

A trap or a bad address leaves a CUDA context unusable, and a hang cannot be called back, so neither may happen in the
process that trains. It reads jobs, one line of JSON each, and writes lines of JSON: a stage before it begins, so that
an end without a word names it, and results. It ends with its input, with its parent, and by an alarm.
"""

import ctypes
import importlib
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch

import cramfast.kernels
from cramfast.config import TrainConfig, from_json
from cramfast.kernels import cuda_build, dispatch, extension
from cramfast.kernels.linear import allow_half_accumulation
from cramfast.qualify import agreement
from cramfast.qualify.candidates import Task
from cramfast.qualify.judge import REPEATS, CaptureError, Judge, evaluate
from cramfast.qualify.regime import Regime, Situation, situations
from cramfast.qualify.timing import compared
from cramfast.qualify.verdict import Verdict
from cramfast.runtime.stopwatch import Stopwatch
from cramfast.session import kernelchoice

DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl
LOST_CONTEXT = 3  # exit status: after an error of the device nothing more can be tried here
TRUTH, LOAD, TIMING = "truth", "load from PTX", "timing"  # stages besides those of judge.py and agreement.py


@dataclass(frozen=True)
class Job:
    """One line to the child, in plain values.

    Attributes:
        kind: "operators" or "microbatch".
        modules: to import first; they may register implementations.
        content: `device`, `kernels` and `half_accumulation` of the run; of the first kind `tasks`, `regime`, `repeats`,
            what is `known` of their implementations, which tasks are `done`, and `until`, on time.monotonic(), which
            all processes share; of the second `config`, `prepared`, `verdicts`, `one_by_one`.
    """

    kind: str
    modules: list[str]
    content: dict[str, Any]


class Late(Exception):
    """The time for this job is up."""


class Speaker:
    """Writes messages, one line each, to where standard output went; what libraries print there goes to stderr.

    Attributes:
        until: time.monotonic() after which no stage begins.
    """

    def __init__(self, out: TextIO):
        self.out, self.until = out, math.inf

    def __call__(self, **message: Any) -> None:
        self.out.write(json.dumps(message) + "\n")
        self.out.flush()

    def begin(self, *stage: str) -> None:
        """Name the stage (task, implementation, what) that comes now.

        Raises:
            Late: none may.
        """
        if time.monotonic() > self.until:
            raise Late
        self(begin=stage)


@dataclass(frozen=True)
class Word:
    """What is said of an implementation.

    Attributes:
        problem: "" when it is right.
        judged: the problem is its own; else it was not tried, because others may hold the memory that it needs.
        lost: nothing more can be tried in this process.
    """

    problem: str
    judged: bool = True
    lost: bool = False


def try_operators(content: dict[str, Any], say: Speaker) -> None:
    """Judge and time every task that is not done yet; where the time is up, leave the rest and keep this process for
    what comes then."""
    regime = Regime(**content["regime"])
    say.until = content["until"]
    try:
        for values in content["tasks"]:
            task = Task(values["op"], values["windowed"], values["floor"], tuple(values["tried"]))
            if task.name not in content["done"]:
                known = dict(content["known"].get(task.name, {}))
                try_task(task, regime, known, content.get("repeats", REPEATS), say)
    except Late:
        say(late=True)
    finally:
        say.until = math.inf


def try_task(task: Task, regime: Regime, known: dict[str, str], repeats: int, say: Speaker) -> None:
    """Judge what is not `known` (implementation -> problem) and time what is right."""
    cases = situations(task.op, regime, task.windowed)
    judge = Judge(task.op, cases, regime.device, regime.graph, repeats, regime.half_accumulation)
    left = [name for name in task.tried if name not in known]
    if left:
        say.begin(task.name, "", TRUTH)
        if why := word(judge.prepare).problem:
            say(unjudged=task.name, problem=why)
            leave_if_lost(regime.device)
            return
    for name in left:
        found = judged(judge, task.name, name, say)
        known[name] = found.problem
        say(judged=[task.name, name], problem=found.problem, final=found.judged)
        leave_if_lost(regime.device, found.lost)
    right = [name for name in task.tried if known[name] == ""]
    say(timed=task.name, seconds=timed(task, right, cases[-1], regime.device, say) if right else {})


def judged(judge: Judge, task: str, implementation: str, say: Speaker) -> Word:
    """The judge's word, or the error that kept it from one."""

    def problem() -> str:
        if from_ptx(implementation, judge.device.type):
            say.begin(task, implementation, LOAD)
            judge.load(implementation)
        return judge.problem(implementation, lambda stage: say.begin(task, implementation, stage))

    return word(problem)


def word(work: Callable[[], str | None]) -> Word:
    """What `work` finds, or the error in its place.

    Raises:
        Late: the time was up.
    """
    lost = False
    try:
        return Word(work() or "")
    except Late:
        raise
    except CaptureError as error:
        lost, raised = True, error.__cause__
    except Exception as error:  # whatever a candidate raises speaks against it
        raised = error
    text = (str(raised).strip() or type(raised).__name__).splitlines()[0]
    if isinstance(raised, torch.OutOfMemoryError) or "out of memory" in text:
        return Word("needs more memory than there is", judged=False, lost=lost)
    return Word(f"failed: {text}", lost=lost)


def from_ptx(implementation: str, device: str) -> bool:
    """Whether the driver has to compile our kernels for this card when they are first used, which takes its time."""
    if device != "cuda" or not implementation.startswith("cpp"):
        return False
    return not cuda_build.machine_code(dispatch.architecture(device), extension.module.cuda_architectures)


def leave_if_lost(device: str, lost: bool = False) -> None:
    """End the process where nothing more can be tried in it: an error has left the device's context unusable, or, as
    the caller says, torch in the middle of a capture."""
    if lost:
        leave()
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(error, file=sys.stderr)
            leave()


def leave() -> None:
    """End the process; what was said so far has been heard."""
    os._exit(LOST_CONTEXT)


def timed(task: Task, right: list[str], situation: Situation, device: str, say: Speaker) -> dict[str, float]:
    """Median seconds of a pass, of the floor and of what is right."""
    inputs = situation.make(0)

    def work(implementation: str) -> None:
        with dispatch.using(task.op, implementation, device=device):
            evaluate(task.op, cramfast.kernels, inputs, situation.cotangent)

    works: dict[str, Callable] = {name: partial(work, name) for name in (task.floor, *right)}
    return compared(works, Stopwatch(device), lambda name: say.begin(task.name, name, TIMING))


def try_microbatch(content: dict[str, Any], say: Speaker) -> None:
    """One microbatch by the floor and by the chosen set, from the run's own first weights."""
    config = from_json(TrainConfig, content["config"])
    verdicts = [Verdict(**values) for values in content["verdicts"]]
    prepared = content["prepared"] and Path(content["prepared"])
    try:
        found = agreement.of_new_model(
            config, prepared, verdicts, content["one_by_one"], lambda name, what: say.begin("microbatch", name, what)
        )
    except torch.OutOfMemoryError:  # of the smallest, by the floor too: no operator's fault
        say(uncompared="it needs more memory than there is")
    else:
        say(departed=found)


def as_the_run(content: dict[str, Any]) -> None:
    """Let this process compute as the run will: with what is asked for by name, and with its kind of sums."""
    kernelchoice.override(tuple(content["kernels"]), content["device"])
    allow_half_accumulation(content["half_accumulation"])


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
        as_the_run(job.content)
        KINDS[job.kind](job.content, say)
        say(done=True)


if __name__ == "__main__":
    main()
