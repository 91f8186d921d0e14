"""Objectives as the command line configures them, and the registry of methods."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.networks import made, relative, soft_targets, swin
from support.objectives import gradients

from fastgn import attacks
from fastgn.config import load_recipe, recipe_names
from fastgn.config.cli import parse_config
from fastgn.models.network import Classifier
from fastgn.objectives import (
    METHODS,
    AttackOptions,
    EdgeOptions,
    GradnormOptions,
    NFgsmOptions,
    ObjectiveConfig,
    PagOptions,
    Representatives,
    TradesOptions,
    build_objective,
    edge,
    fgsm_rs,
    gradnorm,
    n_fgsm,
    natural,
    pag,
    pgd_at,
    trades,
)


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


def test_n_fgsm_trains_after_noise_and_a_step_that_nothing_clips_to_the_ball() -> None:
    """arXiv 2202.01181, algorithm 1: eta is uniform in [-k eps, k eps], and delta is eta plus alpha
    times the sign of the gradient at x + eta. Its code also keeps x + eta and x + delta in 0..1."""
    model = made(swin, torch.float32)
    images, labels, eps = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 3]), 0.03
    torch.manual_seed(3)
    loss = n_fgsm(model, images, labels, eps=eps)
    torch.manual_seed(3)
    eta = torch.empty_like(images).uniform_(-2 * eps, 2 * eps)
    noisy = (images + eta).clamp(0, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(noisy), labels), noisy)
    attacked = (noisy.detach() + eps * gradient.sign()).clamp(0, 1)
    assert torch.equal(loss.total, natural(model, attacked, labels).total)
    assert 2.9 * eps < (attacked - images).abs().max() <= 3 * eps + 1e-6
    assert attacked.min() >= 0 and attacked.max() <= 1

    cfg = ObjectiveConfig("n_fgsm", n_fgsm=NFgsmOptions(0.5), attack=AttackOptions(eps))
    perturb = build_objective(cfg).perturb
    assert perturb is not None
    network = Classifier(model, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 16)
    torch.manual_seed(3)
    moved = perturb(network, images, labels, torch.tensor(0.5), gradient=attacks.input_gradient)
    torch.manual_seed(3)
    start = attacks.draw_random_start(images, 0.5 * eps)
    steps = (moved - start).abs()
    inside = (moved > 0) & (moved < 1)
    assert torch.allclose(steps[inside], torch.tensor(0.5 * eps), atol=1e-6)


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


def test_default_step_sizes() -> None:
    assert math.isclose(ObjectiveConfig(method="pgd_at").step_size, 8 / 255 / 3)
    assert math.isclose(ObjectiveConfig(method="fgsm_rs").step_size, 5 / 255)


# Methods beside gradnorm, against their formulas written out
def test_every_method_is_a_choice_with_a_recipe() -> None:
    """But for pgd_at, which the paper's have, and two whose recipe differs by one option."""
    recipes = {load_recipe(name).objective.method for name in recipe_names()}
    assert recipes >= set(METHODS) - {"fgsm_rs", "n_fgsm"}
    for name in METHODS:
        assert parse_config(["--method", name]).objective.method == name


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
