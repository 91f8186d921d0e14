"""Finds a rank for which all other ranks wait in every update."""

import socket
import statistics
from collections.abc import Callable, Sequence

from fastgn.distributed import World
from fastgn.step.waits import WaitTimer

SHARE = 0.2
"""Share of the time that the other ranks have to wait for a rank before a warning names it."""


class SlowRanks:
    """Names ranks for which the other ranks wait for a large part of the time.

    world: the ranks. waits: measures the waiting of this rank. report: called with the warning.
    """

    def __init__(self, world: World, waits: WaitTimer, report: Callable[[str], object]):
        self.world = world
        self.waits = waits
        self.report = report
        self.named: set[int] = set()
        """Ranks that a warning has named."""

    def check(self, interval_s: float) -> None:
        """Prints a warning if a rank was slow since the last call, at most once for each rank.

        All ranks must call this method. interval_s: seconds since the last call.
        """
        if self.world.size == 1:
            return
        rows = [
            row.split(" ", 1)
            for row in self.world.gather([f"{self.waits.read()} {socket.gethostname()}"])
        ]
        rank, waited_s = find_slowest([float(seconds) for seconds, _ in rows])
        if waited_s <= SHARE * interval_s or rank in self.named:
            return
        self.named.add(rank)
        self.report(
            f"warning: the other ranks wait for rank {rank} on host {rows[rank][1]} during "
            f"{waited_s / interval_s:.0%} of the time: look there for other programs, a hot or "
            "slower device, and slow loading of images"
        )


def find_slowest(seconds: Sequence[float]) -> tuple[int, float]:
    """Returns the rank for which the others wait, and the seconds for which they wait for it.

    seconds: for each rank, the time that it has waited and summed. The rank that waits least is the
    slowest. The others wait for it for the median of their times, less the time of this rank.
    """
    rank = min(range(len(seconds)), key=lambda r: seconds[r])
    others = [s for r, s in enumerate(seconds) if r != rank]
    return rank, statistics.median(others) - seconds[rank]
