"""gradnorm against double backprop written out per image, and the attacks against their
definitions."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage, special
from support.networks import made, relative, resnet, soft_targets, swin, vit
from torch import Tensor, nn

from fastgn import attacks
from fastgn.config import load_recipe, recipe_names
from fastgn.config.cli import parse_config
from fastgn.models.network import Classifier
from fastgn.objectives import (
    METHODS,
    AttackOptions,
    EdgeOptions,
    GradnormOptions,
    ObjectiveConfig,
    PagOptions,
    Representatives,
    TradesOptions,
    build_objective,
    draw_classes,
    edge,
    edge_energy,
    fgsm_rs,
    gradnorm,
    natural,
    pag,
    pgd_at,
    trades,
)

CE_WEIGHT, GN_WEIGHT, EPS, SIGMA = 0.7, 1.3, 3 / 255, 0.21


def gradients(total: Tensor, model: nn.Module) -> Tensor:
    grads = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    assert all(g is not None for g in grads)
    return torch.cat([g.flatten() for g in grads])


def soft_ce(logits: Tensor, targets: Tensor) -> Tensor:
    return -(targets * logits.log_softmax(1)).sum(1)


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


# Attacks: a linear model, whose input gradient is known


class Linear(nn.Module):
    """Two classes; the margin grows with the mean of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(8.0))
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        score = self.weight * (images.mean((1, 2, 3)) - 0.5)
        return torch.stack([-score, score], 1)


def test_pgd_reaches_the_corner_of_the_ball_and_stays_in_0_1() -> None:
    model = Linear()
    images = torch.full((4, 3, 4, 4), 0.5)
    images[0] = 0.99
    labels = torch.tensor([0, 1, 0, 1])
    out = attacks.pgd(model, images, labels, eps=0.1, step_size=0.05, steps=6)
    want = torch.stack(
        [
            (image + (0.1 if y == 0 else -0.1)).clamp(0, 1)
            for image, y in zip(images, labels, strict=True)
        ]
    )
    assert torch.allclose(out, want, atol=1e-6)
    assert model.calls == 6, "nothing is forwarded twice"
    assert model.weight.grad is None, "attacks compute no weight gradients"


@pytest.mark.parametrize(("select", "forwards"), [("last", 3), ("best", 4), ("paper", 4)])
def test_pgd_forwards_and_selection(select: str, forwards: int) -> None:
    model = Linear()
    images, labels = torch.rand(8, 3, 4, 4), torch.randint(0, 2, (8,))
    torch.manual_seed(1)
    out = attacks.pgd(
        model, images, labels, eps=0.05, step_size=0.2, steps=3, select=select, raw_model=model
    )
    assert model.calls == forwards
    if select != "last":  # 'best' is at least as bad for the model as every iterate before it
        torch.manual_seed(1)
        last = attacks.pgd(model, images, labels, eps=0.05, step_size=0.2, steps=3)
        loss = F.cross_entropy(model(out), labels, reduction="none")
        assert (loss >= F.cross_entropy(model(last), labels, reduction="none") - 1e-6).all()


