"""Cross-entropy alone."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastgn.objectives.base import Loss, Objective, Representatives, cross_entropy

if TYPE_CHECKING:
    from fastgn.config.groups import ObjectiveConfig


def natural(model: nn.Module, images_BCHW: Tensor, targets: Tensor) -> Loss:
    """Cross-entropy."""
    ce = cross_entropy(model(images_BCHW), targets)
    return Loss(ce, ce, torch.zeros_like(ce), torch.full_like(ce, torch.nan))


def build_natural(cfg: "ObjectiveConfig", _: Representatives | None) -> Objective:
    def loss(model: Any, images: Tensor, targets: Tensor, ramp: Tensor) -> Loss:
        return natural(model, images, targets)

    return Objective(loss)
