"""Measures fit and robustness of gradnorm with piecewise linear and smooth activations.

The paper finds that gradnorm needs smooth activations. Here PreActResNet-18 is trained naturally
with each activation, and then by gradnorm from those weights. Activations and BatchNorm are the
only nonlinear layers of this network.

    python -m benchmarks.evidence.activations

Three properties of an activation f are computed from f'' where it exists, in float64 on a fine
grid:

  width    (integral of |f''|)^2 / integral of f''^2. It says how wide the bend of f is, compared
           with inputs that BatchNorm scales to about 1. Only units whose input lies in the bend
           contribute to the penalty's gradient through f''. softplus has the width 6 / beta, and a
           kink has the width 0.
  largest  the largest |f''|, which says how sharp the bend is.
  kink     share of the change of f' that lies in kinks, at which f'' does not exist.

The fit is measured by cross-entropy and penalty of training images without augmentation, in eval
mode, before and after gradnorm.

Writes benchmarks/results/activations_<data>_<device>.json.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.tables import (
    Record,
    accuracy_columns,
    device,
    make_table,
    over_seeds,
    with_notes,
)  # fmt: skip
from benchmarks.common.timing import summary
from benchmarks.evidence.study import (
    Arm,
    Results,
    Study,
    device_precision,
    make_parser,
    run_program,
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
REACH, STEP = 40.0, 1e-3
"""The grid on which f'' is computed lies between -REACH and REACH, and its points are STEP apart.
The grid does not contain 0."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """Lengths of training and numbers of attacked images for one data set."""

    base: Config
    start_epochs: int
    """Number of epochs of natural training, which comes first."""
    epochs: int
    """Number of epochs of gradnorm, which starts from the natural weights."""
    eps: float
    images: int
    """Number of images that AutoAttack attacks."""
    pgd_images: int
    """Number of images that PGD-20 attacks."""
    train_images: int
    """Number of training images on which the fit is measured."""
    attack: str = "autoattack"


def setting(data: str, smoke: bool) -> Setting:
    """Returns the lengths of training and numbers of images for a data set.

    smoke: whether to return toy sizes, which only show that the program runs.
    """
    small = data == "digits"
    base = Config().replace(
        **{"data": data, "model": "preact_resnet18", "smoothing": 0.0, "clip_grad": 1.0},
        **{"batch_size": 32 if small else 512, "lr": 4e-3 if small else 2e-3},
        **{"model_kwargs": ["width=4" if small else "width=16"], "model_ema_decay": 0.98},
        **{"eval_images": 360 if small else 1000, "checkpoint_hist": 1},
    )
    base = base.replace(**{"img_size": 16} if small else {})
    if smoke:
        return Setting(base.replace(eval_images=16), 1, 1, 0.025, 2, 16, 256, "apgd-ce")
    if small:
        return Setting(base, 8, 12, 0.1, 30, 360, 1437)
    return Setting(base, 10, 10, 4 / 255, 500, 1000, 5000)


def properties(name: str) -> dict[str, float]:
    """Returns three numbers that describe the second derivative f'' of an activation f.

    width says how wide the bend of f is, largest is the largest |f''|, and kink is the share of the
    change of f' that lies in kinks. The module's docstring defines them.
    """
    layer, arguments = parse_activation(name)
    f = layer(**arguments).double()
    x = torch.arange(-REACH + STEP / 2, REACH, STEP, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    bend = torch.zeros_like(x)
    if slope.requires_grad:
        (bend,) = torch.autograd.grad(slope.sum(), x)
    mass, square = float(bend.abs().sum() * STEP), float(bend.square().sum() * STEP)
    change = float(slope.detach().diff().abs().sum())
    return {
        "width": mass**2 / square if square else 0.0,
        "largest": float(bend.abs().max()),
        "kink": max(0.0, 1 - mass / change),
    }


def fitted(folder: Path, cfg: Config, count: int) -> dict[str, float]:
    """Returns loss, cross-entropy and penalty of a trained network on its first training images.

    folder: output folder of the training. count: number of images. The penalty has its full weight.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_trained(str(folder), device).model
    images = Subset(
        load_dataset(cfg.dataset).train,
        count,
        img_size=model.img_size,
        crop_pct=1.0,
        batch_size=256,
        workers=0,
        device=device,
    )
    o, rows = cfg.objective.gradnorm, []
    for x, y in images:
        values = {"ce_weight": o.ce_weight, "gn_weight": o.gn_weight}
        loss = gradnorm(model.backbone, model.normalize(x), y, **values, eps=o.eps, sigma=o.sigma)
        rows.append(len(x) * torch.stack(loss).detach())
    total = torch.stack(rows).sum(0) / images.size
    return dict(zip(("objective", "ce", "penalty", "grad_l1"), total.tolist(), strict=True))


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Returns Spearman's rank correlation of some pairs of numbers."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [statistics.fmean(i for i, v in enumerate(sorted(values)) if v == x) for x in values]

    return statistics.correlation(*(ranks(v) for v in zip(*pairs, strict=True)))


MEANS = ("clean_mean", "robust_mean", "penalty_ratio", "objective_ratio")


