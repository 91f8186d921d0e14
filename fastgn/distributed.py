"""The processes of a run, with their ranks, their devices and the collectives between them.

Collectives on Python values use gloo and CPU memory, so that no CPU has to wait for its device.
The collectives that sum gradients are in fastgn.step.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, cast

import torch
from torch import Tensor

from fastgn.errors import UserError, check, first_line
from fastgn.heartbeat import Heartbeat, is_connection_loss

MEETING_TIMEOUT = timedelta(minutes=30)
"""Longest time that a collective waits for a rank. It is long because a rank may download or
compile something while the others wait."""
VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that torchrun sets for each process of a job."""

INSTALL_FOR_VOLTA = (
    "pip install --force-reinstall --index-url https://download.pytorch.org/whl/cu126 "
    "'torch>=2.11,<2.15' torchvision"
)
"""Command that replaces any PyTorch by one with code for GPUs below compute capability 7.5."""


@dataclasses.dataclass(frozen=True)
class World:
    """This process's rank and device, and collectives with the other ranks."""

    rank: int
    """Index of this process among all processes, from 0."""
    size: int
    """Number of processes."""
    device: torch.device
    control: "torch.distributed.ProcessGroup | None" = None
    """Process group that uses gloo, so that the ranks exchange values without waiting for their
    devices. None means that there is one rank."""
    held: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)
    """Context managers that are exited when `session` ends, such as the lock on a run's folder."""
    heartbeat: Heartbeat | None = None
    """Detects ranks that have stopped. None means that there is one rank."""

    @property
    def nodes(self) -> int:
        """Returns the number of machines, according to torchrun's LOCAL_WORLD_SIZE."""
        return -(-self.size // count_local_ranks(self.size))

    @property
    def is_main(self) -> bool:
        """Returns whether this is the first rank, which writes files and messages."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Replaces a tensor by its sum over all ranks, in place, and returns it."""
        if self.size > 1:
            self._count_collective()
            torch.distributed.all_reduce(value)
        return value

    def read(self, value: Tensor) -> float:
        """Returns the number in a tensor, after waiting for the device. The heartbeat warns if the
        device takes long."""
        if self.heartbeat is None:
            return float(value.item())
        self.heartbeat.waits_for_device = True
        try:
            return float(value.item())
        finally:
            self.heartbeat.waits_for_device = False

    def broadcast(self, value: Tensor) -> None:
        """Replaces a tensor by the tensor of the first rank, in place."""
        if self.size > 1:
            self._count_collective()
            torch.distributed.broadcast(value, src=0)

    def any(self, flag: bool) -> bool:
        """Returns whether `flag` is True on any rank. Does not wait for the devices."""
        return self.min(-float(flag)) < 0

    def min(self, value: float) -> float:
        """Returns the smallest of the values that the ranks pass. Does not wait for the devices."""
        if self.size == 1:
            return value
        self._count_collective()
        least = torch.tensor(value, dtype=torch.float64)
        torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN, group=self.control)
        return float(least.item())

    def gather(self, items: list[str]) -> list[str]:
        """Returns one list with the items of all ranks, in the order of the ranks. Does not wait
        for the devices."""
        if self.size == 1:
            return list(items)
        self._count_collective()
        parts: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(parts, items, group=self.control)
        return [item for part in parts for item in part]

    def share(self, value: Any) -> Any:
        """Returns the first rank's value, which must support pickle. Does not wait for the
        devices."""
        if self.size == 1:
            return value
        self._count_collective()
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def _count_collective(self) -> None:
        """Counts a collective that begins. The heartbeat compares this count with those of the
        other ranks, to find ranks that are late."""
        if self.heartbeat is not None:
            self.heartbeat.collectives += 1

    @contextlib.contextmanager
    def run_first_rank_first(self) -> Iterator[None]:
        """Runs the block on the first rank of each machine, and on its other ranks afterwards.

        The first rank can then download a file, which the others find in the cache.
        """
        later = os.environ.get("LOCAL_RANK", "0") != "0"
        if later:
            self.barrier()
        yield
        if not later:
            self.barrier()

    def barrier(self) -> None:
        """Waits until all ranks have called this method."""
        if self.size > 1:
            self._count_collective()
            torch.distributed.barrier()


