"""Fused operators whose backward has a fused backward: see kernels/README.md."""

from fastgn_kernels import reference
from fastgn_kernels.activations import activation, gelu, silu
from fastgn_kernels.maths import TABLE as _TABLE

ACTIVATIONS = tuple(_TABLE)
"""Kinds of `activation`."""

__all__ = ["ACTIVATIONS", "activation", "gelu", "reference", "silu"]
