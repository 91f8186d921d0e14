"""Measures robustness and penalty with piecewise linear and smooth activations.

The paper finds that gradnorm needs smooth activations, and that adversarial training needs them
less. Here PreActResNet-18 is trained naturally with each activation, and then by gradnorm and by
PGD-3 from those weights. Activations and BatchNorm are the only nonlinear layers of this network.

    python -m benchmarks.evidence.activations

The networks are trained and attacked as in robustness.py. The table also has the training's mean
cross-entropy and penalty in the last epoch. PGD-3 has no penalty, and its cross-entropy is that of
attacked images.

Writes benchmarks/results/activations_digits_<device>.json.
"""

import argparse
import statistics
import sys
from collections.abc import Collection, Iterator, Sequence

from benchmarks.common import tables
from benchmarks.common.arguments import option
from benchmarks.evidence import study
from benchmarks.evidence.robustness import Budget, Setting, attacked_images, study_of
from fastgn.config import Config
from fastgn.models.activations import parse_activation

SPECTRUM = (
    *("relu", "leaky_relu:0.01", "leaky_relu:0.1", "leaky_relu:0.3", "softplus:100"),
    *("softplus:30", "softplus:10", "softplus:3", "softplus:1", "elu", "gelu", "silu", "mish"),
    "tanh",
)
PIECEWISE_LINEAR = ("relu", "leaky_relu")
METHODS = ("gradnorm", "pgd_at")
WIDTH = "width=4"
"""Argument of PreActResNet-18: the number of channels in its first stage, which is usually 64."""


def digits(activations: Collection[str]) -> Setting:
    """Returns the setting for scikit-learn's digits, with one network for each activation."""
    shape = {"model": "preact_resnet18", "model_kwargs": [WIDTH], "img_size": 16}
    return Setting(
        networks={name: shape | {"activation": name} for name in activations},
        base=Config().replace(
            **{"data": "digits", "smoothing": 0.1, "clip_grad": 1.0, "batch_size": 32},
            **{"lr": 4e-3, "model_ema_decay": 0.98, "eval_images": 360, "checkpoint_hist": 1},
            ramp_epochs=3.0,
        ),
        arms=METHODS,
        start={"epochs": 8, "warmup_epochs": 0.8},
        epochs=12,
        budgets=(Budget(1, 5),),
        eps=0.1,
        eval_eps=(0.1,),
        curve_eps=(),
        images=360,
        attack="apgd-ce",
        full_attack=None,
    )


def rows_of(record: tables.Record) -> list[tables.Row]:
    """Returns the rows of the JSON record with results, for trainings of full length.

    Rows of older records have the name of the activation under another key, and no name of the
    training method, which is gradnorm.
    """
    rows = [{"network": r.get("activation"), "arm": "gradnorm", **r} for r in record["rows"]]
    return [row for row in rows if row["accuracy"] and row.get("budget", 1) == 1]


def last_mean(row: tables.Row, key: str, form: str) -> str:
    """Returns the mean over the seeds of a number in the last evaluated epoch, as text.

    key: "ce" or "penalty". form: format of the number. The text is empty if the training method has
    no penalty.
    """
    if f"{key}_after" in row:  # only in older records
        return format(row[f"{key}_after"]["mean"], form)
    found = [cell["history"][-1].get(key) for cell in row["seeds"]]
    return format(statistics.fmean(found), form) if all(found) else ""


def table(record: tables.Record) -> str:
    """Returns this benchmark's Markdown table of all activations, made from its JSON record.

    Below it is a table of the differences between activations.
    """
    rows = rows_of(record)
    columns: dict[str, tables.Column] = {"method": "arm", "activation": "network"}
    columns |= tables.accuracy_columns(rows)
    columns["cross-entropy"] = lambda row: last_mean(row, "ce", ".2f")
    columns["penalty"] = lambda row: last_mean(row, "penalty", ".3g")
    notes = [
        f"PreActResNet-18, {WIDTH}, {record['data']}, {tables.device(record)}",
        f"{record['precision']}, {tables.over_seeds(record['seeds'])}",
        f"trained at eps {record['eps']:.4g}",
        attacked_images(record),
    ]
    first = tables.with_notes(tables.make_table(rows, columns), record, *notes)
    return study.with_differences(first, list(compare(rows)), "between means on the same seeds")


def group_means(
    rows: Sequence[tables.Row], method: str, group: Collection[str], attack: tuple[str, float]
) -> dict[int, float]:
    """Returns the mean accuracy in percent over a group of activations: seed -> mean.

    Seeds that lack the result of an activation are left out. attack: name of an attack and its eps.
    """
    chosen = [row for row in rows if row["arm"] == method and row["network"] in group]
    found = [study.points_of(row, *attack) for row in chosen] if len(chosen) == len(group) else []
    seeds = set.intersection(*map(set, found)) if found else set()
    return {seed: statistics.fmean(points[seed] for points in found) for seed in sorted(seeds)}


def minus(ours: dict[int, float], theirs: dict[int, float]) -> dict[int, float]:
    """Returns ours[seed] - theirs[seed] for each seed that both dictionaries have."""
    return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}


def compare(rows: Sequence[tables.Row]) -> Iterator[dict[str, str]]:
    """Yields the rows of this benchmark's second table, which compares groups of activations.

    The last row for each pair of groups says by how much their difference is larger for gradnorm
    than for pgd_at. rows: results of `rows_of`.
    """
    attacks = dict.fromkeys((a["attack"], a["eps"]) for row in rows for a in row["accuracy"])
    titles = {name: tables.ATTACKS.get(name, name) for name, _ in attacks}
    names = [f"{titles[name]} {eps:.4g}" if eps else name for name, eps in attacks]
    bent = {row["network"] for row in rows if row["network"].startswith(PIECEWISE_LINEAR)}
    smooth = {row["network"] for row in rows} - bent
    groups = {"smooth - piecewise linear": (smooth, bent), "gelu - relu": (["gelu"], ["relu"])}
    for what, (ours, theirs) in groups.items():
        gains: dict[str, list[dict[int, float]]] = {}
        for method in METHODS:
            pairs = [[group_means(rows, method, g, a) for g in (ours, theirs)] for a in attacks]
            gains[method] = [minus(*pair) for pair in pairs]
        gains["gradnorm - pgd_at"] = list(map(minus, *gains.values()))
        for method, found in gains.items():
            texts = [study.mean_difference([*points.values()]) for points in found]
            if any(texts):
                cells = dict(zip(names, texts, strict=True))
                yield {"activations": what, "method": method, **cells}


@study.study_program(
    option("--activations", nargs="+", default=SPECTRUM, metavar="NAME[:NUMBER]"),
    data=("digits",), seeds=5,
)  # fmt: skip
def main(args: argparse.Namespace) -> study.Study:
    """Returns the study that the command line asks for."""
    for name in args.activations:
        parse_activation(name)  # raises UserError for an unknown name before anything is trained
    return study_of(digits(dict.fromkeys(args.activations)), METHODS, args)


if __name__ == "__main__":
    sys.exit(main())
