"""Handles signals that ask a run to stop, such as Ctrl-C."""

import signal
import time
from typing import Any

from fastgn.extras import REPEAT_S, list_heeded

STOPPED = 75
"""Exit status of a run that a signal has ended early, after it has saved a checkpoint.

sysexits.h calls this status EX_TEMPFAIL, a failure that may not occur again. Running the same
command again continues the run.
"""


class Interrupt:
    """Records signals that ask a run to stop, so that its loop can save a checkpoint and end.

    Another signal, more than REPEAT_S seconds after the first one, ends the process at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        """Number of the first signal. None means that no signal has come."""
        self.noted_s = 0.0
        """Time of the first signal, as returned by time.monotonic()."""
        self.previous: dict[int, Any] = {}
        """Number of each handled signal -> the handler that it had before."""

    def __enter__(self) -> "Interrupt":
        # include SIGINT even if it is ignored, because shells ignore it for background processes
        for number in {*list_heeded(), signal.SIGINT, signal.SIGTERM}:
            self.previous[number] = signal.signal(number, self.note)
        return self

    def note(self, number: int, frame: object) -> None:
        """Handles a signal. The first one is recorded, and a later one ends the process."""
        now = time.monotonic()
        if self.signal is None:
            self.signal, self.noted_s = number, now
        elif now - self.noted_s > REPEAT_S:
            self.restore()
            signal.raise_signal(number)

    def is_signalled(self) -> bool:
        """Returns whether a signal has asked this rank to stop."""
        return self.signal is not None

    def restore(self) -> None:
        """Restores the signal handlers that were in place before __enter__."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def __exit__(self, *exc: object) -> None:
        self.restore()