def test_paper_selection_judges_the_last_iterate_without_normalisation() -> None:
    """The quirk has an effect only through the raw model: one that finds every image harmless makes
    'paper' return an earlier iterate where 'best' returns the last."""
    model = Linear()

    class Harmless(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.stack([torch.full((len(images),), 50.0), torch.zeros(len(images))], 1)

    images, labels = torch.full((2, 3, 4, 4), 0.5), torch.zeros(2, dtype=torch.int64)
    options = {"eps": 0.1, "step_size": 0.05, "steps": 2}
    torch.manual_seed(0)
    best = attacks.pgd(model, images, labels, select="best", **options)
    torch.manual_seed(0)
    paper = attacks.pgd(model, images, labels, select="paper", raw_model=Harmless(), **options)
    assert F.cross_entropy(model(best), labels) > F.cross_entropy(model(paper), labels)


def test_input_gradient_is_each_images_own() -> None:
    model = made(swin)
    images, targets = torch.randn(3, 3, 16, 16, dtype=torch.float64), soft_targets(3)
    got = attacks.input_gradient(model, images, targets)
    for index in range(3):
        one = attacks.input_gradient(model, images[index : index + 1], targets[index : index + 1])
        assert torch.allclose(got.loss_B[index], one.loss_B[0], rtol=1e-12)
        assert relative(got.images_BCHW[index], one.images_BCHW[0]) < 1e-10
    assert all(p.grad is None for p in model.parameters())


def test_pgd_at_and_fgsm_rs_train_on_the_attacked_images() -> None:
    model = made(swin, torch.float32)
    images, labels = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    torch.manual_seed(3)
    loss = pgd_at(model, images, labels, eps=0.03, step_size=0.02, steps=3)
    torch.manual_seed(3)
    attacked = attacks.pgd(model, images, labels, eps=0.03, step_size=0.02, steps=3)
    assert torch.equal(loss.total, natural(model, attacked, labels).total)
    assert (attacked - images).abs().max() <= 0.03 + 1e-6
    torch.manual_seed(3)
    one = fgsm_rs(model, images, labels, eps=0.03, step_size=0.0375)
    torch.manual_seed(3)
    attacked = attacks.pgd(model, images, labels, eps=0.03, step_size=0.0375, steps=1)
    assert torch.equal(one.total, natural(model, attacked, labels).total)


def test_configured_objective_equals_the_pure_function() -> None:
    backbone = made(swin)
    model = Classifier(backbone, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 16).double()
    pixels, targets = torch.rand(2, 3, 16, 16, dtype=torch.float64), soft_targets(2)
    cfg = ObjectiveConfig(
        gradnorm=GradnormOptions(ce_weight=0.6, gn_weight=2.0, eps=0.02, sigma=0.3)
    )
    ramp = torch.tensor(0.25)
    got = build_objective(cfg).loss(model, pixels.clone().requires_grad_(), targets, ramp)
    want = gradnorm(
        backbone,
        model.normalize(pixels).detach(),
        targets,
        ce_weight=0.6,
        gn_weight=2.0 * 0.25,
        eps=0.02,
        sigma=0.3,
    )
    assert relative(gradients(got.total, model), gradients(want.total, model)) < 1e-12


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


def test_default_step_sizes() -> None:
    assert math.isclose(ObjectiveConfig(method="pgd_at").step_size, 8 / 255 / 3)
    assert math.isclose(ObjectiveConfig(method="fgsm_rs").step_size, 5 / 255)


# Methods beside gradnorm, against their formulas written out


def test_every_method_is_a_choice_with_a_recipe() -> None:
    """But for pgd_at and fgsm_rs, which the paper's and no recipe have."""
    recipes = {load_recipe(name).objective.method for name in recipe_names()}
    assert recipes >= set(METHODS) - {"fgsm_rs"}
    for name in METHODS:
        assert parse_config(["--method", name]).objective.method == name


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


def edges_by_numpy(images: np.ndarray) -> np.ndarray:
    """Edge energy by its definition, B x H x W: a Gaussian by Bessel functions of 7 taps, Sobel,
    the root over directions and channels, and the Gaussian, each mirrored at the border."""
    taps = special.ive(np.abs(np.arange(-3, 4)), 1.0)
    taps /= taps.sum()

    def blur(x: np.ndarray) -> np.ndarray:
        for axis in (0, 1):
            x = ndimage.correlate1d(x, taps, axis, mode="mirror")
        return x

    energy = np.zeros((len(images), *images.shape[2:]))
    for index, image in enumerate(images):
        for channel in image:
            for axis in (0, 1):
                energy[index] += ndimage.sobel(blur(channel), axis, mode="mirror") ** 2
        energy[index] = blur(np.sqrt(energy[index]))
    return energy


@pytest.mark.parametrize("shape", [(2, 3, 32, 24), (1, 1, 5, 7), (2, 3, 2, 3), (1, 3, 1, 4)])
def test_edge_energy_is_its_definition(shape: tuple) -> None:
    images = torch.rand(*shape, dtype=torch.float64)
    found = edge_energy(images)
    assert found.shape == (shape[0], 1, *shape[2:])
    want = edges_by_numpy(images.numpy())
    np.testing.assert_allclose(found[:, 0].numpy(), want, rtol=1e-10, atol=1e-12)


def test_edge_energy_keeps_its_dtype_and_finds_a_step() -> None:
    images = torch.zeros(1, 3, 16, 16)
    images[..., 8:] = 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        energy = edge_energy(images)
    assert energy.dtype == torch.float32
    assert energy[0, 0].sum(0).argmax().item() in (7, 8)
    assert edge_energy(torch.full((1, 3, 8, 8), 0.3)).abs().max() < 1e-6


@pytest.mark.parametrize("sampling", ["hard", "relaxed"])
def test_classes_are_drawn_from_the_softmax_at_a_temperature(sampling: str) -> None:
    torch.manual_seed(0)
    logits = torch.tensor([1.0, 0.0, -1.0, 0.5]).expand(40_000, 4)
    weights = draw_classes(logits, 0.5, sampling)
    assert torch.allclose(weights.sum(1), torch.ones(len(weights)))
    largest = weights.argmax(1).bincount(minlength=4) / len(weights)
    # the temperature sharpens a relaxed draw's weights, and leaves open which is the largest
    expected = logits[0] / 0.5 if sampling == "hard" else logits[0]
    assert torch.allclose(largest, expected.softmax(0), atol=0.01)
    certain = (weights.amax(1) == 1).float().mean()
    assert certain == 1 if sampling == "hard" else certain < 0.5


EDGE_OPTIONS = {
    "paper": {},
    "relaxed": {"sampling": "relaxed"},
    "saliency": {"map": "saliency"},
    "of the loss": {"of": "loss"},
    "an rms per image": {"rms": "image"},
    "all": {"sampling": "relaxed", "map": "saliency", "rms": "image"},
}


@pytest.mark.parametrize("name", EDGE_OPTIONS)
def test_edge_is_its_formula(name: str) -> None:
    """The value by numpy from each image's signed gradient. The gradient of the weights, which is
    of second order, by a central difference of that value."""
    options = EDGE_OPTIONS[name]
    model = made(swin)
    contrast = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)  # which one rms per image evens
    images = contrast[:, None, None, None] * torch.randn(3, 3, 16, 16, dtype=torch.float64)
    targets = soft_targets(3)
    torch.manual_seed(2)
    gumbel = -torch.log(-torch.log(torch.rand(3, 5, dtype=torch.float64)))

    def rms(x: np.ndarray) -> np.ndarray:
        axes = (1, 2, 3) if options.get("rms") == "image" else None
        return np.sqrt((x**2).mean(axes, keepdims=True))

    def value() -> float:
        ces, grads = [], []
        for image, target, noise in zip(images, targets, gumbel, strict=True):
            x = image[None].clone().requires_grad_()
            logits = model(x)[0]
            ce = score = soft_ce(logits[None], target[None]).sum()
            if options.get("of") != "loss":
                score = logits[(logits / 0.3 + noise).argmax()]
                if options.get("sampling") == "relaxed":
                    score = ((logits + noise) / 0.3).softmax(0) @ logits
            ces.append(ce.item())
            grads.append(torch.autograd.grad(score, x)[0][0].numpy())
        g, e = np.stack(grads), edges_by_numpy(images.numpy())[:, None]
        if options.get("map") == "saliency":
            g = np.abs(g).max(1, keepdims=True)
        e = np.repeat(e, g.shape[1], 1)
        return np.mean(ces) + 7.0 * np.mean((g / rms(g) - e / rms(e)) ** 2)

    settings = {"weight": 7.0, "temperature": 0.3}
    torch.manual_seed(2)
    loss = edge(model, images, targets, **settings, **options)
    assert math.isclose(loss.total.item(), value(), rel_tol=1e-10)
    assert math.isclose(loss.total.item(), loss.ce.item() + 7 * loss.penalty.item(), rel_tol=1e-10)
    parameters = list(model.parameters())
    direction = [torch.randn_like(p) * p.detach().abs().mean() for p in parameters]
    found = torch.autograd.grad(loss.total, parameters)
    values, h = [], 1e-6
    for step in (h, -h):
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.add_(d, alpha=step)
        values.append(value())
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.sub_(d, alpha=step)
    slope = sum(float((g * d).sum()) for g, d in zip(found, direction, strict=True))
    assert math.isclose((values[0] - values[1]) / (2 * h), slope, rel_tol=1e-4)
    for change in ({"sampling": "relaxed"}, {"map": "saliency"}, {"rms": "image"}, {"of": "loss"}):
        if options.items() & change.items() or (options.get("of") and "sampling" in change):
            continue
        torch.manual_seed(2)
        changed = edge(model, images, targets, **settings, **options | change)
        assert not math.isclose(changed.total.item(), loss.total.item(), rel_tol=1e-4), change


