"""gradnorm against double backprop written out per image, and the attacks against their
definitions."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from fastgn import attacks
from fastgn.config import ObjectiveConfig
from fastgn.models import Classifier, swap_activations, switch_off_fused_attention
from fastgn.objectives import build_objective, fgsm_rs, gradnorm, natural, pgd_at

CE_WEIGHT, GN_WEIGHT, EPS, SIGMA = 0.7, 1.3, 3 / 255, 0.21


def swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=16,
        patch_size=2,
        embed_dim=8,
        depths=(2,),
        num_heads=(2,),
        window_size=4,
        num_classes=5,
        drop_path_rate=0.0,
    )


def vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
        num_classes=5,
    )


def resnet() -> nn.Module:
    model = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=5, channels=(8, 8, 16, 16))
    swap_activations(model, "gelu")
    return model


def made(build, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = build().to(dtype).train()
    switch_off_fused_attention(model)
    for parameter in model.parameters():  # so that no gradient is zero by the initialisation
        nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    return model


def soft_targets(num: int, classes: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(num, classes, dtype=dtype).softmax(1)


def gradients(total: Tensor, model: nn.Module) -> Tensor:
    grads = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    assert all(g is not None for g in grads)
    return torch.cat([g.flatten() for g in grads])


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


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
    cfg = ObjectiveConfig(ce_weight=0.6, gn_weight=2.0, eps=0.02, sigma=0.3)
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
