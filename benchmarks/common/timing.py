"""Measures time for all benchmarks.

An arm is one of the things that a benchmark compares, such as a training method. In each of several
rounds, all arms are timed in turn. Each measurement waits until the device has finished its work.
"""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


def summary(values: Sequence[float]) -> dict[str, float]:
    """Returns statistics of some measurements: mean, median, std, min, max, and their number n."""
    return {
        "mean": statistics.fmean(values),
        "median": statistics.median(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def paired_ratios(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Returns values[i] / others[i] for two lists of times, measured in turn in several rounds.

    If the machine becomes slower in a round, both times of that round grow, and the ratio stays.
    """
    return [a / b for a, b in zip(values, others, strict=True)]


def synchronize() -> None:
    """Waits until the GPU has finished its work. Does nothing without a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


FLUSH_BYTES = 4 << 30
"""Number of bytes that `cold` writes before each timed call, to empty the GPU's caches.

This is 70 times the cache of an H200 and takes 1 ms there. In that time the host queues the call,
so the device does not wait for the host during the measurement.
"""


def once(run: Callable[[], object]) -> float:
    """Returns the seconds of one call, including the work that the call queued on the device."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def interleaved(
    arms: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    calls: int | Mapping[str, int],
    warmup: int = 2,
    during: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> dict[str, list[float]]:
    """Times functions in turn, in several rounds, so that a slower machine slows down all of them.

    Returns the name of each function -> its mean seconds per call, one entry per round.

    arms: name -> function without arguments that is timed. calls: number of calls per round, for
    all functions or for each name. warmup: number of calls of each function that come first and are
    not timed. during: name -> context manager that is active during a function's calls in a round.
    The device is idle when the context manager is entered or left. The time for that is not
    measured.
    """

    def measure(name: str, run: Callable[[], object]) -> float:
        times = calls if isinstance(calls, int) else calls[name]
        synchronize()
        with during(name):
            start = time.perf_counter()
            for _ in range(times):
                run()
            synchronize()
            return (time.perf_counter() - start) / times

    return _measure_in_turn(arms, measure, rounds, warmup)


def cold(
    arms: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Times single calls that take microseconds on a GPU, with cold caches, using CUDA events.

    arms: name -> function without arguments that is timed. Before each call, the cache is filled
    with modified data. When the call stores its results in the cache, the cache must write as much
    of this data to memory. So the time includes the cost of such writes. Without CUDA, this is
    `interleaved` with one call per round.
    """
    if not torch.cuda.is_available():
        return interleaved(arms, rounds=rounds, calls=1, warmup=warmup)
    free, _ = torch.cuda.mem_get_info()
    flush = torch.empty(min(FLUSH_BYTES, free // 8), dtype=torch.uint8, device="cuda")

    def measure(name: str, run: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        run()
        end.record()
        return start, end

    measured = _measure_in_turn(arms, measure, rounds, warmup)
    synchronize()
    return {
        name: [start.elapsed_time(end) / 1e3 for start, end in events]
        for name, events in measured.items()
    }


def _measure_in_turn(
    arms: Mapping[str, Callable[[], object]],
    measure: Callable[[str, Callable[[], object]], Any],
    rounds: int,
    warmup: int,
) -> dict[str, list[Any]]:
    """Measures functions in turn, in several rounds. Returns name -> one result per round.

    arms: name -> function without arguments. measure: takes a name and its function, and returns
    the result. warmup: number of calls of each function before the first round.
    """
    for run in arms.values():
        for _ in range(warmup):
            run()
    measured: dict[str, list[Any]] = {name: [] for name in arms}
    gc.collect()
    gc.disable()  # because a garbage collection during a measurement once took 0.7 s
    try:
        for _ in range(rounds):
            for name, run in arms.items():
                measured[name].append(measure(name, run))
    finally:
        gc.enable()
    return measured
