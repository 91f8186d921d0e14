"""Registers the number of operations of window attention with PyTorch's counter of FLOPs.

After an import of this module, FlopCounterMode counts the operations of these ops. It counts only
matrix products, so the other ops of fastgn_kernels, which compute none, need no entry.
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
"""Name of a custom op -> (position of qkv among its arguments, number of matrix products per window
and head). Products that a backward pass computes a second time are included."""


def count_products(position: int, products: int) -> Callable[..., int]:
    """Returns a formula that counts the operations of an op of window attention.

    Each product takes 2 * N * N * D operations for N tokens and D channels. A multiplication and
    an addition are two operations. position, products: see `WINDOW_ATTENTION`.
    """

    def formula(*shapes: Any, **named: Any) -> int:
        _, windows, heads, tokens, dim = shapes[position]
        return products * 2 * windows * heads * tokens * tokens * dim

    return formula


for name, counts in WINDOW_ATTENTION.items():
    register_flop_formula(getattr(torch.ops.fastgn, name))(count_products(*counts))
