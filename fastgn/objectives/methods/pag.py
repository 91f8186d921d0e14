"""The method pag, which minimises the cross-entropy plus a penalty on an angle.

One side of the angle is the gradient of a class's logit with respect to an image. The other side is
the direction from this image to an image that represents the class.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastgn.loss_scale import differentiate_images
from fastgn.objectives.base import (
    Loss,
    Objective,
    Representatives,
    cross_entropy,
    draw_classes,
    find_loss_scale,
)
from fastgn.objectives.options import PagOptions


def nearest_of_class(images_BCHW: Tensor, classes_B: Tensor, among: Representatives) -> Tensor:
    """Returns the representative of one class for each image, of shape (B, C, H, W).

    classes_B: one class for each image. among: the representatives of all classes. If a class can
    have several of them, the one with the least L2 distance from the image is returned.
    """
    candidates_NCHW, labels_N = among
    if labels_N is None:
        return candidates_NCHW[classes_B]
    with torch.no_grad(), torch.autocast(images_BCHW.device.type, enabled=False):
        candidates_ND = candidates_NCHW.flatten(1)
        # The squared distance of an image x from a representative r is |r|^2 - 2 r x + |x|^2.
        # The last term is left out, because it is the same for all representatives.
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
    loss_scale: Tensor | None = None,
) -> Loss:
    """Returns the cross-entropy plus a penalty on the angle between two directions in image space.

    total = CE + weight * mean_i (1 - cos(d f_c(x_i) / d x_i, r_c - x_i)). For every image x_i a
    class c is drawn uniformly from all classes. f_c is the logit of the class, and r_c an image
    that represents the class (see nearest_of_class). If r_c is x_i itself, the cosine counts as 0.
    The cost is the same as for gradnorm. Source: arXiv 2207.11378 (perceptually aligned gradients),
    equation 4, which sums over all classes instead of drawing one.

    images_BCHW: in the units of the representatives, such as pixels in 0..1.
    loss_scale: factor of the value that is differentiated, for fp16. See fastgn.loss_scale.
    """
    if not images_BCHW.requires_grad:
        images_BCHW = images_BCHW.detach().requires_grad_()
    logits_BK = model(images_BCHW)
    ce = cross_entropy(logits_BK, targets)
    classes_B = draw_classes(torch.zeros_like(logits_BK, dtype=ce.dtype)).argmax(1)
    score = logits_BK.to(ce.dtype).gather(1, classes_B[:, None]).sum()
    grad_BCHW = differentiate_images(
        score, images_BCHW, loss_scale, summed=len(images_BCHW), create_graph=True
    )
    here_BCHW = images_BCHW.detach()
    guide_BCHW = nearest_of_class(here_BCHW, classes_B, representatives) - here_BCHW
    cosine_B = (unit(grad_BCHW.to(ce.dtype)) * unit(guide_BCHW.to(ce.dtype))).sum((1, 2, 3))
    penalty = 1 - cosine_B.mean()
    return Loss(ce + weight * penalty, ce, penalty, torch.full_like(ce, torch.nan))


def unit(x_BCHW: Tensor) -> Tensor:
    """Returns images scaled to an L2 norm of 1. Images that are 0 stay 0."""
    norms = torch.linalg.vector_norm(x_BCHW, dim=(1, 2, 3), keepdim=True)
    return x_BCHW / norms.clamp_min(1e-12)


def build(options: PagOptions, representatives: Representatives | None) -> Objective:
    """Returns the method pag, with its loss, as an Objective."""

    def loss(model: Any, images: Tensor, targets: Tensor, ramp: Tensor) -> Loss:
        assert representatives is not None, "pag needs its classes' representatives"
        return pag(
            model,
            images,
            targets,
            representatives,
            weight=options.pag_weight * ramp,
            loss_scale=find_loss_scale(model),
        )

    return Objective(loss, needs_input_gradient=True, penalty_weight=options.pag_weight)
