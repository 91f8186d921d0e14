"""Numbers that tell a robust model from another: norms and asymmetries of its input gradients, how
linear its loss is nearby, its accuracy against eps, and how its gradients follow the edges.

Shapes: B images, C channels, H x W pixels. Models map images in 0..1 to logits, in eval mode.
Batches are (images B x C x H x W, labels int64 B) on the model's device. What the functions return
goes through json.dumps; None stands for the mean of nothing.
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
"""Per cent."""

PGD_START, UNIFORM = 0, 1
"""What noise is for; part of its key."""


def gradient_statistics(
    model: nn.Module,
    batches: Batches,
    *,
    eps: float,
    seed: int,
    ids: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Table 1 of arXiv 2409.20139, the asymmetries of its section 5, and local linearity.

    g is the gradient of an image's own cross-entropy with respect to its 0..1 pixels, eps the Linf
    radius in the same units. PGD-10 takes steps of eps / 4 from one uniform start. It succeeds
    where the model is wrong about the image, attacked or not, and fails elsewhere. All noise is a
    function of (seed, an image's id), so batches may be cut in any way.

    ids: one an image, at least 0; None: 0, 1, ... in order.

    The keys of what is returned:

    images, eps, seed
    misclassified: images that the model gets wrong without an attack
    l1_mean: mean over images of the L1 norm of g
    l1_mean_pgd10_fails, l1_mean_pgd10_succeeds: the same over those images (None: there are none)
    pgd10_fails, pgd10_succeeds: their numbers
    l1_quantiles: {"0", "5", "25", "50", "75", "95", "100": L1 norm}, per cent of the images
    channel_l1_mean: C means over images of the L1 norm of g within a channel; they sum to l1_mean
    channel_signed_mean: C means over images of the sum of g within a channel, in the same units
    l1: the L1 norm for each image, in order
    channel_l1: the same within each channel: a list of C for each image
    edge_correlation: edge_correlation for each image (None: a constant image or gradient), and
    edge_correlation_mean, over those that have one
    linearity: {"uniform", "pgd10": {"error", "relative_error"}}, at x + d for d uniform in the eps
        ball and for PGD-10's d, both within 0..1. error: mean of |L(x + d) - L(x) - d . g| in nats,
        the quantity whose maximum over the ball is the local linearity measure of Qin et al. 2019
        (arXiv 1907.02610, equation 5), so a lower bound of it. relative_error: that mean over the
        mean of |L(x + d) - L(x)|; None where the loss moves nowhere.

    Raises UserError on an eps outside 0..1, on no images, and on ids of another number.
    """
    check_pixels("eps", eps)
    measured: dict[str, list[Tensor]] = {}
    for images_BCHW, labels_B, batch_ids in with_ids(batches, ids):
        grad_BCHW = attacks.input_gradient(model, images_BCHW, labels_B, loss).images_BCHW
        clean_B, loss_B = judge(model, images_BCHW, labels_B)
        uniform = noise(images_BCHW, batch_ids, seed, UNIFORM)
        points = {
            "uniform": (images_BCHW + eps * uniform).clamp(0, 1),
            "pgd10": attack(model, images_BCHW, labels_B, batch_ids, eps, 10, seed),
        }
        values = {
            "clean": clean_B,
            "l1": grad_BCHW.abs().sum((2, 3), dtype=torch.float64),
            "signed": grad_BCHW.sum((2, 3), dtype=torch.float64),
            "edges": correlations(images_BCHW, grad_BCHW),
        }
        for name, point_BCHW in points.items():
            correct_B, moved_loss_B = judge(model, point_BCHW, labels_B)
            rise_B = moved_loss_B - loss_B
            first_order_B = ((point_BCHW - images_BCHW) * grad_BCHW).sum(
                (1, 2, 3), dtype=torch.float64
            )
            values[f"{name}_correct"] = correct_B
            values[f"{name}_rise"] = rise_B.abs()
            values[f"{name}_error"] = (rise_B - first_order_B).abs()
        for name, value in values.items():
            measured.setdefault(name, []).append(value)
    check(bool(measured), "there are no images to take statistics of")

    all_ = {name: torch.cat(parts).cpu() for name, parts in measured.items()}
    l1 = all_["l1"].sum(1)
    fails = all_["clean"] & all_["pgd10_correct"]
    quantiles = np.quantile(l1.numpy(), np.array(QUANTILES) / 100).tolist()
    return {
        "images": len(l1),
        "eps": eps,
        "seed": seed,
        "misclassified": int((~all_["clean"]).sum()),
        "l1_mean": mean(l1),
        "l1_mean_pgd10_fails": mean(l1[fails]),
        "l1_mean_pgd10_succeeds": mean(l1[~fails]),
        "pgd10_fails": int(fails.sum()),
        "pgd10_succeeds": int((~fails).sum()),
        "l1_quantiles": {str(q): v for q, v in zip(QUANTILES, quantiles, strict=True)},
        "channel_l1_mean": all_["l1"].mean(0).tolist(),
        "channel_signed_mean": all_["signed"].mean(0).tolist(),
        "l1": l1.tolist(),
        "channel_l1": all_["l1"].tolist(),
        "edge_correlation": listed(all_["edges"]),
        "edge_correlation_mean": mean(all_["edges"][~all_["edges"].isnan()]),
        "linearity": {
            name: {
                "error": mean(all_[f"{name}_error"]),
                "relative_error": ratio(all_[f"{name}_error"], all_[f"{name}_rise"]),
            }
            for name in ("uniform", "pgd10")
        },
    }


