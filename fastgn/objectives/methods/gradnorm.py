"""Cross-entropy plus the L1 norm of its input gradient, by double backprop."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastgn import attacks
from fastgn.objectives.base import Loss, Objective, Representatives, cross_entropy
from fastgn.objectives.methods.adversarial import build_pgd_at

if TYPE_CHECKING:
    from fastgn.config.groups import ObjectiveConfig


def gradnorm(
    model: nn.Module,
    images_BCHW: Tensor,
    targets: Tensor,
    *,
    ce_weight: float = 0.8,
    gn_weight: float | Tensor = 1.2,
    eps: float = 4 / 255,
    sigma: float = 0.225,
    norm: str = "l1",
    of: str = "loss",
    channel_weights: Sequence[float] | None = None,
    threshold: float = 0.0,
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


def build_gradnorm(cfg: "ObjectiveConfig", _: Representatives | None) -> Objective:
    def loss(model: Any, images: Tensor, targets: Tensor, ramp: Tensor) -> Loss:
        if cfg.gn_start:
            images = attacks.random_start(images, cfg.gn_start)
        return gradnorm(
            model.backbone,
            model.normalize(images),
            targets,
            ce_weight=cfg.ce_weight,
            gn_weight=cfg.gn_weight * ramp,
            eps=cfg.eps,
            sigma=cfg.sigma,
            norm=cfg.gn_norm,
            of=cfg.gn_of,
            channel_weights=cfg.gn_channel_weights,
            threshold=cfg.gn_threshold,
        )

    attack = build_pgd_at(cfg, None) if cfg.gn_attacked else Objective(loss)
    return dataclasses.replace(
        attack,
        loss=loss,
        needs_input_gradient=True,
        ce_weight=cfg.ce_weight,
        penalty_weight=cfg.gn_weight,
        penalty_scale=cfg.eps / cfg.sigma,
        differences=not cfg.gn_variant,
    )
