"""The losses of an update, as modules that are compiled as one graph each."""

from typing import Any

from torch import Tensor, nn

from fastgn.attacks import Gradient, leaf_gradient
from fastgn.objectives import Loss, Objective, natural, on_subset, without_penalty
from fastgn.step.precision import autocast, in_precision
from fastgn.step.schedule import Schedule


class LossModule(nn.Module):
    """Computes the whole loss of an objective, including the input gradient that it may need.

    The loss is one module, so that torch.compile compiles it as one graph.
    """

    def __init__(self, model: nn.Module, objective: Objective, precision: str):
        super().__init__()
        self.model = model
        self.objective = objective
        self.precision = precision

    def forward(
        self,
        images_BCHW: Tensor,
        targets: Tensor,
        ramp: Tensor,
        loss_scale: Tensor | None = None,
    ) -> Loss:
        with autocast(images_BCHW.device.type, self.precision):
            network = in_precision(self.model, self.precision, loss_scale)
            return self.objective.loss(network, images_BCHW, targets, ramp)


class AttackGradient(nn.Module):
    """Computes the input gradient that a step of an attack needs, compiled as a graph of its
    own."""

    def __init__(self, model: nn.Module, precision: str):
        super().__init__()
        self.model = model
        self.precision = precision

    def forward(
        self, images_BCHW: Tensor, targets: Tensor, loss_scale: Tensor | None = None
    ) -> Gradient:
        with autocast(images_BCHW.device.type, self.precision):
            network = in_precision(self.model, self.precision)
            return leaf_gradient(network, images_BCHW, targets, loss_scale=loss_scale)


def split_objective(objective: Objective, schedule: Schedule) -> dict[str, Objective]:
    """Returns {name: objective} for the losses that the updates of a run need.

    The name is "penalty" for a loss with the penalty, and "plain" for a loss without it. It is
    "point" for the cross-entropy at one of the points of a finite difference. schedule: the way in
    which the penalty is differentiated.
    """
    if schedule.differences:

        def at_point(model: Any, normalized: Tensor, targets: Tensor, ramp: Tensor) -> Loss:
            return natural(model.backbone, normalized, targets)

        return {"point": Objective(at_point, objective.perturb)}
    if schedule.kind == "lazy" and schedule.lazy_interval > 1:
        return {"penalty": objective, "plain": without_penalty(objective)}
    if schedule.kind == "subset":
        return {"penalty": on_subset(objective, schedule.subset_fraction)}
    if objective.rest is not None:
        return {"penalty": objective, "plain": objective.rest}
    return {"penalty": objective}


def name_of_turn(objective: Objective, schedule: Schedule, update: int) -> str:
    """Returns the name of the loss that an update needs: "penalty", "plain" or "point".

    See `split_objective` for the names. update: index of the update, from 0. schedule: the way in
    which the penalty is differentiated.
    """
    if schedule.differences:
        return "point"
    lazy = schedule.kind == "lazy" and update % schedule.lazy_interval != 0
    return "plain" if lazy or not objective.has_turn(update) else "penalty"
