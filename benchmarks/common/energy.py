"""Measures the energy that a GPU takes, in joules, with NVML (package nvidia-ml-py).

Cards from Volta on have a counter for it. It counts the whole board, for all programs on it.
"""

import contextlib
import math
import types
from collections.abc import Iterator
from typing import Any

import torch


class NoMeterError(Exception):
    """Energy cannot be measured on this machine. The message is one line that says why."""


class Meter:
    """Measures the energy of the current CUDA device. Raises NoMeterError if this is impossible.

    The card updates its counter about ten times per second, so a measurement should take a second
    or more.
    """

    source = "NVML's energy counter"

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
            # by UUID, because NVML does not know CUDA_VISIBLE_DEVICES
            uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
            self._card = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(self._card)
        except pynvml.NVMLError as error:
            raise NoMeterError(f"NVML: {error}") from None

    @contextlib.contextmanager
    def measuring(self) -> Iterator[types.SimpleNamespace]:
        """Measures the joules that the GPU takes inside the with block.

        Yields an object whose attribute `joules` is set when the block ends. It is None before, and
        NaN if the card did not answer.
        """
        reading, before = types.SimpleNamespace(joules=None), self._read()
        yield reading
        reading.joules = self._read() - before

    def _read(self) -> float:
        """Returns the joules that the GPU has taken since its driver was loaded, or NaN."""
        try:
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._card) / 1e3
        except self._nvml.NVMLError:  # a run goes on without its energy
            return math.nan
