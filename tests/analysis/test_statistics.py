"""The analysis's numbers against loops over single images, closed forms, numpy and scipy."""

import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastgn import attacks
from fastgn.analysis import figures, statistics
from fastgn.analysis.attacker import Attacker
from fastgn.errors import UserError
from fastgn.objectives import edge_energy

EPS = 0.03


def network() -> nn.Module:
    """Random weights, float64; smooth, so that nothing depends on the last bits."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(6 * 64, 4)
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.35)
    return model.double().eval()


def data(num: int = 16) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, images, and labels of which three in four are what the model says."""
    model = network()
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(num, 3, 8, 8, generator=generator, dtype=torch.float64)
    labels = model(images).argmax(1)
    labels[::4] = (labels[::4] + 1) % 4
    return model, images, labels


def cut(images: Tensor, labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(size), labels.split(size), strict=True))


def loss_and_gradient(model: nn.Module, image: Tensor, label: Tensor) -> tuple[float, Tensor]:
    x = image[None].clone().requires_grad_()
    loss = -model(x).log_softmax(1)[0, label]
    (gradient,) = torch.autograd.grad(loss, x)
    return loss.item(), gradient[0]


def test_gradient_statistics_equal_a_loop_over_single_images() -> None:
    model, images, labels = data()
    got = statistics.gradient_statistics(model, cut(images, labels, 5), eps=EPS, seed=7)

    starts = statistics.draw_noise(images, range(16), 7, statistics.PGD_START)
    shifts = statistics.draw_noise(images, range(16), 7, statistics.UNIFORM)
    norms, channels, signed, robust, clean = [], [], [], [], []
    errors: dict[str, list[float]] = {"uniform": [], "pgd10": []}
    rises: dict[str, list[float]] = {"uniform": [], "pgd10": []}
    for image, label, start, shift in zip(images, labels, starts, shifts, strict=True):
        loss, gradient = loss_and_gradient(model, image, label)
        channels.append([float(gradient[c].abs().sum()) for c in range(3)])
        signed.append([float(gradient[c].sum()) for c in range(3)])
        norms.append(sum(channels[-1]))
        attacked = (image + EPS * start).clamp(0, 1)
        for _ in range(10):
            ascent = loss_and_gradient(model, attacked, label)[1].sign()
            change = (attacked + EPS / 4 * ascent - image).clamp(-EPS, EPS)
            attacked = (image + change).clamp(0, 1)
        clean.append(int(model(image[None]).argmax()) == int(label))
        robust.append(clean[-1] and int(model(attacked[None]).argmax()) == int(label))
        for name, point in (("uniform", (image + EPS * shift).clamp(0, 1)), ("pgd10", attacked)):
            rise = loss_and_gradient(model, point, label)[0] - loss
            rises[name].append(abs(rise))
            errors[name].append(abs(rise - float(((point - image) * gradient).sum())))

    fails = [n for n, r in zip(norms, robust, strict=True) if r]
    succeeds = [n for n, r in zip(norms, robust, strict=True) if not r]
    assert fails and len(succeeds) > clean.count(False), "all three kinds of image are there"
    assert (got["images"], got["eps"], got["seed"]) == (16, EPS, 7)
    assert got["misclassified"] == clean.count(False) == 4
    assert (got["pgd10_fails"], got["pgd10_succeeds"]) == (len(fails), len(succeeds))
    assert got["l1"] == pytest.approx(norms, rel=1e-10)
    assert got["l1_mean"] == pytest.approx(np.mean(norms), rel=1e-10)
    assert got["l1_mean_pgd10_fails"] == pytest.approx(np.mean(fails), rel=1e-10)
    assert got["l1_mean_pgd10_succeeds"] == pytest.approx(np.mean(succeeds), rel=1e-10)
    assert got["channel_l1_mean"] == pytest.approx(np.mean(channels, 0).tolist(), rel=1e-10)
    assert got["channel_signed_mean"] == pytest.approx(np.mean(signed, 0).tolist(), rel=1e-10)
    ordered = sorted(norms)
    assert got["l1_quantiles"]["0"] == pytest.approx(ordered[0])
    assert got["l1_quantiles"]["50"] == pytest.approx((ordered[7] + ordered[8]) / 2)
    assert got["l1_quantiles"]["100"] == pytest.approx(ordered[-1])
    assert list(got["l1_quantiles"]) == ["0", "5", "25", "50", "75", "95", "100"]
    for name in ("uniform", "pgd10"):
        measured = got["linearity"][name]
        assert measured["error"] == pytest.approx(np.mean(errors[name]), rel=1e-8)
        relative = sum(errors[name]) / sum(rises[name])
        assert measured["relative_error"] == pytest.approx(relative, rel=1e-8)
    json.dumps(got, allow_nan=False)


