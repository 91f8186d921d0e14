"""Notices a rank that has stopped, wherever the others wait for it, and ends the job.

A collective says too little: it cannot tell a rank that is slow from one that is gone. So a thread
of each rank says through the store, every few seconds, that its process is alive, and reads the
others; a second one judges, since the store may be what has stopped. Neither costs an update
anything.
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
"""Heartbeats sent per time limit."""
LONGEST_INTERVAL_S = 2.0
"""Longest time between two heartbeats, in seconds."""


class Heartbeat:
    """Says that this rank is alive, and ends the process once another has been silent too long."""

    def __init__(
        self,
        store: Any,
        place: tuple[str, int],
        rank: int,
        size: int,
        limit_s: float,
        *,
        agent: bool,
    ):
        """place: the store's address and port; agent: whether torchrun holds it, not rank 0."""
        self.store = store
        self.place = place
        self.rank = rank
        self.others = [r for r in range(size) if r != rank]
        self.limit_s = limit_s
        self.agent = agent
        self.interval_s = min(limit_s / STEPS, LONGEST_INTERVAL_S)
        self.meetings = 0
        """Number of control collectives that this rank has entered."""
        self.heard: dict[int, list[str]] = {}
        """Rank -> [count, meetings, missing, name] as last read."""
        self.silent_s = dict.fromkeys(self.others, 0.0)
        """Rank -> seconds since its count last changed."""
        self.rounds = 0
        """Number of times that the store has answered."""
        self.alone = False
        """Whether the process that holds the store has ended."""
        self.missing: list[int] = []
        """Ranks for which the job ends."""
        self.over = threading.Event()
        self.told = threading.Event()
        """Set to send `missing` to the other ranks at once."""

    def __enter__(self) -> "Heartbeat":
        for target in (self._beat, self._judge):
            threading.Thread(target=target, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is None:  # one that fails lives on until its process has said why
            self.over.set()
            self.told.set()

    def name(self, rank: int) -> str:
        """Returns 'rank R', with its process and host if known."""
        return f"rank {rank}" + (f" ({self.heard[rank][3]})" if rank in self.heard else "")

    def host(self) -> str:
        """Returns the name of the process that serves the store."""
        return "torchrun itself" if self.agent else self.name(0)

    def _beat(self) -> None:
        me = f"process {os.getpid()} on host {socket.gethostname()}"
        count, last = 0, False
        while not (last or self.over.is_set()):
            count, last = count + 1, self.told.is_set()
            missing = ",".join(map(str, self.missing))
            try:
                # a store that is gone makes torch print a stack of C++: ask the system first
                socket.create_connection(self.place, timeout=self.interval_s).close()
                self.store.set(f"{self.rank}", f"{count};{self.meetings};{missing};{me}")
                there = [r for r in self.others if r in self.heard or self.store.check([f"{r}"])]
                values = self.store.multi_get([f"{r}" for r in there]) if there else []
            except TimeoutError:
                continue
            except (OSError, RuntimeError):
                self.alone = True
                return
            heard = [value.decode().split(";", 3) for value in values]
            self.heard = dict(zip(there, heard, strict=True))
            self.rounds += 1
            self.told.wait(self.interval_s)

    def _judge(self) -> None:
        rounds, counts, store_silent_s = 0, dict.fromkeys(self.others, ""), 0.0
        patience_s = self.limit_s - 2 * self.interval_s  # so that all is over within the limit
        # intervals are counted in place of a clock, which goes on while this process is stopped
        while not self.over.wait(self.interval_s):
            if self.rounds == rounds:
                store_silent_s += self.interval_s
            else:
                rounds, store_silent_s = self.rounds, 0.0
                for other, heard in self.heard.items():
                    changed = heard[0] != counts[other]
                    self.silent_s[other] = -self.interval_s if changed else self.silent_s[other]
                    counts[other] = heard[0]
                    if heard[2]:  # another rank has judged
                        self.missing = [int(r) for r in heard[2].split(",")]
                for other in self.others:
                    self.silent_s[other] += self.interval_s
            if not self.missing:
                self.missing = [r for r in self.others if self.silent_s[r] >= patience_s]
            if self.missing or store_silent_s >= patience_s:
                self._end()

    def _end(self) -> NoReturn:
        """Ends the process, whose main thread may wait in a collective that cannot be stopped."""
        self.told.set()  # so that the others blame the same rank
        if self.missing:
            names = " and ".join(self.name(r) for r in self.missing)
        else:
            names = self.host()
        left = [self.rank, *(r for r in self.heard if r not in self.missing)]
        if self.rank == min(left) or not self.missing:
            _write(
                f"error: no sign of life from {names} for {self.limit_s / 60:.3g} minutes "
                "(--rank-timeout): the job ends, and --resume continues it from its last checkpoint"
            )
        time.sleep(min(1.0, self.interval_s))
        os._exit(1)

    def explain(self, error: Exception) -> str:
        """Returns why a collective has failed, in a line. Waits for what the other ranks say, and
        for ever if this process is about to end."""
        for _ in range(6 * STEPS):
            if self.missing:
                time.sleep(60)
            silent = [r for r in self.others if self.silent_s[r] >= 3 * self.interval_s]
            if self.alone or silent:
                names = self.host() if self.alone else " and ".join(map(self.name, silent))
                return f"ended before the other ranks: {names}"
            time.sleep(self.interval_s / STEPS)
        reason = first_line(error)
        late = [r for r, heard in self.heard.items() if int(heard[1]) < self.meetings]
        if late:
            return f"behind the other ranks: {' and '.join(map(self.name, late))}: {reason}"
        return f"a connection between ranks was lost: {reason}"


def _write(line: str) -> None:
    """Writes to stderr past Python's buffers, whose lock the main thread may hold."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


def is_lost(error: Exception) -> bool:
    """Whether an error means that the connection between ranks was lost."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
