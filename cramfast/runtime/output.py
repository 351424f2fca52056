"""Output that never ends the work: a full disk under a log, a pipe that nobody reads, a terminal that was closed."""

import io
import os
import sys


class Steady(io.TextIOBase):
    """A text stream on a file descriptor; what the system refuses to take is dropped.

    Nothing waits in a buffer, so that nothing is left over for the interpreter to fail on at its end.
    """

    def __init__(self, descriptor: int, encoding: str):
        self.descriptor, self._encoding = descriptor, encoding

    @property
    def encoding(self) -> str:
        return self._encoding

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)

    def write(self, text: str) -> int:
        """Write it, or as much of it as is taken; the length of the text either way."""
        data = memoryview(text.encode(self._encoding, "backslashreplace"))
        try:
            while data:
                data = data[os.write(self.descriptor, data) :]
        except OSError:
            pass
        return len(text)


def make_steady() -> None:
    """Put such streams in place of the standard output and error of this process."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None or stream.fileno() != descriptor:
            continue  # closed by whoever started this
        stream.flush()
        setattr(sys, name, Steady(descriptor, stream.encoding))
