"""The method edge, which minimises the cross-entropy plus a penalty.

The penalty is the mean squared difference between a logit's input gradient and the strength of the
edges in the image, which a filter computes.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgn.loss_scale import differentiate_images
from fastgn.objectives.base import Loss, Objective, cross_entropy, draw_classes, find_loss_scale
from fastgn.objectives.options import EdgeOptions


def bessel(order: int) -> float:
    """Returns the modified Bessel function of the first kind I_order(1)."""
    factorial = math.factorial
    return sum(0.5 ** (2 * k + order) / factorial(k) / factorial(k + order) for k in range(9))


GAUSSIAN = [bessel(abs(i)) for i in range(-3, 4)]
"""Values of the discrete Gaussian (Lindeberg 1990) with a sigma of 1 pixel, at distances of up to 3
pixels. They are not normalised yet."""
GAUSSIAN = [tap / sum(GAUSSIAN) for tap in GAUSSIAN]
"""Discrete Gaussian filter with a sigma of 1 pixel, scaled so that its 7 taps sum to 1."""


def correlate(x_BCHW: Tensor, taps: Sequence[float], dim: int) -> Tensor:
    """Returns the correlation of images with a filter along dim 2 (height) or dim 3 (width).

    taps: the coefficients of the filter. The images are mirrored at their border pixels. The
    function adds shifted images instead of calling a convolution, because autocast would change the
    dtype of a convolution.
    """
    reach = len(taps) // 2
    padded = mirror(x_BCHW, reach, dim)
    first, *others = (t * padded.narrow(dim, i, x_BCHW.shape[dim]) for i, t in enumerate(taps) if t)
    return sum(others, first)


def mirror(x_BCHW: Tensor, reach: int, dim: int) -> Tensor:
    """Extends the images by `reach` pixels on both sides along `dim`, like numpy.pad's mode
    'reflect'."""
    while reach:  # F.pad can add at most one pixel less than the side of the images at once
        step = min(reach, max(x_BCHW.shape[dim] - 1, 1))
        mode = "replicate" if x_BCHW.shape[dim] == 1 else "reflect"
        x_BCHW = F.pad(x_BCHW, (0, 0, step, step) if dim == 2 else (step, step, 0, 0), mode=mode)
        reach -= step
    return x_BCHW


def edge_energy(images_BCHW: Tensor) -> Tensor:
    """Returns the strength of an image's edges at each pixel, B x 1 x H x W, in the images' units.

    First a Gaussian of sigma 1 pixel blurs the image. Then Sobel's 3 x 3 filters give its slopes
    along rows and columns. Their L2 norm over both directions and all channels is blurred again.
    Each filter mirrors its input at the border. Source: the code of arXiv 2409.20139.
    """

    def blur(x: Tensor) -> Tensor:
        return correlate(correlate(x, GAUSSIAN, 2), GAUSSIAN, 3)

    x = blur(images_BCHW)
    slopes = [
        correlate(correlate(x, (-1.0, 0.0, 1.0), dim), (1.0, 2.0, 1.0), 5 - dim) for dim in (2, 3)
    ]
    return blur(torch.linalg.vector_norm(torch.cat(slopes, 1), dim=1, keepdim=True))


def over_rms(x_BCHW: Tensor, rms: str) -> Tensor:
    """Returns images divided by their root mean square. Images that are 0 stay 0.

    rms: 'batch' for one root mean square of the whole batch, 'image' for one per image.
    """
    dims = (0, 1, 2, 3) if rms == "batch" else (1, 2, 3)
    return x_BCHW / x_BCHW.square().mean(dims, keepdim=True).clamp_min(1e-24).sqrt()


def edge(
    model: nn.Module,
    images_BCHW: Tensor,
    targets: Tensor,
    *,
    weight: float | Tensor = 1.0,
    temperature: float = EdgeOptions.edge_temperature,
    sampling: str = EdgeOptions.edge_sampling,
    map: str = EdgeOptions.edge_map,
    of: str = EdgeOptions.edge_of,
    rms: str = EdgeOptions.edge_rms,
    loss_scale: Tensor | None = None,
) -> Loss:
    """Returns the cross-entropy plus the mean squared difference between input gradients and the
    edges in the images.

    total = CE + weight * MSE(G / rms(G), E / rms(E)). G is the gradient of sum_k w_k f_k with
    respect to the images. f_k is the logit of class k, and draw_classes gives the weights w_k. E is
    edge_energy, repeated for all channels. The mean is over images, channels and pixels. E is never
    negative, so the penalties for G and -G differ. The cost is the same as for gradnorm. Source:
    arXiv 2409.20139 and its code.

    images_BCHW: in the units that `model` takes. The edges are computed in these units.
    temperature, sampling: arguments of draw_classes.
    of: 'logit', or 'loss' for the gradient of the cross-entropy.
    map: 'gradient', or 'saliency' for the largest magnitude of G over the channels (Simonyan et al.
    2014).
    rms: 'batch' for one root mean square per batch, as in the paper's code, or 'image' for one per
    image.
    loss_scale: factor of the value that is differentiated, for fp16. See fastgn.loss_scale.
    """
    for name, value, choices in (
        ("map", map, ("gradient", "saliency")),
        ("of", of, ("logit", "loss")),
        ("rms", rms, ("batch", "image")),
    ):
        if value not in choices:
            raise ValueError(f"{name} {value!r} should be {choices[0]} or {choices[1]}")
    if not images_BCHW.requires_grad:
        images_BCHW = images_BCHW.detach().requires_grad_()
    logits_BK = model(images_BCHW)
    ce = score = cross_entropy(logits_BK, targets)
    if of == "logit":
        logits_BK = logits_BK.to(ce.dtype)
        score = (draw_classes(logits_BK, temperature, sampling) * logits_BK).sum()
    summed = len(images_BCHW) if of == "logit" else 1
    grad_BCHW = differentiate_images(
        score, images_BCHW, loss_scale, summed=summed, create_graph=True
    )
    grad_BCHW = grad_BCHW.to(ce.dtype)
    if map == "saliency":
        grad_BCHW = grad_BCHW.abs().amax(1, keepdim=True)
    edges_B1HW = edge_energy(images_BCHW.detach().to(ce.dtype))
    penalty = (over_rms(grad_BCHW, rms) - over_rms(edges_B1HW, rms)).square().mean()
    return Loss(ce + weight * penalty, ce, penalty, torch.full_like(ce, torch.nan))


def build(options: EdgeOptions) -> Objective:
    """Returns the method edge, with its loss, as an Objective."""

    def loss(model: Any, images: Tensor, targets: Tensor, ramp: Tensor) -> Loss:
        return edge(
            model.backbone,
            model.normalize(images),
            targets,
            weight=options.edge_weight * ramp,
            temperature=options.edge_temperature,
            sampling=options.edge_sampling,
            map=options.edge_map,
            of=options.edge_of,
            rms=options.edge_rms,
            loss_scale=find_loss_scale(model),
        )

    return Objective(loss, needs_input_gradient=True, penalty_weight=options.edge_weight)
