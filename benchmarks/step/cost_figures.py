"""Pictures of a record of cost.py's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, LogLocator

from fastgn.analysis.canvas import to_png
from fastgn.files import write_bytes

COLOURS = ("#3182bd", "#d95f02", "#756bb1", "#31a354")
"""Of precisions."""
KINDS = {
    "compiled": ("#3182bd", "o"),
    "eager": ("#9ecae1", "s"),
    "the paper's way": ("#d95f02", "^"),
}
"""How an arm runs -> its colour and marker."""


def kind(row: Mapping[str, Any]) -> str:
    if row["method"].endswith("-paper"):
        return "the paper's way"
    return "compiled" if row["compiled"] else "eager"


def draw(record: Mapping[str, Any], path: Path) -> list[Path]:
    """Writes `path` and <path's stem>_roofline.png; nothing where nothing was timed, or on a CPU
    without the natural arm, whose time is the unit there."""
    known = (row["time_over"].get("natural") for row in record["rows"])
    if not record["rows"] or not (record["meaningful_times"] or all(known)):
        return []
    title = "{model}, {img_size} px, batch {batch}, {device}".format(**record)
    if not record["meaningful_times"]:
        title += f"\n{record['meaning']}"
    written = {path: bars(record), path.with_stem(f"{path.stem}_roofline"): roofline(record)}
    for target, figure in written.items():
        figure.suptitle(title, fontsize=9)
        write_bytes(target, to_png(figure, dpi=150))
        pyplot.close(figure)
    return list(written)


def bars(record: Mapping[str, Any]) -> pyplot.Figure:
    """Time of a batch, a panel a precision: seconds, or without a GPU natural's as unit."""
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for row in record["rows"]:
        panels.setdefault(row["precision"], []).append(row)
    counts = [len(rows) for rows in panels.values()]
    figure, axes = pyplot.subplots(
        len(panels),
        figsize=(8.5, 1.3 + 0.36 * sum(counts) + 0.7 * (len(counts) - 1)),
        height_ratios=counts,
        squeeze=False,
        layout="constrained",
    )
    for panel, (precision, rows) in zip(axes[:, 0], panels.items(), strict=True):
        for y, row in enumerate(rows):
            meaningful = record["meaningful_times"]
            time = row["seconds_a_batch"] if meaningful else row["time_over"]["natural"]
            colour = KINDS[kind(row)][0]
            panel.barh(y, time["mean"], xerr=time["std"], color=colour, height=0.7, capsize=2)
            # beside the bars' area: a number at a bar's end would stand on its error
            text, right = f"{time['mean']:.3g} ± {time['std']:.2g}", panel.get_yaxis_transform()
            panel.text(1.01, y, text, transform=right, va="center", fontsize=7)
        panel.set_yticks(range(len(rows)), [row["arm"] for row in rows], fontsize=8)
        panel.set_ylim(len(rows) - 0.4, -0.6)
        panel.set_xlim(left=0)
        panel.set_title(precision, fontsize=9, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    unit = "seconds a batch" if record["meaningful_times"] else "time over natural's"
    axes[-1, 0].set_xlabel(f"{unit}: mean and deviation over {record['rounds']} rounds", fontsize=9)
    found = [name for name in KINDS if any(kind(row) == name for row in record["rows"])]
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=KINDS[name][0]) for name in found]
    figure.legend(handles, found, loc="outside lower right", ncols=3, frameon=False, fontsize=8)
    return figure


def roofline(record: Mapping[str, Any]) -> pyplot.Figure:
    """What an arm reaches beside what a matrix product of as many operations would: images a
    second, or without a GPU natural's as unit. Where the bytes that an arm moves were predicted,
    operations a second over operations a byte."""
    by_bytes = any(row.get("predicted_bytes_an_image") for row in record["rows"])
    shown = [r for r in record["rows"] if not by_bytes or r.get("predicted_bytes_an_image")]
    numbers = {name: i for i, name in enumerate(dict.fromkeys(r["arm"] for r in shown), 1)}
    figure, axes = pyplot.subplots(figsize=(8, 4.8), layout="constrained")

    def at(row: Mapping[str, Any]) -> float:
        return row["flops_an_image"] / (row["predicted_bytes_an_image"] if by_bytes else 1e9)

    ends = (min(map(at, shown)) / 1.25, max(map(at, shown)) * 1.25)
    roofs = []
    for colour, (precision, gemm) in zip(COLOURS, record["gemm"].items(), strict=False):
        rows = [row for row in shown if row["precision"] == precision]
        rate = gemm["flops_per_s"]
        speeds = [row["flop_utilisation"] * rate for row in rows]
        if by_bytes:
            bandwidth = record["bytes_per_s"]
            steps = [ends[0], min(max(rate / bandwidth, ends[0]), ends[1]), ends[1]]
            roof = [min(rate, bandwidth * x) / 1e12 for x in steps]
            speeds = [speed / 1e12 for speed in speeds]
        else:
            steps, roof = list(ends), [rate / (1e9 * x) for x in ends]
            speeds = [s / row["flops_an_image"] for s, row in zip(speeds, rows, strict=True)]
        if not rows:
            continue
        unit = 1.0
        if not record["meaningful_times"]:
            unit = next(s for s, r in zip(speeds, rows, strict=True) if r["arm"] == "natural")
        label = f"{precision}: matrix product{', memory' if by_bytes else ''}"
        heights = [y / unit for y in roof]
        roofs += axes.plot(steps, heights, color=colour, linewidth=1, label=label)
        for row, speed in zip(rows, speeds, strict=True):
            point = (at(row), speed / unit)
            axes.plot(*point, KINDS[kind(row)][1], color=colour, markersize=5)
            axes.annotate(
                str(numbers[row["arm"]]),
                point,
                xytext=(5, -9 if row["method"].endswith("-paper") else 4),  # it is often the same
                textcoords="offset points",
                fontsize=7,
                color=colour,
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    labels = ("operations an image, GFLOP", "images a second")
    if by_bytes:
        labels = ("operations a byte (bytes predicted, operations counted)", "TFLOP/s")
    axes.set_xlabel(labels[0], fontsize=9)
    axes.set_ylabel(labels[1] + " over natural's" * (not record["meaningful_times"]), fontsize=9)
    axes.grid(which="major", linewidth=0.3)
    found = [name for name in KINDS if any(kind(row) == name for row in shown)]
    style = {"linestyle": "", "color": "grey"}
    handles = roofs + [pyplot.Line2D([], [], marker=KINDS[k][1], label=k, **style) for k in found]
    names = [f"{number}  {name}" for name, number in numbers.items()]
    unknown = dict.fromkeys(row["arm"] for row in record["rows"] if row not in shown)
    names += ["", "bytes not predicted:"] * bool(unknown) + list(unknown)
    handles += [pyplot.Line2D([], [], linestyle="", label=name) for name in names]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=7)
    return figure
