"""pag against its formula."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.networks import made, relative, soft_targets, swin
from support.objectives import gradients, soft_ce

from fastgn.objectives import Representatives, draw_classes, natural, pag


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