def test_edge_needs_the_gradients_sign() -> None:
    """A gradient that equals the edges has no penalty; the same one with other signs has."""
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    edges = edge_energy(images).expand(-1, 3, -1, -1)

    def penalty(signs: Tensor, **options: str) -> float:
        def model(x: Tensor) -> Tensor:  # the gradient of either logit is signs * edges
            return (x * signs * edges).sum((1, 2, 3))[:, None].expand(-1, 2)

        return edge(model, images, torch.tensor([0, 1]), **options).penalty.item()

    mixed = torch.ones_like(images)
    mixed[:, 1] = -1
    assert penalty(torch.ones_like(images)) == pytest.approx(0, abs=1e-20)
    assert penalty(mixed) > 1
    assert penalty(-torch.ones_like(images)) == pytest.approx(4)
    assert penalty(mixed, map="saliency") == pytest.approx(0, abs=1e-20)


def test_a_flat_image_and_a_dead_gradient_give_no_nan() -> None:
    model = made(swin)
    with torch.no_grad():
        for parameter in model.patch_embed.proj.parameters():
            parameter.zero_()
    images, targets = torch.full((2, 3, 16, 16), 0.5, dtype=torch.float64), soft_targets(2)
    guides = Representatives(images[:1].expand(5, -1, -1, -1))
    losses = edge(model, images, targets), pag(model, images, targets, guides)
    for loss in losses:
        assert gradients(loss.total, model).isfinite().all()
    assert losses[1].penalty == 1, "no gradient, and no way to go"


