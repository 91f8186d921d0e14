"""Marks for the cases of a test, and cards that are not here."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch


def pretend_card(patch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]) -> torch.device:
    """Makes PyTorch report a CUDA device of this name and compute capability, and returns the
    device. Nothing can run on it."""
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    patch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    return torch.device("cuda", 0)


def first_is_quick(cases: Iterable[Any], quick: int = 1) -> list[Any]:
    """Returns cases for pytest.mark.parametrize, of which all but the first have the mark `slow`.

    cases: the value of each case, or a tuple of values. quick: number of cases without the mark.
    """
    split = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [
        pytest.param(*values, marks=[pytest.mark.slow] if index >= quick else [])
        for index, values in enumerate(split)
    ]
