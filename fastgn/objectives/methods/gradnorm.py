"""Cross-entropy plus the L1 norm of its input gradient, by double backprop."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgn import attacks
from fastgn.objectives.base import Loss, Objective, cross_entropy
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
) -> Loss:
    """ce_weight * CE + gn_weight * (eps / sigma) * mean_i || d CE_i / d x_i ||_1, differentiated
    exactly.

    images: in the units that `model` takes; for normalised images eps / sigma turns the pixel
    radius eps into those units, for 0..1 pixels use sigma=1. CE_i is image i's own loss. In train
    mode BatchNorm couples the images, and what is penalised is the gradient of the summed loss.
    Images that do not require grad are taken as a fresh leaf. Source: arXiv 2409.20139, equation 2.

    Variants: norm 'l2' or 'l2_squared' (double backpropagation, Drucker & LeCun 1992; Ross &
    Doshi-Velez 2018) in place of 'l1'; of 'logit', the true class's, its expectation under soft
    targets, in place of 'loss'; channel_weights: factors of the gradient's C channels;
    threshold: only what an image's norm exceeds this by is penalised, in the norm's units. Loss
    .grad_l1 is the plain L1 norm whatever the variant.
    """
    if not images_BCHW.requires_grad:
        images_BCHW = images_BCHW.detach().requires_grad_()
    logits_BK = model(images_BCHW)
    ce = cross_entropy(logits_BK, targets)
    score = ce if of == "loss" else true_logit(logits_BK, targets)
    (grad_BCHW,) = torch.autograd.grad(score, images_BCHW, create_graph=True)
    grad_BCHW = grad_BCHW.to(ce.dtype)
    # the batch size cancels against the mean
    size = grad_l1 = grad_BCHW.abs().sum()
    if norm != "l1" or channel_weights is not None or threshold:
        own_BCHW = len(images_BCHW) * grad_BCHW
        if channel_weights is not None:  # no tensor of them: its copy would wait for the device
            channels = own_BCHW.unbind(1)
            weighted = [w * x for w, x in zip(channel_weights, channels, strict=True)]
            own_BCHW = torch.stack(weighted, 1)
        size = (image_norms(own_BCHW, norm) - threshold).clamp_min(0).mean()
    penalty = (eps / sigma) * size
    return Loss(ce_weight * ce + gn_weight * penalty, ce, penalty, grad_l1)


def true_logit(logits_BK: Tensor, targets: Tensor) -> Tensor:
    """The batch's mean, in fp32 or wider; of soft targets, the expected one."""
    logits_BK = logits_BK.to(torch.promote_types(logits_BK.dtype, torch.float32))
    if targets.is_floating_point():
        return (targets * logits_BK).sum(1).mean()
    return logits_BK.gather(1, targets[:, None]).mean()


def image_norms(x_BCHW: Tensor, norm: str) -> Tensor:
    """Each image's, B. The derivative at 0 is 0."""
    match norm:
        case "l1":
            return x_BCHW.abs().sum((1, 2, 3))
        case "l2":
            return torch.linalg.vector_norm(x_BCHW, dim=(1, 2, 3))
        case "l2_squared":
            return x_BCHW.square().sum((1, 2, 3))
    raise ValueError(f"norm {norm!r} should be l1, l2 or l2_squared")


def build(options: GradnormOptions, attack: AttackOptions) -> Objective:
    """Returns the method as the step runs it."""

    def loss(model: Any, images: Tensor, targets: Tensor, ramp: Tensor) -> Loss:
        if options.gn_start:
            images = attacks.random_start(images, options.gn_start)
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
