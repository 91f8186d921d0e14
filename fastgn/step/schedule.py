"""Defines schedules, which are ways to compute and differentiate the penalty of an update."""

import dataclasses
import itertools
from typing import get_args

from fastgn.config.groups import ScheduleKind, StepConfig
from fastgn.objectives import Objective
from fastgn.objectives.options import find_schedule_conflict

SCHEDULES: tuple[str, ...] = get_args(ScheduleKind)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A way to compute and differentiate the penalty.

    exact: double backprop, in one graph if the loss is compiled.
    exact-eager: double backprop by PyTorch's eager autograd.
    finite-difference: (CE(x + h d) - CE(x)) / h. CE is the cross-entropy, and d are the signs of
    its gradient with respect to the images x (Finlay & Oberman 2019). It needs no double backprop.
    central-difference: (CE(x + h d) - CE(x - h d)) / 2h. In both kinds of difference, BatchNorm in
    train mode also takes the shifted images into its running statistics.
    lazy: only every lazy_interval-th update has the penalty, which is then lazy_interval times as
    strong (Karras et al. 2020). Gradient clipping weakens the penalty again.
    subset: only the first subset_fraction of the images of each micro-batch have the penalty.
    """

    kind: str = "exact"
    fd_step: float = StepConfig.fd_step
    """Length h of the step of a finite difference, in units of normalised images."""
    lazy_interval: int = StepConfig.lazy_interval
    """For the kind "lazy", one update has the penalty out of this number of updates."""
    subset_fraction: float = StepConfig.subset_fraction
    """For the kind "subset", share of the images of each micro-batch that have the penalty."""

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"schedule {self.kind!r} should be one of {', '.join(SCHEDULES)}")

    @property
    def divisor(self) -> int:
        """The number that must divide the size of a micro-batch.

        A subset_fraction of 0.75 needs a multiple of 4, because the images with the penalty must be
        a whole number.
        """
        share = self.subset_fraction if self.kind == "subset" else 1.0
        # Begin the search at this n, because a smaller one gives less than one image with penalty.
        # 0.999 images count as one, see is_whole.
        least = max(1, int(0.999 / share))
        return next(n for n in itertools.count(least) if round(share * n) and is_whole(share * n))

    def fewest(self, images: int) -> int:
        """Returns the smallest micro-batch with which every forward gets at least `images` images.

        With subset, the images with the penalty have a forward of their own. If they are half of
        the images, 2 images in a forward need a micro-batch of 4.
        """
        share = self.subset_fraction if self.kind == "subset" else 1.0
        step = self.divisor
        return next(n for n in itertools.count(step, step) if round(share * n) >= images)

    @property
    def is_exact(self) -> bool:
        """Whether the penalty is on all images in every update, by double backprop."""
        return self.kind in ("exact", "exact-eager")

    @property
    def differences(self) -> bool:
        """Whether the penalty is a finite difference of the cross-entropy."""
        return self.kind in ("finite-difference", "central-difference")

    @property
    def cycle(self) -> int:
        """Number of updates after which the order of updates with and without penalty repeats. It
        is lazy_interval for the kind "lazy", otherwise 1."""
        return self.lazy_interval if self.kind == "lazy" else 1

    def __str__(self) -> str:
        values = {"lazy": self.lazy_interval, "subset": self.subset_fraction}
        value = self.fd_step if self.differences else values.get(self.kind)
        return self.kind if value is None else f"{self.kind} {value:g}"


def is_whole(x: float) -> bool:
    """Returns whether `x` is within 0.001 of a whole number.

    For example, 3 times 0.3333 counts as whole, because people write 0.3333 for a third.
    """
    return abs(x - round(x)) < 1e-3


def check_schedule(schedule: Schedule, objective: Objective) -> None:
    """Raises ValueError if the schedule cannot compute the penalty of the objective."""
    conflict = find_schedule_conflict(
        schedule.kind,
        "this objective",
        has_penalty=objective.needs_input_gradient,
        takes_turns=objective.rest is not None,
        allows_differences=objective.differences,
        ce_weight=objective.ce_weight,
    )
    if conflict is not None:
        raise ValueError(f"schedule {schedule} {conflict}")