@pytest.mark.parametrize("nearest", [False, True])
@pytest.mark.parametrize("soft", [True, False])
def test_pag_is_its_formula(nearest: bool, soft: bool) -> None:
    model = made(swin)
    images = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    targets = soft_targets(4) if soft else torch.tensor([0, 3, 4, 1])
    probabilities = targets if soft else F.one_hot(targets, 5).double()
    candidates = torch.rand(15 if nearest else 5, 3, 16, 16, dtype=torch.float64)
    labels = torch.randint(0, 5, (15,)).index_copy(0, torch.arange(5), torch.arange(5))
    torch.manual_seed(4)
    classes = (-torch.log(-torch.log(torch.rand(4, 5, dtype=torch.float64)))).argmax(1).tolist()

    total = torch.zeros((), dtype=torch.float64)
    for image, target, drawn in zip(images, probabilities, classes, strict=True):
        x = image[None].clone().requires_grad_()
        logits = model(x)[0]
        (g,) = torch.autograd.grad(logits[drawn], x, create_graph=True)
        guide = candidates[drawn]
        if nearest:
            guide = min(candidates[labels == drawn], key=lambda r: float((r - image).norm()))
        guide = (guide - image).flatten()
        cosine = (g.flatten() @ guide) / (g.norm() * guide.norm())
        total = total + (soft_ce(logits[None], target[None]).sum() + 3.0 * (1 - cosine)) / 4

    among = Representatives(candidates, labels if nearest else None)
    torch.manual_seed(4)
    loss = pag(model, images, targets, among, weight=3.0)
    assert math.isclose(loss.total.item(), total.item(), rel_tol=1e-10)
    found = gradients(loss.total, model)
    assert relative(found, gradients(total, model)) < 1e-9
    assert relative(found, gradients(natural(model, images, targets).total, model)) > 1e-2
    torch.manual_seed(4)
    changed = pag(model, images, targets, Representatives(1 - candidates, among[1]), weight=3.0)
    assert relative(gradients(changed.total, model), found) > 1e-2


