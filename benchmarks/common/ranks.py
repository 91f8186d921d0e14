"""Calls a function in several new processes of this machine, which form a process group."""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from benchmarks.common.records import read_json, write_json
from fastgn import distributed


def call_in_ranks(function: Callable[..., Any], processes: int, *arguments: Any) -> list[Any]:
    """Calls function(world, *arguments) in new processes, and returns the result of each process.

    function: function of a module, which takes a World and returns a dict that JSON can hold.
    Raises an error whose text ends with the traceback of a process that has failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        names = {"WORLD_SIZE": f"{processes}", "LOCAL_WORLD_SIZE": f"{processes}"}
        names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{get_free_port()}"}
        torch.multiprocessing.spawn(run_rank, (function, names, folder, arguments), processes)
        return [read_json(Path(folder) / f"{rank}.json") for rank in range(processes)]


def run_rank(
    rank: int, function: Callable, names: Mapping[str, str], folder: str, arguments: Sequence[Any]
) -> None:
    """Calls the function in one process. names: environment variables, like those of torchrun."""
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # a store is where torchrun's ranks meet
    os.environ.update({**names, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"})
    torch.set_num_threads(1)
    with distributed.session() as world:
        result = function(world, *arguments)
    write_json(Path(folder) / f"{rank}.json", result)
