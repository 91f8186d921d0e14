"""Draws the picture of a sweep: the robust accuracy of each trial against its clean accuracy."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from fastgn.analysis.canvas import shorten, to_png
from fastgn.analysis.figures import GREEN


def find_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Returns the indices of the points of the Pareto front, in order of the first coordinate.

    A point belongs to the front unless another point is better in one coordinate and at least as
    good in the other.
    """
    kept = [
        i
        for i, (a, b) in enumerate(points)
        if not any(x >= a and y >= b and (x > a or y > b) for x, y in points)
    ]
    return sorted(kept, key=lambda i: points[i])


def draw_pareto(trials: Sequence[dict[str, Any]], best: int | None, title: str) -> bytes:
    """Returns a PNG of the trials' robust accuracy against their clean accuracy.

    trials: dicts with the keys number, clean and robust. The last two are accuracies in 0..1. best:
    number of the trial that gets a ring around its point, or None.
    """
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    points = [(t["clean"], t["robust"]) for t in trials]
    if points:
        axes.plot(*zip(*points, strict=True), "o", color="0.6", label="trial", clip_on=False)
        front = [points[i] for i in find_front(points)]
        label = "Pareto front"
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
        # the axes end at 0 and 1, because an accuracy lies between them
        axes.set_xlim(max(0, axes.get_xlim()[0]), min(1, axes.get_xlim()[1]))
        axes.set_ylim(max(0, axes.get_ylim()[0]), min(1, axes.get_ylim()[1]))
    axes.set(xlabel="clean accuracy", ylabel="accuracy under PGD-10", title=shorten(title, 48))
    axes.grid(alpha=0.3)
    return to_png(figure)
