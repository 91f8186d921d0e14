"""Programs that run as several ranks on one machine."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def as_rank(
    rank: int, count: int, port: int, log: str, function: Callable[..., Any], args: tuple
) -> None:
    """Calls a function as one of several ranks, as torchrun would, with its output in a file."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    os.environ.update({k: str(v) for k, v in names.items()})
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    sys.exit(function(*args))


def start_process(function: Callable[..., Any], *args: Any) -> BaseProcess:
    """Starts function(*args) in a process of a fork server that has imported torch.

    A fork of the tests' own process would not do. If autograd has run there, PyTorch refuses to
    differentiate in the fork, and an exception in the fork would let it go on with the tests.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastgn.train", "fastgn.evaluate"])
    process = context.Process(target=function, args=args)
    process.start()
    return process


def exit_code(process: BaseProcess) -> int | None:
    """Waits for a process and returns its exit status, or minus the signal that ended it."""
    process.join(300)
    return process.exitcode


def start_ranks(
    folder: Path, count: int, function: Callable[..., Any], *args: Any
) -> list[BaseProcess]:
    """Starts function(*args) on several ranks, from a fork server that has imported torch.

    Their output goes to folder/log0, folder/log1 and so on.
    """
    port = free_port()
    return [
        start_process(as_rank, r, count, port, str(folder / f"log{r}"), function, args)
        for r in range(count)
    ]


def start_two(folder: Path, function: Callable[..., Any], *args: Any) -> list[BaseProcess]:
    """Starts function(*args) on ranks 0 and 1, as start_ranks does."""
    return start_ranks(folder, 2, function, *args)


def on_ranks(folder: Path, count: int, function: Callable[..., Any], *args: Any) -> list[str]:
    """Runs function(*args), which returns an exit status, on several ranks.

    Returns the output of each rank. Raises AssertionError if an exit status is not 0.
    """
    ranks = start_ranks(folder, count, function, *args)
    try:
        for process in ranks:
            process.join(300 * count)  # they compile, on cores that others may use
    finally:
        for process in ranks:
            process.kill()
    said = [(folder / f"log{r}").read_text() for r in range(count)]
    assert [p.exitcode for p in ranks] == [0] * count, "\n".join(said)
    return said


def on_two_ranks(folder: Path, function: Callable[..., Any], *args: Any) -> list[str]:
    """Runs function(*args) on two ranks, as on_ranks does."""
    return on_ranks(folder, 2, function, *args)
