"""One update of a small network: its batches, its gradients and what it costs."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastgn.models.network import Classifier
from fastgn.step.options import Quirks, StepOptions
from fastgn.step.schedule import Schedule
from fastgn.step.step import Step
from support.networks import IMAGES, NoModules, classifier, objective, soft_targets, vit


def gradients(model: nn.Module) -> Tensor:
    """Returns the gradients of all parameters that have one, as one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def batches_for(build, count: int, dtype: torch.dtype = torch.float32) -> list:
    """Returns batches of 4 random images with soft targets, the same for each call."""
    torch.manual_seed(1)
    side = IMAGES[build]
    return [
        (torch.rand(4, 3, side, side, dtype=dtype), soft_targets(4, dtype=dtype))
        for _ in range(count)
    ]


def flops(
    model: Classifier,
    batch: tuple,
    schedule: Schedule = Schedule(),  # noqa: B008 - frozen
    update: int = 0,
    **values,
) -> int:
    """Returns the floating-point operations of one eager update.

    values: options of the objective that differ from the defaults.
    """
    quirks = Quirks(attack_weight_grads=values.pop("attack_weight_grads", False))
    options = StepOptions(schedule, compile=False, quirks=quirks)
    step = Step(model, objective(**values), options)
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()
    with counter:
        step([batch], torch.tensor(1.0), update)
    return counter.get_total_flops()


def model_and_batch(build=vit, dtype: torch.dtype = torch.float64) -> tuple[Classifier, tuple]:
    """Returns a network and one batch for it."""
    return classifier(build, dtype), batches_for(build, 1, dtype)[0]


def scheduled(
    kind: str, build=vit, dtype: torch.dtype = torch.float64, update: int = 0, **values
) -> tuple[Tensor, Any]:
    """Returns the weights' gradients after one update with a schedule, and its losses.

    values: options of the objective, the step and the schedule that differ from the defaults.
    """
    options = {k: values.pop(k) for k in ("compile", "micro_batch", "precision") if k in values}
    keys = ("fd_step", "lazy_interval", "subset_fraction")
    schedule = Schedule(kind, **{k: values.pop(k) for k in keys if k in values})
    model, batch = model_and_batch(build, dtype)
    step = Step(model, objective(**values), StepOptions(schedule, **{"compile": False} | options))
    loss = step([batch], torch.tensor(1.0, dtype=dtype), update)
    return gradients(model), loss
