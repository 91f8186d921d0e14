"""Marks for the cases of a test."""

from collections.abc import Iterable
from typing import Any

import pytest


def first_is_quick(cases: Iterable[Any], quick: int = 1) -> list[Any]:
    """Returns cases for pytest.mark.parametrize, of which all but the first have the mark `slow`.

    cases: the value of each case, or a tuple of values. quick: number of cases without the mark.
    """
    split = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [
        pytest.param(*values, marks=[pytest.mark.slow] if index >= quick else [])
        for index, values in enumerate(split)
    ]
