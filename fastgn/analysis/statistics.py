"""Statistics of a model's input gradients, which differ between robust models and others.

They measure the norms of the gradients, how much the gradients follow the images' edges, and how
linear the loss is near the images.

Shapes: B images, C channels, H x W pixels. Models are in evaluation mode, and map images in 0..1 to
logits. Batches are pairs of images (B, C, H, W) and labels (B,), int64, on the model's device. The
statistics are ready for JSON, and None stands for a mean over no values.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgn import attacks
from fastgn.errors import check
from fastgn.fields import check_pixels
from fastgn.objectives import edge_energy

Batches = Iterable[tuple[Tensor, Tensor]]

QUANTILES = (0, 5, 25, 50, 75, 95, 100)
"""Quantiles of the L1 norms that are reported, in per cent."""

PGD_START, UNIFORM = 0, 1
"""Numbers that stand for the two uses of random noise. PGD_START means a start of PGD, and UNIFORM
means noise that is added to an image. The number is a part of the noise's seed, so that the noise
of the two uses differs."""


def gradient_statistics(
    model: nn.Module,
    batches: Batches,
    *,
    eps: float,
    seed: int,
    ids: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Returns statistics of input gradients, and how linear the loss is near the images.

    They include those of table 1 and section 5 of arXiv 2409.20139. In the following, g is the
    gradient of an image's own cross-entropy L with respect to its pixels in 0..1. eps is an Linf
    radius in the same units. PGD-10 takes steps of eps / 4 from one uniform start. PGD-10 fails if
    the model classifies the image correctly both with and without the attack, otherwise it
    succeeds. All noise depends only on the seed and on the image's id, so the division into batches
    does not matter.

    ids: a number per image, at least 0. None means 0, 1, ... in order.

    Keys of the result:

    images, eps, seed
    misclassified: number of images that the model classifies wrongly without an attack
    l1_mean: mean over images of the L1 norm of g
    l1_mean_pgd10_fails: the same over the images for which PGD-10 fails. None if there are none.
    l1_mean_pgd10_succeeds: the same over the images for which PGD-10 succeeds
    pgd10_fails, pgd10_succeeds: number of images for which PGD-10 fails or succeeds
    l1_quantiles: dict from a share of the images in per cent, such as "25", to the L1 norm of g
        that this share does not exceed. The shares are 0, 5, 25, 50, 75, 95 and 100.
    channel_l1_mean: C means over images of the L1 norm of g within a channel. Their sum is l1_mean.
    channel_signed_mean: C means over images of the sum of g within a channel
    l1: L1 norm of g for each image, in order
    channel_l1: L1 norm of g within each channel, a list of C for each image
    edge_correlation: result of the function edge_correlation for each image
    edge_correlation_mean: mean over the images that have a correlation
    linearity: a dict with the keys uniform and pgd10. Each value is a dict with the keys error and
        relative_error, measured at the points x + d, clipped to 0..1. For uniform, d is uniform
        noise in the eps ball. For pgd10, d is the perturbation of PGD-10.
        error: mean of |L(x + d) - L(x) - d . g| in nats. It is at most the local linearity measure
        of Qin et al. 2019 (arXiv 1907.02610, equation 5), which is the maximum over the ball.
        relative_error: error / mean of |L(x + d) - L(x)|. None if the loss changes nowhere.

    Raises UserError if eps lies outside 0..1, if there are no images, or if the number of ids is
    not the number of images.
    """
    check_pixels("eps", eps)
    measured: dict[str, list[Tensor]] = {}
    for images_BCHW, labels_B, batch_ids in pair_with_ids(batches, ids):
        values = measure_batch(model, images_BCHW, labels_B, batch_ids, eps=eps, seed=seed)
        for name, value in values.items():
            measured.setdefault(name, []).append(value)
    check(bool(measured), "there are no images to compute statistics of")
    summary = summarise({name: torch.cat(parts).cpu() for name, parts in measured.items()})
    return {"images": summary.pop("images"), "eps": eps, "seed": seed, **summary}


