"""What is minimised: pure functions of (model, images, targets).

targets are class indices (int64 B) or probabilities (B x K: mixup, cutmix, smoothing).
"""

import dataclasses
import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgn.objectives.options import METHODS, ObjectiveConfig


class Loss(NamedTuple):
    """Scalars, all in fp32 or wider."""

    total: Tensor
    """What is minimised."""
    ce: Tensor
    """Mean cross-entropy of the images trained on."""
    penalty: Tensor
    """What is added to the cross-entropy, before its weight: for gradnorm (eps / sigma) times
    grad_l1; 0 for methods without one."""
    grad_l1: Tensor
    """Mean L1 norm of each image's input gradient, in the units of `images`; NaN where not
    computed."""


def cross_entropy(logits_BK: Tensor, targets: Tensor) -> Tensor:
    """The batch's mean, computed in fp32 or wider whatever the logits' dtype."""
    return F.cross_entropy(
        logits_BK.to(torch.promote_types(logits_BK.dtype, torch.float32)), targets
    )


class Representatives(NamedTuple):
    """What pag's gradients are to point to, in the units of the images."""

    images_NCHW: Tensor
    """One a class, in the classes' order, where labels_N is None."""
    labels_N: Tensor | None = None
    """int64; each image is given its nearest neighbour of a class."""


def draw_classes(logits_BK: Tensor, temperature: float = 1.0, sampling: str = "hard") -> Tensor:
    """Returns random weights of the classes, B x K.

    'hard' gives 1 to one class, which is drawn from softmax(logits / temperature), and 0 to the
    others. 'relaxed' gives softmax((logits + Gumbel noise) / temperature), through which gradients
    flow to the logits (Jang et al. 2017, Maddison et al. 2017).
    """
    gumbel_BK = -torch.log(-torch.log(torch.rand_like(logits_BK)))
    if sampling == "relaxed":
        return ((logits_BK + gumbel_BK) / temperature).softmax(1)
    if sampling != "hard":
        raise ValueError(f"sampling {sampling!r} should be hard or relaxed")
    # the class with the largest sum is distributed as the softmax
    drawn_B1 = (logits_BK.detach() / temperature + gumbel_BK).argmax(1, keepdim=True)
    # F.one_hot looks at its input's range on the host
    return torch.zeros_like(gumbel_BK).scatter(1, drawn_B1, 1.0)


@dataclasses.dataclass(frozen=True)
class Objective:
    """A method as the step runs it: perturb the images, if at all, then minimise the loss there.

    model maps 0..1 pixels to logits as backbone(normalize(pixels)), see models.Classifier; ramp is
    the scalar tensor in 0..1 that grows over the first epochs (a tensor, so that its change
    recompiles nothing).
    """

    loss: Callable[[Any, Tensor, Tensor, Tensor], Loss]
    perturb: Callable[..., Tensor] | None = None
    """(model, images, targets, ramp, gradient=...) -> images, with the ramp of the attack's step.
    None trains on the images as they are."""
    needs_input_gradient: bool = False
    """Whether `loss` differentiates with respect to the images. Then it is ce_weight * CE plus a
    penalty that ramp multiplies."""
    ce_weight: float = 1.0
    """Of the cross-entropy in `loss`."""
    penalty_weight: float = 0.0
    """Of the penalty in `loss`, at full ramp."""
    penalty_scale: float = 0.0
    """The penalty's factor before grad_l1: eps / sigma."""
    differences: bool = False
    """Whether the penalty is that and no more, which a finite difference of the cross-entropy
    takes."""
    forwards: int = 1
    """That `loss` runs, each swept back as well."""
    attack_steps: int = 0
    """Gradients that `perturb` takes."""
    attack_forwards: int = 0
    """Forwards that `perturb` runs beside those of its gradients."""
    rest: "Objective | None" = None
    """What the updates minimise whose turn this is not."""
    share: float = 1.0
    """Of the updates, whose turn it is where there is a rest."""

    def has_turn(self, update: int) -> bool:
        """The update's number decides alone; turns are spread evenly, from update 0 on."""
        if self.rest is None:
            return True
        return math.ceil((update + 1) * self.share) > math.ceil(update * self.share)


def on_subset(objective: Objective, fraction: float) -> Objective:
    """`objective` with its penalty on the first `fraction` of the images alone, a whole number of
    them, and the cross-entropy on all. The parts go through the network one after the other:
    BatchNorm in train mode sees two batches."""

    def loss(model: Any, images_BCHW: Tensor, targets: Tensor, ramp: Tensor) -> Loss:
        count = round(fraction * len(images_BCHW))
        part = objective.loss(model, images_BCHW[:count], targets[:count], ramp)
        if count == len(images_BCHW):
            return part
        rest_ce = cross_entropy(model(images_BCHW[count:]), targets[count:])
        ce = torch.lerp(rest_ce, part.ce, count / len(images_BCHW))
        total = part.total + objective.ce_weight * (ce - part.ce)
        return Loss(total, ce, part.penalty, part.grad_l1)

    return dataclasses.replace(objective, loss=loss)


def without_penalty(objective: Objective) -> Objective:
    """The cross-entropy of `objective`, with its weight and at the same images."""

    def loss(model: Any, images_BCHW: Tensor, targets: Tensor, ramp: Tensor) -> Loss:
        ce = cross_entropy(model(images_BCHW), targets)
        none = torch.full_like(ce, torch.nan)  # not a penalty of 0: it is not taken
        return Loss(objective.ce_weight * ce, ce, none, none)

    return Objective(
        loss,
        objective.perturb,
        ce_weight=objective.ce_weight,
        attack_steps=objective.attack_steps,
        attack_forwards=objective.attack_forwards,
    )


def build_objective(
    cfg: ObjectiveConfig, representatives: Representatives | None = None
) -> Objective:
    """Returns the configured method as the step runs it. representatives: what pag's input
    gradients should point to, which only pag needs."""
    module = importlib.import_module(f"fastgn.objectives.methods.{cfg.method.replace('+', '_')}")
    needed = (representatives,) if METHODS[cfg.method].needs_representatives else ()
    objective: Objective = module.build(*cfg.own_options, *needed)
    return objective
