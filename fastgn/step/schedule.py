"""The schedules of a penalty's passes, and what each one costs."""

import dataclasses
import itertools
from typing import NamedTuple

from fastgn.objectives import Objective

SCHEDULES = ("exact", "exact-eager", "finite-difference", "central-difference", "lazy", "subset")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which passes a step makes for its penalty."""

    kind: str = "exact"
    """exact: double backprop, one compiled graph; exact-eager: the same by PyTorch's eager engine.
    finite-difference: (CE(x + h d) - CE(x)) / h with d the signs of the input gradient (Finlay &
    Oberman 2019), which needs no double backprop; central-difference: (CE(x + h d) - CE(x - h d)) /
    2h; BatchNorm in train mode sees all these points. lazy: every lazy_interval-th update has the
    penalty, that many times as strong (Karras et al. 2020) unless the gradient is clipped. subset:
    the first subset_fraction of the images, of each micro-batch where there are several."""
    fd_step: float = 1e-2
    """h, in normalised units."""
    lazy_interval: int = 4
    subset_fraction: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"schedule {self.kind!r} should be one of {', '.join(SCHEDULES)}")

    @property
    def divisor(self) -> int:
        """What a number of images has to be a multiple of: of 4 for a subset of 0.75 or 0.25."""
        share = self.subset_fraction if self.kind == "subset" else 1.0
        least = max(1, int(0.999 / share))  # of fewer the share is none: a tiny one takes no search
        return next(n for n in itertools.count(least) if round(share * n) and is_whole(share * n))

    @property
    def differences(self) -> bool:
        return self.kind in ("finite-difference", "central-difference")

    def __str__(self) -> str:
        values = {"lazy": self.lazy_interval, "subset": self.subset_fraction}
        value = self.fd_step if self.differences else values.get(self.kind)
        return self.kind if value is None else f"{self.kind} {value:g}"


def is_whole(x: float) -> bool:
    """To the digits that a fraction is written with: 3 times 0.3333 is."""
    return abs(x - round(x)) < 1e-3


class Passes(NamedTuple):
    """What one update costs, on average over updates."""

    paper: float
    """Forward and backward sweeps, as arXiv 2409.20139 counts them: natural 2, gradnorm 5, PGD-3
    8."""
    units: float
    """Operations in forwards: a forward is 1, the gradient of the images 1, of the weights 1, a
    double backward 4. natural 3, gradnorm 6, PGD-3 9."""


def count_passes(
    objective: Objective, schedule: Schedule, attack_weight_grads: bool = False
) -> Passes:
    """The passes of a step of `objective` by `schedule`.

    attack_weight_grads: see config.ObjectiveConfig.
    """
    if objective.rest is not None:
        alone = dataclasses.replace(objective, rest=None)
        turns = (objective.share, alone), (1 - objective.share, objective.rest)
        counts = [(s, count_passes(o, schedule, attack_weight_grads)) for s, o in turns]
        return Passes(*(sum(s * passes[i] for s, passes in counts) for i in (0, 1)))
    plain, exact = (2.0 * objective.forwards, 3.0 * objective.forwards), (5.0, 6.0)
    share = 1.0 if objective.needs_input_gradient else 0.0
    if schedule.kind == "lazy":
        share /= schedule.lazy_interval
    elif schedule.kind == "subset":
        share *= schedule.subset_fraction
    paper, units = (p + share * (e - p) for p, e in zip(plain, exact, strict=True))
    if schedule.differences:
        points = 3 if schedule.kind == "central-difference" else 2
        paper, units = points * plain[0], points * plain[1]
    steps, forwards = objective.attack_steps, objective.attack_forwards
    paper += 2 * steps + forwards
    units += (3 if attack_weight_grads else 2) * steps + forwards
    return Passes(paper, units)
