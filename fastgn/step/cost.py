"""Counts the cost of an update before it runs.

`count_cost` runs the real Step without compiling it. It runs on fake tensors, which have shapes and
lifetimes but no data. Even for Swin-B with a large batch it takes only seconds and no memory.
"""

import contextlib
import dataclasses
import itertools

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgn.objectives import Objective
from fastgn.step.meter import Meter, autocast_as_on_cuda, fake_copy
from fastgn.step.options import StepOptions
from fastgn.step.passes import Passes, count_passes
from fastgn.step.precision import AUTOCAST
from fastgn.step.schedule import Schedule
from fastgn.step.step import Step


@dataclasses.dataclass(frozen=True)
class StepCost:
    """The cost of an update that is not compiled.

    The counts are means over all updates, because with some schedules the updates differ.
    """

    schedule: str
    precision: str
    passes: Passes
    flops: float
    """Floating-point operations per image."""
    traffic_bytes: float
    """Bytes per image that operators read and write if none are fused."""
    fixed_traffic_bytes: float
    """Bytes per micro-batch that operators read and write for the weights."""
    operators: float
    """Number of operators per micro-batch."""
    fixed_bytes: float
    """Bytes of the peak memory that do not depend on the size of the micro-batch, without weights
    and gradients."""
    image_bytes: float
    """Bytes by which the peak memory grows with every image of the micro-batch."""
    weight_bytes: int
    """Bytes of all weights and buffers."""
    gradient_bytes: int
    """Bytes of all gradients of the weights."""
    kernels: bool
    """Whether LayerNorm or window attention run as ops of fastgn_kernels."""
    double_backward: bool
    """Whether the loss contains a gradient that is differentiated again."""

    def peak_bytes(self, images: int) -> float:
        """Returns the peak memory of a micro-batch in bytes, without weights and gradients."""
        return self.fixed_bytes + images * self.image_bytes


def count_cost(
    model: nn.Module,
    objective: Objective,
    options: StepOptions,
    *,
    batch_size: int,
    img_size: int,
    num_classes: int,
    device_type: str = "cuda",
) -> StepCost:
    """Counts the cost of an update that is not compiled, on micro-batches of up to batch_size
    images.

    The count assumes that the gradients of the weights are allocated already, as they are from the
    second micro-batch on. If only some updates have a penalty, the largest peak memory of all
    updates is taken.

    Peak memory is counted for a few images and for batch_size images, and interpolated between
    these two sizes. The interpolated value is never too low, for this reason. Memory at each moment
    of the update is a linear function of the number of images. The peak is the maximum of these
    functions, so it is convex and nowhere above the line between two of its points.

    device_type: the device whose autocast is imitated.
    """
    schedule = options.schedule
    step = schedule.divisor
    few = schedule.fewest(2)  # two, because BatchNorm cannot be trained on one image
    sizes = (few, max(batch_size // step * step, 2 * few))
    eager = dataclasses.replace(options, compile=False, micro_batch=None)
    updates = share_of_updates(objective, schedule)
    cuda_autocast = device_type == "cuda" and options.precision in AUTOCAST

    def count(images: int, update: int) -> Meter:
        with FakeTensorMode(allow_non_fake_inputs=True):
            copied = fake_copy(model)
            pixels = torch.empty(images, 3, img_size, img_size)
            targets = torch.empty(images, num_classes)
            ramp = torch.empty(())
            step = Step(copied, objective, eager)
            with Meter() as meter:
                step([(pixels, targets)], ramp, update)
        return meter

    with autocast_as_on_cuda() if cuda_autocast else contextlib.nullcontext():
        meters = {update: [count(size, update) for size in sizes] for update in updates}

    def mean(name: str, index: int) -> float:
        return sum(share * getattr(meters[u][index], name) for u, share in updates.items())

    def line(few: float, many: float) -> tuple[float, float]:
        """Returns the intercept, at least 0, and the slope of the line through two measurements.

        few, many: the values for the smaller and for the larger number of images.
        """
        slope = (many - few) / (sizes[1] - sizes[0])
        return max(few - sizes[0] * slope, 0.0), slope

    fixed_traffic, traffic = line(mean("traffic_bytes", 0), mean("traffic_bytes", 1))
    fixed, image = line(*(max(m[i].peak_bytes for m in meters.values()) for i in (0, 1)))
    return StepCost(
        schedule=str(schedule),
        precision=options.precision,
        passes=count_passes(objective, schedule, options.quirks.attack_weight_grads),
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


def share_of_updates(objective: Objective, schedule: Schedule) -> dict[int, float]:
    """Returns {index: share} with one entry for each kind of update.

    There are two kinds if only some updates have the penalty, otherwise one. index: number of the
    first update of this kind. share: this kind's share of all updates.
    """
    if schedule.kind == "lazy" and schedule.lazy_interval > 1:
        share = 1 / schedule.lazy_interval
        return {0: share, 1: 1 - share}
    if objective.rest is not None:
        other = next(u for u in itertools.count(1) if not objective.has_turn(u))
        return {0: objective.share, other: 1 - objective.share}
    return {0: 1.0}
