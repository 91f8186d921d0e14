"""The clock measures what it says."""

import time
import types

import pytest
import torch

from benchmarks.common import timing
from benchmarks.common.timing import cold, interleaved


def test_the_clock_interleaves_and_counts_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    now_s = 0.0

    def work(name: str, seconds: float) -> None:
        nonlocal now_s
        order.append(name)
        now_s += seconds

    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: now_s))
    arms = {"short": lambda: work("short", 0.25), "long": lambda: work("long", 2)}
    timings = interleaved(arms, rounds=3, calls=2, warmup=1)
    assert order == ["short", "long"] + 3 * (2 * ["short"] + 2 * ["long"])
    assert timings["short"] == [0.25] * 3 and timings["long"] == [2] * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="the cold clock reads CUDA's events")
def test_without_a_gpu_the_cold_clock_is_the_wall_clock() -> None:
    timings = cold({"sleep": lambda: time.sleep(0.002)}, rounds=3, warmup=0)
    assert len(timings["sleep"]) == 3 and min(timings["sleep"]) >= 0.002
