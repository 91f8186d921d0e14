"""Which activations gradnorm can fit: the paper's finding (smooth ones) as a spectrum.

    python -m benchmarks.evidence.activations

PreActResNet-18, whose activations are its only nonlinear layers but for BatchNorm, is trained
naturally with each and from there by gradnorm. Against it stand three properties of the activation
f, all of f'' where it exists, in float64 on a fine grid:

  width    (integral of |f''|)^2 / integral of f''^2: how wide the bend is, in the units of what
           goes in, which BatchNorm brings to about 1. It decides how many units a batch finds in a
           bend, and only of those can the penalty's gradient know where they are: softplus has
           6 / beta, a kink 0.
  largest  |f''|: how sharp the bend is.
  kink     share of the change of f' that lies in kinks, where f'' does not exist.

How well the objective is fitted: cross-entropy and penalty of the training images, unaugmented, in
eval mode, before and after.

Writes benchmarks/results/activations_<data>_<device>.json and a picture.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.arguments import ROOT, output_for, positive_int
from benchmarks.common.records import write_record
from benchmarks.common.timing import summary
from benchmarks.evidence import trials
from benchmarks.evidence.robustness import statistics_of
from benchmarks.evidence.trials import Trial
from fastgn.config import Config
from fastgn.data.datasets import load_dataset
from fastgn.data.subset import Subset
from fastgn.errors import UserError, check
from fastgn.files import write_bytes
from fastgn.metrics import environment
from fastgn.models.activations import parse_activation
from fastgn.objectives import gradnorm
from fastgn.trained import load_trained

SPECTRUM = (
    *("relu", "leaky_relu:0.01", "leaky_relu:0.1", "leaky_relu:0.3", "softplus:100"),
    *("softplus:30", "softplus:10", "softplus:3", "softplus:1", "elu", "gelu", "silu", "mish"),
    "tanh",
)
REACH, STEP = 40.0, 1e-3
"""The grid; no point of it is 0, where the kinks are."""


@dataclasses.dataclass(frozen=True)
class Setting:
    base: Config
    start_epochs: int
    epochs: int
    eps: float
    images: int
    """AutoAttack's."""
    pgd_images: int
    attack: str = "autoattack"


def setting(data: str, smoke: bool) -> Setting:
    small = data == "digits"
    base = Config().replace(
        **{"data": data, "model": "preact_resnet18", "smoothing": 0.0, "clip_grad": 1.0},
        **{"batch_size": 32 if small else 512, "lr": 4e-3 if small else 2e-3},
        **{"model_kwargs": ["width=4" if small else "width=16"], "model_ema_decay": 0.98},
        **{"eval_images": 360 if small else 1000, "checkpoint_hist": 1},
    )
    base = base.replace(**{"img_size": 16} if small else {})
    if smoke:
        return Setting(base.replace(eval_images=16), 1, 1, 0.025, 2, 16, "apgd-ce")
    if small:
        return Setting(base, 8, 12, 0.1, 30, 360)
    return Setting(base, 10, 10, 4 / 255, 500, 1000)


