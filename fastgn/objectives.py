"""What is minimised: pure functions of (model, images, targets).

targets are class indices (int64 B) or probabilities (B x K: mixup, cutmix, smoothing).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgn import attacks

if TYPE_CHECKING:  # config needs the extra `train`; objectives, and `import fastgn`, torch alone
    from fastgn.config.groups import ObjectiveConfig


class Loss(NamedTuple):
    """Scalars, all in fp32 or wider."""

    total: Tensor
    """What is minimised."""
    ce: Tensor
    """Mean cross-entropy of the images trained on."""
    penalty: Tensor
    """What is added to the cross-entropy, before its weight: for gradnorm (eps / sigma) times
    grad_l1; 0 for methods without one."""
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


def bessel(order: int) -> float:
    """Returns the modified Bessel function of the first kind I_order(1)."""
    factorial = math.factorial
    return sum(0.5 ** (2 * k + order) / factorial(k) / factorial(k + order) for k in range(9))


GAUSSIAN = [bessel(abs(i)) for i in range(-3, 4)]
GAUSSIAN = [tap / sum(GAUSSIAN) for tap in GAUSSIAN]
"""Taps of the discrete Gaussian (Lindeberg 1990) with a sigma of 1 pixel, cut off at 3 pixels."""


def correlate(x_BCHW: Tensor, taps: Sequence[float], dim: int) -> Tensor:
    """Correlates along rows (dim 2) or columns (dim 3), with the image mirrored at its border
    pixels. Adds shifted images, so that autocast leaves the dtype alone."""
    reach = len(taps) // 2
    padded = mirror(x_BCHW, reach, dim)
    first, *others = (t * padded.narrow(dim, i, x_BCHW.shape[dim]) for i, t in enumerate(taps) if t)
    return sum(others, first)


def mirror(x_BCHW: Tensor, reach: int, dim: int) -> Tensor:
    """Extends the images by `reach` pixels on both sides, as numpy.pad's mode 'reflect' does."""
    while reach:  # one reflection adds at most the side less one pixel
        step = min(reach, max(x_BCHW.shape[dim] - 1, 1))
        mode = "replicate" if x_BCHW.shape[dim] == 1 else "reflect"
        x_BCHW = F.pad(x_BCHW, (0, 0, step, step) if dim == 2 else (step, step, 0, 0), mode=mode)
        reach -= step
    return x_BCHW


def edge_energy(images_BCHW: Tensor) -> Tensor:
    """Returns where an image has edges: B x 1 x H x W, in the images' dtype and units.

    The image is blurred by a Gaussian of sigma 1 pixel. Sobel's 3 x 3 filters along rows and
    columns follow, then the root of their squares' sum over directions and channels, then the blur
    again. Each filter mirrors its input at the border. Source: the code of arXiv 2409.20139.
    """

    def blur(x: Tensor) -> Tensor:
        return correlate(correlate(x, GAUSSIAN, 2), GAUSSIAN, 3)

    x = blur(images_BCHW)
    slopes = [
        correlate(correlate(x, (-1.0, 0.0, 1.0), dim), (1.0, 2.0, 1.0), 5 - dim) for dim in (2, 3)
    ]
    return blur(torch.linalg.vector_norm(torch.cat(slopes, 1), dim=1, keepdim=True))


def over_rms(x_BCHW: Tensor, rms: str) -> Tensor:
    """Divides by the root mean square of all elements of the 'batch', or of each 'image'; 0 stays
    0."""
    dims = (0, 1, 2, 3) if rms == "batch" else (1, 2, 3)
    return x_BCHW / x_BCHW.square().mean(dims, keepdim=True).clamp_min(1e-24).sqrt()


def draw_classes(logits_BK: Tensor, temperature: float = 1.0, sampling: str = "hard") -> Tensor:
    """Returns random weights of the classes, B x K.

    'hard' gives 1 to one class, which is drawn from softmax(logits / temperature), and 0 to the
    others. 'relaxed' gives softmax((logits + Gumbel noise) / temperature), through which gradients
    flow to the logits (Jang et al. 2017, Maddison et al. 2017).
    """
    gumbel_BK = -torch.log(-torch.log(torch.rand_like(logits_BK)))
    if sampling == "relaxed":
        return ((logits_BK + gumbel_BK) / temperature).softmax(1)
    if sampling != "hard":
        raise ValueError(f"sampling {sampling!r} should be hard or relaxed")
    # the class with the largest sum is distributed as the softmax
    drawn_B1 = (logits_BK.detach() / temperature + gumbel_BK).argmax(1, keepdim=True)
    # F.one_hot looks at its input's range on the host
    return torch.zeros_like(gumbel_BK).scatter(1, drawn_B1, 1.0)


