"""Detects ranks that have stopped while other ranks wait for them, and ends the job.

If a rank is alive but late, a warning names it. If a rank waits long for its own device, a warning
says so.

A rank that waits in a collective cannot know whether the other ranks are slow or dead. Therefore
each rank has a thread that writes a report into torch.distributed's key-value store every few
seconds. The report says that the process is alive. The same thread reads the reports of the other
ranks. A second thread watches the reports, because the first one hangs if the store stops. Neither
thread slows down an update.
"""

import contextlib
import os
import socket
import threading
import time
from typing import Any, NoReturn

import torch

from fastgn.errors import first_line

STEPS = 10
"""Smallest number of heartbeats that a rank sends within the time limit (--rank-timeout)."""
LONGEST_INTERVAL_S = 2.0
"""Longest time between two heartbeats, in seconds."""
WAITING_S = 60.0
"""Seconds for which a rank waits for another rank, or for its own device, before a warning is
printed."""


class Wait:
    """Measures a wait, and decides when to warn about it.

    The first warning comes after WAITING_S seconds, and the next ones after 2, 4, 8 times as long.
    """

    def __init__(self) -> None:
        self.end()

    def end(self) -> None:
        """Forgets the wait, so that the next one begins at 0 seconds."""
        self.seconds, self.next_warning_s = 0.0, WAITING_S

    def is_warning_due(self, interval_s: float) -> bool:
        """Adds some seconds to the wait, and returns whether to print a warning now."""
        self.seconds += interval_s
        due = self.seconds >= self.next_warning_s
        self.next_warning_s *= 2 if due else 1
        return due

    def __str__(self) -> str:
        minutes = round(self.seconds / 60, 1)
        return f"{minutes:g} {'minute' if minutes == 1 else 'minutes'}"


