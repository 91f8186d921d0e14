"""Worker processes that stand still, as on a network that does not answer: a line, and an end."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from support.odd import PICTURE, run_args, write_tree

import fastgn.data.check as checking
import fastgn.data.pack as packing
import fastgn.data.torch as torch_loader
from fastgn import train
from fastgn.data.datasets import Files
from fastgn.data.torch import map_in_workers
from fastgn.errors import UserError

SAID = r"^worker process \d+ of the data loader has given nothing for 3 s, and was ended: "


def stop_at_2(index: int) -> int:
    if index == 2:
        time.sleep(0.5)  # what came before is handed over by a thread
        os.kill(os.getpid(), signal.SIGSTOP)
    return index


@pytest.fixture
def images(tmp_path: Path) -> Path:
    names = [f"{name}/{i}.png" for name in ("ant", "bee") for i in range(4)]
    return write_tree(tmp_path / "images", dict.fromkeys(names, PICTURE))


@pytest.fixture
def standstill(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads the fourth image in a worker process stands still; workers are forks."""
    read, main = Files.read, os.getpid()

    def stop(self: Files, index: int) -> bytes:
        if index == 3 and os.getpid() != main:
            os.kill(os.getpid(), signal.SIGSTOP)
        return read(self, index)

    monkeypatch.setattr(Files, "read", stop)


def test_a_worker_that_stands_still_is_named_and_ended():
    made, began = map_in_workers(stop_at_2, range(6), 1, 3.0), time.monotonic()
    assert [next(made), next(made)] == [0, 1]
    with pytest.raises(UserError, match=SAID):
        next(made)
    assert time.monotonic() - began < 20
    assert multiprocessing.active_children() == []


def test_slow_workers_have_their_time():
    def slow(index: int) -> int:
        time.sleep(0.5)
        return index

    assert list(map_in_workers(slow, range(5), 1, 2.0)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_a_run_whose_worker_stands_still_ends_with_a_line(
    loader, images, standstill, tmp_path, capsys, monkeypatch
):
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed: fastgn[dali]")
        # DALI's feeder has one process for 4 threads
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4))
    more = ("--loader", loader, "--workers", "4" if loader == "dali" else "1")
    args = run_args(images, tmp_path / "run", *more, "--worker-timeout", "1", "--max-updates", "4")
    began = time.monotonic()
    assert train.main(args) == 2
    assert time.monotonic() - began < 60
    line = capsys.readouterr().err.splitlines()[-1]
    assert "has given nothing for 1 s, and was ended" in line and "--worker-timeout" in line
    assert multiprocessing.active_children() == []


def test_check_and_pack_end_with_a_line(images, standstill, tmp_path, capsys):
    more = ("--workers", "1", "--worker-timeout", "1")
    assert checking.main([str(images), *more]) == 2
    assert packing.main([str(images), str(tmp_path / "out"), *more]) == 2
    for line in capsys.readouterr().err.splitlines():
        assert "has given nothing for 1 s" in line
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_does_not_kill_a_worker_that_starts(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun and SLURM send signals to workers as well, at any time of their life."""
    set_up = torch_loader.set_up_worker

    def receive_then_set_up(worker: int) -> None:
        os.kill(os.getpid(), number)
        set_up(worker)

    def is_held(index: int) -> bool:
        return number in signal.pthread_sigmask(signal.SIG_BLOCK, ())

    monkeypatch.setattr(torch_loader, "set_up_worker", receive_then_set_up)
    assert list(map_in_workers(is_held, range(3), 1, 60.0)) == [False, False, False]
    assert not is_held(0), "in the main process"
