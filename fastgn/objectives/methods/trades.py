"""The method trades, which minimises the cross-entropy plus a divergence between predictions.

The divergence compares the predictions for images with those for their attacked versions.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgn import attacks
from fastgn.objectives.base import Loss, Objective, cross_entropy
from fastgn.objectives.options import AttackOptions, TradesOptions

DEFAULTS = AttackOptions()


def trades(
    model: nn.Module,
    images_BCHW: Tensor,
    targets: Tensor,
    *,
    beta: float = TradesOptions.trades_beta,
    eps: float = DEFAULTS.attack_eps,
    step_size: float | Tensor = DEFAULTS.step_size,
    steps: int = DEFAULTS.attack_it,
) -> Loss:
    """Returns the cross-entropy plus the divergence between predictions for images and attacked
    images.

    total = CE(x) + beta * KL(p(x) || p(x_adv)). p are the predicted probabilities, and
    trades_attack finds x_adv. Source: Zhang et al. 2019, arXiv 1901.08573, equation 5.

    images_BCHW: pixels in 0..1. A model with BatchNorm or dropout should be in eval mode during the
    attack, but in train mode afterwards. For such a model, call trades_attack and trades_loss
    instead of this function, and change the mode between the two calls.
    """
    attacked = trades_attack(model, images_BCHW, eps=eps, step_size=step_size, steps=steps)
    return trades_loss(model, torch.cat([images_BCHW, attacked]), targets, beta=beta)


def trades_attack(
    model: nn.Module,
    images_BCHW: Tensor,
    *,
    eps: float,
    step_size: float | Tensor,
    steps: int,
    select: str = "last",
    gradient: attacks.GradientFn = attacks.input_gradient,
) -> Tensor:
    """Returns images x' that PGD finds from a uniform start by increasing KL(p(x) || p(x')).

    p are the predicted probabilities, and p(x) is constant during the attack. The divergence
    therefore has the same gradient as the cross-entropy with p(x) as soft targets. See attacks.pgd
    for the arguments.
    """
    with torch.no_grad():
        logits_BK = model(images_BCHW)
        own_BK = logits_BK.to(torch.promote_types(logits_BK.dtype, torch.float32)).softmax(1)
    return attacks.pgd(
        model,
        images_BCHW,
        own_BK,
        eps=eps,
        step_size=step_size,
        steps=steps,
        select=select,
        gradient=gradient,
    )


def trades_loss(
    model: nn.Module,
    both_2BCHW: Tensor,
    targets: Tensor,
    *,
    beta: float = TradesOptions.trades_beta,
) -> Loss:
    """Returns the loss of `trades` for images and their attacked versions.

    both_2BCHW: a batch of 2 B images, first the images and then their attacked versions. beta:
    weight of the divergence. The network runs on one half after the other. The predictions for the
    images are not detached, so the gradient of the divergence flows through both halves.
    """
    here_BK, there_BK = (model(part) for part in both_2BCHW.chunk(2))
    ce = cross_entropy(here_BK, targets)
    log_here_BK, log_there_BK = (x.to(ce.dtype).log_softmax(1) for x in (here_BK, there_BK))
    kl = F.kl_div(log_there_BK, log_here_BK, reduction="batchmean", log_target=True)
    return Loss(ce + beta * kl, ce, kl, torch.full_like(ce, torch.nan))


def build(options: TradesOptions, attack: AttackOptions) -> Objective:
    """Returns the method trades, with its attack and its loss, as an Objective."""

    def loss(model: Any, images: Tensor, targets: Tensor, ramp: Tensor) -> Loss:
        return trades_loss(model, images, targets, beta=options.trades_beta)

    def perturb(
        model: Any,
        images: Tensor,
        targets: Tensor,
        ramp: Tensor,
        gradient: attacks.GradientFn,
    ) -> Tensor:
        attacked = trades_attack(
            model,
            images,
            eps=attack.attack_eps,
            step_size=attack.step_size * ramp,
            steps=attack.attack_it,
            select=attack.attack_select,
            gradient=gradient,
        )
        return torch.cat([images, attacked])

    return Objective(
        loss,
        perturb,
        forwards=2,
        attack_steps=attack.attack_it,
        attack_forwards=1 if attack.attack_select == "last" else 2,
    )
