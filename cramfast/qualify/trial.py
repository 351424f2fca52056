"""From tasks to verdicts: asks the child, starts another where one ended, and names what ended it."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cramfast.config import TrainConfig, to_json
from cramfast.qualify.candidates import Task
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
        stage_s: seconds of one stage.
    """

    def __init__(
        self, config: TrainConfig, tasks: list[Task], regime: Regime, seconds: float, show: Show,
        stage_s: float = STAGE_S, repeats: int = REPEATS,
    ):  # fmt: skip
        self.config, self.tasks, self.regime, self.show = config, tasks, regime, show
        self.seconds, self.stage_s, self.repeats = seconds, stage_s, repeats
        self.began = time.monotonic()
        self.child: Child | None = None
        self.problems: dict[str, dict[str, str]] = {task.name: {} for task in tasks}
        self.times: dict[str, dict[str, float]] = {}
        self.late: dict[str, str] = {}

    def __enter__(self) -> "Trial":
        return self

    def __exit__(self, *exception) -> None:
        if self.child is not None:
            self.child.__exit__()
            self.child = None

    def ask(self, share: float, kind: str, **content: Any) -> Iterator[dict[str, Any]]:
        """The child's messages, from a fresh one where there is none.

        Raises:
            Ended: it is gone; the next question starts another.
        """
        end = self.began + self.seconds
        if self.child is None:
            device = torch.cuda.current_device() if self.regime.device == "cuda" else 0
            self.child = Child(device, end, self.stage_s)
        self.child.end = self.began + share * self.seconds
        try:
            yield from self.child.ask(kind, **content)
        except Ended:
            self.__exit__()
            raise

    def operators(self) -> list[Verdict]:
        """A verdict for every task, whatever becomes of the children."""
        plain = {
            "tasks": [asdict(task) for task in self.tasks], "regime": asdict(self.regime), "repeats": self.repeats,
            "graph": self.config.graph != "off" and self.config.nvtx != "layers",
        }  # fmt: skip
        late = "" if any(task.tried for task in self.tasks) else "nothing can be"
        while not late:
            known = str((self.problems, self.times))
            try:
                for message in self.ask(
                    FOR_OPERATORS, "operators", **plain, problems=self.problems, seconds=self.times
                ):
                    self.note(message)
                break
            except Ended as ended:
                if ended.late:
                    late = f"the {self.seconds:g} s were up; python -m cramfast.doctor --qualify takes longer"
                elif not ended.stage:
                    late = f"the process for it {ended.why}"
                else:
                    self.blame(ended)
                    if str((self.problems, self.times)) == known:
                        late = f"the process for it {ended.why}"
        return [
            decide(task, self.problems[task.name], self.times.get(task.name, {}), self.late.get(task.name) or late)
            for task in self.tasks
        ]

    def note(self, message: dict[str, Any]) -> None:
        """Keep a result; show a stage."""
        if "judged" in message:
            task, implementation = message["judged"]
            self.problems[task][implementation] = message["problem"]
        elif "timed" in message:
            self.times[message["timed"]] = message["seconds"]
        elif "begin" in message:
            task = message["begin"][0]
            done = sum(len(found) for found in self.problems.values())
            self.show(f"qualifying {task}", done, sum(len(each.tried) for each in self.tasks))

    def blame(self, ended: Ended) -> None:
        """What the child was doing when it ended is what speaks against an implementation."""
        name, implementation, what = ended.stage
        task = next(task for task in self.tasks if task.name == name)
        problem = f"{ended.why} in {what}" if what != "timing" else f"{ended.why} while it was timed"
        if implementation == task.floor:
            self.times[name], self.late[name] = {}, f"{implementation} {problem}"
        elif not self.problems[name].get(implementation):
            self.problems[name][implementation] = problem

    def microbatch(self, verdicts: list[Verdict], prepared: Path | None) -> tuple[list[Verdict], bool]:
        """The verdicts after a whole microbatch, and whether it was compared to the end."""
        one_by_one = False
        while any(each.replaces_floor for each in verdicts):
            plain = {"config": to_json(self.config), "prepared": prepared and str(prepared), "one_by_one": one_by_one}
            found: dict[str, str] = {}
            try:
                for message in self.ask(1.0, "microbatch", **plain, verdicts=[each.json() for each in verdicts]):
                    self.show("comparing a whole microbatch", 0, 0)
                    found = message.get("departed", found)
                return [back(v, f"failed a whole microbatch: {found[v.name]}") if v.name in found else v
                        for v in verdicts], True  # fmt: skip
            except Ended as ended:
                if ended.late or not ended.stage or ended.stage[2] == "start":
                    why = f"qualified, but no whole microbatch could be compared: the process for it {ended.why}"
                    return [back(v, why) for v in verdicts], False
                one_by_one, name = True, ended.stage[1]
                verdicts = [back(v, f"{ended.why} in a whole microbatch") if v.name == name else v for v in verdicts]
        return verdicts, True


def back(verdict: Verdict, why: str) -> Verdict:
    """The operator on its floor, and what the implementation in its place did."""
    return verdict.on_floor(f"{verdict.implementation} {why}") if verdict.replaces_floor else verdict