def test_conditional_means_add_up() -> None:
    model, images, labels = data()
    got = statistics.gradient_statistics(model, cut(images, labels, 16), eps=EPS, seed=0)
    total = got["pgd10_fails"] * got["l1_mean_pgd10_fails"]
    total += got["pgd10_succeeds"] * got["l1_mean_pgd10_succeeds"]
    assert total == pytest.approx(16 * got["l1_mean"])
    assert sum(got["channel_l1_mean"]) == pytest.approx(got["l1_mean"])
    for whole, channels in zip(got["l1"], got["channel_l1"], strict=True):
        assert sum(channels) == pytest.approx(whole)
    grad = attacks.input_gradient(model, images, labels).images_BCHW
    along = statistics.edge_correlation(images, grad)
    assert got["edge_correlation"] == pytest.approx(along)
    assert got["edge_correlation_mean"] == pytest.approx(sum(along) / len(along))


def flat(value) -> list[float]:
    if isinstance(value, dict):
        return [x for v in value.values() for x in flat(v)]
    return [x for v in value for x in flat(v)] if isinstance(value, list) else [value]


def test_the_cut_into_batches_changes_nothing() -> None:
    model, images, labels = data()

    one, four = (
        flat(statistics.gradient_statistics(model, cut(images, labels, size), eps=EPS, seed=3))
        for size in (16, 4)
    )
    assert one == pytest.approx(four, rel=1e-8)
    other_seed = statistics.gradient_statistics(model, [(images, labels)], eps=EPS, seed=4)
    assert flat(other_seed["linearity"]) != pytest.approx(one[-4:], rel=1e-3)


def test_an_images_noise_follows_its_id() -> None:
    model, images, labels = data()
    whole = statistics.gradient_statistics(model, cut(images, labels, 8), eps=EPS, seed=3)
    alone = [
        statistics.gradient_statistics(
            model, [(images[i : i + 1], labels[i : i + 1])], eps=EPS, seed=3, ids=[i]
        )
        for i in range(16)
    ]
    for name in ("uniform", "pgd10"):
        errors = [a["linearity"][name]["error"] for a in alone]
        assert np.mean(errors) == pytest.approx(whole["linearity"][name]["error"], rel=1e-8)
    noises = [statistics.draw_noise(images[:1], [i], 3, use) for i in (0, 1) for use in (0, 1)]
    assert len({float(n.sum()) for n in noises}) == 4
    assert all(n.abs().max() <= 1 for n in noises)


