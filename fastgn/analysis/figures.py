"""Pictures, each as the bytes of a PNG: a run's curves; images, gradients and perturbations of
models; models' accuracy against eps and the norms of their gradients."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from fastgn.analysis.canvas import log_axis, short, to_png
from fastgn.analysis.statistics import edge_correlation
from fastgn.analysis.tables import format_radius
from fastgn.objectives import edge_energy

GREEN, RED, GREY = "#2a9d4a", "#c8323c", "#9a9a9a"
FRAMES = {
    GREEN: "still right",
    RED: "right before the attack, wrong after it",
    GREY: "wrong before the attack",
}
"""Colours of the frames of attacked images, and what they mean."""


def draw_curves(rows: Sequence[dict[str, float]], title: str) -> bytes:
    """A run's loss, penalty and accuracy against epochs, from metrics.csv's rows."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    figure.suptitle(short(title, 100))
    panels = figure.subplots(1, 3)
    groups = (
        ("loss", {"loss": "total", "ce": "cross-entropy", "penalty": "penalty"}),
        ("mean L1 norm of the input gradient", {"grad_l1": "normalised units"}),
        ("accuracy on the fixed subset", {"clean_accuracy": "clean", "pgd10_accuracy": "PGD-10"}),
    )
    for axes, (name, columns) in zip(panels, groups, strict=True):
        for column, label in columns.items():
            there = (r for r in rows if math.isfinite(r.get(column, math.nan)) and "epoch" in r)
            points = [(r["epoch"], r[column]) for r in there]
            if any(y != 0 for _, y in points):
                axes.plot(
                    *zip(*points, strict=True),
                    label=label,
                    marker="." if len(points) < 40 else None,
                )
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
        else:
            axes.text(
                0.5, 0.5, "not computed\nby this method", ha="center", transform=axes.transAxes
            )
    norms = [norm for line in panels[1].lines for norm in line.get_ydata()]
    panels[1].set_ylim(0, 1.1 * max(norms, default=1))  # a norm that hardly changes looks flat
    panels[2].set_ylim(0, 1)
    return to_png(figure)


@dataclasses.dataclass(frozen=True)
class ModelView:
    """One model's columns in draw_pictures, for the same B images."""

    name: str
    grad_BCHW: Tensor
    """Gradient of each image's own cross-entropy with respect to its 0..1 pixels."""
    adversarial_BCHW: Tensor
    clean_B: Tensor
    """Class predicted for the image."""
    attacked_B: Tensor
    """Class predicted for the adversarial image."""


