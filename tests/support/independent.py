"""The ops of fastgn_kernels, written a second time from elementary operators of PyTorch.

They share no code with fastgn_kernels.reference, except for the values of the activations, which
are those of the Triton source. Tests compare the ops with them where the ops call the reference.
"""

import torch
from fastgn_kernels.maths import TABLE, in_pytorch
from torch import Tensor


def activation(
    x: Tensor, kind: str, bias: Tensor | None = None, parameter: float | None = None
) -> Tensor:
    """Returns the activation of x + bias."""
    u = x if bias is None else x + bias
    return in_pytorch(TABLE[kind].value)(
        u, TABLE[kind].parameter if parameter is None else parameter
    )


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns the normalised x, or the pair of the normalised x + residual and that sum."""
    total = x if residual is None else x + residual
    count = total.shape[-1]
    mean = total.sum(-1, keepdim=True) / count
    variance = (total * total).sum(-1, keepdim=True) / count - mean * mean
    y = (total - mean) / (variance + eps) ** 0.5
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y if residual is None else (y, total)


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Returns the cross-entropy. It overflows if logits are large."""
    if not targets.is_floating_point():
        classes = torch.arange(logits.shape[1], device=logits.device)
        targets = (targets[:, None] == classes).to(logits.dtype)
    logarithm = logits.exp().sum(1).log()
    loss = logarithm * targets.sum(1) - (targets * logits).sum(1)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / len(logits)}[reduction]


def gradient_norm(grad: Tensor, ord: int = 1) -> Tensor:
    """Returns the norm of each sample. It has no derivative where an element or a norm is 0."""
    x = grad.reshape(grad.shape[0], -1)
    return (x * x.sign()).sum(1) if ord == 1 else (x * x).sum(1) ** 0.5


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Returns the attention within each window. It overflows if scores are large."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * (q[..., :, None, :] * k[..., None, :, :]).sum(-1)
    scores = scores if bias is None else scores + bias
    if mask is not None:
        scores = scores + mask.repeat(scores.shape[0] // mask.shape[0], 1, 1)[:, None]
    weights = scores.exp()
    return ((weights / weights.sum(-1, keepdim=True))[..., None] * v[..., None, :, :]).sum(-2)
