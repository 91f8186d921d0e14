"""Updates the weights from their gradients. In fp16, the device decides whether to do so."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

from fastgn import optim
from fastgn.config import Config
from fastgn.loss_scale import LossScale
from fastgn.step.precision import is_fp16
from fastgn.step.retry import RetryingStep


class Updater:
    """Updates the weights of a run and their moving average.

    In fp16, an update whose gradient is not finite is skipped. Then weights, average, state of the
    optimizer and statistics of BatchNorm stay as they are. The scale of the losses adapts.

    ema: the moving average of the weights, or None. gradients: the object that has computed the
    gradients.
    """

    def __init__(
        self, cfg: Config, model: nn.Module, ema: optim.ModelEmaV3 | None, gradients: RetryingStep
    ):
        self.cfg = cfg
        self.model = model
        self.ema = ema
        self.gradients = gradients
        self.has_moved = False
        """Whether this process has updated the weights. In fp16, its first updates may be
        skipped."""

    def __call__(self, optimizer: torch.optim.Optimizer, lr: float, number: int) -> Tensor:
        """Clips the gradients, and updates the weights. Does not wait for the device, except in
        fp16 until the first update of this process that is not skipped.

        Returns the L2 norm of the gradient before clipping. lr: learning rate of the update.
        number: number of the update, from 1.
        """
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm(
            [p.grad for p in parameters if p.grad is not None]
        )
        if self.cfg.step.clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.cfg.step.clip_grad, grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss_scale = self.gradients.step.loss_scale
        if loss_scale is None:
            optimizer.step()
            self._update_average(number)
            self.has_moved = True
        else:
            self._move_unless(~grad_norm.isfinite(), loss_scale, optimizer, number)
        optimizer.zero_grad()  # sets each .grad to None (apex's method takes no argument)
        return grad_norm

    def _update_average(self, number: int) -> None:
        if self.ema is not None:
            optim.update_average(self.cfg.optimizer, self.ema, self.model, number)

    def _move_unless(
        self,
        skipped: Tensor,
        loss_scale: LossScale,
        optimizer: torch.optim.Optimizer,
        number: int,
    ) -> None:
        """Updates the weights and their average, unless `skipped` is True, and adapts the scale.

        skipped: bool scalar on the device, the same on all ranks.
        """
        loss_scale.update(skipped)
        self.gradients.restore_statistics(skipped)
        if not self.has_moved:
            self.has_moved = not bool(skipped)
            # an optimizer without a state would make one now, which only the host can prevent
            if not (self.has_moved or optimizer.state):
                return
        take_step_unless(optimizer, skipped)
        if self.ema is not None:
            undo = Undo(self.ema.module.state_dict)
            self._update_average(number)
            undo.undo(skipped)


class Undo:
    """Copies of tensors, with which their changes can be undone without waiting for the device.

    read: function that returns {key: tensor} for all tensors that may change. A key that is missing
    now may be there later.
    """

    def __init__(self, read: Callable[[], dict[Any, Tensor]]):
        self.read = read
        self.before = {key: tensor.detach().clone() for key, tensor in read().items()}

    def undo(self, where: Tensor) -> None:
        """Writes the copies back if `where`, a bool scalar on the device, is True.

        A tensor that was not there before is then filled with zeros.
        """
        for key, tensor in self.read().items():
            before = self.before.get(key)
            now = tensor.detach()
            torch.where(where, torch.zeros_like(now) if before is None else before, now, out=now)


def count_copied_bytes(cfg: Config, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Returns the number of bytes that an update copies, so that it can be undone in fp16.

    The copies of weights and state are deleted before those of the moving average are made.
    """
    if not is_fp16(cfg.step.precision):
        return 0
    copied = 0
    if not skips_by_itself(optimizer):
        copied = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        copied += optim.measure_state_bytes(cfg.optimizer, model)
    average = sum(t.nbytes for t in model.state_dict().values()) if cfg.optimizer.model_ema else 0
    return max(copied, average)


def skips_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether an optimizer is one of PyTorch's fused ones, which skip a step themselves."""
    is_from_pytorch = type(optimizer).__module__.startswith("torch.optim")
    return is_from_pytorch and getattr(optimizer, "_step_supports_amp_scaling", False)


def take_step(optimizer: torch.optim.Optimizer, loss_scale: LossScale | None) -> None:
    """Updates the weights. In fp16, a gradient that is not finite skips the step and halves the
    scale. The optimizer must have made a step before."""
    if loss_scale is None:
        optimizer.step()
        return
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [p.grad for p in weights if p.grad is not None]
    skipped = ~torch.nn.utils.get_total_norm(grads).isfinite()
    loss_scale.update(skipped)
    take_step_unless(optimizer, skipped)


def take_step_unless(optimizer: torch.optim.Optimizer, skipped: Tensor) -> None:
    """Updates the weights, unless `skipped`, a bool scalar on the device, is True.

    A skipped step changes neither the weights nor the optimizer's tensors on the device. A number
    that an optimizer keeps on the host, such as Lamb's number of steps, changes nevertheless,
    because the host does not wait for the device. The fused optimizers of PyTorch skip a step
    themselves. For others, weights and state are copied, and written back after a skipped step.
    """
    if skips_by_itself(optimizer):
        optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        optimizer.step()
        return

    def read() -> dict[Any, Tensor]:
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        states = [optimizer.state.get(p, {}) for p in weights]
        found = tree_flatten_with_path((weights, states))[0]
        tensors = {path: x for path, x in found if isinstance(x, Tensor)}
        return {path: x for path, x in tensors.items() if x.device == skipped.device}

    undo = Undo(read)
    optimizer.step()
    undo.undo(skipped)
