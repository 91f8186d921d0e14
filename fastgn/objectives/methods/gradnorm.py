"""The method gradnorm, which minimises the cross-entropy plus the norm of its input gradient.

The penalty is differentiated exactly by double backprop.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgn import attacks
from fastgn.loss_scale import differentiate_images
from fastgn.objectives.base import Loss, Objective, cross_entropy, find_loss_scale
from fastgn.objectives.methods import pgd_at
from fastgn.objectives.options import AttackOptions, GradnormOptions


def gradnorm(
    model: nn.Module,
    images_BCHW: Tensor,
    targets: Tensor,
    *,
    ce_weight: float = GradnormOptions.ce_weight,
    gn_weight: float | Tensor = GradnormOptions.gn_weight,
    eps: float = GradnormOptions.eps,
    sigma: float = GradnormOptions.sigma,
    norm: str = GradnormOptions.gn_norm,
    of: str = GradnormOptions.gn_of,
    channel_weights: Sequence[float] | None = GradnormOptions.gn_channel_weights,
    threshold: float = GradnormOptions.gn_threshold,
    loss_scale: Tensor | None = None,
) -> Loss:
    """Returns the cross-entropy plus the L1 norm of its gradient with respect to the images.

    total = ce_weight * CE + gn_weight * (eps / sigma) * mean_i || d CE_i / d x_i ||_1, where CE_i
    is the loss of image x_i alone. The penalty can be differentiated exactly. Source: arXiv
    2409.20139, equation 2.

    images_BCHW: in the units that `model` takes. For normalised images, eps / sigma converts the
    pixel radius eps to these units. For pixels in 0..1 use sigma=1. If the images do not require
    grad, the function differentiates with respect to a copy that does. If BatchNorm in train mode
    couples the images, the gradient of the summed loss takes the place of d CE_i / d x_i.

    norm: 'l1', or 'l2' or 'l2_squared' (double backpropagation, Drucker & LeCun 1992; Ross &
    Doshi-Velez 2018).
    of: 'loss', or 'logit' to penalise the gradient of the true class's logit. With soft targets it
    is the gradient of the expected logit.
    channel_weights: factors of the gradient's C channels.
    threshold: only the part of a norm above this value is penalised, in the units of the norm.
    loss_scale: factor of the value that is differentiated, for fp16. See fastgn.loss_scale.

    Loss.grad_l1 is the L1 norm of the gradient without channel_weights and threshold.
    """
    if not images_BCHW.requires_grad:
        images_BCHW = images_BCHW.detach().requires_grad_()
    logits_BK = model(images_BCHW)
    ce = cross_entropy(logits_BK, targets)
    score = ce if of == "loss" else true_logit(logits_BK, targets)
    grad_BCHW = differentiate_images(score, images_BCHW, loss_scale, create_graph=True)
    grad_BCHW = grad_BCHW.to(ce.dtype)
    # the sum over all images is their mean norm, because the loss is already a mean over the batch
    size = grad_l1 = grad_BCHW.abs().sum()
    if norm != "l1" or channel_weights is not None or threshold:
        own_BCHW = len(images_BCHW) * grad_BCHW
        if channel_weights is not None:
            # multiply by Python numbers, because the CPU would wait for the copy of a tensor
            channels = own_BCHW.unbind(1)
            weighted = [w * x for w, x in zip(channel_weights, channels, strict=True)]
            own_BCHW = torch.stack(weighted, 1)
        size = (image_norms(own_BCHW, norm) - threshold).clamp_min(0).mean()
    penalty = (eps / sigma) * size
    return Loss(ce_weight * ce + gn_weight * penalty, ce, penalty, grad_l1)


def true_logit(logits_BK: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean logit of the true class over a batch, in fp32 or wider. For soft targets it
    is the expected logit."""
    logits_BK = logits_BK.to(torch.promote_types(logits_BK.dtype, torch.float32))
    if targets.is_floating_point():
        return (targets * logits_BK).sum(1).mean()
    return logits_BK.gather(1, targets[:, None]).mean()


def image_norms(x_BCHW: Tensor, norm: str) -> Tensor:
    """Returns the norm of each image, of shape (B,). Its derivative at 0 is 0."""
    match norm:
        case "l1":
            return x_BCHW.abs().sum((1, 2, 3))
        case "l2":
            return torch.linalg.vector_norm(x_BCHW, dim=(1, 2, 3))
        case "l2_squared":
            return x_BCHW.square().sum((1, 2, 3))
    raise ValueError(f"norm {norm!r} should be l1, l2 or l2_squared")


def build(options: GradnormOptions, attack: AttackOptions) -> Objective:
    """Returns the method gradnorm as an Objective, with its loss.

    With options.gn_attacked, the Objective also attacks the images. attack: options of the attack.
    """

    def loss(model: Any, images: Tensor, targets: Tensor, ramp: Tensor) -> Loss:
        if options.gn_start:
            images = attacks.draw_random_start(images, options.gn_start)
        return gradnorm(
            model.backbone,
            model.normalize(images),
            targets,
            ce_weight=options.ce_weight,
            gn_weight=options.gn_weight * ramp,
            eps=options.eps,
            sigma=options.sigma,
            norm=options.gn_norm,
            of=options.gn_of,
            channel_weights=options.gn_channel_weights,
            threshold=options.gn_threshold,
            loss_scale=find_loss_scale(model),
        )

    attacked = pgd_at.build(attack) if options.gn_attacked else Objective(loss)
    return dataclasses.replace(
        attacked,
        loss=loss,
        needs_input_gradient=True,
        ce_weight=options.ce_weight,
        penalty_weight=options.gn_weight,
        penalty_scale=options.eps / options.sigma,
        differences=not options.is_variant,
    )
