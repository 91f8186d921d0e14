"""The only clock of the benchmarks: interleaved rounds, the device waited for, mean and spread."""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Mapping

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


def interleaved(
    arms: Mapping[str, Callable[[], object]], *, rounds: int, calls: int, warmup: int = 2
) -> dict[str, Timing]:
    """Times each arm in turn, round after round, so that drift of the machine falls on all
    alike."""
    for run in arms.values():
        for _ in range(warmup):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    gc.collect()
    gc.disable()  # as timeit does: collecting what the compiler left took 0.7 s of one round
    try:
        for _ in range(rounds):
            for name, run in arms.items():
                synchronize()
                start = time.perf_counter()
                for _ in range(calls):
                    run()
                synchronize()
                seconds[name].append((time.perf_counter() - start) / calls)
    finally:
        gc.enable()
    return {name: Timing(tuple(values)) for name, values in seconds.items()}