def edge(
    model: nn.Module,
    images_BCHW: Tensor,
    targets: Tensor,
    *,
    weight: float | Tensor = 1.0,
    temperature: float = 0.5,
    sampling: str = "hard",
    map: str = "gradient",
    of: str = "logit",
    rms: str = "batch",
) -> Loss:
    """CE + weight * MSE(G / rms(G), E / rms(E)): signed input gradients that equal the image's
    edges.

    images: in the units that `model` takes, of which the edges are taken as well. G is the gradient
    of sum_k w_k f_k, with weights w from draw_classes, or for of 'loss' that of the cross-entropy.
    E is edge_energy, the same for all channels. The mean is over images, channels and pixels. An
    edge is never negative, so that the gradient's sign counts. map 'saliency' replaces G by its
    largest magnitude over channels (Simonyan et al. 2014). rms says whether one root mean square
    serves the batch, as in the paper's code, or each image has its own. The cost is gradnorm's.
    Source: arXiv 2409.20139 and its code.
    """
    for name, value, choices in (
        ("map", map, ("gradient", "saliency")),
        ("of", of, ("logit", "loss")),
        ("rms", rms, ("batch", "image")),
    ):
        if value not in choices:
            raise ValueError(f"{name} {value!r} should be {choices[0]} or {choices[1]}")
    if not images_BCHW.requires_grad:
        images_BCHW = images_BCHW.detach().requires_grad_()
    logits_BK = model(images_BCHW)
    ce = score = cross_entropy(logits_BK, targets)
    if of == "logit":
        logits_BK = logits_BK.to(ce.dtype)
        score = (draw_classes(logits_BK, temperature, sampling) * logits_BK).sum()
    (grad_BCHW,) = torch.autograd.grad(score, images_BCHW, create_graph=True)
    grad_BCHW = grad_BCHW.to(ce.dtype)
    if map == "saliency":
        grad_BCHW = grad_BCHW.abs().amax(1, keepdim=True)
    edges_B1HW = edge_energy(images_BCHW.detach().to(ce.dtype))
    penalty = (over_rms(grad_BCHW, rms) - over_rms(edges_B1HW, rms)).square().mean()
    return Loss(ce + weight * penalty, ce, penalty, torch.full_like(ce, torch.nan))


class Representatives(NamedTuple):
    """What pag's gradients are to point to, in the units of the images."""

    images_NCHW: Tensor
    """One a class, in the classes' order, where labels_N is None."""
    labels_N: Tensor | None = None
    """int64; each image is given its nearest neighbour of a class."""


def nearest_of_class(images_BCHW: Tensor, classes_B: Tensor, among: Representatives) -> Tensor:
    """For each image the one of its class in `among` at the least L2 distance; without labels the
    class's only one. B x C x H x W."""
    candidates_NCHW, labels_N = among
    if labels_N is None:
        return candidates_NCHW[classes_B]
    with torch.no_grad(), torch.autocast(images_BCHW.device.type, enabled=False):
        candidates_ND = candidates_NCHW.flatten(1)
        # |r - x|^2 but for |x|^2, which is the same for all
        products_BN = images_BCHW.to(candidates_ND.dtype).flatten(1) @ candidates_ND.T
        distances_BN = candidates_ND.square().sum(1) - 2 * products_BN
        others_BN = classes_B[:, None] != labels_N
        return candidates_NCHW[distances_BN.masked_fill(others_BN, torch.inf).argmin(1)]


def pag(
    model: nn.Module,
    images_BCHW: Tensor,
    targets: Tensor,
    representatives: Representatives,
    *,
    weight: float | Tensor = 1.0,
) -> Loss:
    """CE + weight * mean_i (1 - cos(d f_c(x_i) / d x_i, r_c - x_i)): perceptually aligned
    gradients.

    c is drawn uniformly from the classes for every image, whatever its target, and r_c is the
    representative of c (see nearest_of_class). images: in the units of the representatives, 0..1
    pixels for a model that normalises. Where r_c is the image itself the cosine counts as 0. What
    it costs is gradnorm's. Source: arXiv 2207.11378, equation 4, of whose sum over classes one term
    is drawn.
    """
    if not images_BCHW.requires_grad:
        images_BCHW = images_BCHW.detach().requires_grad_()
    logits_BK = model(images_BCHW)
    ce = cross_entropy(logits_BK, targets)
    classes_B = draw_classes(torch.zeros_like(logits_BK, dtype=ce.dtype)).argmax(1)
    score = logits_BK.to(ce.dtype).gather(1, classes_B[:, None]).sum()
    (grad_BCHW,) = torch.autograd.grad(score, images_BCHW, create_graph=True)
    here_BCHW = images_BCHW.detach()
    guide_BCHW = nearest_of_class(here_BCHW, classes_B, representatives) - here_BCHW
    cosine_B = (unit(grad_BCHW.to(ce.dtype)) * unit(guide_BCHW.to(ce.dtype))).sum((1, 2, 3))
    penalty = 1 - cosine_B.mean()
    return Loss(ce + weight * penalty, ce, penalty, torch.full_like(ce, torch.nan))


