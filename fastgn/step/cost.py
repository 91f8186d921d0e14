"""Counts the cost of a step before it runs.

`step_cost` runs the real step, eagerly, on fake tensors: shapes and lifetimes without data, so that
Swin-B at any batch takes seconds and no memory.
"""

import contextlib
import dataclasses
import itertools

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgn.objectives import Objective
from fastgn.step.meter import Meter, autocast_as_on_cuda, fake_copy
from fastgn.step.schedule import Passes, Schedule, count_passes
from fastgn.step.step import Step


@dataclasses.dataclass(frozen=True)
class StepCost:
    """An eager step, counted."""

    schedule: str
    precision: str
    passes: Passes
    flops: float
    """An image, on average over updates."""
    traffic_bytes: float
    """An image: read and written by operators that are not fused, on average over updates."""
    fixed_traffic_bytes: float
    """A micro-batch: the weights'."""
    operators: float
    """A micro-batch, on average over updates."""
    fixed_bytes: float
    """Memory at the peak beside weights and gradients, whatever the micro-batch: fixed_bytes +
    images * image_bytes."""
    image_bytes: float
    weight_bytes: int
    """Buffers included."""
    gradient_bytes: int
    kernels: bool
    """Whether LayerNorm or window attention run as ops of fastgn_kernels."""
    double_backward: bool
    """Whether the loss differentiates with respect to the images and is differentiated."""

    def peak_bytes(self, images: int) -> float:
        """Beside weights and gradients, eager."""
        return self.fixed_bytes + images * self.image_bytes


def step_cost(
    model: nn.Module,
    objective: Objective,
    schedule: Schedule,
    *,
    batch_size: int,
    img_size: int,
    num_classes: int,
    precision: str,
    attack_weight_grads: bool = False,
    device_type: str = "cuda",
) -> StepCost:
    """Counts a step on up to batch_size images, run eagerly on fake tensors: seconds, no memory.

    device_type: whose autocast it is to be. Gradients are taken to be there throughout, as from a
    second micro-batch on. Memory is the line through a few images and batch_size: the peak of a
    step is the largest of several lines, so between the two the line lies on it or above. Of
    updates that take turns it is the largest one's.
    """
    step = schedule.divisor
    few = -(-2 // step) * step
    sizes = (few, max(batch_size // step * step, 2 * few))
    # an update without the penalty costs the same whichever it is
    updates = {0: 1.0}
    if schedule.kind == "lazy" and schedule.lazy_interval > 1:
        updates = {0: 1 / schedule.lazy_interval, 1: 1 - 1 / schedule.lazy_interval}
    if objective.rest is not None:
        other = next(u for u in itertools.count(1) if not objective.has_turn(u))
        updates = {0: objective.share, other: 1 - objective.share}
    cuda_autocast = device_type == "cuda" and precision == "bf16"

    def count(images: int, update: int) -> Meter:
        with FakeTensorMode(allow_non_fake_inputs=True):
            copied = fake_copy(model)
            pixels = torch.empty(images, 3, img_size, img_size)
            targets = torch.empty(images, num_classes)
            ramp = torch.empty(())
            with Meter() as meter:
                step = Step(
                    copied,
                    objective,
                    schedule=schedule,
                    compile=False,
                    precision=precision,
                    attack_weight_grads=attack_weight_grads,
                )
                step([(pixels, targets)], ramp, update)
        return meter

    with autocast_as_on_cuda() if cuda_autocast else contextlib.nullcontext():
        meters = {update: [count(size, update) for size in sizes] for update in updates}

    def mean(name: str, index: int) -> float:
        return sum(share * getattr(meters[u][index], name) for u, share in updates.items())

    def line(few: float, many: float) -> tuple[float, float]:
        slope = (many - few) / (sizes[1] - sizes[0])
        return max(few - sizes[0] * slope, 0.0), slope

    fixed_traffic, traffic = line(mean("traffic_bytes", 0), mean("traffic_bytes", 1))
    fixed, image = line(*(max(m[i].peak_bytes for m in meters.values()) for i in (0, 1)))
    return StepCost(
        schedule=str(schedule),
        precision=precision,
        passes=count_passes(objective, schedule, attack_weight_grads),
        flops=mean("flops", 1) / sizes[1],
        traffic_bytes=traffic,
        fixed_traffic_bytes=fixed_traffic,
        operators=mean("operators", 1),
        fixed_bytes=fixed,
        image_bytes=image,
        weight_bytes=sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        gradient_bytes=sum(p.nbytes for p in model.parameters() if p.requires_grad),
        kernels=any(meter.kernels for pair in meters.values() for meter in pair),
        double_backward=objective.needs_input_gradient and not schedule.differences,
    )