def table(record: Record) -> str:
    """Returns this benchmark's Markdown table of all activations, made from its JSON record.

    Below it are the means of the piecewise linear and of the smooth activations.
    """
    finished = [row for row in record["rows"] if row["accuracy"]]
    rows = sorted(finished, key=lambda r: (r["width"], r["activation"]))
    columns = {
        "activation": [row["activation"] for row in rows],
        "width of the bend": [f"{row['width']:.2g}" for row in rows],
        "largest f''": [f"{row['largest']:.2g}" for row in rows],
        "share in kinks": [f"{row['kink']:.0%}" for row in rows],
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
    for key, label in (("robust_mean", "AutoAttack"), ("objective_ratio", "the objective left")):
        if len({r["width"] for r in rows}) > 1 and len({r[key]["mean"] for r in rows}) > 1:
            value = rank_correlation([(r["width"], r[key]["mean"]) for r in rows])
            notes.append(f"rank correlation of the bend's width with {label}: {value:+.2f}")
    groups = {
        "piecewise linear": [r for r in rows if r["kink"] > 0.5],
        "smooth": [r for r in rows if r["kink"] <= 0.5],
    }
    kinds = [
        {"kind": f"{name} ({len(group)})"}
        | {k: f"{100 * statistics.fmean(r[k]['mean'] for r in group):.1f}" for k in MEANS}
        for name, group in groups.items()
        if group
    ]
    headings = ("kind", "clean, %", "AutoAttack, %", "penalty, % of the start's")
    headings += ("objective, % of the start's",)
    keys = zip(headings, ("kind", *MEANS), strict=True)
    second = make_table(kinds, {heading: (lambda r, k=key: r[k]) for heading, key in keys})
    return f"{with_notes(make_table(rows, columns), record, *notes)}\n\n{second}"


def summarize(row: Mapping[str, Any]) -> Results:
    """Returns means over an activation's seeds, such as the share of the penalty that is left."""
    fits = [(cell["before"], cell["after"]) for cell in row["seeds"]]
    by_attack = {a["attack"]: a["accuracy"] for a in row["accuracy"]}
    robust = next(name for name in ("autoattack", "apgd-ce") if name in by_attack)
    return {
        **{f"{k}_ratio": summary([b[k] / a[k] for a, b in fits]) for k in ("objective", "penalty")},
        **{f"{k}_before": summary([a[k] for a, _ in fits]) for k in ("ce", "penalty")},
        **{f"{k}_after": summary([b[k] for _, b in fits]) for k in ("ce", "penalty")},
        **{"clean_mean": by_attack["clean"], "robust_mean": by_attack[robust]},
    }


def plan(args: argparse.Namespace, work: Path, before: Results) -> Study:
    """Returns the study that the command line asks for. `before` is not used."""
    s = setting(args.data, args.smoke)
    base = s.base.replace(**{"data_dir": args.data_dir} if args.data_dir else {})
    base = base.replace(precision=device_precision(), eps=s.eps, eval_eps=s.eps)
    evaluations = (
        ("--attacks", "clean", "pgd-20", "--eps", repr(s.eps), "--num-images", str(s.pgd_images)),
        ("--attacks", s.attack, "--eps", repr(s.eps), "--num-images", str(s.images)),
    )

    def training(name: str, seed: int, epochs: int, method: str) -> Config:
        lengths = {"epochs": epochs, "warmup_epochs": 0.1 * epochs, "ramp_epochs": 0.25 * epochs}
        values = {"activation": name, "seed": seed, "method": method}
        return base.replace(**values, **lengths, eval_interval=max(1, epochs // 4))

    def trial(name: str, seed: int) -> Trial:
        natural = training(name, seed, s.start_epochs, "natural")
        start = Trial(f"natural_{name}_s{seed}", natural)
        cfg = training(name, seed, s.epochs, "gradnorm")
        return Trial(f"gradnorm_{name}_s{seed}", cfg, evaluations, start)

    def measure(trial: Trial, work: Path) -> Results:
        assert trial.start is not None
        keys = {"before": trial.start.key, "after": trial.key}
        return {when: fitted(work / key, trial.cfg, s.train_images) for when, key in keys.items()}

    arms = [
        Arm({"activation": name, **properties(name)}, [trial(name, i) for i in range(args.seeds)])
        for name in dict.fromkeys(args.activations)
    ]
    head = {
        "network": f"PreActResNet-18, {', '.join(base.architecture.model_kwargs)}",
        "epochs": {"natural": s.start_epochs, "gradnorm": s.epochs},
        "eps": s.eps,
        "images": {"autoattack": s.images, "pgd": s.pgd_images},
    }
    return Study(arms, head, measure, summarize)


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, runs the benchmark, and returns the exit status.

    The status is 2 for a user's mistake, 1 if every training failed, and else 0.
    """
    parser = make_parser(__doc__, data=("digits", "cifar10"), seeds=1)
    parser.add_argument("--activations", nargs="+", default=SPECTRUM, metavar="NAME[:NUMBER]")
    return run_program("activations", parser, argv, plan)


if __name__ == "__main__":
    sys.exit(main())