@contextlib.contextmanager
def session(
    device: str = "auto",
    *,
    rank_timeout: float = 5.0,
    meeting_timeout: timedelta = MEETING_TIMEOUT,
) -> Iterator[World]:
    """Joins the process group of torchrun, with nccl on CUDA and with gloo on CPU, and yields the
    World.

    Without torchrun there is one process and no group.

    device: auto, cpu or cuda. rank_timeout: minutes after which a rank that gives no sign of life
    ends the job. meeting_timeout: longest time that a collective with gloo waits for a rank that is
    alive but late.

    Raises UserError if CUDA is demanded but missing, or if the installed PyTorch has no code for
    the GPU. Also raises UserError if there are more processes than GPUs, if torchrun's variables
    are incomplete, or if the connection to a rank is lost.
    """
    rank, size, local_rank = read_ranks()
    has_cuda = torch.cuda.is_available()
    check(
        device != "cuda" or has_cuda,
        "--device cuda: this machine has no CUDA device (or torch was built without CUDA); use "
        "--device cpu",
    )
    kind = "cuda" if has_cuda and device != "cpu" else "cpu"
    chosen = torch.device("cpu")
    if kind == "cuda":
        check_has_device(local_rank, count_local_ranks(size))
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)  # otherwise the next line would make a context on GPU 0
        check_has_code(chosen)
    with contextlib.ExitStack() as held:
        if size == 1:
            yield World(0, 1, chosen, held=held)
            return
        limit = timedelta(minutes=rank_timeout)
        store: Any = connect_to_store(limit, serve=rank == 0 and not has_agent_store())
        # Torchrun's store may contain reports of dead ranks from an earlier start of the job.
        # Therefore the keys of each start begin with the number of restarts and of ranks.
        # The number of ranks is included because it can change without a restart.
        # Without torchrun's store, machines that join later would count fewer restarts, so use 0.
        start = count_restarts() if has_agent_store() else 0
        store = torch.distributed.PrefixStore(f"fastgn/{start}/{size}", store)
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
                heartbeat.collectives += 1
                # wait for all ranks, because a rank that leaves earlier would seem to have failed
                torch.distributed.barrier(group=cast(Any, control))
        except RuntimeError as error:
            if not is_connection_loss(error):
                raise
            raise UserError(heartbeat.explain_failure(error)) from None
        # not done after an error, because the other ranks would fail before this rank prints it
        torch.distributed.destroy_process_group()


def check_has_device(local_rank: int, processes: int) -> None:
    """Raises UserError if there is no CUDA device for one of several processes of a machine.

    local_rank: index of the process on the machine, from 0.
    """
    count = torch.cuda.device_count()
    check(
        local_rank < count,
        f"torchrun started {processes} processes for {count} CUDA devices: lower --nproc-per-node "
        f"to {count}",
    )


def check_has_code(device: torch.device) -> None:
    """Raises UserError if the installed PyTorch has no code for a CUDA device.

    Without this check, the first kernel on the device would fail with "no kernel image is
    available". PyTorch has code for some compute capabilities, such as sm_80 for 8.0. Such code
    also runs on later capabilities with the same major version. PyTorch may also contain PTX, such
    as compute_120, which runs on all later devices.
    """
    capability = torch.cuda.get_device_capability(device)
    builds = torch.cuda.get_arch_list()
    for build in builds:
        kind, _, number = build.partition("_")
        digits = number.rstrip("af")
        if not digits.isdecimal():
            return  # this PyTorch is for GPUs of another maker
        built = int(digits[:-1]), int(digits[-1])
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return
    remedy = "install a newer PyTorch, or a build for a newer CUDA"
    if capability < (7, 5):
        remedy = (
            f"install PyTorch 2.11 to 2.14 for CUDA 12.6 ({INSTALL_FOR_VOLTA}), see docs/v100.md"
        )
    if capability < (5, 0):
        remedy = "use another GPU, because no PyTorch that fastgn supports has code for this one"
    check(
        not builds,
        f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}."
        f"{capability[1]}, but PyTorch {torch.__version__} has code only for {', '.join(builds)}: "
        f"{remedy}",
    )


def read_ranks() -> tuple[int, int, int]:
    """Returns (rank, number of ranks, rank on this machine) from torchrun's environment variables.

    Raises UserError if some of the variables are missing or contradict each other.
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
        f"WORLD_SIZE={given['WORLD_SIZE']} is set without {', '.join(missing)}: {remedy}",
    )
    numbers = {n: int(v) if v.isdecimal() else -1 for n, v in given.items() if n != "MASTER_ADDR"}
    check(
        min(numbers.values()) >= 0
        and numbers["RANK"] < numbers["WORLD_SIZE"]
        and numbers["MASTER_PORT"] < 2**16,
        f"{' '.join(f'{name}={given[name]}' for name in numbers)} contradict each other: {remedy}",
    )
    return numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"]


def is_under_torchrun() -> bool:
    """Returns whether torchrun has started this process and watches its exit status."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def has_agent_store() -> bool:
    """Returns whether torchrun itself serves the job's key-value store, which then outlives the
    ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def count_restarts() -> int:
    """Returns the number of times that torchrun has restarted this job's ranks."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def count_local_ranks(otherwise: int = 1) -> int:
    """Returns the number of ranks on this machine, from torchrun's variable LOCAL_WORLD_SIZE.

    Returns `otherwise` if the variable is not set.
    """
    return int(os.environ.get("LOCAL_WORLD_SIZE") or otherwise)


def connect_to_store(limit: timedelta, *, serve: bool = False) -> torch.distributed.TCPStore:
    """Returns the job's key-value store, which this process serves if `serve` is True.

    limit: time to wait for a connection. Raises UserError if the store cannot be served or reached.
    """
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
            f"MASTER_ADDR={host} MASTER_PORT={port}: rank 0 "
            f"{'cannot listen' if serve else 'cannot be reached'} there: {first_line(error)}"
        ) from None


def share_across_restarts(key: str, value: str) -> str:
    """Returns the value that was passed for a key when a torchrun job was first started.

    Ranks that torchrun restarts therefore get the same value again. If torchrun serves no store,
    returns `value`.
    """
    if not has_agent_store():
        return value
    return connect_to_store(timedelta(minutes=1)).compare_set(f"fastgn/{key}", "", value).decode()
