"""The only clock of the benchmarks: interleaved rounds, the device waited for, mean and spread."""

import contextlib
import dataclasses
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a call over rounds."""

    rounds: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.rounds)

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def std(self) -> float:
        return statistics.stdev(self.rounds) if len(self.rounds) > 1 else 0.0


def summary(values: Sequence[float]) -> dict[str, float]:
    """Of several measurements of one thing, as a record keeps them."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


FLUSH_BYTES = 4 << 30
"""Written before each call of `cold`: 70 times an H200's cache, and 1 ms there, in which the host
queues the call, so that the device does not wait for it inside the measurement."""


def once(run: Callable[[], object]) -> float:
    """Seconds of one call, the device waited for."""
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
    during: Callable[[str], contextlib.AbstractContextManager] = lambda name: (
        contextlib.nullcontext()
    ),
) -> dict[str, Timing]:
    """Times each arm in turn, round after round, so that drift of the machine falls on all
    alike.

    calls: of an arm in a round, one number or each arm's own; during: what else watches an arm's
    calls of a round. It enters and leaves with the device idle, outside the time taken.
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

    measured = _in_turn(arms, measure, rounds, warmup)
    return {name: Timing(tuple(seconds)) for name, seconds in measured.items()}


def cold(
    arms: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 2
) -> dict[str, Timing]:
    """`interleaved` for what takes microseconds on a GPU: each call's time on the device, by CUDA
    events, with none of its inputs in the cache. That is full of unwritten lines before the call as
    it is after one, so that a call pays for the writing of as many bytes as it writes. Without CUDA
    `interleaved` itself, one call a round, with whatever is in the cache."""
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

    measured = _in_turn(arms, measure, rounds, warmup)
    synchronize()
    return {
        name: Timing(tuple(start.elapsed_time(end) / 1e3 for start, end in events))
        for name, events in measured.items()
    }


class Marks:
    """Instants within a call, taken where the work is done: by CUDA events, which the host does not
    wait for, or else by the wall clock."""

    def __init__(self) -> None:
        self._instants: list[tuple[str, Any]] = []
        self("start")

    def __call__(self, name: str) -> None:
        """What was done since the mark before was `name`."""
        if torch.cuda.is_available():
            instant: Any = torch.cuda.Event(enable_timing=True)
            instant.record()
        else:
            instant = time.perf_counter()
        self._instants.append((name, instant))

    def seconds(self) -> dict[str, float]:
        """Name -> seconds in all, in order of first appearance."""
        synchronize()
        total: dict[str, float] = {}
        for (_, before), (name, after) in itertools.pairwise(self._instants):
            if torch.cuda.is_available():
                spent = before.elapsed_time(after) / 1e3
            else:
                spent = after - before
            total[name] = total.get(name, 0.0) + spent
        return total


def _in_turn(
    arms: Mapping[str, Callable[[], object]],
    measure: Callable[[str, Callable[[], object]], Any],
    rounds: int,
    warmup: int,
) -> dict[str, list[Any]]:
    """What `measure` says of each arm, once a round."""
    for run in arms.values():
        for _ in range(warmup):
            run()
    measured: dict[str, list[Any]] = {name: [] for name in arms}
    gc.collect()
    gc.disable()  # as timeit does: collecting what the compiler left took 0.7 s of one round
    try:
        for _ in range(rounds):
            for name, run in arms.items():
                measured[name].append(measure(name, run))
    finally:
        gc.enable()
    return measured