def test_pag_draws_every_class_alike() -> None:
    torch.manual_seed(0)
    drawn = draw_classes(torch.zeros(50_000, 5)).mean(0)
    assert torch.allclose(drawn, torch.full((5,), 0.2), atol=0.01)


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Of each image, by its definition."""
    p, q = p_logits.softmax(1), q_logits.softmax(1)
    return (p * (p / q).log()).sum(1)


@pytest.mark.parametrize("soft", [True, False])
def test_trades_is_its_formula(soft: bool) -> None:
    model = made(swin)
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    targets = soft_targets(3) if soft else torch.tensor([0, 3, 4])
    probabilities = targets if soft else F.one_hot(targets, 5).double()
    torch.manual_seed(6)
    x = (images + torch.empty_like(images).uniform_(-0.1, 0.1)).clamp(0, 1)
    for _ in range(2):
        x.requires_grad_()
        (g,) = torch.autograd.grad(kl(model(images).detach(), model(x)).sum(), x)
        x = torch.clamp(x.detach() + 0.04 * g.sign(), images - 0.1, images + 0.1).clamp(0, 1)
    assert (x - images).abs().max() <= 0.1 + 1e-12
    ce = soft_ce(model(images), probabilities).mean()
    total = ce + 4.0 * kl(model(images), model(x)).mean()

    options = {"beta": 4.0, "eps": 0.1, "step_size": 0.04, "steps": 2}
    torch.manual_seed(6)
    loss = trades(model, images, targets, **options)
    assert math.isclose(loss.total.item(), total.item(), rel_tol=1e-10)
    assert math.isclose(loss.ce.item(), ce.item(), rel_tol=1e-12)
    found = gradients(loss.total, model)
    assert relative(found, gradients(total, model)) < 1e-9
    for change in ({"beta": 1.0}, {"eps": 0.02}, {"steps": 1}, {"step_size": 0.01}):
        torch.manual_seed(6)
        changed = trades(model, images, targets, **options | change)
        assert relative(gradients(changed.total, model), found) > 1e-4, change


def test_configured_methods_equal_the_pure_functions() -> None:
    backbone = made(swin)
    model = Classifier(backbone, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 16).double()
    pixels, targets = torch.rand(2, 3, 16, 16, dtype=torch.float64), soft_targets(2)
    normalized = model.normalize(pixels).detach()
    among = Representatives(torch.rand(5, 3, 16, 16, dtype=torch.float64))
    ramp = torch.tensor(0.25, dtype=torch.float64)
    cases = [
        (
            ObjectiveConfig("edge", edge=EdgeOptions("logit", 8.0, 2.0, edge_map="saliency")),
            lambda: edge(
                backbone, normalized, targets, weight=2.0, temperature=2.0, map="saliency"
            ),
        ),
        (
            ObjectiveConfig("pag", pag=PagOptions(8.0)),
            lambda: pag(model, pixels, targets, among, weight=2.0),
        ),
        (
            ObjectiveConfig(
                "trades", trades=TradesOptions(2.0), attack=AttackOptions(0.1, attack_it=2)
            ),
            lambda: trades(
                model, pixels, targets, beta=2.0, eps=0.1, step_size=0.1 * 0.25, steps=2
            ),
        ),
    ]
    cases.append(
        (
            ObjectiveConfig("edge", edge=EdgeOptions("loss", 8.0, edge_rms="image")),
            lambda: edge(backbone, normalized, targets, weight=2.0, of="loss", rms="image"),
        )
    )
    for cfg, pure in cases:
        built, images = build_objective(cfg, among), pixels.clone()
        torch.manual_seed(8)
        if built.perturb is not None:
            images = built.perturb(model, images, targets, ramp, gradient=attacks.input_gradient)
        got = built.loss(model, images, targets, ramp)
        torch.manual_seed(8)
        want = pure()
        assert relative(gradients(got.total, model), gradients(want.total, model)) < 1e-12
        assert torch.isclose(got.penalty, want.penalty, rtol=1e-12), cfg.method


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda *a: gradnorm(*a, norm="l3"), "norm 'l3' should be l1, l2 or l2_squared"),
        (lambda *a: edge(*a, sampling="soft"), "sampling 'soft' should be hard or relaxed"),
        (lambda *a: edge(*a, map="energy"), "map 'energy' should be gradient or saliency"),
        (lambda *a: edge(*a, of="class"), "of 'class' should be logit or loss"),
        (lambda *a: edge(*a, rms="pixel"), "rms 'pixel' should be batch or image"),
    ],
)
def test_unknown_options_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(made(swin), torch.rand(2, 3, 16, 16, dtype=torch.float64), soft_targets(2))
