"""Measures fit and robustness with piecewise linear and smooth activations.

The paper finds that gradnorm needs smooth activations, and that adversarial training needs them
less. Here PreActResNet-18 is trained naturally with each activation, and then by gradnorm and by
PGD-3 from those weights. Activations and BatchNorm are the only nonlinear layers of this network.

    python -m benchmarks.evidence.activations

The fit is measured by cross-entropy and penalty of training images without augmentation, in eval
mode, before and after that. PGD-20 attacks all held-out images, and APGD-CE those images that are
still classified correctly after PGD-20.

Writes benchmarks/results/activations_digits_<device>.json.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.arguments import DEVICE, PRECISION, option
from benchmarks.common.tables import (
    ATTACKS,
    Record,
    Row,
    accuracy_columns,
    device,
    make_table,
    over_seeds,
    with_notes,
)  # fmt: skip
from benchmarks.common.timing import summary
from benchmarks.evidence.study import (
    DIFFERENCES,
    Arm,
    Results,
    Study,
    mean_difference,
    study_program,
)
from benchmarks.evidence.trials import Trial
from fastgn.config import Config
from fastgn.data.datasets import load_dataset
from fastgn.data.subset import Subset
from fastgn.models.activations import parse_activation
from fastgn.objectives import gradnorm
from fastgn.trained import load_trained

SPECTRUM = (
    *("relu", "leaky_relu:0.01", "leaky_relu:0.1", "leaky_relu:0.3", "softplus:100"),
    *("softplus:30", "softplus:10", "softplus:3", "softplus:1", "elu", "gelu", "silu", "mish"),
    "tanh",
)
PIECEWISE_LINEAR = ("relu", "leaky_relu")
BASE = {
    **{"data": "digits", "model": "preact_resnet18", "model_kwargs": ["width=4"], "img_size": 16},
    **{"smoothing": 0.1, "clip_grad": 1.0, "batch_size": 32, "lr": 4e-3, "model_ema_decay": 0.98},
    **{"eval_images": 360, "checkpoint_hist": 1},
}
"""Options of fastgn.train that all trainings share."""
METHODS = ("gradnorm", "pgd_at")
START_EPOCHS, EPOCHS, EPS = 8, 12, 0.1
"""Epochs of natural training, epochs of each method that starts from the natural weights, and
radius of the perturbations."""
IMAGES, TRAIN_IMAGES = 360, 1437
"""Numbers of images that are attacked, and on which the fit is measured."""


def fitted(folder: Path, cfg: Config, count: int) -> dict[str, float]:
    """Returns how well a trained network fits its first training images.

    Keys: objective (the value that gradnorm minimises), ce (cross-entropy), penalty, and grad_l1
    (L1 norm of the input gradient), each a mean over the images.

    The penalty has its full weight, which it reaches in training only after some epochs. folder:
    output folder of the training. cfg: configuration with the data and gradnorm's
    options. count: number of images.
    """
    where = DEVICE
    model = load_trained(str(folder), where).model
    form = {"img_size": model.img_size, "crop_pct": 1.0}
    size = {"batch_size": 256, "workers": 0}
    images = Subset(load_dataset(cfg.dataset).train, count, **form, **size, device=where)
    o, rows = cfg.objective.gradnorm, []
    for x, y in images:
        values = {"ce_weight": o.ce_weight, "gn_weight": o.gn_weight}
        loss = gradnorm(model.backbone, model.normalize(x), y, **values, eps=o.eps, sigma=o.sigma)
        rows.append(len(x) * torch.stack(loss).detach())
    total = torch.stack(rows).sum(0) / images.size
    return dict(zip(("objective", "ce", "penalty", "grad_l1"), total.tolist(), strict=True))


def method_of(row: Row) -> str:
    """Returns the training method of a row of the JSON record. In older ones it is gradnorm."""
    return row.get("method", "gradnorm")


def table(record: Record) -> str:
    """Returns this benchmark's Markdown table of all activations, made from its JSON record.

    Below it is a table of the differences between activations.
    """
    rows = [row for row in record["rows"] if row["accuracy"]]
    several = len({method_of(row) for row in rows}) > 1
    columns = {
        "method": [method_of(row) if several else "" for row in rows],
        "activation": [row["activation"] for row in rows],
        **accuracy_columns(rows),
        "cross-entropy": [f"{row['ce_after']['mean']:.2f}" for row in rows],
        "penalty, of the start's": [f"{row['penalty_ratio']['mean']:.1%}" for row in rows],
        "objective, of the start's": [f"{row['objective_ratio']['mean']:.1%}" for row in rows],
    }
    images, epochs = record["images"], record["epochs"]
    attacked = f"{images} images, APGD-CE on those that PGD-20 leaves"
    if not isinstance(images, int):
        attacked = f"AutoAttack on {images['autoattack']} images, the rest on {images['pgd']}"
    notes = [
        f"{record['network']}, {record['data']}, {device(record)}, {record['precision']}, "
        f"{over_seeds(record['seeds'])}",
        f"{epochs['natural']} natural epochs, then {epochs['gradnorm']} of each method at eps "
        f"{record['eps']:.4g}",
        attacked,
    ]
    first = with_notes(make_table(rows, columns), record, *notes)
    differences = list(compare(rows))
    if not differences:
        return first
    second = make_table(differences, {key: [d[key] for d in differences] for key in differences[0]})
    return (
        f"{first}\n\n{second}\n\nDifferences of accuracy in points over the seeds: {DIFFERENCES}."
    )


def compare(rows: Sequence[Row]) -> Iterator[dict[str, str]]:
    """Yields the rows of this benchmark's second table, which compares groups of activations.

    The last row for each pair of groups says by how much their difference is larger for gradnorm
    than for pgd_at. rows: rows of the JSON record with results.
    """

    def by_seed(method: str, group: Sequence[str], key: tuple[str, float]) -> dict[int, float]:
        found: dict[int, list[float]] = {}
        for row in rows:
            if method_of(row) == method and row["activation"] in group:
                for cell in row["seeds"]:
                    values = [a for a in cell["accuracy"] if (a["attack"], a["eps"]) == key]
                    found.setdefault(cell["seed"], []).append(100 * values[0]["accuracy"])
        return {seed: statistics.fmean(v) for seed, v in found.items() if len(v) == len(group)}

    names = list(dict.fromkeys(row["activation"] for row in rows))
    bent = [name for name in names if name.partition(":")[0] in PIECEWISE_LINEAR]
    smooth = [name for name in names if name not in bent]
    keys = dict.fromkeys((a["attack"], a["eps"]) for row in rows for a in row["accuracy"])
    groups = {"smooth - piecewise linear": (smooth, bent), "gelu - relu": (["gelu"], ["relu"])}
    for what, (ours, theirs) in groups.items():
        points: dict[str, list[dict[int, float]]] = {}
        for method in METHODS:
            pairs = [(by_seed(method, ours, key), by_seed(method, theirs, key)) for key in keys]
            points[method] = [{s: a[s] - b[s] for s in a if s in b} for a, b in pairs]
        both = zip(*points.values(), strict=True)
        points["gradnorm - pgd_at"] = [{s: a[s] - b[s] for s in a if s in b} for a, b in both]
        for method, found in points.items():
            texts = [mean_difference([*p.values()]) for p in found]
            heads = [
                f"{ATTACKS.get(attack, attack)} {eps:.4g}" if eps else attack
                for attack, eps in keys
            ]
            if any(texts):
                yield {
                    "activations": what,
                    "method": method,
                    **dict(zip(heads, texts, strict=True)),
                }


def summarize(row: Mapping[str, Any]) -> Results:
    """Returns means over the seeds of one activation, such as of its penalty after training.

    row: the activation's row of the JSON record. Its key "seeds" holds one result per seed.
    """
    fits = [(cell["before"], cell["after"]) for cell in row["seeds"]]
    return {
        **{f"{k}_ratio": summary([b[k] / a[k] for a, b in fits]) for k in ("objective", "penalty")},
        **{f"{k}_before": summary([a[k] for a, _ in fits]) for k in ("ce", "penalty")},
        **{f"{k}_after": summary([b[k] for _, b in fits]) for k in ("ce", "penalty")},
    }


@study_program(
    option("--activations", nargs="+", default=SPECTRUM, metavar="NAME[:NUMBER]"),
    data=("digits",), seeds=5,
)  # fmt: skip
def main(args: argparse.Namespace, work: Path) -> Study:
    """Returns the study that the command line asks for. work: folder for the trainings."""
    base = Config().replace(**BASE, precision=PRECISION)
    base = base.replace(eps=EPS, attack_eps=EPS, eval_eps=EPS)
    images, train_images = IMAGES, TRAIN_IMAGES
    epochs = dict.fromkeys(METHODS, EPOCHS) | {"natural": START_EPOCHS}
    if args.smoke:
        images, train_images = 8, 256
        base, epochs = base.replace(eval_images=16), dict.fromkeys(epochs, 1)
    flags = ("--attacks", "clean", "pgd-20", "apgd-ce", "--successive")
    evaluations = ((*flags, "--eps", repr(EPS), "--num-images", str(images)),)

    def training(name: str, seed: int, method: str) -> Config:
        n = epochs[method]
        lengths = {"epochs": n, "warmup_epochs": 0.1 * n, "ramp_epochs": 0.25 * n}
        values = {"activation": name, "seed": seed, "method": method}
        return base.replace(**values, **lengths, eval_interval=max(1, n // 4))

    def trial(method: str, name: str, seed: int) -> Trial:
        start = Trial(f"natural_{name}_s{seed}", training(name, seed, "natural"))
        cfg = training(name, seed, method)
        return Trial(f"{method}_{name}_s{seed}", cfg, evaluations, start)

    def measure(trial: Trial, work: Path) -> Results:
        assert trial.start is not None
        keys = {"before": trial.start.key, "after": trial.key}
        return {when: fitted(work / key, trial.cfg, train_images) for when, key in keys.items()}

    names = list(dict.fromkeys(args.activations))
    for name in names:
        parse_activation(name)  # raises UserError for an unknown name before anything is trained
    arms = [
        Arm(
            {"method": method, "activation": name},
            [trial(method, name, seed) for seed in range(args.seeds)],
        )
        for method in METHODS
        for name in names
    ]
    head = {
        "network": f"PreActResNet-18, {', '.join(base.architecture.model_kwargs)}",
        "epochs": epochs,
        "eps": EPS,
        "images": images,
    }
    return Study(arms, head, measure, summarize)


if __name__ == "__main__":
    sys.exit(main())
