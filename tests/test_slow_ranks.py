"""A rank that is slower than the others in every update is named."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import on_two_ranks
from support.runs import tiny_run

from fastgn import slow_ranks, train
from fastgn.distributed import World
from fastgn.slow_ranks import SlowRanks, find_slowest
from fastgn.step.step import Step
from fastgn.step.waits import WaitTimer

SLEEP_S = 0.3


def train_asleep(sleepers: list[int], args: list[str]) -> int:
    """Trains, and sleeps in every update of some ranks."""
    slow_ranks.SHORTEST_S, compute = 1.0, Step.__call__

    def sleep(self: Step, *inputs: Any) -> Any:
        if int(os.environ["RANK"]) in sleepers:
            time.sleep(SLEEP_S)
        return compute(self, *inputs)

    Step.__call__ = sleep  # type: ignore[method-assign]
    return train.main(args)


@pytest.mark.slow
@pytest.mark.parametrize("sleepers", [[1], [0, 1]], ids=["one", "both"])
def test_a_rank_that_sleeps_in_every_update_is_named_once(
    sleepers: list[int], tmp_path: Path
) -> None:
    """But no rank is named if all are equally slow."""
    args = tiny_run(tmp_path / "run", "--max-updates", "7", "--log-interval", "3")
    said = on_two_ranks(tmp_path, train_asleep, sleepers, args)
    lines = [line for line in said[0].splitlines() if "ranks wait for" in line]
    assert len(lines) == (len(sleepers) == 1), said[0]
    assert all("the other ranks wait for rank 1 on host " in line for line in lines)
    assert "ranks wait for" not in said[1]


class FourRanks(World):
    """Four ranks, of which the first is this process."""

    def gather(self, items: list[str]) -> list[str]:
        times = [float(items[0].split()[0]), 9.0, 2.0, 8.0]
        return [f"{s} host{rank}" for rank, s in enumerate(times)]


class Waited(WaitTimer):
    """This process has waited for seven seconds."""

    def read(self) -> float:
        return 7.0


def test_the_warning_says_how_much_of_the_time(tmp_path: Path) -> None:
    device = torch.device("cpu")
    said: list[str] = []
    ranks = SlowRanks(FourRanks(0, 4, device), Waited(device), said.append)
    ranks.check(40.0)  # 6 s of 40 s are less than a fifth
    for _ in range(3):
        ranks.check(3.0)  # too short to tell
    assert said == []
    ranks.check(71.0)
    ranks.check(20.0)
    ranks.check(20.0)
    (line,) = said
    assert line.startswith("warning: the other ranks wait for rank 2 on host host2 during 30% of ")


def test_the_slowest_rank_waits_least() -> None:
    assert find_slowest([5.0, 1.0, 4.0, 6.0]) == (1, 4.0)
    assert find_slowest([3.0, 3.0]) == (0, 0.0)


def test_waits_are_added_up_until_they_are_read() -> None:
    timer = WaitTimer(torch.device("cpu"))
    for _ in range(2):
        timer.begin()  # this one is repeated, because memory ran out
        timer.begin()
        time.sleep(0.02)
        timer.end()
    assert 0.04 <= timer.read() < 10 and timer.read() == 0
    timer.begin()
    timer.end()
    timer.reset()
    assert timer.read() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_timed_without_waiting() -> None:
    timer = WaitTimer(torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            timer.begin()
            torch.cuda._sleep(2_000_000)
            timer.end()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 0.005 < timer.read() < 10 and timer.read() == 0
