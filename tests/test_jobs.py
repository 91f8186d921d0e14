"""Jobs are not lost: one writer in a folder, ranks that stop or die, restarts by torchrun."""

import os
import random
import re
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from conftest import tiny_run
from test_distributed import start_two

from fastgn import train
from fastgn.metrics import read_rows

ENDLESS = ("--epochs", "100000", "--batch-size", "24", "--log-interval", "1", "--eval-images", "0")
LIMIT_S = 10


def wait_for_rows(folder: Path, count: int, processes: list[BaseProcess]) -> None:
    deadline = time.monotonic() + 120
    while len(read_rows(folder / "metrics.csv")) < count:
        assert all(p.is_alive() for p in processes) and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("stopped", "seed"), [(0, 0), (1, 1), (1, 2)])
def test_a_rank_that_is_stopped_ends_the_job(stopped: int, seed: int, tmp_path: Path) -> None:
    """At a random moment, and whichever rank serves the store."""
    folder = tmp_path / "run"
    args = [*tiny_run(folder, *ENDLESS), "--rank-timeout", str(LIMIT_S / 60)]
    ranks = start_two(tmp_path, train.main, args)
    try:
        wait_for_rows(folder, 3, ranks)
        time.sleep(random.Random(seed).uniform(0, 0.5))
        os.kill(ranks[stopped].pid or 0, signal.SIGSTOP)
        ranks[1 - stopped].join(LIMIT_S + 5)
        assert ranks[1 - stopped].exitcode == 1
        said = (tmp_path / f"log{1 - stopped}").read_text()
        assert "Traceback" not in said
        (line,) = (x for x in said.splitlines() if x.startswith("error: "))
        assert re.match(rf"error: no sign of life from rank {stopped} ", line), line
    finally:
        for process in ranks:
            process.kill()
            process.join()


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_is_named(killed: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ranks = start_two(tmp_path, train.main, tiny_run(folder, *ENDLESS))
    try:
        wait_for_rows(folder, 2, ranks)
        ranks[killed].kill()
        ranks[1 - killed].join(60)
        assert ranks[1 - killed].exitcode == 2
        said = (tmp_path / f"log{1 - killed}").read_text()
        assert "Traceback" not in said
        (line,) = (x for x in said.splitlines() if "error: " in x)
        assert re.search(rf"error: ended before the other ranks: rank {killed} ", line), line
    finally:
        for process in ranks:
            process.kill()
            process.join()


def test_a_rank_that_never_comes_ends_the_job(tmp_path: Path) -> None:
    args = [*tiny_run(tmp_path / "run", *ENDLESS), "--rank-timeout", str(LIMIT_S / 60)]
    ranks = start_two(tmp_path, train.main, args)
    try:
        os.kill(ranks[1].pid or 0, signal.SIGSTOP)
        ranks[0].join(LIMIT_S + 30)
        assert ranks[0].exitcode == 1
        said = (tmp_path / "log0").read_text()
        assert said.startswith("error: no sign of life from rank 1 ") and said.count("\n") == 1
        assert not (tmp_path / "run").exists()
    finally:
        for process in ranks:
            process.kill()
            process.join()
