"""Ctrl-C, SIGTERM and SIGHUP as a request to stop after the current microbatch; the second one stops at once."""

import contextlib
import os
import signal
from types import FrameType

from cramfast.errors import stop_signals


class Interrupt:
    """Context in which the signals of errors.stop_signals() only set `requested`; a `silent` one does not say so."""

    def __init__(self, silent: bool = False):
        self.requested, self.silent = False, silent
        self.before: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        self.before = {number: signal.signal(number, self.note) for number in stop_signals()}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if not self.silent:  # os.write, because a print that this handler interrupts cannot be entered again
            with contextlib.suppress(OSError):  # a terminal that is gone
                os.write(2, b"\nstopping after this microbatch and saving; once more aborts at once\n")
