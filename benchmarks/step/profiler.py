"""Where a step's time goes: its passes, its operators, and how many kernels it launches."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common.timing import Marks, synchronize
from fastgn.objectives import Objective

OPERATORS = 30
"""The most expensive ones, which are named."""


@contextlib.contextmanager
def marked(marks: Marks, backbone: nn.Module | None, objective: Objective) -> Iterator[None]:
    """Marks the passes of a fastgn.step.step.Step that runs in here.

    backbone: an eager step's network. Its passes are F, the forwards; B, the gradients of images,
    an attack's among them; J, the double backward down to the logits; B', the rest of it, or the
    only backward there is. The cross-entropy belongs to the pass after it. None for a compiled
    step, which has one graph for F and B, beside those of an attack, and one for J and B'.

    No node that the forward made can run before J is over: all of them wait for the gradient of the
    logits, to which J's last node contributes.
    """
    grad, backward = torch.autograd.grad, torch.autograd.backward
    twice = objective.needs_input_gradient
    forward = "F + B" if twice or objective.perturb else "F"
    after = "J + B'" if twice and backbone is None else "B'"
    in_backward = False

    def marked_backward(*args: Any, **kwargs: Any) -> None:
        nonlocal in_backward
        if backbone is None:
            marks(forward)
        in_backward = True
        backward(*args, **kwargs)
        in_backward = False
        marks(after)

    def marked_grad(*args: Any, **kwargs: Any) -> Any:
        found = grad(*args, **kwargs)
        marks("B")
        return found

    def at_logits(_: Tensor) -> None:
        if in_backward:
            marks("J")

    def at_forward(module: nn.Module, inputs: Any, logits: Tensor) -> None:
        marks("F")
        if twice:
            logits.register_hook(at_logits)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.autograd, "backward", marked_backward))
        if backbone is not None:
            stack.enter_context(mock.patch.object(torch.autograd, "grad", marked_grad))
            stack.callback(backbone.register_forward_hook(at_forward).remove)
        yield


class Dispatched(TorchDispatchMode):
    """Counts the operators that reach a kernel, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@dataclasses.dataclass(frozen=True)
class Launches:
    """How many, and of what."""

    what: str
    count: int | None
    busy_s: float | None = None
    """How long the GPU was at work on them; less than the call took where the host is the limit."""


def launches(run: Callable[[], object], compiled: bool) -> Launches:
    """Of one call: kernels on a GPU, aten operators on a CPU, where a compiled step's cannot be
    seen."""
    if torch.cuda.is_available():
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run()
            synchronize()
        kernels = [e for e in profiler.events() if is_kernel(e)]
        what = "kernels launched"
        if not kernels:  # no profiler on this machine
            return Launches(what, None)
        return Launches(what, len(kernels), sum(e.time_range.elapsed_us() for e in kernels) / 1e6)
    what = "aten operators dispatched"
    if compiled:
        return Launches(what, None)
    with Dispatched() as dispatched:
        run()
    return Launches(what, dispatched.count)


def is_kernel(event: Any) -> bool:
    """Whether it is neither the host's, nor a copy, nor the profiler's own annotation."""
    return (
        event.device_type == DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset"))
        and not getattr(event, "is_user_annotation", False)
    )


def by_operator(run: Callable[[], object]) -> dict[str, list[dict[str, Any]]]:
    """The most expensive operators of one call, and on a GPU kernels, by their time on the device:
    {"name", "calls", "share" of all}."""
    gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * gpu]) as profiler:
        run()
        synchronize()
    rows = profiler.key_averages()
    on_host = [r for r in rows if r.device_type == DeviceType.CPU]
    if not gpu:
        return {"operators": _most(on_host, "self_cpu_time_total")}
    kernels = [
        r
        for r in rows
        if r.device_type == DeviceType.CUDA and not getattr(r, "is_user_annotation", False)
    ]
    whole = sum(r.self_device_time_total for r in kernels)
    return {
        "operators": _most(on_host, "self_device_time_total", whole),
        "kernels": _most(kernels, "self_device_time_total", whole),
    }


def _most(rows: Sequence[Any], field: str, whole: float | None = None) -> list[dict[str, Any]]:
    whole = whole or sum(getattr(row, field) for row in rows) or 1.0
    ranked = sorted(rows, key=lambda row: getattr(row, field), reverse=True)[:OPERATORS]
    return [{"name": r.key, "calls": r.count, "share": getattr(r, field) / whole} for r in ranked]
