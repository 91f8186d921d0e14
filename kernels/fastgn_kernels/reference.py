"""The plain-PyTorch twin of every op: any floating dtype, any device, any order of derivative.

These are what the ops are tested against, what they become in a compiled region where Inductor does
better, and what to use where a third derivative is wanted.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def activation(
    x: Tensor, kind: str, bias: Tensor | None = None, parameter: float | None = None
) -> Tensor:
    """See fastgn_kernels.activation."""
    u = x if bias is None else x + bias.to(x.dtype)
    if kind == "gelu":
        return F.gelu(u)
    if kind == "gelu_tanh":
        return F.gelu(u, approximate="tanh")
    if kind == "silu":
        return F.silu(u)
    if kind == "quick_gelu":
        return u * torch.sigmoid(1.702 * u)
    if kind == "mish":
        return F.mish(u)
    if kind == "softplus":
        return F.softplus(u, beta=1.0 if parameter is None else parameter)
    if kind == "elu":
        return F.elu(u, alpha=1.0 if parameter is None else parameter)
    if kind == "tanh":
        return torch.tanh(u)
    if kind == "sigmoid":
        return torch.sigmoid(u)
    if kind == "squared_relu":
        return F.relu(u).square()
    if kind == "relu":
        return F.relu(u)
    if kind == "leaky_relu":
        return F.leaky_relu(u, 0.01 if parameter is None else parameter)
    raise ValueError(f"activation: kind {kind!r} is unknown")
