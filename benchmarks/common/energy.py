"""Measures the energy that a GPU takes, in joules, with NVML (package nvidia-ml-py).

Cards from Volta on have a counter of joules. The counter covers the whole board and all programs
that use it. The card updates the counter about ten times per second, so a measurement should take a
second or more.
"""

from collections.abc import Callable
from typing import Any

import torch


def energy_counter() -> tuple[Callable[[], float] | None, str]:
    """Returns a function that reads the joules that the current CUDA device has taken so far.

    If energy cannot be measured here, returns None in place of the function. Also returns a text
    that says how energy is measured, or why it is not.
    """
    if not torch.cuda.is_available():
        return None, "not measured: no GPU"
    try:
        import pynvml
    except ImportError:
        return None, "not measured: pynvml is not installed: pip install nvidia-ml-py"
    nvml: Any = pynvml
    try:
        nvml.nvmlInit()
        # finds the card by its UUID, because NVML ignores CUDA_VISIBLE_DEVICES
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        card = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(card)
    except nvml.NVMLError as error:
        return None, f"not measured: NVML: {error}"

    return lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1e3, "NVML's energy counter"
