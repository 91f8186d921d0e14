"""gradnorm and its variants against double backprop written out per image."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.networks import made, relative, resnet, soft_targets, swin, vit
from support.objectives import gradients, soft_ce

from fastgn import attacks
from fastgn.models.network import Classifier
from fastgn.objectives import (
    AttackOptions,
    GradnormOptions,
    ObjectiveConfig,
    build_objective,
    gradnorm,
    natural,
)

CE_WEIGHT, GN_WEIGHT, EPS, SIGMA = 0.7, 1.3, 3 / 255, 0.21


@pytest.mark.parametrize("build", [swin, vit])
@pytest.mark.parametrize("soft", [True, False])
def test_gradnorm_is_the_mean_of_each_images_own_penalty(build, soft: bool) -> None:
    model = made(build)
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    targets = soft_targets(3) if soft else torch.tensor([0, 3, 4])
    probabilities = targets if soft else F.one_hot(targets, 5).double()

    total = torch.zeros((), dtype=torch.float64)
    ce_sum, l1_sum = 0.0, 0.0
    for image, target in zip(images, probabilities, strict=True):  # one image at a time
        x = image[None].clone().requires_grad_()
        ce = soft_ce(model(x), target[None]).sum()
        (g,) = torch.autograd.grad(ce, x, create_graph=True)
        l1 = (g * g.detach().sign()).sum()
        total = total + (CE_WEIGHT * ce + GN_WEIGHT * EPS / SIGMA * l1) / 3
        ce_sum, l1_sum = ce_sum + ce.item(), l1_sum + l1.item()

    loss = gradnorm(
        model, images, targets, ce_weight=CE_WEIGHT, gn_weight=GN_WEIGHT, eps=EPS, sigma=SIGMA
    )
    assert math.isclose(loss.ce.item(), ce_sum / 3, rel_tol=1e-12)
    assert math.isclose(loss.grad_l1.item(), l1_sum / 3, rel_tol=1e-12)
    assert math.isclose(loss.penalty.item(), EPS / SIGMA * l1_sum / 3, rel_tol=1e-12)
    assert math.isclose(loss.total.item(), total.item(), rel_tol=1e-12)
    assert relative(gradients(loss.total, model), gradients(total, model)) < 1e-10


def test_gradnorm_with_batchnorm_in_train_mode() -> None:
    """The images are coupled: what is penalised is the gradient of the summed loss."""
    model, model_too = made(resnet), made(resnet)
    images, targets = torch.randn(4, 3, 32, 32, dtype=torch.float64), soft_targets(4)
    x = images.clone().requires_grad_()
    ce = soft_ce(model_too(x), targets)
    (g,) = torch.autograd.grad(ce.sum(), x, create_graph=True)
    total = CE_WEIGHT * ce.mean() + GN_WEIGHT * EPS / SIGMA * g.abs().sum((1, 2, 3)).mean()
    loss = gradnorm(
        model, images, targets, ce_weight=CE_WEIGHT, gn_weight=GN_WEIGHT, eps=EPS, sigma=SIGMA
    )
    assert relative(gradients(loss.total, model), gradients(total, model_too)) < 1e-10
    for mine, theirs in zip(model.buffers(), model_too.buffers(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("build", [swin, vit, resnet])
def test_gradient_is_the_derivative_of_the_value(build) -> None:
    """A central difference along a random direction of the weights: no autograd in the
    reference."""
    model = made(build).eval()
    images = torch.randn(
        2, 3, 32 if build is resnet else 16, 32 if build is resnet else 16
    ).double()
    targets = soft_targets(2)
    parameters = list(model.parameters())
    direction = [torch.randn_like(p) * p.detach().abs().mean() for p in parameters]

    def value(step: float) -> float:
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.add_(d, alpha=step)
        out = gradnorm(model, images, targets, gn_weight=5.0, eps=0.1).total.item()
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.sub_(d, alpha=step)
        return out

    grads = torch.autograd.grad(
        gradnorm(model, images, targets, gn_weight=5.0, eps=0.1).total, parameters
    )
    slope = sum(float((g * d).sum()) for g, d in zip(grads, direction, strict=True))
    h = 1e-7  # small, for the L1 norm has a kink wherever a gradient entry changes its sign
    assert math.isclose((value(h) - value(-h)) / (2 * h), slope, rel_tol=1e-4)


def test_penalty_changes_the_weight_gradients() -> None:
    model = made(swin)
    images, targets = torch.randn(2, 3, 16, 16, dtype=torch.float64), soft_targets(2)
    without = gradients(gradnorm(model, images, targets, gn_weight=0.0).total, model)
    with_it = gradients(gradnorm(model, images, targets, gn_weight=1.2).total, model)
    plain = gradients(0.8 * natural(model, images, targets).total, model)
    assert relative(without, plain) < 1e-12
    assert relative(with_it, plain) > 0.01


def test_gradnorm_in_pixels_equals_normalised_units() -> None:
    """sigma converts units: with std in every channel, pixels and sigma 1 give the same penalty."""
    std = 0.25
    backbone = made(swin)
    model = Classifier(backbone, (0.5,) * 3, (std,) * 3, 16).double()
    pixels, targets = torch.rand(2, 3, 16, 16, dtype=torch.float64), soft_targets(2)
    in_pixels = gradnorm(model, pixels, targets, sigma=1.0)
    normalised = gradnorm(backbone, model.normalize(pixels), targets, sigma=std)
    assert math.isclose(in_pixels.penalty.item(), normalised.penalty.item(), rel_tol=1e-10)


def test_bf16_logits_are_reduced_in_fp32() -> None:
    loss = natural(
        made(swin, torch.bfloat16), torch.randn(2, 3, 16, 16).bfloat16(), torch.tensor([0, 1])
    )
    assert loss.total.dtype == torch.float32


def test_gradnorm_at_attacked_images_is_gradnorm_there() -> None:
    backbone = made(swin)
    model = Classifier(backbone, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 16).double()
    pixels, targets = torch.rand(2, 3, 16, 16, dtype=torch.float64), soft_targets(2)
    cfg = ObjectiveConfig(
        gradnorm=GradnormOptions(gn_attacked=True),
        attack=AttackOptions(attack_eps=0.1, attack_it=2, attack_select="best"),
    )
    built = build_objective(cfg)
    assert built.perturb is not None and (built.attack_steps, built.attack_forwards) == (2, 1)
    ramp = torch.tensor(0.5, dtype=torch.float64)
    torch.manual_seed(3)
    images = built.perturb(model, pixels, targets, ramp, gradient=attacks.input_gradient)
    torch.manual_seed(3)
    want = attacks.pgd(model, pixels, targets, eps=0.1, step_size=0.05, steps=2, select="best")
    assert torch.equal(images, want) and not torch.equal(images, pixels)
    got = built.loss(model, images, targets, ramp)
    normalized = model.normalize(want).detach()
    there = gradnorm(backbone, normalized, targets, gn_weight=1.2 * 0.5)
    assert relative(gradients(got.total, model), gradients(there.total, model)) < 1e-12
    assert build_objective(ObjectiveConfig()).perturb is None


VARIANTS = {
    "l2": {"norm": "l2"},
    "l2 squared": {"norm": "l2_squared"},
    "logit": {"of": "logit"},
    "logit, l2": {"of": "logit", "norm": "l2"},
    "channels": {"channel_weights": (0.5, 2.0, 1.0)},
    "threshold": {"threshold": 1.0},
    "l2, channels, threshold": {
        **{"norm": "l2", "channel_weights": (0.5, 2.0, 1.0), "threshold": 0.05},
    },
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("soft", [True, False])
def test_gradnorm_variants(name: str, soft: bool) -> None:
    """One image at a time, by double backprop of the formula."""
    options = VARIANTS[name]
    model = made(swin)
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    targets = soft_targets(4) if soft else torch.tensor([0, 3, 4, 1])
    probabilities = targets if soft else F.one_hot(targets, 5).double()
    weights = torch.tensor(options.get("channel_weights", (1.0, 1.0, 1.0))).double()

    sizes, total = [], torch.zeros((), dtype=torch.float64)
    for image, target in zip(images, probabilities, strict=True):
        x = image[None].clone().requires_grad_()
        logits = model(x)
        ce = soft_ce(logits, target[None]).sum()
        score = (target * logits[0]).sum() if options.get("of") == "logit" else ce
        (g,) = torch.autograd.grad(score, x, create_graph=True)
        g = g * weights[None, :, None, None]
        squares = (g * g).sum()
        norms = {"l1": (g * g.detach().sign()).sum(), "l2": squares.sqrt(), "l2_squared": squares}
        sizes.append(norms[options.get("norm", "l1")])
    if "threshold" in options:  # between the images' norms, so that some count and some do not
        ordered = sorted(size.item() for size in sizes)
        options = options | {"threshold": (ordered[1] + ordered[2]) / 2}
    threshold = options.get("threshold", 0.0)
    penalty = sum(size - threshold for size in sizes if size > threshold) / 4
    ce = soft_ce(model(images), probabilities).mean()
    total = CE_WEIGHT * ce + GN_WEIGHT * EPS / SIGMA * penalty

    weights_of = {"ce_weight": CE_WEIGHT, "gn_weight": GN_WEIGHT, "eps": EPS, "sigma": SIGMA}
    loss = gradnorm(model, images, targets, **weights_of, **options)
    plain = gradnorm(model, images, targets, **weights_of)
    assert math.isclose(loss.penalty.item(), EPS / SIGMA * penalty.item(), rel_tol=1e-10)
    assert math.isclose(loss.total.item(), total.item(), rel_tol=1e-10)
    found = gradients(loss.total, model)
    assert relative(found, gradients(total, model)) < 1e-9
    assert relative(found, gradients(plain.total, model)) > 1e-4, "the option does something"


def test_the_random_start_moves_the_point_of_loss_and_gradient() -> None:
    backbone = made(swin)
    model = Classifier(backbone, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 16).double()
    pixels, targets = torch.rand(2, 3, 16, 16, dtype=torch.float64), soft_targets(2)
    torch.manual_seed(7)
    noise = torch.empty_like(pixels).uniform_(-0.1, 0.1)
    moved = model.normalize((pixels + noise).clamp(0, 1))
    want = gradnorm(backbone, moved.detach(), targets)
    there = gradnorm(backbone, model.normalize(pixels).detach(), targets)
    loss = build_objective(ObjectiveConfig(gradnorm=GradnormOptions(gn_start=0.1))).loss
    torch.manual_seed(7)
    ramp = torch.tensor(1.0, dtype=torch.float64)
    got = loss(model, pixels.clone().requires_grad_(), targets, ramp)
    found = gradients(got.total, model)
    assert math.isclose(got.ce.item(), want.ce.item(), rel_tol=1e-12)
    assert relative(found, gradients(want.total, model)) < 1e-10
    assert relative(found, gradients(there.total, model)) > 1e-4
