"""Finds a rank for which all other ranks wait in every update."""

import socket
import statistics
from collections.abc import Callable, Sequence

from fastgn.distributed import World
from fastgn.step.waits import WaitTimer

SHARE = 0.2
"""Largest share of the time for which the other ranks may wait for a rank. Above it, a warning
names the rank."""
SHORTEST_S = 10.0
"""Shortest time in seconds over which ranks are compared. A row of the log may cover less time, and
then one short delay would be a large part of it."""


class SlowRanks:
    """Names ranks for which the other ranks wait for a large part of the time.

    world: the ranks of the run. waits: object that measures how long this rank waits. report:
    function that is called with the text of a warning.
    """

    def __init__(self, world: World, waits: WaitTimer, report: Callable[[str], object]):
        self.world = world
        self.waits = waits
        self.report = report
        self.named: set[int] = set()
        """Ranks that a warning has named."""
        self.reset()

    def reset(self) -> None:
        """Forgets the times that the ranks have waited so far, and begins another comparison."""
        self.interval_s = 0.0
        self.seconds = [0.0] * self.world.size
        """For each rank, the seconds since the last `reset` in which it waited for other ranks or
        summed gradients."""

    def check(self, interval_s: float) -> None:
        """Prints a warning if a rank was slow in the last SHORTEST_S seconds or more, at most once
        for each rank.

        All ranks must call this method. interval_s: seconds since the last call.
        """
        if self.world.size == 1:
            return
        rows = [
            row.split(" ", 1)
            for row in self.world.gather([f"{self.waits.read()} {socket.gethostname()}"])
        ]
        self.interval_s += interval_s
        self.seconds = [s + float(row[0]) for s, row in zip(self.seconds, rows, strict=True)]
        if self.interval_s < SHORTEST_S:
            return
        rank, waited_s = find_slowest(self.seconds)
        share = waited_s / self.interval_s
        self.reset()
        if share <= SHARE or rank in self.named:
            return
        self.named.add(rank)
        self.report(
            f"warning: the other ranks wait for rank {rank} on host {rows[rank][1]} during "
            f"{share:.0%} of the time: look there for other programs, a hot or slower device, and "
            "slow loading of images"
        )


def find_slowest(seconds: Sequence[float]) -> tuple[int, float]:
    """Returns the rank for which the others wait, and the seconds for which they wait for it.

    seconds: for each rank, the time in which it waited for other ranks or summed gradients.

    The rank that waits least is the slowest. The others wait for it for the difference between the
    median of their times and its own time.
    """
    rank = min(range(len(seconds)), key=lambda r: seconds[r])
    others = [s for r, s in enumerate(seconds) if r != rank]
    return rank, statistics.median(others) - seconds[rank]