class Bowl(nn.Module):
    """Its cross-entropy for label 0 is 1000 + w . x + a |x|^2 / 2, exactly: the other logit is so
    far above that nothing of the first is left in float64."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = a
        self.w = torch.linspace(0.5, 2, 192, dtype=torch.float64)

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        value = 1000 + x @ self.w + self.a / 2 * x.pow(2).sum(1)
        return torch.stack([torch.zeros_like(value), value], 1)


@pytest.mark.parametrize("a", [0.0, 3.0])
def test_local_linearity_of_a_quadratic_loss(a: float) -> None:
    images = 0.3 + 0.4 * torch.rand(32, 3, 8, 8, dtype=torch.float64)
    labels = torch.zeros(32, dtype=torch.int64)
    got = statistics.gradient_statistics(Bowl(a), [(images, labels)], eps=EPS, seed=0)
    gradient = Bowl(a).w + a * images.flatten(1)
    assert got["l1"] == pytest.approx(gradient.sum(1).tolist(), rel=1e-12)
    corner = a / 2 * 192 * EPS**2  # PGD ends in the corner of the ball that all of g points to
    rise = EPS * float(gradient.sum(1).mean()) + corner
    attacked, uniform = got["linearity"]["pgd10"], got["linearity"]["uniform"]
    assert attacked["error"] == pytest.approx(corner, rel=1e-6, abs=1e-9)
    assert attacked["relative_error"] == pytest.approx(corner / rise, rel=1e-6, abs=1e-9)
    # E |d|^2 is a third of the corner's; 6,144 draws know it to about 1 %
    assert uniform["error"] == pytest.approx(corner / 3, rel=0.05, abs=1e-9)
    assert got["l1_mean_pgd10_fails"] is None and got["pgd10_succeeds"] == 32
    json.dumps(got, allow_nan=False)


def test_an_image_that_the_attack_puts_right_counts_as_fooled() -> None:
    class Misleading(nn.Module):
        """Class 0 near a mean of 0.5, class 1 elsewhere; its gradient says nothing of that."""

        def forward(self, images: Tensor) -> Tensor:
            means = images.mean((1, 2, 3))
            score = (means.detach() - 0.5).abs() - 0.001 + means - means.detach()
            return torch.stack([-score, score], 1)

    images, labels = torch.full((1, 3, 4, 4), 0.5), torch.ones(1, dtype=torch.int64)
    assert int(Misleading()(images - EPS).argmax()) == 1
    got = statistics.gradient_statistics(Misleading(), [(images, labels)], eps=EPS, seed=0)
    assert (got["misclassified"], got["pgd10_succeeds"], got["pgd10_fails"]) == (1, 1, 0)


def test_a_small_loss_keeps_its_gradient_in_fp32() -> None:
    """softmax - 1 is 0 in fp32 at the label here, and with it half of the gradient."""

    class Confident(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            score = 20 + images.sum((1, 2, 3))
            return torch.stack([score, torch.zeros_like(score)], 1)

    images, labels = torch.full((1, 3, 2, 2), 0.25), torch.zeros(1, dtype=torch.int64)
    got = statistics.gradient_statistics(Confident(), [(images, labels)], eps=EPS, seed=0)
    assert got["l1_mean"] == pytest.approx(12 / (1 + math.exp(23)), rel=1e-5)


# Accuracy against eps: a linear model whose robustness is known


class Threshold(nn.Module):
    """Class 1 where the pixels' mean is above 0.5; remembers the means that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def forward(self, images: Tensor) -> Tensor:
        means = images.mean((1, 2, 3))
        self.seen += means.tolist()
        return torch.stack([0.5 - means, means - 0.5], 1)


MEANS = (0.505, 0.515, 0.1, 0.545, 0.495, 0.9)
LABELS = (1, 1, 1, 1, 0, 0)
"""The third and the last are wrong from the start; the others fall at 0.005, 0.015, 0.045, 0.005"""


def constant_images() -> tuple[Tensor, Tensor]:
    means = torch.tensor(MEANS, dtype=torch.float64)[:, None, None, None]
    return means.expand(-1, 3, 4, 4), torch.tensor(LABELS)


def outcomes_of(model: Threshold, eps: float, steps: int) -> str:
    images, labels = constant_images()
    attacker = Attacker("Linf", 0, 6, torch.device("cpu"))
    clean = attacker.find_correct(model, images, labels, range(6), "clean", 0.0, None)
    right = attacker.find_correct(model, images, labels, range(6), f"pgd-{steps}", eps, clean)
    return "".join("01"[x] for x in right)


