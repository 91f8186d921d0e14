"""Figures of runs and evaluations, each returned as the bytes of a PNG."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from fastgn.analysis.canvas import log_axis, shorten, to_png
from fastgn.analysis.statistics import edge_correlation
from fastgn.analysis.tables import format_radius
from fastgn.objectives import edge_energy

GREEN, RED, GREY = "#2a9d4a", "#c8323c", "#9a9a9a"
FRAMES = {
    GREEN: "still right",
    RED: "right before the attack, wrong after it",
    GREY: "wrong before the attack",
}
"""Colour of the frame around an attacked image -> its meaning."""


def draw_curves(rows: Sequence[dict[str, float]], title: str) -> bytes:
    """Draws a run's losses, gradient norm and accuracies against epochs.

    rows: the rows of metrics.csv. The gradient norm is that with respect to normalised images.
    """
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    figure.suptitle(shorten(title, 100))
    panels = figure.subplots(1, 3)
    groups = (
        ("loss", {"loss": "total", "ce": "cross-entropy", "penalty": "penalty"}),
        ("mean L1 norm of the input gradient", {"grad_l1": "normalised images"}),
        ("accuracy on the fixed subset", {"clean_accuracy": "clean", "pgd10_accuracy": "PGD-10"}),
    )
    for axes, (name, columns) in zip(panels, groups, strict=True):
        for column, label in columns.items():
            points = [
                (row["epoch"], row[column])
                for row in rows
                if math.isfinite(row.get(column, math.nan)) and "epoch" in row
            ]
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
    # the axis begins at 0, so that a norm that hardly changes looks flat
    panels[1].set_ylim(0, 1.1 * max(norms, default=1))
    panels[2].set_ylim(0, 1)
    return to_png(figure)


@dataclasses.dataclass(frozen=True)
class ModelView:
    """What `draw_pictures` shows about one model, for B images that are the same for all models."""

    name: str
    grad_BCHW: Tensor
    """Gradient of each image's own cross-entropy with respect to its pixels in 0..1."""
    adversarial_BCHW: Tensor
    """The images after the attack."""
    clean_B: Tensor
    """Class that the model predicts for each image before the attack."""
    attacked_B: Tensor
    """Class that the model predicts for each image after the attack."""


