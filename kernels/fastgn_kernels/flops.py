"""Tells PyTorch's FlopCounterMode how many operations window attention takes.

An import of this module registers a formula for each custom op of window attention. FlopCounterMode
counts only matrix products. The other ops of this package compute no matrix products, so they need
no formula.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import fastgn_kernels.window_attention  # noqa: F401 - defines the ops

WINDOW_ATTENTION = {
    "window_attention": (0, 2),
    "window_attention_bwd": (1, 5),
    "window_attention_bwd_bwd": (3, 12),
}
"""Name of a custom op -> (index of the argument qkv, number of matrix products per window and
head). The number includes products that a backward pass computes again, such as that of queries and
keys."""


def count_products(position: int, products: int) -> Callable[..., int]:
    """Returns a function that computes an op's number of operations from the shapes of its
    arguments.

    A matrix product takes 2 * N * N * D operations for a window of N tokens and a head of D
    channels. A multiplication and an addition count as two operations.

    position: index of qkv among the arguments of the op. products: number of matrix products per
    window and head.
    """

    def formula(*shapes: Any, **named: Any) -> int:
        _, windows, heads, tokens, dim = shapes[position]
        return products * 2 * windows * heads * tokens * tokens * dim

    return formula


for name, counts in WINDOW_ATTENTION.items():
    register_flop_formula(getattr(torch.ops.fastgn, name))(count_products(*counts))