def unit(x_BCHW: Tensor) -> Tensor:
    """Each image at an L2 norm of 1; 0 stays 0."""
    norms = torch.linalg.vector_norm(x_BCHW, dim=(1, 2, 3), keepdim=True)
    return x_BCHW / norms.clamp_min(1e-12)


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


def trades(
    model: nn.Module,
    images_BCHW: Tensor,
    targets: Tensor,
    *,
    beta: float = 6.0,
    eps: float = 4 / 255,
    step_size: float | Tensor = 8 / 255 / 3,
    steps: int = 3,
) -> Loss:
    """CE(x) + beta * KL(p(x) || p(x_adv)) with x_adv by trades_attack (Zhang et al. 2019, arXiv
    1901.08573, equation 5). images: 0..1 pixels. Put the model in eval mode for the attack where it
    has BatchNorm or dropout: then call trades_attack and trades_loss."""
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
    """PGD on KL(p(x) || p(x')) from a uniform start. With p(x) fixed this is the cross-entropy with
    the targets p(x), less their entropy: the same gradient."""
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
    model: nn.Module, both_2BCHW: Tensor, targets: Tensor, *, beta: float = 6.0
) -> Loss:
    """See trades; both: the images, then their adversarial ones, which go through the network one
    after the other. The gradient flows through p(x) as well."""
    here_BK, there_BK = (model(part) for part in both_2BCHW.chunk(2))
    ce = cross_entropy(here_BK, targets)
    log_here_BK, log_there_BK = (x.to(ce.dtype).log_softmax(1) for x in (here_BK, there_BK))
    kl = F.kl_div(log_there_BK, log_here_BK, reduction="batchmean", log_target=True)
    return Loss(ce + beta * kl, ce, kl, torch.full_like(ce, torch.nan))


@dataclasses.dataclass(frozen=True)
class Objective:
    """A method as the step runs it: perturb the images, if at all, then minimise the loss there.

    model maps 0..1 pixels to logits as backbone(normalize(pixels)), see models.Classifier; ramp is
    the scalar tensor in 0..1 that grows over the first epochs (a tensor, so that its change
    recompiles nothing).
    """

    loss: Callable[[Any, Tensor, Tensor, Tensor], Loss]
    perturb: Callable[..., Tensor] | None = None
    """(model, images, targets, ramp, gradient=...) -> images, with the ramp of the attack's step.
    None trains on the images as they are."""
    needs_input_gradient: bool = False
    """Whether `loss` differentiates with respect to the images. Then it is ce_weight * CE plus a
    penalty that ramp multiplies."""
    ce_weight: float = 1.0
    """Of the cross-entropy in `loss`."""
    penalty_weight: float = 0.0
    """Of the penalty in `loss`, at full ramp."""
    penalty_scale: float = 0.0
    """The penalty's factor before grad_l1: eps / sigma."""
    differences: bool = False
    """Whether the penalty is that and no more, which a finite difference of the cross-entropy
    takes."""
    forwards: int = 1
    """That `loss` runs, each swept back as well."""
    attack_steps: int = 0
    """Gradients that `perturb` takes."""
    attack_forwards: int = 0
    """Forwards that `perturb` runs beside those of its gradients."""
    rest: "Objective | None" = None
    """What the updates minimise whose turn this is not."""
    share: float = 1.0
    """Of the updates, whose turn it is where there is a rest."""

    def has_turn(self, update: int) -> bool:
        """The update's number decides alone; turns are spread evenly, from update 0 on."""
        if self.rest is None:
            return True
        return math.ceil((update + 1) * self.share) > math.ceil(update * self.share)


Builder = Callable[["ObjectiveConfig", Representatives | None], Objective]