def draw_pictures(
    images_BCHW: Tensor,
    labels_B: Tensor,
    views: Sequence[ModelView],
    classes: Sequence[str],
    eps: float,
) -> bytes:
    """Draws a row per image, with the image, its edges, and three columns per model (view).

    The three columns are the input gradient, the perturbation, and the attacked image. Below the
    gradient stand its L1 norm and its correlation with the edges. The frame of the attacked image
    shows what the attack has changed, see FRAMES.

    The gradients of a model share one colour scale. The scale ends at the median of the images'
    99.5th percentiles, so that one large gradient does not hide the others. The scales of the
    models differ, because the norms of their gradients may differ by orders of magnitude.

    eps: limit of the perturbations' colour scale if no attack has changed an image.
    """
    rows, columns = len(images_BCHW), 2 + 3 * len(views)
    names = [shorten(name, 12) for name in classes]
    figure = Figure(figsize=(1.35 * columns + 0.2, 1.52 * rows + 1.1), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    edges = edge_energy(images_BCHW)
    summed = [view.grad_BCHW.float().sum(1) for view in views]
    limits = [float(x.abs().flatten(1).quantile(0.995, dim=1).median()) or 1.0 for x in summed]
    added = [(view.adversarial_BCHW - images_BCHW).mean(1) for view in views]
    # the colour scale does not end at eps, because an L2 eps is far above the change of any pixel
    largest = max(float(x.abs().max()) for x in added) or eps
    correlations = [edge_correlation(images_BCHW, view.grad_BCHW) for view in views]
    for row in range(rows):
        show_image(grid[row][0], images_BCHW[row])
        label = int(labels_B[row])
        grid[row][0].set_xlabel(names[label], fontsize=8)
        grid[row][1].imshow(edges[row, 0].cpu().numpy(), cmap="gray_r")
        grid[row][1].set(xticks=[], yticks=[])
        for index, view in enumerate(views):
            gradient, perturbation, attacked = grid[row][2 + 3 * index : 5 + 3 * index]
            show_signed(gradient, summed[index][row], limits[index])
            along = correlations[index][row]
            edge = "" if along is None else f", edges {along:.2f}"
            norm = float(view.grad_BCHW[row].abs().sum())
            gradient.set_xlabel(f"L1 {norm:.3g}{edge}", fontsize=8)
            show_signed(perturbation, added[index][row], largest)
            show_image(attacked, view.adversarial_BCHW[row])
            before, after = int(view.clean_B[row]), int(view.attacked_B[row])
            colour = GREY if before != label else GREEN if after == label else RED
            attacked.set_xlabel(f"{names[before]} → {names[after]}", fontsize=8)
            for spine in attacked.spines.values():
                spine.set(color=colour, linewidth=3)
    grid[0][0].set_title("image", fontsize=9)
    grid[0][1].set_title("edges", fontsize=9)
    for index, view in enumerate(views):
        heads = (
            f"{shorten(view.name, 20)}\ninput gradient",
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


def show_image(axes: Axes, image_CHW: Tensor) -> None:
    """Draws an image with values in 0..1."""
    axes.imshow(image_CHW.permute(1, 2, 0).clamp(0, 1).cpu().numpy().astype(np.float32))
    axes.set(xticks=[], yticks=[])


def show_signed(axes: Axes, values_HW: Tensor, limit: float) -> None:
    """Draws values in -limit..limit from blue to red, with 0 in white."""
    axes.imshow(values_HW.cpu().numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    axes.set(xticks=[], yticks=[])


def draw_robust_curve(
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    subset: str,
    attack: str = "PGD",
    norm: str = "Linf",
) -> bytes:
    """Draws the accuracy under an attack against eps, with a line per model.

    curves: name of a model -> its rows with eps and accuracy. eps is in 0..1 pixel units, and is
    drawn in units of 1/255 for Linf. subset: name of the images, for the title.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    unit = 255 if norm == "Linf" else 1
    for name, rows in curves.items():
        points = sorted((unit * row["eps"], row["accuracy"]) for row in rows)
        axes.plot(*zip(*points, strict=True), label=shorten(name), marker=".")
    axes.set_title(f"accuracy under {attack}: {subset}", fontsize=10)
    axes.set_xlabel("Linf eps (1/255)" if norm == "Linf" else f"{norm} eps")
    axes.set_ylabel("accuracy")
    axes.set_ylim(0, 1)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return to_png(figure)


def draw_gradient_histograms(norms: Mapping[str, Sequence[float]]) -> bytes:
    """Draws a histogram of the L1 norms of the input gradients, and their median, for each model.

    norms: name of a model -> one norm per image, in 0..1 pixel units. A norm is 0 if the loss is 0
    in fp32. A norm of 0 cannot be drawn on a logarithmic axis, so the legend says how many are 0.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    values = {name: np.asarray(norm, dtype=np.float64) for name, norm in norms.items()}
    positive = np.concatenate([v[v > 0] for v in values.values()] or [np.ones(0)])
    low, high = (positive.min(), positive.max()) if len(positive) else (1.0, 1.0)
    # eight bins per factor of 10, the same for all models, so that the histograms can be compared
    first = np.floor(8 * np.log10(low) - 1e-9)
    last = np.floor(8 * np.log10(high) + 1e-9) + 1
    bins = (10 ** (np.arange(first, last + 1) / 8)).tolist()
    for index, (name, norm) in enumerate(values.items()):
        colour, zeros, median = f"C{index}", int((norm == 0).sum()), float(np.median(norm))
        text = f"{median:.3g}" if median < 1000 else f"{median:,.0f}"
        label = f"{shorten(name)} (median {text}" + (f", {zeros} are 0)" if zeros else ")")
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
    """Draws the mean L1 norm of the input gradient during training, with a line per run.

    rows: name of a run -> its pairs (epoch, norm). The axis of the norms is logarithmic, so a norm
    of 0 is not drawn.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in rows.items():
        marker = "." if len(points) < 40 else None
        axes.plot(*zip(*sorted(points), strict=True), label=shorten(name), marker=marker)
    log_axis(axes, "y", [norm for points in rows.values() for _, norm in points])
    axes.set_title("mean L1 norm of the input gradient", fontsize=10)
    axes.set_xlabel("epoch")
    axes.set_ylabel("L1 norm")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return to_png(figure)
