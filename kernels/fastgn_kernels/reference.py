"""The plain-PyTorch twin of every op: any floating dtype, any device, any order of derivative.

These are what the ops are tested against, what they become in a compiled region where Inductor does
better, and what to use where a third derivative is wanted.
"""

import math

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
    if kind == "mish":  # the second derivative of F.mish is NaN from 89 on
        wide = u.to(torch.promote_types(u.dtype, torch.float32))
        # beyond the threshold softplus is linear to the last bit of float64
        return (wide * F.softplus(wide, threshold=40).tanh()).to(u.dtype)
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


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See fastgn_kernels.layer_norm."""
    total = x if residual is None else x + residual
    dtype = dtype or total.dtype
    common = torch.promote_types(total.dtype, dtype)
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # PyTorch's second derivative drops a term without one
    if weight is not None:
        weight = weight.to(common)
    if bias is not None:
        bias = bias.to(common)
    y = F.layer_norm(total.to(common), total.shape[-1:], weight, bias, eps).to(dtype)
    return y if residual is None else (y, total)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """See fastgn_kernels.window_attention."""
    scores = q * (q.shape[-1] ** -0.5 if scale is None else scale) @ k.mT
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if mask is not None:
        apart = scores.unflatten(0, (scores.shape[0] // mask.shape[0], mask.shape[0]))
        scores = (apart + mask[:, None].to(scores.dtype)).flatten(0, 1)
    return scores.softmax(-1) @ v


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """See fastgn_kernels.cross_entropy."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if targets.is_floating_point():
        return F.cross_entropy(z, targets.to(z.dtype), reduction=reduction)
    # an index that nothing can be: PyTorch's -100 would pass for a target whose loss is 0
    ignored = torch.iinfo(torch.int64).min
    return F.cross_entropy(z, targets, reduction=reduction, ignore_index=ignored)


def gradient_norm(grad: Tensor, ord: int = 1) -> Tensor:
    """See fastgn_kernels.gradient_norm."""
    x = grad.to(torch.promote_types(grad.dtype, torch.float32))
    x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    if ord == 1:
        return x.abs().sum(1)
    # torch.linalg.vector_norm's second derivative is NaN where the norm is 0
    squares = x.square().sum(1)
    return torch.where(squares == 0, 0.0, torch.where(squares == 0, 1.0, squares).sqrt())
