"""edge against its formula, and the energy of an image's edges against numpy."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage, special
from support.networks import made, soft_targets, swin
from support.objectives import gradients, soft_ce
from torch import Tensor

from fastgn.objectives import Representatives, draw_classes, edge, edge_energy, pag


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
