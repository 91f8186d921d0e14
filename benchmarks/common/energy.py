"""Joules that a GPU takes, its whole board's, by NVML (package nvidia-ml-py, module pynvml).

The card's own counter of millijoules where it has one (Volta and later), else its power, sampled.
"""

import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch

SAMPLE_S = 0.02
"""Between samples of the power, where there is no counter: NVML's own are no finer."""


@dataclasses.dataclass
class Reading:
    """Of one stretch of time."""

    joules: float | None = None
    """None until the stretch is over."""


class NoMeterError(Exception):
    """Why there is no meter here, in one line."""


class Meter:
    """Of the current CUDA device. Raises NoMeterError.

    source: how it measures. What it says is of the whole board, whoever else keeps it busy, and
    the counter moves some ten times a second: measure a second or more.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise NoMeterError("no GPU")
        try:
            import pynvml
        except ImportError:
            raise NoMeterError("pynvml is not installed: pip install nvidia-ml-py") from None
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            # by UUID: NVML knows nothing of CUDA_VISIBLE_DEVICES
            uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
            self._card = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except pynvml.NVMLError as error:
            raise NoMeterError(f"NVML: {error}") from None
        try:
            self._counter()
            self.source = "NVML's energy counter"
        except pynvml.NVMLError:
            try:
                self._watts()
            except pynvml.NVMLError as error:
                raise NoMeterError(f"NVML: {error}") from None
            self.source = f"NVML's power, sampled every {1e3 * SAMPLE_S:.0f} ms"

    @contextlib.contextmanager
    def measuring(self) -> Iterator[Reading]:
        """The joules between entering and leaving, to be read afterwards; NaN where the card would
        not say."""
        reading = Reading()
        if "counter" in self.source:
            before = self._asked()
            yield reading
            reading.joules = self._asked() - before
        else:
            with _Sampler(self._watts) as sampler:
                yield reading
            reading.joules = sampler.joules

    def _asked(self) -> float:
        try:
            return self._counter()
        except self._nvml.NVMLError:  # no reason to end a run
            return math.nan

    def _counter(self) -> float:
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._card) / 1e3

    def _watts(self) -> float:
        return self._nvml.nvmlDeviceGetPowerUsage(self._card) / 1e3


class _Sampler(threading.Thread):
    """Sums up a power over time, by trapezoids."""

    def __init__(self, watts: Any):
        super().__init__(daemon=True)
        self.watts = watts
        self.joules = 0.0
        self.over = threading.Event()

    def run(self) -> None:
        last_s, last_watts = time.perf_counter(), self.watts()
        while True:
            over = self.over.wait(SAMPLE_S)
            now_s, now_watts = time.perf_counter(), self.watts()
            self.joules += (now_s - last_s) * (last_watts + now_watts) / 2
            if over:
                return
            last_s, last_watts = now_s, now_watts

    def __enter__(self) -> "_Sampler":
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.over.set()
        self.join()