def measure_batch(
    model: nn.Module,
    images_BCHW: Tensor,
    labels_B: Tensor,
    ids: Sequence[int],
    *,
    eps: float,
    seed: int,
) -> dict[str, Tensor]:
    """Returns the values of each image from which statistics are computed, with B entries per key.

    ids: number of each image, on which its noise depends. g is the gradient of the image's
    cross-entropy with respect to its pixels.

    clean: whether the image is classified correctly. l1 and signed: sums of |g| and g in each
    channel (B, C). edges: correlation of |g| with the image's edges.

    The other keys begin with the name of a point near the image: uniform (the image plus random
    noise) or pgd10 (the image after PGD-10). *_correct: whether the point is classified correctly.
    *_rise: absolute change of the loss from the image to the point. *_error: absolute difference
    between this change and the one that g predicts.
    """
    grad_BCHW = attacks.input_gradient(model, images_BCHW, labels_B, cross_entropy).images_BCHW
    clean_B, loss_B = classify(model, images_BCHW, labels_B)
    noise_BCHW = draw_noise(images_BCHW, ids, seed, UNIFORM)
    points = {
        "uniform": (images_BCHW + eps * noise_BCHW).clamp(0, 1),
        "pgd10": run_pgd(model, images_BCHW, labels_B, ids, eps=eps, steps=10, seed=seed),
    }
    values = {
        "clean": clean_B,
        "l1": grad_BCHW.abs().sum((2, 3), dtype=torch.float64),
        "signed": grad_BCHW.sum((2, 3), dtype=torch.float64),
        "edges": correlate_with_edges(images_BCHW, grad_BCHW),
    }
    for name, point_BCHW in points.items():
        correct_B, moved_loss_B = classify(model, point_BCHW, labels_B)
        rise_B = moved_loss_B - loss_B
        difference = (point_BCHW - images_BCHW) * grad_BCHW
        first_order_B = difference.sum((1, 2, 3), dtype=torch.float64)
        values[f"{name}_correct"] = correct_B
        values[f"{name}_rise"] = rise_B.abs()
        values[f"{name}_error"] = (rise_B - first_order_B).abs()
    return values


def summarise(values: dict[str, Tensor]) -> dict[str, Any]:
    """Returns the statistics over all images, from the values that `measure_batch` describes."""
    l1 = values["l1"].sum(1)
    fails = values["clean"] & values["pgd10_correct"]
    quantiles = np.quantile(l1.numpy(), np.array(QUANTILES) / 100).tolist()
    edges = values["edges"]
    return {
        "images": len(l1),
        "misclassified": int((~values["clean"]).sum()),
        "l1_mean": mean(l1),
        "l1_mean_pgd10_fails": mean(l1[fails]),
        "l1_mean_pgd10_succeeds": mean(l1[~fails]),
        "pgd10_fails": int(fails.sum()),
        "pgd10_succeeds": int((~fails).sum()),
        "l1_quantiles": {str(q): v for q, v in zip(QUANTILES, quantiles, strict=True)},
        "channel_l1_mean": values["l1"].mean(0).tolist(),
        "channel_signed_mean": values["signed"].mean(0).tolist(),
        "l1": l1.tolist(),
        "channel_l1": values["l1"].tolist(),
        "edge_correlation": replace_nan(edges),
        "edge_correlation_mean": mean(edges[~edges.isnan()]),
        "linearity": {
            name: {
                "error": mean(values[f"{name}_error"]),
                "relative_error": ratio(values[f"{name}_error"], values[f"{name}_rise"]),
            }
            for name in ("uniform", "pgd10")
        },
    }


def edge_correlation(images_BCHW: Tensor, grad_BCHW: Tensor) -> list[float | None]:
    """Returns for each image how strongly the input gradient follows the image's edges, in -1..1.

    This is Pearson's correlation over the pixels between the strength of the edges (edge_energy)
    and the absolute gradient, summed over channels. It is None if the strength of the edges or the
    gradient is the same in all pixels.
    """
    return replace_nan(correlate_with_edges(images_BCHW, grad_BCHW).cpu())


