"""The method n_fgsm, adversarial training with strong noise and one attack step.

Neither the noise nor the step is clipped to the ball of radius eps (de Jorge et al. 2022, arXiv
2202.01181). The authors' experiments show that this avoids catastrophic overfitting. If training
uses attacks of one step, it can suddenly lose all robustness against attacks of several steps.
"""

from typing import Any

from torch import Tensor, nn

from fastgn import attacks
from fastgn.objectives.base import Loss, Objective
from fastgn.objectives.methods import natural
from fastgn.objectives.options import AttackOptions, NFgsmOptions

DEFAULTS = AttackOptions()


def attack(
    model: nn.Module,
    images_BCHW: Tensor,
    targets: Tensor,
    *,
    noise: float,
    step_size: float | Tensor,
    gradient: attacks.GradientFn = attacks.input_gradient,
) -> Tensor:
    """Returns images after uniform noise and one step in the direction of the gradient's sign.

    Pixels stay in 0..1, as in the authors' code. noise: largest change of a pixel by the noise.
    gradient: function that computes the gradient at the noisy images.
    """
    noisy_BCHW = attacks.draw_random_start(images_BCHW, noise)
    grad_BCHW = gradient(model, noisy_BCHW, targets).images_BCHW
    return (noisy_BCHW + step_size * grad_BCHW.sign()).clamp(0, 1)


def n_fgsm(
    model: nn.Module,
    images_BCHW: Tensor,
    targets: Tensor,
    *,
    eps: float = DEFAULTS.attack_eps,
    noise: float = NFgsmOptions.attack_noise,
    step_size: float | Tensor | None = None,
) -> Loss:
    """Returns the cross-entropy after noise of at most noise * eps and one attack step.

    model: takes pixels in 0..1, as images_BCHW are. step_size: None means eps.
    """
    step_size = eps if step_size is None else step_size
    attacked_BCHW = attack(model, images_BCHW, targets, noise=noise * eps, step_size=step_size)
    return natural.natural(model, attacked_BCHW, targets)


def build(options: NFgsmOptions, attack_options: AttackOptions) -> Objective:
    """Returns the method n_fgsm, with its attack and its loss, as an Objective.

    The ramp, which grows from 0 to 1 over the first epochs, multiplies the size of the step, but
    not the noise.
    """
    noise = options.attack_noise * attack_options.attack_eps
    step_size = attack_options.noisy_step_size

    def perturb(
        model: Any, images: Tensor, targets: Tensor, ramp: Tensor, gradient: attacks.GradientFn
    ) -> Tensor:
        return attack(
            model, images, targets, noise=noise, step_size=step_size * ramp, gradient=gradient
        )

    return Objective(natural.build().loss, perturb, attack_steps=1)
