"""The functions of fastgn_kernels in plain PyTorch.

They work for any floating-point dtype and device. They can be differentiated any number of times,
also in forward mode and by the transforms of torch.func. Each function takes the same arguments and
returns the same result as the function with its name in fastgn_kernels. The arguments are
documented there.

The tests compare the ops with these functions. In code compiled by torch.compile, some ops call
these functions instead of a kernel, because Inductor then generates faster code. In forward mode,
in torch.func and for third derivatives, every op calls them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgn_kernels.dispatch import needs_formula


def activation(
    x: Tensor, kind: str, bias: Tensor | None = None, parameter: float | None = None
) -> Tensor:
    """Returns f(x + bias) for an activation function f, in plain PyTorch.

    Arguments and result are those of `fastgn_kernels.activation`.
    """
    u = x if bias is None else x + bias.to(x.dtype)
    if kind == "gelu":
        return F.gelu(u)
    if kind == "gelu_tanh":
        return F.gelu(u, approximate="tanh")
    if kind == "silu":  # not F.silu, because its first derivative has no forward mode
        wide = _widen(u)
        return (wide * torch.sigmoid(wide)).to(u.dtype)
    if kind == "quick_gelu":
        return u * torch.sigmoid(1.702 * u)
    if kind == "mish":  # not F.mish, because its second derivative is NaN for inputs above 89
        wide = _widen(u)
        # F.softplus(u) returns u above its threshold, which is exact for u above 40 in any dtype
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
    raise ValueError(f"activation: kind {kind!r} is not one of fastgn_kernels.ACTIVATIONS")


def _widen(x: Tensor) -> Tensor:
    """Returns x in float32, or in float64 if x has this dtype."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _exponentiate(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns x - max(x) and the exponential of this difference, over the last dimension."""
    shifted = x - x.amax(-1, keepdim=True).detach()
    return shifted, shifted.exp()


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalises x, or the sum x + residual, over its last dimension, in plain PyTorch.

    Arguments and result are those of `fastgn_kernels.layer_norm`.
    """
    total = x if residual is None else x + residual
    dtype = dtype or total.dtype
    wide = _widen(total.to(torch.promote_types(total.dtype, dtype)))
    # Not F.layer_norm. Its third derivative in x, and the gradient of its forward-mode derivative,
    # are wrong without an error, because they treat mean and variance as constants.
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    y = y.to(dtype)
    return y if residual is None else (y, total)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Returns softmax(scale q k^T + bias + mask) v within each window, in plain PyTorch.

    Arguments and result are those of `fastgn_kernels.window_attention`.
    """
    scores = q * (q.shape[-1] ** -0.5 if scale is None else scale) @ k.mT
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if mask is not None:
        by_mask = scores.unflatten(0, (scores.shape[0] // mask.shape[0], mask.shape[0]))
        scores = (by_mask + mask[:, None].to(scores.dtype)).flatten(0, 1)
    if not needs_formula(scores):
        return scores.softmax(-1) @ v
    # the derivative of torch.softmax in forward mode cannot be differentiated again
    exponential = _exponentiate(scores)[1]
    return exponential / exponential.sum(-1, keepdim=True) @ v


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Returns the cross-entropy loss, in plain PyTorch.

    Arguments and result are those of `fastgn_kernels.cross_entropy`. If a class index in targets is
    out of range, PyTorch raises its own error.
    """
    z = _widen(logits)
    if needs_formula(z, targets):
        # the derivative of F.cross_entropy in forward mode cannot be differentiated again
        shifted, exponential = _exponentiate(z)
        log_p = shifted - exponential.sum(1, keepdim=True).log()
        if targets.is_floating_point():
            loss = -(targets.to(z.dtype) * log_p).sum(1)
        else:
            loss = -log_p.gather(1, targets[:, None])[:, 0]
        return loss if reduction == "none" else getattr(loss, reduction)()
    if targets.is_floating_point():
        return F.cross_entropy(z, targets.to(z.dtype), reduction=reduction)
    # with PyTorch's default ignore_index, a target of -100 would give a loss of 0 and no error
    ignored = torch.iinfo(torch.int64).min
    return F.cross_entropy(z, targets, reduction=reduction, ignore_index=ignored)


def gradient_norm(grad: Tensor, ord: int = 1) -> Tensor:
    """Returns the L1 or L2 norm of each sample of a gradient, in plain PyTorch.

    Arguments and result are those of `fastgn_kernels.gradient_norm`.
    """
    x = _widen(grad)
    x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    if ord == 1:
        return x.abs().sum(1)
    # not torch.linalg.vector_norm, because its second derivative is NaN where the norm is 0
    squares = x.square().sum(1)
    return torch.where(squares == 0, 0.0, torch.where(squares == 0, 1.0, squares).sqrt())