def correlate_with_edges(images_BCHW: Tensor, grad_BCHW: Tensor) -> Tensor:
    """Returns the result of edge_correlation as a tensor (B,), with NaN instead of None."""
    edges = edge_energy(images_BCHW.double()).flatten(1)
    # a constant image gets edges below 1e-9, which are only rounding errors
    edges = edges * (edges.amax(1, keepdim=True) > 1e-9)
    sizes = grad_BCHW.double().abs().sum(1).flatten(1)
    return (standardise_rows(edges) * standardise_rows(sizes)).sum(1).clamp(-1, 1)


def replace_nan(values: Tensor) -> list[float | None]:
    """Returns the values as a list with None instead of NaN, which JSON does not have."""
    return [None if x != x else x for x in values.tolist()]


def standardise_rows(values_BN: Tensor) -> Tensor:
    """Shifts and scales each row so that its mean is 0 and its L2 norm is 1. A constant row becomes
    NaN."""
    centred = values_BN - values_BN.mean(1, keepdim=True)
    length = centred.norm(dim=1, keepdim=True)
    # about 1e-16 of a constant row remains after centring, because the mean is rounded
    constant = length <= 1e-12 * values_BN.norm(dim=1, keepdim=True)
    return (centred / length).masked_fill(constant, torch.nan)


def pair_with_ids(
    batches: Batches, ids: Sequence[int] | None
) -> Iterator[tuple[Tensor, Tensor, Sequence[int]]]:
    """Yields each batch with the ids of its images.

    Raises UserError unless there are as many ids as images.
    """
    start = 0
    for images_BCHW, labels_B in batches:
        stop = start + len(labels_B)
        batch_ids = range(start, stop) if ids is None else ids[start:stop]
        check(
            len(batch_ids) == len(labels_B),
            f"{0 if ids is None else len(ids)} ids for at least {stop} images: give one id per "
            "image",
        )
        yield images_BCHW, labels_B, batch_ids
        start = stop
    if ids is not None:
        check(len(ids) == start, f"{len(ids)} ids for {start} images: give one id per image")


def draw_noise(images_BCHW: Tensor, ids: Sequence[int], seed: int, use: int) -> Tensor:
    """Returns uniform noise in -1..1 with the shape, dtype and device of the images.

    use: PGD_START or UNIFORM. The use, the seed and the images' ids determine the noise.
    """
    keys = [
        int(np.random.SeedSequence([use, seed, i]).generate_state(1, np.uint64)[0] >> 1)
        for i in ids
    ]
    return attacks.draw_uniform_noise(keys, images_BCHW.shape[1:], 1.0, "Linf").to(images_BCHW)


def run_pgd(
    model: nn.Module,
    images_BCHW: Tensor,
    labels_B: Tensor,
    ids: Sequence[int],
    *,
    eps: float,
    steps: int,
    seed: int,
) -> Tensor:
    """Returns the images after PGD from one random start. An image's start depends only on the seed
    and the image's id."""
    start = eps * draw_noise(images_BCHW, ids, seed, PGD_START)
    return attacks.restarted_pgd(model, images_BCHW, labels_B, eps=eps, steps=steps, starts=[start])


@torch.no_grad()
def classify(model: nn.Module, images_BCHW: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
    """Returns whether each image is classified correctly, and its float64 loss in nats."""
    logits_BK = model(images_BCHW)
    return logits_BK.argmax(1) == labels_B, cross_entropy(logits_BK, labels_B)


def cross_entropy(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Returns the cross-entropy of each image, computed in float64.

    In fp32 a probability above 1 - 3e-8 is rounded to 1, so the loss and its gradient would be 0.
    """
    return attacks.cross_entropy(logits_BK.double(), labels_B)


def mean(values: Tensor) -> float | None:
    """Returns the mean, or None if there are no values."""
    return float(values.double().mean()) if len(values) else None


def ratio(numerators: Tensor, denominators: Tensor) -> float | None:
    """Returns the sum of the first tensor divided by the sum of the second one. Returns None if the
    second sum is 0."""
    total = float(denominators.sum())
    return float(numerators.sum()) / total if total else None
