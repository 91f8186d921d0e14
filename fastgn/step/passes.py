"""Counts the passes through the network that an update makes."""

import dataclasses
from typing import NamedTuple

from fastgn.objectives import Objective
from fastgn.step.schedule import Schedule


class Passes(NamedTuple):
    """Two counts of the passes through the network in one update, averaged over all updates."""

    paper: float
    """Number of forward and backward passes, as arXiv 2409.20139 counts them. It is 2 for the
    method natural, 5 for gradnorm, and 8 for training on images attacked by PGD-3."""
    units: float
    """Number of operations, divided by the operations of a forward. It is 3 for the method natural,
    6 for gradnorm, and 9 for training on images attacked by PGD-3. A forward, the gradient of the
    images and the gradient of the weights count 1 each, and a double backward counts 4."""


def count_passes(
    objective: Objective, schedule: Schedule, attack_weight_grads: bool = False
) -> Passes:
    """Returns the numbers of passes through the network in one update.

    schedule: the way in which the penalty is differentiated. attack_weight_grads: whether each step
    of an attack also computes the weights' gradients, as the code of arXiv 2409.20139 does.
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
