"""The attacks against their definitions."""

import pytest
import torch
import torch.nn.functional as F
from support.networks import made, relative, soft_targets, swin
from torch import Tensor, nn

from fastgn import attacks


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