def test_outcomes_of_a_linear_model() -> None:
    found = [outcomes_of(Threshold(), eps, 10) for eps in (0.001, 0.01, 0.02, 0.05)]
    assert found == ["110110", "010100", "000100", "000000"]


def test_wrong_images_are_never_attacked() -> None:
    model = Threshold()
    outcomes_of(model, 0.02, 4)
    for mean in (0.1, 0.9):
        assert len([m for m in model.seen if abs(m - mean) < 0.05]) == 1
    # a clean look at each; 4 steps and two looks at the result of 4 images
    assert len(model.seen) == 6 + 4 * (4 + 2)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"ids": [0, 1]}, "2 ids for at least 4 images"),
        ({"ids": range(9)}, "9 ids for 6 images"),
        ({"eps": 4.0}, "eps 4 is out of range"),
    ],
)
def test_refusals(more: dict, named: str) -> None:
    images, labels = constant_images()
    eps = more.pop("eps", 0.1)
    with pytest.raises(UserError, match=named):
        statistics.gradient_statistics(Threshold(), cut(images, labels, 4), eps=eps, seed=0, **more)
    with pytest.raises(UserError, match="no images"):
        statistics.gradient_statistics(Threshold(), [], eps=0.1, seed=0)


# Edges


def test_edge_correlation_equals_numpys() -> None:
    images, grads = torch.rand(4, 3, 6, 9), torch.randn(4, 3, 6, 9)
    images[2] = 0.3
    grads[3] = -0.7
    got = statistics.edge_correlation(images, grads)
    edges = edge_energy(images.double())[:, 0]
    for index in (0, 1):
        sizes = np.abs(grads[index].double().numpy()).sum(0)
        want = np.corrcoef(edges[index].numpy().ravel(), sizes.ravel())[0, 1]
        assert got[index] == pytest.approx(want, rel=1e-10)
    assert got[2] is None and got[3] is None, "a constant correlates with nothing"
    follows = edges[:1, None].expand(-1, 3, -1, -1) * torch.tensor([1, -2, 0.5])[:, None, None]
    assert statistics.edge_correlation(images[:1], follows) == pytest.approx([1.0])


# Pictures


def decoded(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def coloured(png: bytes, colour: tuple[int, int, int]) -> int:
    """Pixels of a colour."""
    return int((np.abs(decoded(png) - colour).max(2) < 12).sum())


BLUE, ORANGE = (0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)
"""The first two of matplotlib's cycle."""


@pytest.mark.parametrize("models", [1, 2])
def test_every_model_has_its_line(models: int) -> None:
    names = ("natural", "gradnorm")[:models]
    rows = [{"eps": e / 255, "accuracy": 0.8 - 0.1 * e, "correct": ""} for e in range(4)]
    norms = {n: [0.0, *np.geomspace(1, 1e4, 50).tolist()] for n in names}
    norms["natural"] = [1.0, 10.0, 1000.0]  # powers of ten lie on the bins' borders
    for png in (
        figures.draw_robust_curve(
            {
                n: [{**r, "accuracy": r["accuracy"] / (i + 1)} for r in rows]
                for i, n in enumerate(names)
            },
            "64 images",
        ),
        figures.draw_gradient_histograms(norms),
        figures.draw_norm_against_epoch(
            {n: [(0.5, 10.0 * (i + 1)), (1.0, 5.0)] for i, n in enumerate(names)}
        ),
    ):
        assert coloured(png, BLUE) > 20
        assert (coloured(png, ORANGE) > 20) == (models == 2)


def test_histogram_of_gradients_that_are_all_zero() -> None:
    png = figures.draw_gradient_histograms({"saturated": [0.0, 0.0]})
    assert decoded(png).std() > 0
