"""Reads options whose value is a list of texts that are each written as key=value."""

import ast
from collections.abc import Sequence
from typing import Any

from fastgn.errors import check


def model_kwargs(pairs: Sequence[str]) -> dict[str, Any]:
    """Returns --model-kwargs as a dictionary, such as {'depths': (2, 2)} for ('depths=(2, 2)',).

    A value that is not a Python literal stays a string. Raises UserError unless each pair is
    written as key=value.
    """
    out = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        check(bool(equals and key), f"--model-kwargs {pair!r} should be key=value")
        try:
            out[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            out[key] = value
    return out