class Heartbeat:
    """Reports that this rank is alive, and ends the process if another rank is silent for too
    long."""

    def __init__(
        self,
        store: Any,
        address: tuple[str, int],
        rank: int,
        size: int,
        limit_s: float,
        *,
        agent: bool,
    ):
        """Prepares the heartbeat, which runs while the object is used as a context manager.

        store: torch.distributed's key-value store. address: host and port of the store. rank, size:
        index of this rank, and number of ranks. limit_s: seconds without a heartbeat after which a
        rank counts as stopped. agent: whether torchrun serves the store instead of rank 0.
        """
        self.store = store
        self.address = address
        self.rank = rank
        self.others = [r for r in range(size) if r != rank]
        self.limit_s = limit_s
        self.agent = agent
        self.interval_s = min(limit_s / STEPS, LONGEST_INTERVAL_S)
        self.collectives = 0
        """Number of collectives, such as all-reduces, that this rank has begun through a
        distributed.World."""
        self.waits_in = 0
        """Value of `collectives` when this rank began to wait for other ranks."""
        self.wait_for_ranks = Wait()
        self.waits_for_device = False
        """Whether the main thread waits until its device has computed everything."""
        self.wait_for_device = Wait()
        self.reports: dict[int, list[str]] = {}
        """Rank -> its last report, as four texts. These are its number of heartbeats, its number of
        collectives, the ranks that it has found missing, and the name of its process."""
        self.silent_s = dict.fromkeys(self.others, 0.0)
        """Rank -> seconds since its last heartbeat."""
        self.rounds = 0
        """Number of times that the other ranks' reports were read from the key-value store."""
        self.store_lost = False
        """Whether the process that serves the key-value store has ended."""
        self.missing: list[int] = []
        """Ranks that have stopped sending heartbeats. The job ends because of them."""
        self.stopped = threading.Event()
        self.announce = threading.Event()
        """Event that makes the heartbeat's thread send `missing` to the other ranks at once."""

    def __enter__(self) -> "Heartbeat":
        for target in (self._beat, self._judge):
            threading.Thread(target=target, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is None:  # after an error, heartbeats continue until the error is printed
            self.stopped.set()
            self.announce.set()

    def describe_rank(self, rank: int) -> str:
        """Returns 'rank R', with its process and host if they are known."""
        return f"rank {rank}" + (f" ({self.reports[rank][3]})" if rank in self.reports else "")

    def describe_store_owner(self) -> str:
        """Returns the name of the process that serves torch.distributed's key-value store."""
        return "torchrun itself" if self.agent else self.describe_rank(0)

    def _beat(self) -> None:
        """Writes this rank's heartbeats to the key-value store and reads those of the other ranks,
        until `stopped` is set."""
        me = f"process {os.getpid()} on host {socket.gethostname()}"
        count, last = 0, False
        while not (last or self.stopped.is_set()):
            count, last = count + 1, self.announce.is_set()
            missing = ",".join(map(str, self.missing))
            try:
                # try to connect first, because torch prints a C++ stack if the store is gone
                socket.create_connection(self.address, timeout=self.interval_s).close()
                self.store.set(f"{self.rank}", f"{count};{self.collectives};{missing};{me}")
                there = [r for r in self.others if r in self.reports or self.store.check([f"{r}"])]
                values = self.store.multi_get([f"{r}" for r in there]) if there else []
            except TimeoutError:
                continue
            except (OSError, RuntimeError):
                self.store_lost = True
                return
            report = [value.decode().split(";", 3) for value in values]
            self.reports = dict(zip(there, report, strict=True))
            self.rounds += 1
            self.announce.wait(self.interval_s)

    def _judge(self) -> None:
        """Watches the heartbeats that `_beat` reads from torch.distributed's key-value store.

        Ends the process if another rank or the store is silent for too long.
        """
        rounds, counts, store_silent_s = 0, dict.fromkeys(self.others, ""), 0.0
        # patience_s is below the limit, because a silent rank is noticed up to two intervals late
        patience_s = self.limit_s - 2 * self.interval_s
        # count time in intervals, because a clock also runs while this process is suspended
        while not self.stopped.wait(self.interval_s):
            if self.rounds == rounds:
                store_silent_s += self.interval_s
            else:
                rounds, store_silent_s = self.rounds, 0.0
                for other, report in self.reports.items():
                    changed = report[0] != counts[other]
                    self.silent_s[other] = -self.interval_s if changed else self.silent_s[other]
                    counts[other] = report[0]
                    if report[2]:  # the other rank reports that ranks are missing
                        self.missing = [int(r) for r in report[2].split(",")]
                for other in self.others:
                    self.silent_s[other] += self.interval_s
            if not self.missing:
                self.missing = [r for r in self.others if self.silent_s[r] >= patience_s]
            if self.missing or store_silent_s >= patience_s:
                self._end_process()
            self._name_late_ranks()
            self._tell_device_wait()

    def find_late_ranks(self) -> list[int]:
        """Returns the ranks that have begun fewer collectives than this rank."""
        return [r for r, report in self.reports.items() if int(report[1]) < self.collectives]

    def _name_late_ranks(self) -> None:
        """Prints which ranks are alive but late.

        A rank is late if it has not begun the collective in which this rank waits.
        """
        late = self.find_late_ranks()
        if self.waits_in != self.collectives or not late:
            self.waits_in = self.collectives
            self.wait_for_ranks.end()
            return
        first = min(r for r in (self.rank, *self.others) if r not in late)
        if self.wait_for_ranks.is_warning_due(self.interval_s) and self.rank == first:
            names = " and ".join(map(self.describe_rank, late))
            _write_to_stderr(f"warning: waiting for {names} for {self.wait_for_ranks}")

    def _tell_device_wait(self) -> None:
        """Prints that this rank waits for its device.

        If one device hangs, the devices of all other ranks wait for it in an all-reduce. Then each
        rank waits for its own device, so no rank is late.
        """
        if not self.waits_for_device:
            self.wait_for_device.end()
        elif self.wait_for_device.is_warning_due(self.interval_s):
            _write_to_stderr(
                f"warning: rank {self.rank} (process {os.getpid()} on host {socket.gethostname()}) "
                f"has waited for its own device for {self.wait_for_device}: if all ranks say so, "
                "look for a device that hangs"
            )

    def _end_process(self) -> NoReturn:
        """Prints which ranks have stopped, and ends this process.

        The main thread may wait in a collective, which cannot be interrupted in any other way.
        """
        self.announce.set()  # tell the other ranks, so that their messages name the same ranks
        if self.missing:
            names = " and ".join(self.describe_rank(r) for r in self.missing)
        else:
            names = self.describe_store_owner()
        left = [self.rank, *(r for r in self.reports if r not in self.missing)]
        if self.rank == min(left) or not self.missing:
            _write_to_stderr(
                f"error: no sign of life from {names} for {self.limit_s / 60:.3g} minutes "
                "(--rank-timeout): the job ends; --resume continues it from its last checkpoint"
            )
        time.sleep(min(1.0, self.interval_s))
        os._exit(1)

    def explain_failure(self, error: Exception) -> str:
        """Returns in one line why a collective has failed.

        Waits until the other ranks' reports show whether a rank has stopped. If the heartbeat's
        thread is about to end this process, this method does not return.
        """
        for _ in range(6 * STEPS):
            if self.missing:
                time.sleep(60)
            silent = [r for r in self.others if self.silent_s[r] >= 3 * self.interval_s]
            if self.store_lost or silent:
                names = (
                    self.describe_store_owner()
                    if self.store_lost
                    else " and ".join(map(self.describe_rank, silent))
                )
                return f"{names} ended before the other ranks"
            time.sleep(self.interval_s / STEPS)
        reason = first_line(error)
        late = self.find_late_ranks()
        if late:
            names = " and ".join(map(self.describe_rank, late))
            return f"{names} fell behind the other ranks: {reason}"
        return f"a connection between ranks was lost: {reason}"


def _write_to_stderr(line: str) -> None:
    """Writes a line to stderr without Python's buffers, because the main thread may hold their
    lock."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


def is_connection_loss(error: Exception) -> bool:
    """Returns whether an error means that the connection between ranks was lost."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
