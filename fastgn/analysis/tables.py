"""Turns numbers of an evaluation into text, such as the table of accuracies on the terminal."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Z = 1.959964
"""Two-sided 95 % quantile of the normal distribution."""
WORST = "worst case"
"""Name of the row of results in which an image counts as correct only if it is correct under every
attack."""


def format_radius(eps: float) -> str:
    """Returns eps as n/255 if n is 0.5 or a whole number up to 64, otherwise as a decimal."""
    n = round(eps * 255) or 0.5
    return f"{n:g}/255" if n <= 64 and math.isclose(n, eps * 255, rel_tol=1e-6) else f"{eps:.4g}"


def name_attack(name: str, eps: float) -> str:
    """Returns an attack and its radius as text, such as pgd-20 at 4/255. The radius of clean is
    left out."""
    return name if name == "clean" else f"{name} at {format_radius(eps)}"


def wilson_interval(accuracy: float, images: int) -> tuple[float, float]:
    """Returns the 95 % score interval (Wilson 1927) of an accuracy.

    Unlike the interval of a normal approximation, it stays within 0..1, and its width is not 0 if
    the accuracy is 0 or 1. images: number of images from which the accuracy was computed.
    """
    if images < 1:
        return 0.0, 1.0
    shrink = 1 + Z * Z / images
    centre = (accuracy + Z * Z / (2 * images)) / shrink
    variance = accuracy * (1 - accuracy) / images + Z * Z / (4 * images * images)
    half = Z * math.sqrt(variance) / shrink
    return max(0.0, centre - half), min(1.0, centre + half)


def format_accuracies(models: Sequence[Mapping[str, Any]]) -> str:
    """Returns the accuracies as a table with a row per attack and eps, and a column per model.

    A dash stands for an accuracy that only other models have. models: the entries of
    evaluation.json.
    """
    columns = [
        {(r["attack"], r["eps"]): f"{r['accuracy']:.1%}" for r in m["results"]} for m in models
    ]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    rows = [["attack", "eps", *(model["name"] for model in models)]]
    for name, eps in sorted(keys, key=lambda key: key[0] == WORST):
        radius = "" if name == "clean" else format_radius(eps)
        rows.append([name, radius, *(column.get((name, eps), "-") for column in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[:2] = [row[0].ljust(widths[0]), row[1].ljust(widths[1])]
        lines.append("  ".join(cells))
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)
