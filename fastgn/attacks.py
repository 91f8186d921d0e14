"""Attacks, shared by training and evaluation. Input gradients only: the weights' are never
computed.

Shapes: B images, C channels, H x W pixels. Images lie in 0..1, eps is in the same units and bounds
the norm, Linf or L2, of what is added.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Gradient(NamedTuple):
    """What an attack step needs."""

    loss_B: Tensor
    images_BCHW: Tensor
    """The gradient of each image's own loss."""


GradientFn = Callable[[nn.Module, Tensor, Tensor], Gradient]
LossFn = Callable[[Tensor, Tensor], Tensor]
"""(logits B x K, targets) -> each image's loss, B; the attack raises it."""
Norm = Literal["Linf", "L2"]


def cross_entropy(logits_BK: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits_BK, targets, reduction="none")


def margin(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """The best other logit less the label's (Carlini & Wagner 2017): it has a gradient where the
    cross-entropy's has vanished. Positive once the image is misclassified."""
    own = F.one_hot(labels_B, logits_BK.shape[1]).bool()
    return logits_BK.masked_fill(own, -torch.inf).amax(1) - logits_BK[own]


def input_gradient(
    model: nn.Module, images_BCHW: Tensor, targets: Tensor, loss: LossFn = cross_entropy
) -> Gradient:
    """Each image's loss and its gradient with respect to the image; no weight gradients.

    targets: int64 B, or probabilities B x K.
    """
    images_BCHW = images_BCHW.detach().requires_grad_()
    return leaf_gradient(model, images_BCHW, targets, loss)


def leaf_gradient(
    model: nn.Module, images_BCHW: Tensor, targets: Tensor, loss: LossFn = cross_entropy
) -> Gradient:
    """input_gradient for a leaf that requires grad already, as torch.compile wants it."""
    loss_B = loss(model(images_BCHW), targets)
    (grad_BCHW,) = torch.autograd.grad(loss_B.sum(), images_BCHW)
    return Gradient(loss_B.detach(), grad_BCHW)


def random_start(images_BCHW: Tensor, eps: float) -> Tensor:
    """Uniform within eps of the images and within 0..1."""
    return (images_BCHW + torch.empty_like(images_BCHW).uniform_(-eps, eps)).clamp(0, 1)


def l2_norm(x_BCHW: Tensor) -> Tensor:
    """B x 1 x 1 x 1."""
    return x_BCHW.flatten(1).norm(dim=1)[:, None, None, None]


def uniform_noise(seeds: Sequence[int], shape: Sequence[int], eps: float, norm: Norm) -> Tensor:
    """Uniform in the eps ball, fp32 B x shape on the CPU; an image's depends on its seed alone."""
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


def step(
    adversarial_BCHW: Tensor,
    images_BCHW: Tensor,
    grad_BCHW: Tensor,
    eps: float,
    step_size: float | Tensor,
    norm: Norm,
) -> Tensor:
    """One step of steepest ascent, projected on the eps ball and on 0..1."""
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
    norm: Norm = "Linf",
    start: Tensor | None = None,
) -> Tensor:
    """Projected gradient ascent on the cross-entropy (Madry et al. 2018).

    start: what is added to the images first; None: uniform within the eps ball of Linf.
    gradient: of another loss, where it is to be raised.

    select: 'last' returns the last iterate; 'best' each image's iterate of highest loss, at the
    price of one forward more; 'paper' does the same, but its last forward goes through raw_model,
    the network without its normalisation, as the code of arXiv 2409.20139 does.
    """
    if start is None:
        adversarial = random_start(images_BCHW, eps)
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
        adversarial = step(adversarial, images_BCHW, grad_BCHW, eps, step_size, norm)
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
    """Runs PGD from each of the starts, which are what is added to the images. An image that is
    misclassified at the end of a run keeps that iterate and is attacked no more.

    step_size: None means 2.5 eps / steps.
    judge: who says so, in fp32; None: the model. A host sync a start.
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
    """One step of length eps from the image itself, signed for Linf (Goodfellow et al. 2015)."""
    grad_BCHW = input_gradient(model, images_BCHW, targets, loss).images_BCHW
    return step(images_BCHW, images_BCHW, grad_BCHW, eps, eps, norm)


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
    """The adversarial images of AutoAttack (Croce & Hein 2020), its authors' code, on the images'
    device; batches are attacked on `device`. Unfooled images come back as they were.

    attacks: some of apgd-ce, apgd-dlr, apgd-t, fab, fab-t, square, in place of a version's. With K
    classes the targeted ones try at most K - 1 others.
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
def autoattack_warnings() -> Iterator[list[str]]:
    """Collects what AutoAttack warns of in here, each once, whatever its logger is set to."""
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
    """Images classified correctly over (images, labels) batches, after the attack when there is
    one: an int64 scalar on the device; reading it is the caller's host sync."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for images_BCHW, labels_B in batches:
        if attack is not None:
            images_BCHW = attack(model, images_BCHW, labels_B)
        with torch.no_grad():
            total += (model(images_BCHW).argmax(1) == labels_B).sum()
    return total
