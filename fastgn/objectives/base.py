"""Types and functions that all methods share. The training step works with Loss and Objective.

Targets are class indices, `(B,), int64`, or probabilities, `(B, K)`, after mixup, cutmix or label
smoothing. B is the number of images, K the number of classes, CE the cross-entropy.
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
    """The parts of the loss of a batch. Each is a scalar tensor in fp32 or wider."""

    total: Tensor
    """The value that is minimised."""
    ce: Tensor
    """Mean cross-entropy of the images that the network trains on."""
    penalty: Tensor
    """Penalty before it is multiplied by its weight. For gradnorm it is grad_l1 * eps / sigma, with
    the method's options eps and sigma. 0 for methods without a penalty, and NaN if the penalty is
    left out of this update."""
    grad_l1: Tensor
    """L1 norm of the gradient of an image's loss with respect to the image, averaged over the
    images. The gradient is taken with respect to the images as the loss gets them, for example
    after normalisation. NaN if the method does not compute it."""


def cross_entropy(logits_BK: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean cross-entropy of a batch, computed in fp32 or wider for logits of any
    dtype."""
    return F.cross_entropy(
        logits_BK.to(torch.promote_types(logits_BK.dtype, torch.float32)), targets
    )


def find_loss_scale(model: Any) -> Tensor | None:
    """Returns the scale of the losses of a model that computes in fp16, or None for other models.

    A method that differentiates with respect to images passes it to
    loss_scale.differentiate_images.
    """
    return getattr(model, "loss_scale", None)


class Representatives(NamedTuple):
    """Images towards which the method pag turns input gradients. Their pixels are in the same units
    as those of the training images."""

    images_NCHW: Tensor
    """The images. If labels_N is None, there is one per class, in the order of the classes."""
    labels_N: Tensor | None = None
    """Class of each image in images_NCHW, int64. A class can then have several images. For each
    training image, the nearest image of a class represents the class. None means that there is one
    image per class."""


def draw_classes(logits_BK: Tensor, temperature: float = 1.0, sampling: str = "hard") -> Tensor:
    """Returns random weights of the K classes for each of B images, of shape (B, K).

    sampling: 'hard' gives the weight 1 to one class, which is drawn from softmax(logits /
    temperature), and the weight 0 to the others. 'relaxed' gives softmax((logits + Gumbel noise) /
    temperature), through which gradients flow to the logits (Jang et al. 2017, Maddison et al.
    2017).
    """
    gumbel_BK = -torch.log(-torch.log(torch.rand_like(logits_BK)))
    if sampling == "relaxed":
        return ((logits_BK + gumbel_BK) / temperature).softmax(1)
    if sampling != "hard":
        raise ValueError(f"sampling {sampling!r} should be hard or relaxed")
    # the class with the largest sum of logit and Gumbel noise is a draw from the softmax
    drawn_B1 = (logits_BK.detach() / temperature + gumbel_BK).argmax(1, keepdim=True)
    # F.one_hot is not used, because it checks its input and so makes the CPU wait for the GPU
    return torch.zeros_like(gumbel_BK).scatter(1, drawn_B1, 1.0)


@dataclasses.dataclass(frozen=True)
class Objective:
    """A configured training method, with the loss that it minimises and its attack, if it has one.

    The model has `normalize` and `backbone`, and maps pixels in 0..1 to logits with
    backbone(normalize(pixels)). In fp16 it also has `loss_scale`, see find_loss_scale. The ramp is
    a scalar tensor that grows from 0 to 1 over the first epochs. It is a tensor because a change of
    a number would recompile the step.
    """

    loss: Callable[[Any, Tensor, Tensor, Tensor], Loss]
    """Function (model, images, targets, ramp) -> Loss. The images are pixels in 0..1. ramp:
    strength of the penalty, a scalar tensor in 0..1."""
    perturb: Callable[..., Tensor] | None = None
    """Function (model, images, targets, ramp, gradient=...) -> attacked images. ramp: factor of the
    attack's step size, a scalar tensor in 0..1. `gradient` computes the input gradient of an attack
    step. None means that the images stay as they are."""
    needs_input_gradient: bool = False
    """Whether `loss` differentiates with respect to the images. If so, the loss is ce_weight * CE +
    ramp * penalty_weight * penalty. CE is the cross-entropy, and the ramp grows from 0 to 1 over
    the first epochs."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy in `loss`."""
    penalty_weight: float = 0.0
    """Full weight of the penalty in `loss`. It is multiplied by the ramp, a factor that grows from
    0 to 1 over the first epochs."""
    penalty_scale: float = 0.0
    """Ratio of the penalty to grad_l1, the mean L1 norm of the input gradient. It is eps / sigma
    for gradnorm."""
    differences: bool = False
    """Whether a finite difference of the cross-entropy can replace the penalty.

    This is possible only if the penalty is penalty_scale * grad_l1.
    """
    forwards: int = 1
    """Number of forward passes that `loss` makes. Each one needs a backward pass later."""
    attack_steps: int = 0
    """Number of gradients with respect to the images that the attack computes."""
    attack_forwards: int = 0
    """Number of forward passes without a gradient that the attack makes."""
    rest: "Objective | None" = None
    """Another objective, which some of the updates minimise instead of this one. None means that
    all updates minimise this one."""
    share: float = 1.0
    """Share of the updates that minimise this objective. The other updates minimise `rest`."""

    def has_turn(self, update: int) -> bool:
        """Returns whether an update minimises this objective, and not `rest`.

        This depends only on the number of the update. The updates that minimise this objective are
        spread evenly, and begin with update 0.
        """
        if self.rest is None:
            return True
        return math.ceil((update + 1) * self.share) > math.ceil(update * self.share)


def on_subset(objective: Objective, fraction: float) -> Objective:
    """Returns an objective with the penalty on only the first `fraction` of the images, and the
    cross-entropy on all images.

    The images with the penalty go through the network first, and those without it afterwards.
    Therefore BatchNorm in train mode normalises the two groups separately.
    """

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
    """Returns an objective like `objective`, but without its penalty.

    It minimises only the cross-entropy, with the same weight. If `objective` attacks the images,
    the result attacks them in the same way.
    """

    def loss(model: Any, images_BCHW: Tensor, targets: Tensor, ramp: Tensor) -> Loss:
        ce = cross_entropy(model(images_BCHW), targets)
        none = torch.full_like(ce, torch.nan)  # NaN, because the penalty is not computed
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
    """Returns the configured method, with its attack and its loss.

    representatives: images towards which the method pag turns input gradients. Other methods take
    None.
    """
    module = importlib.import_module(f"fastgn.objectives.methods.{cfg.method.replace('+', '_')}")
    needed = (representatives,) if METHODS[cfg.method].needs_representatives else ()
    objective: Objective = module.build(*cfg.own_options, *needed)
    return objective
