"""Adversarial attacks, used by training and evaluation.

Attacks compute input gradients and never weight gradients. Shapes: B images, C channels, H x W
pixels, K classes. Images lie in 0..1. A perturbation is the difference between the attacked image
and the original. eps bounds its norm, Linf or L2, in the same units as the images.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgn.loss_scale import differentiate_images


class Gradient(NamedTuple):
    """The losses of a batch of images, and the gradients of these losses."""

    loss_B: Tensor
    """Loss of each image."""
    images_BCHW: Tensor
    """Gradient of each image's own loss with respect to the image."""


GradientFn = Callable[[nn.Module, Tensor, Tensor], Gradient]
"""Function (model, images, targets) -> Gradient, which holds each image's loss and gradient."""
LossFn = Callable[[Tensor, Tensor], Tensor]
"""Function (logits `(B, K)`, targets) -> loss of each image, `(B,)`, which an attack increases."""
Norm = Literal["Linf", "L2"]


def cross_entropy(logits_BK: Tensor, targets: Tensor) -> Tensor:
    """Returns the cross-entropy of each image."""
    return F.cross_entropy(logits_BK, targets, reduction="none")


def margin_loss(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Returns the largest logit of another class minus the logit of the label (Carlini & Wagner
    2017).

    It is positive if the image is misclassified. It still has a gradient when the gradient of the
    cross-entropy has vanished.
    """
    own = F.one_hot(labels_B, logits_BK.shape[1]).bool()
    return logits_BK.masked_fill(own, -torch.inf).amax(1) - logits_BK[own]


def input_gradient(
    model: nn.Module, images_BCHW: Tensor, targets: Tensor, loss: LossFn = cross_entropy
) -> Gradient:
    """Returns each image's loss and its gradient with respect to the image.

    No weight gradients are computed. targets: labels `(B,), int64`, or probabilities `(B, K)`.
    """
    images_BCHW = images_BCHW.detach().requires_grad_()
    return leaf_gradient(model, images_BCHW, targets, loss)


def leaf_gradient(
    model: nn.Module,
    images_BCHW: Tensor,
    targets: Tensor,
    loss: LossFn = cross_entropy,
    loss_scale: Tensor | None = None,
) -> Gradient:
    """Returns each image's loss and its gradient with respect to the image.

    The images must be a leaf tensor that requires grad. `input_gradient` makes such a leaf itself,
    which torch.compile cannot compile. loss_scale: see differentiate_images.
    """
    loss_B = loss(model(images_BCHW), targets)
    grad_BCHW = differentiate_images(loss_B.sum(), images_BCHW, loss_scale, summed=len(images_BCHW))
    return Gradient(loss_B.detach(), grad_BCHW)


def draw_random_start(images_BCHW: Tensor, eps: float) -> Tensor:
    """Returns images plus uniform noise of at most eps per pixel, clipped to 0..1."""
    return (images_BCHW + torch.empty_like(images_BCHW).uniform_(-eps, eps)).clamp(0, 1)


def l2_norm(x_BCHW: Tensor) -> Tensor:
    """Returns the L2 norm of each image, `(B, 1, 1, 1)`."""
    return x_BCHW.flatten(1).norm(dim=1)[:, None, None, None]


def draw_uniform_noise(
    seeds: Sequence[int], shape: Sequence[int], eps: float, norm: Norm
) -> Tensor:
    """Returns noise drawn uniformly from the ball of radius eps, `(B, *shape), fp32`, on the CPU.

    seeds: one seed per image. The noise of an image depends only on its seed. shape: shape of one
    image. norm: norm in which the ball is measured.
    """
    draws = []
    for seed in seeds:
        draw = torch.Generator().manual_seed(seed)
        if norm == "Linf":
            draws.append(torch.empty(*shape).uniform_(-eps, eps, generator=draw))
            continue
        direction = torch.randn(*shape, generator=draw)
        radius = float(torch.rand((), generator=draw)) ** (1 / direction.numel())
        draws.append(direction * (eps * radius / direction.norm()))
    return torch.stack(draws)


def attack_step(
    adversarial_BCHW: Tensor,
    images_BCHW: Tensor,
    grad_BCHW: Tensor,
    eps: float,
    step_size: float | Tensor,
    norm: Norm,
) -> Tensor:
    """Returns attacked images after one step of steepest ascent.

    The result is projected on the ball of radius eps around the original images, and on 0..1.
    adversarial_BCHW: the attacked images before the step. images_BCHW: the original images.
    grad_BCHW: gradient of the loss at the attacked images.
    """
    if norm == "Linf":
        return fgsm_step(adversarial_BCHW, images_BCHW, grad_BCHW, eps, step_size)
    moved = adversarial_BCHW + step_size * grad_BCHW / l2_norm(grad_BCHW).clamp_min(1e-12)
    added = moved - images_BCHW
    added = added * (eps / l2_norm(added).clamp_min(1e-12)).clamp_max(1)
    return (images_BCHW + added).clamp(0, 1)


def fgsm_step(
    adversarial_BCHW: Tensor,
    images_BCHW: Tensor,
    grad_BCHW: Tensor,
    eps: float,
    step_size: float | Tensor,
) -> Tensor:
    """Returns attacked images after one step in the direction of the gradient's sign.

    The result is projected on the Linf ball of radius eps around the original images, and on 0..1.
    See `attack_step` for the arguments.
    """
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
    norm: Norm = "Linf",
    start: Tensor | None = None,
) -> Tensor:
    """Returns images attacked by projected gradient ascent on the cross-entropy (Madry et al.
    2018).

    start: initial perturbation. None means a uniform draw from the Linf ball of radius eps.
    gradient: function that computes losses and input gradients. To attack another loss, give a
    function that differentiates that loss.

    select: which images are returned. 'last' returns the images after the last step. 'best' returns
    each image as it was when its loss was highest. This costs one more forward pass. 'paper' does
    the same as 'best', but uses raw_model for the last forward pass. raw_model is the network
    without its normalisation. The code of arXiv 2409.20139 does so.
    """
    if start is None:
        adversarial = draw_random_start(images_BCHW, eps)
    else:
        adversarial = (images_BCHW + start).clamp(0, 1)
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
        adversarial = attack_step(adversarial, images_BCHW, grad_BCHW, eps, step_size, norm)
    if select == "last":
        return adversarial
    judge = raw_model if select == "paper" and raw_model is not None else model
    with torch.no_grad():
        keep_best(F.cross_entropy(judge(adversarial), targets, reduction="none"))
    return best


def restarted_pgd(
    model: nn.Module,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    eps: float,
    steps: int,
    starts: Iterable[Tensor],
    step_size: float | None = None,
    loss: LossFn = cross_entropy,
    norm: Norm = "Linf",
    judge: nn.Module | None = None,
) -> Tensor:
    """Returns images attacked by one run of PGD from each of several starts.

    An image that is misclassified at the end of a run keeps the perturbation of that run and is not
    attacked again. The CPU waits for the device once per start.

    starts: initial perturbations of all images, one tensor per run. step_size: None means
    2.5 eps / steps. judge: fp32 model that decides whether an image is misclassified. None means
    the attacked model.
    """
    gradient = partial(input_gradient, loss=loss)
    result = images_BCHW.clone()
    left = torch.arange(len(labels_B), device=labels_B.device)
    for start in starts:
        attacked = pgd(
            model,
            images_BCHW[left],
            labels_B[left],
            eps=eps,
            step_size=2.5 * eps / steps if step_size is None else step_size,
            steps=steps,
            gradient=gradient,
            norm=norm,
            start=start[left],
        )
        result[left] = attacked
        with torch.no_grad(), torch.autocast(images_BCHW.device.type, enabled=False):
            right = (judge or model)(attacked).argmax(1) == labels_B[left]
        left = left[right]
        if not len(left):
            break
    return result


def fgsm(
    model: nn.Module,
    images_BCHW: Tensor,
    targets: Tensor,
    *,
    eps: float,
    norm: Norm = "Linf",
    loss: LossFn = cross_entropy,
) -> Tensor:
    """Returns images after one step of length eps from the original (Goodfellow et al. 2015).

    For Linf, every pixel moves by eps in the direction of the gradient's sign.
    """
    grad_BCHW = input_gradient(model, images_BCHW, targets, loss).images_BCHW
    return attack_step(images_BCHW, images_BCHW, grad_BCHW, eps, eps, norm)


AutoAttackVersion = Literal["standard", "plus", "rand"]


def autoattack(
    model: nn.Module,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    eps: float,
    batch_size: int,
    seed: int,
    device: torch.device,
    norm: Norm = "Linf",
    version: AutoAttackVersion = "standard",
    attacks: Sequence[str] | None = None,
) -> Tensor:
    """Returns images attacked by AutoAttack (Croce & Hein 2020), with the code of its authors.

    Batches are moved to `device`, and the result is on the images' own device. Images that no
    attack fools are returned unchanged.

    attacks: names among apgd-ce, apgd-dlr, apgd-t, fab, fab-t and square. None means all attacks of
    the version. Targeted attacks try at most K - 1 classes, where K is the model's number of
    classes.
    """
    from pyautoattack import AutoAttack

    with torch.no_grad():
        others = model(images_BCHW[:1].to(device)).shape[1] - 1

    attack = AutoAttack(
        model,
        eps=eps,
        norm=norm,
        version="custom" if attacks else version,
        attacks=list(attacks) if attacks else None,
        seed=seed,
        device=device,
    )
    for targeted in (attack.apgd_targeted, attack.fab):
        targeted.n_target_classes = min(targeted.n_target_classes, others)
    adversarial_BCHW, _ = attack.run_standard_evaluation(
        images_BCHW.contiguous(), labels_B, batch_size=batch_size
    )
    return adversarial_BCHW


@contextlib.contextmanager
def collect_autoattack_warnings() -> Iterator[list[str]]:
    """Yields a list that collects the warnings that AutoAttack logs inside the block.

    A repeated warning is added only once. The warnings are collected even if the configuration of
    the logger would suppress them.
    """
    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line = " ".join(record.getMessage().split())
            if line not in lines:
                lines.append(line)

    logger, handler = logging.getLogger("auto-attack"), Collect(logging.WARNING)
    level, disabled = logger.level, logger.disabled
    logger.addHandler(handler)
    logger.disabled = False
    if logger.getEffectiveLevel() > logging.WARNING:
        logger.setLevel(logging.WARNING)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.disabled = disabled


def count_correct(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    attack: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
    *,
    device: torch.device,
) -> Tensor:
    """Returns the number of correctly classified images in (images, labels) batches.

    The result is an int64 scalar on the device. Reading it waits for the device.

    attack: function (model, images, labels) -> attacked images, which are then classified. None
    means no attack.
    """
    total = torch.zeros((), dtype=torch.int64, device=device)
    for images_BCHW, labels_B in batches:
        if attack is not None:
            images_BCHW = attack(model, images_BCHW, labels_B)
        with torch.no_grad():
            total += (model(images_BCHW).argmax(1) == labels_B).sum()
    return total
