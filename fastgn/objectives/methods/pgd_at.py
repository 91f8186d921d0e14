"""The method pgd_at (adversarial training): cross-entropy of images that PGD has attacked."""

from typing import Any

from torch import Tensor, nn

from fastgn import attacks
from fastgn.objectives.base import Loss, Objective
from fastgn.objectives.methods import natural
from fastgn.objectives.options import AttackOptions

DEFAULTS = AttackOptions()


def pgd_at(
    model: nn.Module,
    images_BCHW: Tensor,
    targets: Tensor,
    *,
    eps: float = DEFAULTS.attack_eps,
    step_size: float | Tensor = DEFAULTS.step_size,
    steps: int = DEFAULTS.attack_it,
    select: str = DEFAULTS.attack_select,
) -> Loss:
    """Returns the cross-entropy at the images that PGD finds (Madry et al. 2018).

    model: takes pixels in 0..1, as images_BCHW are. See attacks.pgd for the other arguments.
    """
    attacked_BCHW = attacks.pgd(
        model, images_BCHW, targets, eps=eps, step_size=step_size, steps=steps, select=select
    )
    return natural.natural(model, attacked_BCHW, targets)


def build(attack: AttackOptions) -> Objective:
    """Returns the method pgd_at, with its attack and its loss, as an Objective."""
    return train_on_attacked(
        attack.attack_eps, attack.step_size, attack.attack_it, attack.attack_select
    )


def train_on_attacked(eps: float, step_size: float, steps: int, select: str) -> Objective:
    """Returns an Objective that minimises the cross-entropy at the images that PGD finds.

    The arguments are those of attacks.pgd. The ramp, which grows from 0 to 1 over the first epochs,
    multiplies the step size.
    """

    def perturb(
        model: Any,
        images: Tensor,
        targets: Tensor,
        ramp: Tensor,
        gradient: attacks.GradientFn,
    ) -> Tensor:
        return attacks.pgd(
            model,
            images,
            targets,
            eps=eps,
            step_size=step_size * ramp,
            steps=steps,
            select=select,
            raw_model=model.backbone,
            gradient=gradient,
        )

    return Objective(
        natural.build().loss,
        perturb,
        attack_steps=steps,
        attack_forwards=0 if select == "last" else 1,
    )
