"""Programs that run as two ranks on one machine."""

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
    """Returns the number of a port that nothing uses at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def as_rank(rank: int, port: int, log: str, function: Callable[..., Any], args: tuple) -> None:
    """Calls a function as one of two ranks, as torchrun would, with its output in a file."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    os.environ.update({k: str(v) for k, v in names.items()})
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    sys.exit(function(*args))


def start_two(folder: Path, function: Callable[..., Any], *args: Any) -> list[BaseProcess]:
    """Starts function(*args) on ranks 0 and 1, from a fork server that has imported torch.

    Their output goes to folder/log0 and folder/log1.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastgn.train", "fastgn.evaluate"])
    port = free_port()
    ranks = [
        context.Process(target=as_rank, args=(r, port, str(folder / f"log{r}"), function, args))
        for r in range(2)
    ]
    for process in ranks:
        process.start()
    return ranks


def on_two_ranks(folder: Path, function: Callable[..., Any], *args: Any) -> list[str]:
    """Runs function(*args), which returns an exit status, on two ranks; returns their output."""
    ranks = start_two(folder, function, *args)
    try:
        for process in ranks:
            process.join(300)  # two of them compile, on cores that others may use
    finally:
        for process in ranks:
            process.kill()
    said = [(folder / f"log{r}").read_text() for r in range(2)]
    assert [p.exitcode for p in ranks] == [0, 0], "\n".join(said)
    return said
