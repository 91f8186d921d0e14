"""The only clock of the benchmarks: interleaved rounds, the device waited for, mean and spread."""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Mapping
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


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


FLUSH_BYTES = 4 << 30
"""Written before each call of `cold`: 70 times an H200's cache, and 1 ms there, in which the host
queues the call, so that the device does not wait for it inside the measurement."""


def interleaved(
    arms: Mapping[str, Callable[[], object]], *, rounds: int, calls: int, warmup: int = 2
) -> dict[str, Timing]:
    """Times each arm in turn, round after round, so that drift of the machine falls on all
    alike."""

    def measure(run: Callable[[], object]) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize()
        return (time.perf_counter() - start) / calls

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

    def measure(run: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
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


def _in_turn(
    arms: Mapping[str, Callable[[], object]],
    measure: Callable[[Callable[[], object]], Any],
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
                measured[name].append(measure(run))
    finally:
        gc.enable()
    return measured
