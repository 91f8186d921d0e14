"""The exponential moving average of a model's weights, in fp32."""

import copy

import torch
from torch import nn


class ModelEma:
    """`module` is a copy of the model whose floating-point weights and buffers follow it in
    fp32."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.module = copy.deepcopy(model).float().eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Once an update. No host sync."""
        averages, values = [], []
        for mine, theirs in zip(self._tensors(self.module), self._tensors(model), strict=True):
            if mine.is_floating_point():
                averages.append(mine)
                values.append(theirs.float())
            else:
                mine.copy_(theirs)  # BatchNorm's counter
        torch._foreach_lerp_(averages, values, 1 - self.decay)

    @staticmethod
    def _tensors(model: nn.Module) -> list[torch.Tensor]:
        return [*model.parameters(), *model.buffers()]
