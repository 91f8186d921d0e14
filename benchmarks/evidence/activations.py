"""Measures fit and robustness of gradnorm with piecewise linear and smooth activations.

The paper finds that gradnorm needs smooth activations. Here PreActResNet-18 is trained naturally
with each activation, and then by gradnorm from those weights. Activations and BatchNorm are the
only nonlinear layers of this network.

    python -m benchmarks.evidence.activations

The fit is measured by cross-entropy and penalty of training images without augmentation, in eval
mode, before and after gradnorm.

Writes benchmarks/results/activations_digits_<device>.json.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.arguments import DEVICE, PRECISION, option
from benchmarks.common.tables import (
    Record,
    Row,
    accuracy_columns,
    device,
    make_table,
    over_seeds,
    with_notes,
)  # fmt: skip
from benchmarks.common.timing import summary
from benchmarks.evidence.study import Arm, Results, Study, study_program
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
    **{"smoothing": 0.0, "clip_grad": 1.0, "batch_size": 32, "lr": 4e-3, "model_ema_decay": 0.98},
    **{"eval_images": 360, "checkpoint_hist": 1},
}
"""Options of fastgn.train that all trainings share."""
START_EPOCHS, EPOCHS, EPS = 8, 12, 0.1
"""Epochs of natural training, and of gradnorm, which starts from the natural weights."""
IMAGES, PGD_IMAGES, TRAIN_IMAGES = 30, 360, 1437
"""Numbers of images that AutoAttack and PGD-20 attack, and on which the fit is measured."""


def fitted(folder: Path, cfg: Config, count: int) -> dict[str, float]:
    """Returns how well a trained network fits its first training images.

    Keys: objective (the value that gradnorm minimises), ce (cross-entropy), penalty, and grad_l1
    (L1 norm of the input gradient), each a mean over the images.

    The penalty has its full weight, without a ramp. folder: output folder of
    the training. cfg: configuration with the data and gradnorm's options. count: number of images.
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


MEANS = {
    "clean, %": "clean_mean",
    "AutoAttack, %": "robust_mean",
    "penalty, % of the start's": "penalty_ratio",
    "objective, % of the start's": "objective_ratio",
}
"""Heading in the second table -> key in a row of the record."""


def table(record: Record) -> str:
    """Returns this benchmark's Markdown table of all activations, made from its JSON record.

    Below it are the means of the piecewise linear and of the smooth activations.
    """
    rows = [row for row in record["rows"] if row["accuracy"]]
    columns = {
        "activation": [row["activation"] for row in rows],
        **accuracy_columns(rows),
        "cross-entropy": [f"{row['ce_after']['mean']:.2f}" for row in rows],
        "penalty, of the start's": [f"{row['penalty_ratio']['mean']:.1%}" for row in rows],
        "objective, of the start's": [f"{row['objective_ratio']['mean']:.1%}" for row in rows],
    }
    images = record["images"]
    notes = [
        f"{record['network']}, {record['data']}, {device(record)}, {record['precision']}, "
        f"{over_seeds(record['seeds'])}",
        f"{record['epochs']['natural']} natural epochs, then {record['epochs']['gradnorm']} of "
        f"gradnorm at eps {record['eps']:.4g}",
        f"AutoAttack on {images['autoattack']} images, the rest on {images['pgd']}",
    ]
    kinds: dict[str, list[Row]] = {"piecewise linear": [], "smooth": []}
    for row in rows:
        bent = row["activation"].partition(":")[0] in PIECEWISE_LINEAR
        kinds["piecewise linear" if bent else "smooth"].append(row)
    means = {"kind": [f"{kind} ({len(group)})" for kind, group in kinds.items() if group]}
    for heading, key in MEANS.items():
        values = [[100 * r[key]["mean"] for r in group] for group in kinds.values() if group]
        means[heading] = [f"{statistics.fmean(group):.1f}" for group in values]
    second = make_table(means["kind"], means)
    return f"{with_notes(make_table(rows, columns), record, *notes)}\n\n{second}"


def summarize(row: Mapping[str, Any]) -> Results:
    """Returns means over an activation's seeds, such as the share of the penalty that is left.

    row: the activation's row of the record, whose key "seeds" holds one result per seed.
    """
    fits = [(cell["before"], cell["after"]) for cell in row["seeds"]]
    by_attack = {a["attack"]: a["accuracy"] for a in row["accuracy"]}
    robust = next(name for name in ("autoattack", "apgd-ce") if name in by_attack)
    return {
        **{f"{k}_ratio": summary([b[k] / a[k] for a, b in fits]) for k in ("objective", "penalty")},
        **{f"{k}_before": summary([a[k] for a, _ in fits]) for k in ("ce", "penalty")},
        **{f"{k}_after": summary([b[k] for _, b in fits]) for k in ("ce", "penalty")},
        **{"clean_mean": by_attack["clean"], "robust_mean": by_attack[robust]},
    }


@study_program(
    option("--activations", nargs="+", default=SPECTRUM, metavar="NAME[:NUMBER]"),
    data=("digits",), seeds=1,
)  # fmt: skip
def main(args: argparse.Namespace, work: Path) -> Study:
    """Returns the study that the command line asks for. work: folder for the trainings."""
    base = Config().replace(**BASE, precision=PRECISION, eps=EPS, eval_eps=EPS)
    attack, images, pgd_images, train_images = "autoattack", IMAGES, PGD_IMAGES, TRAIN_IMAGES
    epochs = {"natural": START_EPOCHS, "gradnorm": EPOCHS}
    if args.smoke:
        attack, images, pgd_images, train_images = "apgd-ce", 2, 16, 256
        base, epochs = base.replace(eval_images=16), dict.fromkeys(epochs, 1)
    evaluations = (
        ("--attacks", "clean", "pgd-20", "--eps", repr(EPS), "--num-images", str(pgd_images)),
        ("--attacks", attack, "--eps", repr(EPS), "--num-images", str(images)),
    )

    def training(name: str, seed: int, method: str) -> Config:
        n = epochs[method]
        lengths = {"epochs": n, "warmup_epochs": 0.1 * n, "ramp_epochs": 0.25 * n}
        values = {"activation": name, "seed": seed, "method": method}
        return base.replace(**values, **lengths, eval_interval=max(1, n // 4))

    def trial(name: str, seed: int) -> Trial:
        start = Trial(f"natural_{name}_s{seed}", training(name, seed, "natural"))
        cfg = training(name, seed, "gradnorm")
        return Trial(f"gradnorm_{name}_s{seed}", cfg, evaluations, start)

    def measure(trial: Trial, work: Path) -> Results:
        assert trial.start is not None
        keys = {"before": trial.start.key, "after": trial.key}
        return {when: fitted(work / key, trial.cfg, train_images) for when, key in keys.items()}

    names = list(dict.fromkeys(args.activations))
    for name in names:
        parse_activation(name)  # refuses unknown ones before anything is trained
    runs = {name: [trial(name, seed) for seed in range(args.seeds)] for name in names}
    arms = [Arm({"activation": name}, trials) for name, trials in runs.items()]
    head = {
        "network": f"PreActResNet-18, {', '.join(base.architecture.model_kwargs)}",
        "epochs": epochs,
        "eps": EPS,
        "images": {"autoattack": images, "pgd": pgd_images},
    }
    return Study(arms, head, measure, summarize)


if __name__ == "__main__":
    sys.exit(main())
