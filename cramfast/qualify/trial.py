"""From tasks to verdicts: asks the child, starts another where one ended, and names what ended it."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cramfast.config import TrainConfig, to_json
from cramfast.qualify import agreement
from cramfast.qualify.candidates import Task
from cramfast.qualify.child import TIMING
from cramfast.qualify.judge import REPEATS
from cramfast.qualify.process import STAGE_S, Child, Ended
from cramfast.qualify.regime import Regime
from cramfast.qualify.verdict import Verdict, decide

FOR_OPERATORS = 0.7  # share of the time; the rest is the microbatch's

Show = Callable[[str, int, int], None]


class Trial:
    """One qualification; use as a context, which leaves no process behind.

    Args:
        seconds: what it may take in all.
        show: called with (stage, done, total), for the screen.
        known: verdicts of earlier ones; what is open in them is tried, and nothing else.
        stage_s: seconds of one stage.
    """

    def __init__(
        self, config: TrainConfig, tasks: list[Task], regime: Regime, seconds: float, show: Show,
        known: Sequence[Verdict] = (), stage_s: float = STAGE_S, repeats: int = REPEATS,
    ):  # fmt: skip
        self.config, self.tasks, self.regime, self.show = config, tasks, regime, show
        self.seconds, self.stage_s, self.repeats = seconds, stage_s, repeats
        self.began = time.monotonic()
        self.child: Child | None = None
        self.settled = {verdict.name: verdict for verdict in known if not verdict.open}
        self.left = [task for task in tasks if task.name not in self.settled]
        before = {verdict.name: verdict.problems for verdict in known}
        self.problems: dict[str, dict[str, str]] = {task.name: dict(before.get(task.name, {})) for task in self.left}
        self.missed: dict[str, dict[str, str]] = {task.name: {} for task in self.left}
        self.times: dict[str, dict[str, float]] = {}  # of the tasks that are done
        self.late: dict[str, str] = {}  # task -> why it could not be judged or timed

    def __enter__(self) -> "Trial":
        return self

    def __exit__(self, *exception) -> None:
        if self.child is not None:
            self.child.__exit__()
            self.child = None

    def ask(self, kind: str, **content: Any) -> Iterator[dict[str, Any]]:
        """The child's messages, from a fresh one where there is none.

        Raises:
            Ended: it is gone; the next question starts another.
        """
        if self.child is None:
            device = torch.cuda.current_device() if self.regime.device == "cuda" else 0
            self.child = Child(device, self.began + self.seconds, self.stage_s)
        run = {
            "device": self.regime.device, "kernels": self.config.kernels,
            "half_accumulation": self.config.half_accumulation,
        }  # fmt: skip
        try:
            yield from self.child.ask(kind, **run, **content)
        except Ended:
            self.__exit__()
            raise

    def operators(self) -> list[Verdict]:
        """A verdict for every task, whatever becomes of the children."""
        until = self.began + FOR_OPERATORS * self.seconds
        plain = {
            "tasks": [asdict(task) for task in self.left], "regime": asdict(self.regime), "repeats": self.repeats,
            "until": until,
        }  # fmt: skip
        up = f"the {self.seconds:g} s were up; the next run goes on with it"
        late = "" if any(task.tried for task in self.left) else "nothing can be"
        while not late:
            before = self.progress()
            try:
                for message in self.ask("operators", **plain, known=self.words(), done=list(self.times)):
                    late = up if "late" in message else late
                    self.note(message)
                break
            except Ended as ended:
                if ended.stage and not ended.late:
                    self.blame(ended)
                if ended.late or time.monotonic() > until:
                    late = up
                elif self.progress() == before:
                    late = f"the process for it {ended.why}"
        return [self.settled.get(task.name) or self.decided(task, late) for task in self.tasks]

    def decided(self, task: Task, late: str) -> Verdict:
        """The verdict of a task that was to be tried now."""
        name, seconds = task.name, self.times.get(task.name, {})
        return decide(task, self.problems[name], seconds, self.late.get(name) or late, self.missed[name])

    def words(self) -> dict[str, dict[str, str]]:
        """Task -> implementation -> what is said of it so far."""
        return {name: {**found, **self.missed[name]} for name, found in self.problems.items()}

    def progress(self) -> str:
        """Something that differs whenever anything has become known."""
        return str((self.words(), self.times))

    def note(self, message: dict[str, Any]) -> None:
        """Keep a result; show a stage."""
        if "judged" in message:
            task, implementation = message["judged"]
            found = self.problems if message["final"] else self.missed
            found[task][implementation] = message["problem"]
        elif "unjudged" in message:
            self.give_up(message["unjudged"], f"what it is compared with {message['problem']}")
        elif "timed" in message:
            self.times[message["timed"]] = message["seconds"]
        elif "begin" in message:
            task = message["begin"][0]
            done = sum(len(found) for found in self.words().values())
            self.show(f"qualifying {task}", done, sum(len(each.tried) for each in self.left))

    def give_up(self, task: str, why: str) -> None:
        """No more of a task in this trial; that speaks against none of its implementations."""
        self.times[task], self.late[task] = {}, f"it could not be judged: {why}"

    def blame(self, ended: Ended) -> None:
        """What the child was doing when it ended is what speaks against an implementation."""
        name, implementation, what = ended.stage
        task = next(task for task in self.tasks if task.name == name)
        if not implementation:
            self.give_up(name, f"computing what it is compared with {ended.why}")
            return
        problem = f"{ended.why} in {what}" if what != TIMING else f"{ended.why} while it was timed"
        if implementation == task.floor:
            self.times[name], self.late[name] = {}, f"{implementation} {problem}"
        elif not self.words()[name].get(implementation):
            self.problems[name][implementation] = problem

    def microbatch(self, verdicts: list[Verdict], prepared: Path | None) -> tuple[list[Verdict], bool]:
        """The verdicts after a whole microbatch, and whether it was compared to the end."""
        one_by_one = False
        while any(each.replaces_floor for each in verdicts):
            plain = {"config": to_json(self.config), "prepared": prepared and str(prepared), "one_by_one": one_by_one}
            found: dict[str, str] = {}
            missed = ""
            try:
                for message in self.ask("microbatch", **plain, verdicts=[each.json() for each in verdicts]):
                    self.show("comparing a whole microbatch", 0, 0)
                    found, missed = message.get("departed", found), message.get("uncompared", missed)
            except Ended as ended:
                if not ended.late and ended.stage and ended.stage[2] == agreement.RUN:
                    one_by_one, name = True, ended.stage[1]
                    verdicts = [v.failed(f"{ended.why} in {agreement.RUN}") if v.name == name else v for v in verdicts]
                    continue
                missed = f"the process for it {ended.why}" + (f" in its {ended.stage[2]}" if ended.stage else "")
            if missed:
                why = f"qualified, but no whole microbatch could be compared: {missed}"
                return [v.on_floor(f"{v.implementation} {why}") if v.replaces_floor else v for v in verdicts], False
            failed = {name: f"failed a whole microbatch: {why}" for name, why in found.items()}
            return [v.failed(failed[v.name]) if v.name in failed else v for v in verdicts], True
        return verdicts, True