def draw_pictures(
    images_BCHW: Tensor,
    labels_B: Tensor,
    views: Sequence[ModelView],
    classes: Sequence[str],
    eps: float,
) -> bytes:
    """A row an image: the image and its edges, then for each model its input gradient (with its L1
    norm, and how its magnitude goes with the edges), the attack's perturbation and the attacked
    image, in a frame that says what the attack has changed (FRAMES).

    A model's gradients share one scale, to the median of their 99.5th percentiles: one image's does
    not drown the others, and between models, where the norms differ by orders of magnitude, they
    are printed.
    """
    rows, columns = len(images_BCHW), 2 + 3 * len(views)
    names = [short(name, 12) for name in classes]
    figure = Figure(figsize=(1.35 * columns + 0.2, 1.52 * rows + 1.1), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    edges = edge_energy(images_BCHW)
    summed = [view.grad_BCHW.float().sum(1) for view in views]
    limits = [float(x.abs().flatten(1).quantile(0.995, dim=1).median()) or 1.0 for x in summed]
    added = [(view.adversarial_BCHW - images_BCHW).mean(1) for view in views]
    largest = max(float(x.abs().max()) for x in added) or eps  # of Linf about eps, of L2 far less
    correlations = [edge_correlation(images_BCHW, view.grad_BCHW) for view in views]
    for row in range(rows):
        show(grid[row][0], images_BCHW[row])
        label = int(labels_B[row])
        grid[row][0].set_xlabel(names[label], fontsize=8)
        grid[row][1].imshow(edges[row, 0].cpu().numpy(), cmap="gray_r")
        grid[row][1].set(xticks=[], yticks=[])
        for index, view in enumerate(views):
            gradient, perturbation, attacked = grid[row][2 + 3 * index : 5 + 3 * index]
            signed(gradient, summed[index][row], limits[index])
            along = correlations[index][row]
            edge = "" if along is None else f", edges {along:.2f}"
            norm = float(view.grad_BCHW[row].abs().sum())
            gradient.set_xlabel(f"L1 {norm:.3g}{edge}", fontsize=8)
            signed(perturbation, added[index][row], largest)
            show(attacked, view.adversarial_BCHW[row])
            before, after = int(view.clean_B[row]), int(view.attacked_B[row])
            colour = GREY if before != label else GREEN if after == label else RED
            attacked.set_xlabel(f"{names[before]} → {names[after]}", fontsize=8)
            for spine in attacked.spines.values():
                spine.set(color=colour, linewidth=3)
    grid[0][0].set_title("image", fontsize=9)
    grid[0][1].set_title("edges", fontsize=9)
    for index, view in enumerate(views):
        heads = (
            f"{short(view.name, 20)}\ninput gradient",
            f"perturbation\n(±{format_radius(largest)})",
            "attacked\n(before → after)",
        )
        for axes, head in zip(grid[0][2 + 3 * index : 5 + 3 * index], heads, strict=True):
            axes.set_title(head, fontsize=9)
    frames = [
        Patch(facecolor="none", edgecolor=colour, linewidth=2, label=meaning)
        for colour, meaning in FRAMES.items()
    ]
    figure.legend(handles=frames, loc="outside lower center", fontsize=8, ncols=3, frameon=False)
    return to_png(figure)


def show(axes, image_CHW: Tensor) -> None:
    axes.imshow(image_CHW.permute(1, 2, 0).clamp(0, 1).cpu().numpy().astype(np.float32))
    axes.set(xticks=[], yticks=[])


def signed(axes, values_HW: Tensor, limit: float) -> None:
    axes.imshow(values_HW.cpu().numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    axes.set(xticks=[], yticks=[])


def draw_robust_curve(
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    subset: str,
    attack: str = "PGD",
    norm: str = "Linf",
) -> bytes:
    """Accuracy against the attack's radius, a line a model.

    curves: {model: rows with eps and accuracy}; eps in 0..1 pixel units, of Linf drawn in 1/255.
    subset: the images' name, attack the attack's, both for the title.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    unit = 255 if norm == "Linf" else 1
    for name, rows in curves.items():
        points = sorted((unit * row["eps"], row["accuracy"]) for row in rows)
        axes.plot(*zip(*points, strict=True), label=short(name), marker=".")
    axes.set_title(f"accuracy under {attack}: {subset}", fontsize=10)
    axes.set_xlabel("Linf eps (1/255)" if norm == "Linf" else f"{norm} eps")
    axes.set_ylabel("accuracy")
    axes.set_ylim(0, 1)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return to_png(figure)


def draw_gradient_histograms(norms: Mapping[str, Sequence[float]]) -> bytes:
    """The share of images by the L1 norm of their input gradient, a model a colour, with the
    median dashed.

    norms: {model: one norm an image, in 0..1 pixel units}. Norms of 0, as of a loss that is 0 in
    fp32, have no place on the log axis: the legend counts them.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    values = {name: np.asarray(norm, dtype=np.float64) for name, norm in norms.items()}
    positive = np.concatenate([v[v > 0] for v in values.values()] or [np.ones(0)])
    low, high = (positive.min(), positive.max()) if len(positive) else (1.0, 1.0)
    # a bin an eighth of a decade, the same for all, so that the models' shares compare
    first = np.floor(8 * np.log10(low) - 1e-9)
    last = np.floor(8 * np.log10(high) + 1e-9) + 1
    bins = (10 ** (np.arange(first, last + 1) / 8)).tolist()
    for index, (name, norm) in enumerate(values.items()):
        colour, zeros, median = f"C{index}", int((norm == 0).sum()), float(np.median(norm))
        text = f"{median:.3g}" if median < 1000 else f"{median:,.0f}"
        label = f"{short(name)} (median {text}" + (f", {zeros} are 0)" if zeros else ")")
        shares = np.full(len(norm), 1 / len(norm))
        axes.hist(norm, bins, weights=shares, histtype="stepfilled", alpha=0.25, color=colour)
        axes.hist(norm, bins, weights=shares, histtype="step", color=colour, label=label)
        if median > 0:
            axes.axvline(median, color=colour, linestyle="--", linewidth=1)
    log_axis(axes, "x", positive)
    axes.set_title("L1 norm of the input gradient (0..1 pixels)", fontsize=10)
    axes.set_xlabel("L1 norm")
    axes.set_ylabel("share of the images")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return to_png(figure)


def draw_norm_against_epoch(rows: Mapping[str, Sequence[tuple[float, float]]]) -> bytes:
    """The mean L1 norm of the input gradient during training, log scale, a line a run.

    rows: {run: (epoch, norm) pairs}. A norm of 0 has no place on the log axis.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in rows.items():
        marker = "." if len(points) < 40 else None
        axes.plot(*zip(*sorted(points), strict=True), label=short(name), marker=marker)
    log_axis(axes, "y", [norm for points in rows.values() for _, norm in points])
    axes.set_title("mean L1 norm of the input gradient", fontsize=10)
    axes.set_xlabel("epoch")
    axes.set_ylabel("L1 norm")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return to_png(figure)
