"""Cross-entropy plus the angle of input gradients to a representative of the class."""

from typing import Any

import torch
from torch import Tensor, nn

from fastgn.objectives.base import Loss, Objective, Representatives, cross_entropy, draw_classes
from fastgn.objectives.options import PagOptions


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


def build(options: PagOptions, representatives: Representatives | None) -> Objective:
    """Returns the method as the step runs it."""

    def loss(model: Any, images: Tensor, targets: Tensor, ramp: Tensor) -> Loss:
        assert representatives is not None, "pag needs its classes' representatives"
        return pag(model, images, targets, representatives, weight=options.pag_weight * ramp)

    return Objective(loss, needs_input_gradient=True, penalty_weight=options.pag_weight)
