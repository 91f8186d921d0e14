"""The method fgsm_rs, adversarial training with one attack step from a random start."""

from torch import Tensor, nn

from fastgn.objectives.base import Loss, Objective
from fastgn.objectives.methods import pgd_at
from fastgn.objectives.options import AttackOptions

DEFAULTS = AttackOptions()


def fgsm_rs(
    model: nn.Module,
    images_BCHW: Tensor,
    targets: Tensor,
    *,
    eps: float = DEFAULTS.attack_eps,
    step_size: float | Tensor = DEFAULTS.single_step_size,
) -> Loss:
    """Returns the cross-entropy at images after one attack step from a uniformly drawn start (Wong
    et al. 2020).

    model: takes pixels in 0..1, as images_BCHW are.
    """
    return pgd_at.pgd_at(model, images_BCHW, targets, eps=eps, step_size=step_size, steps=1)


def build(attack: AttackOptions) -> Objective:
    """Returns the method fgsm_rs, with its attack and its loss, as an Objective."""
    return pgd_at.train_on_attacked(attack.attack_eps, attack.single_step_size, 1, "last")