METHODS: dict[str, Builder] = {}
"""--method's choices: name -> what builds it. A new one is a function here and a recipe."""


def method(name: str) -> Callable[[Builder], Builder]:
    """Registers a builder."""

    def register(builder: Builder) -> Builder:
        METHODS[name] = builder
        return builder

    return register


def build_objective(
    cfg: "ObjectiveConfig", representatives: Representatives | None = None
) -> Objective:
    """The configured method on a model with `normalize` and `backbone`. representatives: pag's,
    which its loss cannot do without."""
    return METHODS[cfg.method](cfg, representatives)


@method("natural")
def build_natural(cfg: "ObjectiveConfig", _: Representatives | None) -> Objective:
    def loss(model: Any, images: Tensor, targets: Tensor, ramp: Tensor) -> Loss:
        return natural(model, images, targets)

    return Objective(loss)


@method("gradnorm")
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


@method("pgd_at")
def build_pgd_at(cfg: "ObjectiveConfig", _: Representatives | None) -> Objective:
    return adversarial(cfg, steps=cfg.attack_it, select=cfg.attack_select)


@method("fgsm_rs")
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


@method("trades")
def build_trades(cfg: "ObjectiveConfig", _: Representatives | None) -> Objective:
    def loss(model: Any, images: Tensor, targets: Tensor, ramp: Tensor) -> Loss:
        return trades_loss(model, images, targets, beta=cfg.trades_beta)

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
            eps=cfg.attack_eps,
            step_size=cfg.step_size * ramp,
            steps=cfg.attack_it,
            select=cfg.attack_select,
            gradient=gradient,
        )
        return torch.cat([images, attacked])

    return Objective(
        loss,
        perturb,
        forwards=2,
        attack_steps=cfg.attack_it,
        attack_forwards=1 if cfg.attack_select == "last" else 2,
    )


@method("edge")
def build_edge(cfg: "ObjectiveConfig", _: Representatives | None) -> Objective:
    def loss(model: Any, images: Tensor, targets: Tensor, ramp: Tensor) -> Loss:
        return edge(
            model.backbone,
            model.normalize(images),
            targets,
            weight=cfg.edge_weight * ramp,
            temperature=cfg.edge_temperature,
            sampling=cfg.edge_sampling,
            map=cfg.edge_map,
            of=cfg.edge_of,
            rms=cfg.edge_rms,
        )

    return Objective(loss, needs_input_gradient=True, penalty_weight=cfg.edge_weight)


@method("pag")
def build_pag(cfg: "ObjectiveConfig", representatives: Representatives | None) -> Objective:
    def loss(model: Any, images: Tensor, targets: Tensor, ramp: Tensor) -> Loss:
        assert representatives is not None, "pag needs its classes' representatives"
        return pag(model, images, targets, representatives, weight=cfg.pag_weight * ramp)

    return Objective(loss, needs_input_gradient=True, penalty_weight=cfg.pag_weight)


@method("gradnorm+fgsm")
def build_gradnorm_fgsm(cfg: "ObjectiveConfig", _: Representatives | None) -> Objective:
    penalised = build_gradnorm(cfg, None)
    if cfg.gn_share == 1:
        return penalised
    # its rows have no penalty, and not one of 0
    attacked = without_penalty(build_fgsm_rs(cfg, None))
    return dataclasses.replace(penalised, rest=attacked, share=cfg.gn_share)


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
    """The cross-entropy of `objective`, with its weight and at the same images."""

    def loss(model: Any, images_BCHW: Tensor, targets: Tensor, ramp: Tensor) -> Loss:
        ce = natural(model, images_BCHW, targets).ce
        none = torch.full_like(ce, torch.nan)  # not a penalty of 0: it is not taken
        return Loss(objective.ce_weight * ce, ce, none, none)

    return Objective(
        loss,
        objective.perturb,
        ce_weight=objective.ce_weight,
        attack_steps=objective.attack_steps,
        attack_forwards=objective.attack_forwards,
    )


def piecewise_linear_warning(cfg: "ObjectiveConfig", counts: dict[str, int]) -> str | None:
    """The line to warn with when a method that differentiates twice meets activations without a
    second derivative, else None.

    counts: {class name: how many} of the model's piecewise-linear activations.
    """
    if not build_objective(cfg).needs_input_gradient or not counts:
        return None
    found = ", ".join(f"{n} {name}" for name, n in counts.items())
    return (
        f"{cfg.method} gets almost no signal through piecewise-linear activations ({found}): their "
        "second derivative is 0. Replace them with --activation gelu (or silu)."
    )
