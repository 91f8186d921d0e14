"""trades against its formula."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.networks import made, relative, soft_targets, swin
from support.objectives import gradients, soft_ce
from torch import Tensor

from fastgn.objectives import trades


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
