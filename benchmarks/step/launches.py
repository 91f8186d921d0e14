"""Number of kernels that an update launches, and how long the GPU is at work on them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common.timing import synchronize


class Dispatched(TorchDispatchMode):
    """Counts the ATen operators that run, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@dataclasses.dataclass(frozen=True)
class Launches:
    """Number of kernel launches of one call, and the GPU's working time."""

    what: str
    """Kind of launches that are counted: kernels on a GPU, ATen operators on a CPU."""
    count: int | None
    """Number of launches, None if it cannot be found out."""
    busy_s: float | None = None
    """Seconds in which the GPU was at work. If the call took longer, the GPU waited for the
    host."""


def launches(run: Callable[[], object], compiled: bool) -> Launches:
    """Counts the kernels that a call launches, or on a CPU the ATen operators that it runs.

    compiled: whether torch.compile has compiled the call. On a CPU its operators cannot be counted.
    """
    if torch.cuda.is_available():
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run()
            synchronize()
        kernels = [e for e in profiler.events() if is_kernel(e)]
        what = "kernels launched"
        if not kernels:  # the machine does not let programs profile
            return Launches(what, None)
        return Launches(what, len(kernels), sum(e.time_range.elapsed_us() for e in kernels) / 1e6)
    what = "aten operators dispatched"
    if compiled:
        return Launches(what, None)
    with Dispatched() as dispatched:
        run()
    return Launches(what, dispatched.count)


def is_kernel(event: Any) -> bool:
    """Returns whether an event of PyTorch's profiler is a kernel, not host code, a copy or a
    note."""
    return (
        event.device_type == DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset"))
        and not getattr(event, "is_user_annotation", False)
    )
