"""Cross-entropy at attacked images: pgd_at and fgsm_rs."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastgn import attacks
from fastgn.objectives.base import Loss, Objective, Representatives
from fastgn.objectives.methods.natural import build_natural, natural

if TYPE_CHECKING:
    from fastgn.config.groups import ObjectiveConfig


def pgd_at(
    model: nn.Module,
    images_BCHW: Tensor,
    targets: Tensor,
    *,
    eps: float = 4 / 255,
    step_size: float | Tensor = 8 / 255 / 3,
    steps: int = 3,
    select: str = "last",
) -> Loss:
    """Cross-entropy at PGD's images (Madry et al. 2018). images: 0..1 pixels."""
    return natural(
        model,
        attacks.pgd(
            model, images_BCHW, targets, eps=eps, step_size=step_size, steps=steps, select=select
        ),
        targets,
    )


def fgsm_rs(
    model: nn.Module,
    images_BCHW: Tensor,
    targets: Tensor,
    *,
    eps: float = 4 / 255,
    step_size: float | Tensor = 5 / 255,
) -> Loss:
    """Cross-entropy after one step of 1.25 eps from a uniform start (Wong et al. 2020)."""
    return pgd_at(model, images_BCHW, targets, eps=eps, step_size=step_size, steps=1)


def build_pgd_at(cfg: "ObjectiveConfig", _: Representatives | None) -> Objective:
    return adversarial(cfg, steps=cfg.attack_it, select=cfg.attack_select)


def build_fgsm_rs(cfg: "ObjectiveConfig", _: Representatives | None) -> Objective:
    return adversarial(cfg, steps=1, select="last")


def adversarial(cfg: "ObjectiveConfig", steps: int, select: str) -> Objective:
    """The cross-entropy at the attacked images."""

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
            eps=cfg.attack_eps,
            step_size=cfg.step_size * ramp,
            steps=steps,
            select=select,
            raw_model=model.backbone,
            gradient=gradient,
        )

    return Objective(
        build_natural(cfg, None).loss,
        perturb,
        attack_steps=steps,
        attack_forwards=0 if select == "last" else 1,
    )
