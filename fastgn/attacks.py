"""Linf attacks, shared by training and evaluation. Input gradients only: the weights' are never
computed.

Shapes: B images, C channels, H x W pixels. Images lie in 0..1 and eps is in the same units.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Gradient(NamedTuple):
    """What an attack step needs."""

    loss_B: Tensor
    images_BCHW: Tensor
    """The gradient of each image's own loss."""


GradientFn = Callable[[nn.Module, Tensor, Tensor], Gradient]


def input_gradient(model: nn.Module, images_BCHW: Tensor, targets: Tensor) -> Gradient:
    """Each image's cross-entropy and its gradient with respect to the image; no weight gradients.

    targets: int64 B, or probabilities B x K.
    """
    images_BCHW = images_BCHW.detach().requires_grad_()
    return leaf_gradient(model, images_BCHW, targets)


def leaf_gradient(model: nn.Module, images_BCHW: Tensor, targets: Tensor) -> Gradient:
    """input_gradient for a leaf that requires grad already, as torch.compile wants it."""
    loss_B = F.cross_entropy(model(images_BCHW), targets, reduction="none")
    (grad_BCHW,) = torch.autograd.grad(loss_B.sum(), images_BCHW)
    return Gradient(loss_B.detach(), grad_BCHW)


def random_start(images_BCHW: Tensor, eps: float) -> Tensor:
    """Uniform within eps of the images and within 0..1."""
    return (images_BCHW + torch.empty_like(images_BCHW).uniform_(-eps, eps)).clamp(0, 1)


def fgsm_step(
    adversarial_BCHW: Tensor,
    images_BCHW: Tensor,
    grad_BCHW: Tensor,
    eps: float,
    step_size: float | Tensor,
) -> Tensor:
    """One signed step, projected on the eps ball and on 0..1."""
    moved = adversarial_BCHW + step_size * grad_BCHW.sign()
    return torch.clamp(moved, images_BCHW - eps, images_BCHW + eps).clamp(0, 1)


def pgd(
    model: nn.Module,
    images_BCHW: Tensor,
    targets: Tensor,
    *,
    eps: float,
    step_size: float | Tensor,
    steps: int,
    select: str = "last",
    raw_model: nn.Module | None = None,
    gradient: GradientFn = input_gradient,
) -> Tensor:
    """Projected gradient ascent on the cross-entropy from a uniform start (Madry et al. 2018).

    select: 'last' returns the last iterate; 'best' each image's iterate of highest loss, at the
    price of one forward more; 'paper' does the same, but its last forward goes through raw_model,
    the network without its normalisation, as the code of arXiv 2409.20139 does.
    """
    adversarial = random_start(images_BCHW, eps)
    best, best_loss_B = adversarial, torch.full_like(images_BCHW[:, 0, 0, 0], -torch.inf)

    def keep_best(loss_B: Tensor) -> None:
        nonlocal best, best_loss_B
        better_B = loss_B > best_loss_B
        best = torch.where(better_B[:, None, None, None], adversarial, best)
        best_loss_B = torch.where(better_B, loss_B, best_loss_B)

    for _ in range(steps):
        loss_B, grad_BCHW = gradient(model, adversarial, targets)
        if select != "last":
            keep_best(loss_B)
        adversarial = fgsm_step(adversarial, images_BCHW, grad_BCHW, eps, step_size)
    if select == "last":
        return adversarial
    judge = raw_model if select == "paper" and raw_model is not None else model
    with torch.no_grad():
        keep_best(F.cross_entropy(judge(adversarial), targets, reduction="none"))
    return best


def fgsm(model: nn.Module, images_BCHW: Tensor, targets: Tensor, *, eps: float) -> Tensor:
    """One signed step of length eps from the image itself (Goodfellow et al. 2015)."""
    grad_BCHW = input_gradient(model, images_BCHW, targets).images_BCHW
    return fgsm_step(images_BCHW, images_BCHW, grad_BCHW, eps, eps)


def autoattack(
    model: nn.Module,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    eps: float,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> Tensor:
    """The adversarial images of AutoAttack's 'standard' version (Croce & Hein 2020), its authors'
    code, on the images' device; batches are attacked on `device`. Unfooled images come back as
    they were."""
    from pyautoattack import AutoAttack

    attack = AutoAttack(model, eps=eps, norm="Linf", version="standard", seed=seed, device=device)
    adversarial_BCHW, _ = attack.run_standard_evaluation(
        images_BCHW.contiguous(), labels_B, batch_size=batch_size
    )
    return adversarial_BCHW


def count_correct(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    attack: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
    *,
    device: torch.device,
) -> Tensor:
    """Images classified correctly over (images, labels) batches, after the attack when there is
    one: an int64 scalar on the device; reading it is the caller's host sync."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for images_BCHW, labels_B in batches:
        if attack is not None:
            images_BCHW = attack(model, images_BCHW, labels_B)
        with torch.no_grad():
            total += (model(images_BCHW).argmax(1) == labels_B).sum()
    return total
