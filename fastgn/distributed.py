"""One process or many: ranks, the device, and the few collectives outside DDP's own."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, cast

import torch
from torch import Tensor

from fastgn.errors import check


@dataclasses.dataclass(frozen=True)
class World:
    """This process among the run's."""

    rank: int
    size: int
    device: torch.device
    control: "torch.distributed.ProcessGroup | None" = None
    """A gloo group beside nccl's, so that hosts can agree without waiting for their devices."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(value)
        return value

    def broadcast(self, value: Tensor) -> None:
        """The first rank's value, in place."""
        if self.size > 1:
            torch.distributed.broadcast(value, src=0)

    def any(self, flag: bool) -> bool:
        """Whether any rank says so. Host to host: no device is waited for."""
        return self.least(-float(flag)) < 0

    def least(self, value: float) -> float:
        """The smallest of the ranks' values. Host to host."""
        if self.size == 1:
            return value
        least = torch.tensor(value, dtype=torch.float64)
        torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN, group=self.control)
        return float(least.item())

    def gather(self, items: list[str]) -> list[str]:
        """The ranks' items, one rank's after the other's. Host to host."""
        if self.size == 1:
            return list(items)
        parts: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(parts, items, group=self.control)
        return [item for part in parts for item in part]

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first rank of each machine runs the block, then the others: one download is
        enough."""
        later = os.environ.get("LOCAL_RANK", "0") != "0"
        if later:
            self.barrier()
        yield
        if not later:
            self.barrier()

    def barrier(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()


@contextlib.contextmanager
def session(device: str = "auto") -> Iterator[World]:
    """Joins torchrun's process group (nccl on CUDA, gloo on CPU); one process needs none.

    device: auto, cpu or cuda. Raises UserError where CUDA is demanded and absent, or where more
    processes than GPUs were started.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    has_cuda = torch.cuda.is_available()
    check(
        device != "cuda" or has_cuda,
        "--device cuda: this machine has no CUDA device (or torch was built without CUDA); use "
        "--device cpu",
    )
    kind = "cuda" if has_cuda and device != "cpu" else "cpu"
    chosen = torch.device("cpu")
    if kind == "cuda":
        count = torch.cuda.device_count()
        check(
            local_rank < count,
            f"torchrun started {os.environ.get('LOCAL_WORLD_SIZE', size)} processes for {count} "
            f"CUDA devices: lower --nproc-per-node to {count}",
        )
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    if size == 1:
        yield World(0, 1, chosen)
        return
    torch.distributed.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        timeout=timedelta(minutes=30),
        device_id=chosen if kind == "cuda" else None,
    )
    # an evaluation's ranks meet when the slowest has attacked its last batch
    control = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))
    yield World(torch.distributed.get_rank(), size, chosen, cast(Any, control))
    # not after an error: it would fail the others' collectives before say_error has said why
    torch.distributed.destroy_process_group()