def edge_correlation(images_BCHW: Tensor, grad_BCHW: Tensor) -> list[float | None]:
    """For each image, Pearson's correlation over its pixels between objectives.edge_energy and the
    input gradient's absolute values summed over channels: in -1..1, None where either is
    constant."""
    return listed(correlations(images_BCHW, grad_BCHW).cpu())


def correlations(images_BCHW: Tensor, grad_BCHW: Tensor) -> Tensor:
    """edge_correlation as B numbers, NaN for None."""
    edges = edge_energy(images_BCHW.double()).flatten(1)
    edges = edges * (edges.amax(1, keepdim=True) > 1e-9)  # a constant image's are rounding alone
    sizes = grad_BCHW.double().abs().sum(1).flatten(1)
    return (standardised(edges) * standardised(sizes)).sum(1).clamp(-1, 1)


def listed(values: Tensor) -> list[float | None]:
    """NaN has no place in JSON."""
    return [None if x != x else x for x in values.tolist()]


def standardised(values_BN: Tensor) -> Tensor:
    """Rows of mean 0 and length 1; NaN where a row is constant."""
    centred = values_BN - values_BN.mean(1, keepdim=True)
    length = centred.norm(dim=1, keepdim=True)
    # the mean's rounding leaves about 1e-16 of a constant row
    constant = length <= 1e-12 * values_BN.norm(dim=1, keepdim=True)
    return (centred / length).masked_fill(constant, torch.nan)


def with_ids(
    batches: Batches, ids: Sequence[int] | None
) -> Iterator[tuple[Tensor, Tensor, Sequence[int]]]:
    """Batches with their images' ids. Raises UserError unless there are as many ids as images."""
    start = 0
    for images_BCHW, labels_B in batches:
        stop = start + len(labels_B)
        batch_ids = range(start, stop) if ids is None else ids[start:stop]
        check(
            len(batch_ids) == len(labels_B),
            f"{0 if ids is None else len(ids)} ids for {stop} images or more: give one an image",
        )
        yield images_BCHW, labels_B, batch_ids
        start = stop
    if ids is not None:
        check(len(ids) == start, f"{len(ids)} ids for {start} images: give one an image")


def noise(images_BCHW: Tensor, ids: Sequence[int], seed: int, use: int) -> Tensor:
    """Uniform in -1..1, of the images' shape, dtype and device."""
    keys = [
        int(np.random.SeedSequence([use, seed, i]).generate_state(1, np.uint64)[0] >> 1)
        for i in ids
    ]
    return attacks.draw_uniform_noise(keys, images_BCHW.shape[1:], 1.0, "Linf").to(images_BCHW)


def attack(
    model: nn.Module,
    images_BCHW: Tensor,
    labels_B: Tensor,
    ids: Sequence[int],
    eps: float,
    steps: int,
    seed: int,
) -> Tensor:
    """PGD from one start of each image's own."""
    start = eps * noise(images_BCHW, ids, seed, PGD_START)
    return attacks.restarted_pgd(model, images_BCHW, labels_B, eps=eps, steps=steps, starts=[start])


@torch.no_grad()
def judge(model: nn.Module, images_BCHW: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each image is classified correctly, and its cross-entropy in nats, float64."""
    logits_BK = model(images_BCHW)
    return logits_BK.argmax(1) == labels_B, loss(logits_BK, labels_B)


def loss(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Cross-entropy, reduced in float64: in fp32 a label's probability above 1 - 3e-8 is 1."""
    return attacks.cross_entropy(logits_BK.double(), labels_B)


def mean(values: Tensor) -> float | None:
    return float(values.double().mean()) if len(values) else None


def ratio(numerators: Tensor, denominators: Tensor) -> float | None:
    total = float(denominators.sum())
    return float(numerators.sum()) / total if total else None
