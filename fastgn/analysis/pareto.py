"""The picture of a sweep: clean against robust accuracy, as the bytes of a PNG."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from fastgn.analysis.canvas import short, to_png
from fastgn.analysis.figures import GREEN


def front_of(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other one is better than in one coordinate and at least as good
    in both, by the first coordinate."""
    kept = [
        i
        for i, (a, b) in enumerate(points)
        if not any(x >= a and y >= b and (x > a or y > b) for x, y in points)
    ]
    return sorted(kept, key=lambda i: points[i])


def draw_pareto(trials: Sequence[dict[str, Any]], best: int | None, title: str) -> bytes:
    """trials: {"number", "clean", "robust"}, accuracies in 0..1; best: the number of the one with a
    ring."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    points = [(t["clean"], t["robust"]) for t in trials]
    if points:
        axes.plot(*zip(*points, strict=True), "o", color="0.6", label="trial", clip_on=False)
        front = [points[i] for i in front_of(points)]
        label = "not surpassed in both"
        axes.plot(*zip(*front, strict=True), "o-", color=GREEN, label=label, clip_on=False)
        for trial, point in zip(trials, points, strict=True):
            axes.annotate(str(trial["number"]), point, textcoords="offset points", xytext=(4, 4))
            if trial["number"] == best:
                axes.plot(
                    *point,
                    "o",
                    label="best",
                    markersize=13,
                    markerfacecolor="none",
                    color="black",
                    clip_on=False,
                )
        axes.legend(fontsize=8)
        # an accuracy lies in 0..1, and so do the axes
        axes.set_xlim(max(0, axes.get_xlim()[0]), min(1, axes.get_xlim()[1]))
        axes.set_ylim(max(0, axes.get_ylim()[0]), min(1, axes.get_ylim()[1]))
    axes.set(xlabel="clean accuracy", ylabel="accuracy under PGD-10", title=short(title, 48))
    axes.grid(alpha=0.3)
    return to_png(figure)
