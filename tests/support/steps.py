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
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def batches_for(build, count: int, dtype: torch.dtype = torch.float32) -> list:
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
    quirks = Quirks(attack_weight_grads=values.pop("attack_weight_grads", False))
    options = StepOptions(schedule, compile=False, quirks=quirks)
    step = Step(model, objective(**values), options)
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()
    with counter:
        step([batch], torch.tensor(1.0), update)
    return counter.get_total_flops()


def model_and_batch(build=vit, dtype: torch.dtype = torch.float64) -> tuple[Classifier, tuple]:
    return classifier(build, dtype), batches_for(build, 1, dtype)[0]


def scheduled(
    kind: str, build=vit, dtype: torch.dtype = torch.float64, update: int = 0, **values
) -> tuple[Tensor, Any]:
    """The weights' gradients after one update by a schedule, and its losses."""
    options = {k: values.pop(k) for k in ("compile", "micro_batch", "precision") if k in values}
    keys = ("fd_step", "lazy_interval", "subset_fraction")
    schedule = Schedule(kind, **{k: values.pop(k) for k in keys if k in values})
    model, batch = model_and_batch(build, dtype)
    step = Step(model, objective(**values), StepOptions(schedule, **{"compile": False} | options))
    loss = step([batch], torch.tensor(1.0, dtype=dtype), update)
    return gradients(model), loss
