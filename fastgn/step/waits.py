"""Measures how long a process waits for the others when they sum their gradients."""

import time

import torch


class WaitTimer:
    """Adds up the time between the end of a backward and the end of the sum of the gradients.

    The time has two parts, the wait for the last process and the sum itself. The sum takes equally
    long in all processes. The wait is shortest in the process for which all others wait.

    On a GPU the time is measured with CUDA events, so that the CPU never waits for the device.

    device: the device that computes the updates.
    """

    def __init__(self, device: torch.device):
        self.on_cuda = device.type == "cuda"
        self.reset()

    def reset(self) -> None:
        """Forgets all times that were measured."""
        self._seconds = 0.0
        self._began = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        """CUDA events (begin, end) of each measurement whose time is not part of `_seconds` yet."""

    def begin(self) -> None:
        """Starts a measurement. An earlier one that was started but not ended is discarded."""
        if self.on_cuda:
            self._begin_event = torch.cuda.Event(enable_timing=True)
            self._begin_event.record()
        else:
            self._began = time.perf_counter()

    def end(self) -> None:
        """Ends the measurement that `begin` has started."""
        if not self.on_cuda:
            self._seconds += time.perf_counter() - self._began
            return
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        self._events.append((self._begin_event, end))
        # read events that the device has passed, so that few of them are kept
        while self._events[0][1].query() and len(self._events) > 1:
            self._read_event()

    def _read_event(self) -> None:
        """Removes the oldest measurement from `_events` and adds its time to `_seconds`."""
        begin, end = self._events.pop(0)
        self._seconds += begin.elapsed_time(end) / 1000

    def read(self) -> float:
        """Returns the seconds that were measured since the last call of `read` or `reset`.

        Waits until the device has reached the end of the last measured time. Call this when the CPU
        has just waited for the device anyway.
        """
        if self._events:
            self._events[-1][1].synchronize()
        while self._events:
            self._read_event()
        seconds = self._seconds
        self.reset()
        return seconds
