"""Coefficients and plain formulas that the tests of objectives share."""

import torch
from torch import Tensor, nn


def gradients(total: Tensor, model: nn.Module) -> Tensor:
    """Returns the gradients of all parameters as one vector. Fails if one has none."""
    grads = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    assert all(g is not None for g in grads)
    return torch.cat([g.flatten() for g in grads])


def soft_ce(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the cross-entropy of each image with its target distribution."""
    return -(targets * logits.log_softmax(1)).sum(1)
