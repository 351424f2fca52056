"""Ctrl-C and SIGTERM as a request to stop after the current microbatch; the second one stops at once."""

import os
import signal
from types import FrameType


class Interrupt:
    """Context in which SIGINT and SIGTERM only set `requested`; a `silent` one does not say so."""

    def __init__(self, silent: bool = False):
        self.requested, self.silent = False, silent
        self.before: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if not self.silent:  # os.write, because a print that this handler interrupts cannot be entered again
            os.write(2, b"\nstopping after this microbatch and saving; once more aborts at once\n")
