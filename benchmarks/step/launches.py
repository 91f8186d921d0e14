"""Number of kernels that an update launches, and how long the GPU is at work on them."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.common.timing import synchronize
from fastgn.step.meter import Meter


def launches(run: Callable[[], object], compiled: bool) -> tuple[str, int | None, float | None]:
    """Counts the kernels that a call launches, or on a CPU the operators that read or write memory.

    compiled: whether torch.compile has compiled the call. Returns what is counted, the number, and
    the seconds in which the GPU was at work. A value that cannot be measured is None, such as the
    number of operators in a compiled call.
    """
    if torch.cuda.is_available():
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run()
            synchronize()
        kernels = [e for e in profiler.events() if is_kernel(e)]
        busy_s = sum(e.time_range.elapsed_us() for e in kernels) / 1e6
        # if the profiler shows no kernel, the machine does not allow profiling
        return "kernels launched", len(kernels) or None, busy_s or None
    what = "operators without views"
    if compiled:
        return what, None, None
    with Meter() as meter:
        run()
    return what, meter.operators, None


def is_kernel(event: Any) -> bool:
    """Returns whether an event of PyTorch's profiler is a kernel, not host code or a copy."""
    return (
        event.device_type == DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset"))
        and not getattr(event, "is_user_annotation", False)
    )
