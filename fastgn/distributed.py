"""One process or many: ranks, the device, and the few collectives outside DDP's own."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, cast

import torch
from torch import Tensor

from fastgn.errors import UserError, check, first_line
from fastgn.heartbeat import Heartbeat, is_lost

MEETING_TIMEOUT = timedelta(minutes=30)
"""How long a collective waits for a rank that is alive: one may download or compile alone."""
VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process of a job."""


@dataclasses.dataclass(frozen=True)
class World:
    """This process among the run's."""

    rank: int
    size: int
    device: torch.device
    control: "torch.distributed.ProcessGroup | None" = None
    """A gloo group beside nccl's, so that hosts can agree without waiting for their devices."""
    held: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)
    """What the session lets go of at its end, such as the lock on a run's folder."""
    heartbeat: Heartbeat | None = None
    """None means that there is one rank."""

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
        self._meet()
        least = torch.tensor(value, dtype=torch.float64)
        torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN, group=self.control)
        return float(least.item())

    def gather(self, items: list[str]) -> list[str]:
        """The ranks' items, one rank's after the other's. Host to host."""
        if self.size == 1:
            return list(items)
        self._meet()
        parts: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(parts, items, group=self.control)
        return [item for part in parts for item in part]

    def share(self, value: Any) -> Any:
        """Returns the first rank's value, which can be pickled. Host to host."""
        if self.size == 1:
            return value
        self._meet()
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def _meet(self) -> None:
        if self.heartbeat is not None:
            self.heartbeat.meetings += 1

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
            self._meet()
            torch.distributed.barrier()


@contextlib.contextmanager
def session(
    device: str = "auto",
    *,
    rank_timeout: float = 5.0,
    meeting_timeout: timedelta = MEETING_TIMEOUT,
) -> Iterator[World]:
    """Joins torchrun's process group (nccl on CUDA, gloo on CPU); one process needs none.

    device: auto, cpu or cuda. rank_timeout: minutes after which a rank that gives no sign of life
    ends the job. meeting_timeout: how long hosts wait for a rank that is alive.

    Raises UserError if CUDA is demanded and absent, if there are more processes than GPUs, if
    torchrun's variables are incomplete, or if the connection to another rank is lost.
    """
    rank, size, local_rank = ranks()
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
    with contextlib.ExitStack() as held:
        if size == 1:
            yield World(0, 1, chosen, held=held)
            return
        limit = timedelta(minutes=rank_timeout)
        store: Any = connect(limit, serve=rank == 0 and not has_agent_store())
        # what an earlier start of the job has left in torchrun's store is of dead ranks
        store = torch.distributed.PrefixStore(f"fastgn/{restarts()}", store)
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        heartbeat = Heartbeat(
            store.clone(), place, rank, size, limit.total_seconds(), agent=has_agent_store()
        )
        try:
            with heartbeat:
                torch.distributed.init_process_group(
                    "nccl" if kind == "cuda" else "gloo",
                    store=store,
                    rank=rank,
                    world_size=size,
                    timeout=MEETING_TIMEOUT,
                    device_id=chosen if kind == "cuda" else None,
                )
                control = torch.distributed.new_group(backend="gloo", timeout=meeting_timeout)
                yield World(rank, size, chosen, cast(Any, control), held, heartbeat)
                # one that left early would be taken for one that has stopped
                torch.distributed.barrier(group=cast(Any, control))
        except RuntimeError as error:
            if not is_lost(error):
                raise
            raise UserError(heartbeat.explain(error)) from None
        # not after an error: it would fail the others' collectives before say_error has said why
        torch.distributed.destroy_process_group()


def ranks() -> tuple[int, int, int]:
    """Returns (rank, number of ranks, rank on this machine) from torchrun's variables.

    Raises UserError if some are missing or make no sense together.
    """
    given = {name: os.environ.get(name, "").strip() for name in VARIABLES}
    if given["WORLD_SIZE"] in ("", "1"):
        given |= {"WORLD_SIZE": "1", "RANK": "0"}
        given = {"MASTER_ADDR": "unused", "MASTER_PORT": "0", "LOCAL_RANK": "0"} | {
            name: value for name, value in given.items() if value
        }
    missing = [name for name in VARIABLES if not given[name]]
    remedy = "start with torchrun, which sets them, or unset WORLD_SIZE"
    check(
        not missing,
        f"WORLD_SIZE={given['WORLD_SIZE']} without {', '.join(missing)}: {remedy}",
    )
    numbers = {n: int(v) if v.isdecimal() else -1 for n, v in given.items() if n != "MASTER_ADDR"}
    check(
        min(numbers.values()) >= 0
        and numbers["RANK"] < numbers["WORLD_SIZE"]
        and numbers["MASTER_PORT"] < 2**16,
        f"{' '.join(f'{name}={given[name]}' for name in numbers)} make no sense together: {remedy}",
    )
    return numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"]


def has_agent_store() -> bool:
    """Whether torchrun itself serves the store, which then outlives the ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def restarts() -> int:
    """Returns how often torchrun has started this job's ranks again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def connect(limit: timedelta, *, serve: bool = False) -> torch.distributed.TCPStore:
    """Returns the job's store, served by this process or by another. Raises UserError."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return torch.distributed.TCPStore(
            host,
            port,
            is_master=serve,
            timeout=limit,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"MASTER_ADDR={host} MASTER_PORT={port}: the first rank's store cannot be "
            f"{'served' if serve else 'reached'} there: {first_line(error)}"
        ) from None


def remembered(key: str, value: str) -> str:
    """Returns the value that the first start of a torchrun job gave, on its restarts too."""
    if not has_agent_store():
        return value
    return connect(timedelta(minutes=1)).compare_set(f"fastgn/{key}", "", value).decode()
