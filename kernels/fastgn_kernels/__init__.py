"""Fused PyTorch operators with fused first and second derivatives. See kernels/README.md."""

from fastgn_kernels import flops as _flops  # noqa: F401 - registers formulas
from fastgn_kernels import reference
from fastgn_kernels.activations import activation, gelu, silu
from fastgn_kernels.cross_entropy import cross_entropy
from fastgn_kernels.gradient_norm import gradient_norm
from fastgn_kernels.layer_norm import layer_norm
from fastgn_kernels.maths import TABLE as _TABLE
from fastgn_kernels.window_attention import window_attention, window_attention_qkvpacked

ACTIVATIONS = tuple(_TABLE)
"""Names that the argument `kind` of `activation` accepts."""

__all__ = [
    "ACTIVATIONS",
    "activation",
    "cross_entropy",
    "gelu",
    "gradient_norm",
    "layer_norm",
    "reference",
    "silu",
    "window_attention",
    "window_attention_qkvpacked",
]
