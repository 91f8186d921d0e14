"""What is minimised: pure functions of (model, images, targets).

targets are class indices (int64 B) or probabilities (B x K: mixup, cutmix, smoothing).
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgn import attacks

if TYPE_CHECKING:  # config needs the extra `train`; objectives, and `import fastgn`, torch alone
    from fastgn.config import ObjectiveConfig


class Loss(NamedTuple):
    """Scalars, all in fp32 or wider."""

    total: Tensor
    """What is minimised."""
    ce: Tensor
    """Mean cross-entropy of the images trained on."""
    penalty: Tensor
    """(eps / sigma) times grad_l1; 0 for methods without it."""
    grad_l1: Tensor
    """Mean L1 norm of each image's input gradient, in the units of `images`; NaN where not
    computed."""


def cross_entropy(logits_BK: Tensor, targets: Tensor) -> Tensor:
    """The batch's mean, computed in fp32 or wider whatever the logits' dtype."""
    return F.cross_entropy(
        logits_BK.to(torch.promote_types(logits_BK.dtype, torch.float32)), targets
    )


def natural(model: nn.Module, images_BCHW: Tensor, targets: Tensor) -> Loss:
    """Cross-entropy."""
    ce = cross_entropy(model(images_BCHW), targets)
    return Loss(ce, ce, torch.zeros_like(ce), torch.full_like(ce, torch.nan))


def gradnorm(
    model: nn.Module,
    images_BCHW: Tensor,
    targets: Tensor,
    *,
    ce_weight: float = 0.8,
    gn_weight: float | Tensor = 1.2,
    eps: float = 4 / 255,
    sigma: float = 0.225,
) -> Loss:
    """ce_weight * CE + gn_weight * (eps / sigma) * mean_i || d CE_i / d x_i ||_1, differentiated
    exactly.

    images: in the units that `model` takes; for normalised images eps / sigma turns the pixel
    radius eps into those units, for 0..1 pixels use sigma=1. CE_i is image i's own loss. In train
    mode BatchNorm couples the images, and what is penalised is the gradient of the summed loss.
    Images that do not require grad are taken as a fresh leaf. Source: arXiv 2409.20139, equation 2.
    """
    if not images_BCHW.requires_grad:
        images_BCHW = images_BCHW.detach().requires_grad_()
    ce = cross_entropy(model(images_BCHW), targets)
    (grad_BCHW,) = torch.autograd.grad(ce, images_BCHW, create_graph=True)
    grad_l1 = grad_BCHW.to(ce.dtype).abs().sum()  # the batch size cancels against the mean
    penalty = (eps / sigma) * grad_l1
    return Loss(ce_weight * ce + gn_weight * penalty, ce, penalty, grad_l1)


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


@dataclasses.dataclass(frozen=True)
class Objective:
    """A method as the step runs it: perturb the images, if at all, then minimise the loss there.

    model maps 0..1 pixels to logits as backbone(normalize(pixels)), see models.Classifier; ramp is
    the scalar tensor in 0..1 that grows over the first epochs (a tensor, so that its change
    recompiles nothing).
    """

    loss: Callable[[Any, Tensor, Tensor, Tensor], Loss]
    perturb: Callable[..., Tensor] | None = None
    """(model, images, targets, ramp, gradient=...) -> images; None trains on the images as they
    are."""
    needs_input_gradient: bool = False
    """Whether `loss` differentiates with respect to the images."""
    ce_weight: float = 1.0
    """Of the cross-entropy in `loss`."""
    penalty_weight: float = 0.0
    """Of the penalty in `loss`, at full ramp."""
    penalty_scale: float = 0.0
    """The penalty's factor before grad_l1: eps / sigma."""
    attack_steps: int = 0
    """Gradients that `perturb` takes."""
    attack_forwards: int = 0
    """Forwards that `perturb` runs beside those of its gradients."""


def build_objective(cfg: "ObjectiveConfig") -> Objective:
    """The configured method on a model with `normalize` and `backbone`."""

    def natural_loss(model: Any, images: Tensor, targets: Tensor, ramp: Tensor) -> Loss:
        return natural(model, images, targets)

    def gradnorm_loss(model: Any, images: Tensor, targets: Tensor, ramp: Tensor) -> Loss:
        return gradnorm(
            model.backbone,
            model.normalize(images),
            targets,
            ce_weight=cfg.ce_weight,
            gn_weight=cfg.gn_weight * ramp,
            eps=cfg.eps,
            sigma=cfg.sigma,
        )

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
            steps=cfg.attack_it if cfg.method == "pgd_at" else 1,
            select=cfg.attack_select if cfg.method == "pgd_at" else "last",
            raw_model=model.backbone,
            gradient=gradient,
        )

    match cfg.method:
        case "natural":
            return Objective(natural_loss)
        case "gradnorm":
            return Objective(
                gradnorm_loss,
                needs_input_gradient=True,
                ce_weight=cfg.ce_weight,
                penalty_weight=cfg.gn_weight,
                penalty_scale=cfg.eps / cfg.sigma,
            )
        case "pgd_at":
            extra = 0 if cfg.attack_select == "last" else 1
            return Objective(
                natural_loss, perturb, attack_steps=cfg.attack_it, attack_forwards=extra
            )
        case "fgsm_rs":
            return Objective(natural_loss, perturb, attack_steps=1)


def on_subset(objective: Objective, fraction: float) -> Objective:
    """`objective` with its penalty on the first `fraction` of the images alone, a whole number of
    them, and the cross-entropy on all. The parts go through the network one after the other:
    BatchNorm in train mode sees two batches."""

    def loss(model: Any, images_BCHW: Tensor, targets: Tensor, ramp: Tensor) -> Loss:
        count = round(fraction * len(images_BCHW))
        part = objective.loss(model, images_BCHW[:count], targets[:count], ramp)
        if count == len(images_BCHW):
            return part
        rest = natural(model, images_BCHW[count:], targets[count:])
        ce = torch.lerp(rest.ce, part.ce, count / len(images_BCHW))
        total = part.total + objective.ce_weight * (ce - part.ce)
        return Loss(total, ce, part.penalty, part.grad_l1)

    return dataclasses.replace(objective, loss=loss)


def without_penalty(objective: Objective) -> Objective:
    """The cross-entropy of `objective`, with its weight."""

    def loss(model: Any, images_BCHW: Tensor, targets: Tensor, ramp: Tensor) -> Loss:
        ce = natural(model, images_BCHW, targets).ce
        none = torch.full_like(ce, torch.nan)  # not a penalty of 0: it is not taken
        return Loss(objective.ce_weight * ce, ce, none, none)

    return Objective(loss, ce_weight=objective.ce_weight)


def piecewise_linear_warning(method: str, counts: dict[str, int]) -> str | None:
    """The line to warn with when gradnorm meets activations without a second derivative, else None.

    counts: {class name: how many} of the model's piecewise-linear activations.
    """
    if method != "gradnorm" or not counts:
        return None
    found = ", ".join(f"{n} {name}" for name, n in counts.items())
    return (
        f"gradnorm gets almost no signal through piecewise-linear activations ({found}): their "
        "second derivative is 0. Replace them with --activation gelu (or silu)."
    )