def properties(name: str) -> dict[str, float]:
    """See the script's head."""
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
    """Cross-entropy and penalty at full strength of `count` training images."""
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
    """Spearman's."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [statistics.fmean(i for i, v in enumerate(sorted(values)) if v == x) for x in values]

    return statistics.correlation(*(ranks(v) for v in zip(*pairs, strict=True)))


def draw(record: Mapping[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    from fastgn.analysis.canvas import log_axis, to_png

    figure = Figure(figsize=(15, 4.6), layout="constrained")
    panels = figure.subplots(1, 3)
    eps = record["eps"]
    columns = (
        (f"accuracy under AutoAttack at {eps:.4g}", lambda r: r["robust_mean"]["mean"]),
        ("clean accuracy", lambda r: r["clean_mean"]["mean"]),
        ("training objective after / before", lambda r: r["objective_ratio"]["mean"]),
    )
    for axes, (label, value) in zip(panels, columns, strict=True):
        kinks, widths = 0, []
        for row in record["rows"]:
            kinked = row["kink"] > 0.5
            at = (max(row["width"], 0.02 / 2.5**kinks), value(row))
            kinks += kinked
            widths.append(at[0])
            axes.plot(*at, "o", color="tab:red" if kinked else "tab:blue")
            text = {"textcoords": "offset points", "xytext": (4, 3), "fontsize": 7}
            axes.annotate(row["activation"], at, **text)
        log_axis(axes, "x", [min(widths) / 1.3, max(widths) * 1.3])
        axes.set(xlabel="width of the bend (red: kinks, of width 0, side by side)", title=label)
        axes.grid(alpha=0.3)
    figure.suptitle(f"gradnorm by activation: {record['network']}, {record['data']}")
    write_bytes(path, to_png(figure))


def of(row: Mapping[str, Any], attack: str) -> dict[str, float]:
    return next(r["accuracy"] for r in row["accuracy"] if r["attack"] == attack)


def answers_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the spectrum says of the paper's finding."""
    groups = {
        "piecewise linear": [r for r in rows if r["kink"] > 0.5],
        "smooth": [r for r in rows if r["kink"] <= 0.5],
    }
    out = []
    for name, group in groups.items():
        if group:
            values = [
                100 * statistics.fmean(r[k]["mean"] for r in group)
                for k in ("clean_mean", "robust_mean", "penalty_ratio", "objective_ratio")
            ]
            out.append(
                f"{name} ({len(group)}): clean {values[0]:.1f} %, AutoAttack {values[1]:.1f} %, "
                f"penalty {values[2]:.1f} % and objective {values[3]:.1f} % of the natural start's"
            )
    for key, label in (("robust_mean", "AutoAttack"), ("objective_ratio", "the objective left")):
        if len({r["width"] for r in rows}) > 1 and len({r[key]["mean"] for r in rows}) > 1:
            value = rank_correlation([(r["width"], r[key]["mean"]) for r in rows])
            out.append(f"rank correlation of the bend's width with {label}: {value:+.2f}")
    return out


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    deadline = time.time() + 60 * args.minutes
    gpu = torch.cuda.is_available()
    s = setting(args.data, args.smoke)
    cfg = s.base.replace(**{"data_dir": args.data_dir} if args.data_dir else {})
    precision = trials.device_precision()
    cfg = cfg.replace(precision=precision, eps=s.eps, eval_eps=s.eps)
    names = tuple(dict.fromkeys(args.activations))
    found = {name: properties(name) for name in names}
    check(args.seeds > 0, f"--seeds {args.seeds} must be at least 1")
    device = "cuda" if gpu else "cpu"
    free = {"data_dir", "minutes", "processes", "work", "plot", "data"}
    output = output_for(f"activations_{args.data}_{device}.json", parser, args, free)
    work = trials.work_folder(args, "activations")
    evaluations = (
        ("--attacks", "clean", "pgd-20", "--eps", repr(s.eps), "--num-images", str(s.pgd_images)),
        ("--attacks", s.attack, "--eps", repr(s.eps), "--num-images", str(s.images)),
    )
    plan = []
    for seed in range(args.seeds):
        for name in names:
            own = cfg.replace(activation=name, seed=seed)

            def budget(c: Config, epochs: int) -> Config:
                shares = {"warmup_epochs": 0.1 * epochs, "ramp_epochs": 0.25 * epochs}
                return c.replace(epochs=epochs, eval_interval=max(1, epochs // 4), **shares)

            start = Trial(
                f"natural_{name}_s{seed}", budget(own.replace(method="natural"), s.start_epochs)
            )
            trial = Trial(f"gradnorm_{name}_s{seed}", budget(own, s.epochs), evaluations, start)
            plan.append((name, trial))
    order = [t for _, trial in plan for t in (trial.start, trial) if t is not None]
    finished = True
    if args.processes == 1:
        finished = trials.run_all(order, work, processes=1, deadline=deadline)
    else:
        for half in (order[::2], order[1::2]):  # natural starts first
            options = {"processes": args.processes, "deadline": deadline}
            finished = finished and trials.run_all(half, work, **options)
    record: dict[str, Any] = {
        "script": "benchmarks/evidence/activations.py",
        "file": output.name,
        "data": args.data,
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "network": f"PreActResNet-18, {', '.join(cfg.architecture.model_kwargs)}",
        "epochs": {"natural": s.start_epochs, "gradnorm": s.epochs},
        "eps": s.eps,
        "images": {"autoattack": s.images, "pgd": s.pgd_images},
        "precision": precision,
        "seeds": args.seeds,
        **environment(),
        "rows": [],
        "failed": [],
    }
    train_images = 256 if args.smoke else 1437 if args.data == "digits" else 5000
    for name in names:
        seeds = []
        for trial in (t for n, t in plan if n == name):
            result = trials.result(trial, work)
            if result and result["failed"]:
                seed = trial.cfg.run.seed
                record["failed"].append({"activation": name, "seed": seed, "why": result["failed"]})
            elif result and len(result["accuracy"]) == 3:
                before = fitted(work / trial.start.key, trial.cfg, train_images)
                after = fitted(work / trial.key, trial.cfg, train_images)
                result.pop("seconds")
                seeds.append(
                    {"seed": trial.cfg.run.seed, "before": before, "after": after} | result
                )
        if seeds:
            row = {"activation": name, **found[name], "accuracy": statistics_of(seeds)}
            for key in ("objective", "penalty"):
                ratios = [x["after"][key] / x["before"][key] for x in seeds]
                row[f"{key}_ratio"] = summary(ratios)
            for key in ("ce", "penalty"):
                row[f"{key}_after"] = summary([x["after"][key] for x in seeds])
                row[f"{key}_before"] = summary([x["before"][key] for x in seeds])
            row |= {"clean_mean": of(row, "clean"), "robust_mean": of(row, s.attack)}
            record["rows"].append(row | {"seeds": seeds})
    record["complete"] = finished
    record["notes"] = [
        {
            "question": "Does gradnorm need a smooth activation?",
            "answers": answers_of(record["rows"]),
        }
    ]
    output = write_record(output, record)
    if record["rows"]:
        picture = args.plot or ROOT / "runs" / f"{output.stem}.png"
        draw(record, picture)
        print(f"picture: {picture}")
    for line in record["notes"][0]["answers"]:
        print(line)
    for failure in record["failed"]:
        print(f"FAILED: {failure['activation']}, seed {failure['seed']}: {failure['why']}")
    if not finished:
        print("stopped: say the same again to go on")
    print(f"{len(record['rows'])} of {len(names)} activations -> {output}")
    return int(bool(names) and len(record["failed"]) == len(plan))


def main(argv: Sequence[str] | None = None) -> int:
    """Its exit status: 2 for a mistake of the user's, 1 where every training failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", choices=("digits", "cifar10"), default="digits")
    trials.add_arguments(parser)
    add("--activations", nargs="+", default=SPECTRUM, metavar="NAME[:NUMBER]")
    add("--seeds", type=positive_int, default=1, help="how many, from 0")
    add("--plot", type=Path, help="PNG")
    args = parser.parse_args(argv)
    try:
        return run(parser, args)
    except UserError as error:
        print(f"activations.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
