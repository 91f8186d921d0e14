"""Robustness of every training method under AutoAttack, at equal passes and at equal time.

All arms start from the same natural weights of their seed. Each gets the epochs that cost as much
as gradnorm's: once counted in passes (operations in forwards, count_passes), and once in time, by
the seconds per update of one interleaved run of all arms.

    python -m benchmarks.evidence.robustness --data digits --seeds 3
    python -m benchmarks.evidence.robustness --data cifar10 --data-dir DIR --minutes 9

A finished training or evaluation is kept in --work and not made again. The same command continues
an interrupted one. On a CPU, times mean something as ratios within that run alone.

Writes benchmarks/results/robustness_<data>_<device>.json.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.arguments import device_name, output_for, positive_int
from benchmarks.common.records import write_record
from benchmarks.common.tables import (
    Record,
    Row,
    accuracy_columns,
    device,
    make_table,
    over_seeds,
    percent,
    plus_minus,
    with_notes,
)  # fmt: skip
from benchmarks.common.timing import interleaved, summary
from benchmarks.evidence import trials
from benchmarks.evidence.trials import Trial, digest, statistics_of
from fastgn.config import Config, load_recipe
from fastgn.data.datasets import load_dataset
from fastgn.distributed import session
from fastgn.errors import UserError, check, nearest
from fastgn.files import write_bytes, write_json
from fastgn.metrics import environment
from fastgn.objectives import build_objective
from fastgn.resolved import schedule_of
from fastgn.setup import build
from fastgn.step.passes import count_passes

ARMS: dict[str, dict[str, Any]] = {
    "natural": {"method": "natural"},
    "gradnorm": {"method": "gradnorm", "precision": "fp32"},
    "gradnorm-bf16": {"method": "gradnorm", "precision": "bf16"},
    "gradnorm-fd": {"method": "gradnorm", "schedule": "finite-difference", "precision": "fp32"},
    "gradnorm-lazy2": {"method": "gradnorm", "schedule": "lazy", "lazy_interval": 2},
    "gradnorm-lazy4": {"method": "gradnorm", "schedule": "lazy", "lazy_interval": 4},
    "gradnorm-subset": {"method": "gradnorm", "schedule": "subset", "subset_fraction": 0.5},
    "gradnorm-weak": {"method": "gradnorm", "gn_weight": 0.6},
    "gradnorm-strong": {"method": "gradnorm", "gn_weight": 2.4},
    "pgd_at": {"method": "pgd_at"},
    "fgsm_rs": {"method": "fgsm_rs"},
    "edge": {"method": "edge"},
    "pag": {"method": "pag"},
    "trades": {"method": "trades"},
    "gradnorm+fgsm": {"method": "gradnorm+fgsm"},
}
"""Name of each training method that is compared -> options of fastgn.train in which it differs.

If the precision is not among the options, it is fp32 on a CPU and bf16 on a GPU.
"""
SEVERAL = math.lcm(*(arm.get("lazy_interval", 1) for arm in ARMS.values()))
"""Number of updates per timed call.

It is a multiple of every --lazy-interval, because only some updates have a penalty.
"""
SAME = 0.1
"""If the epochs for equal passes and for equal time differ by less than this share, they count as
equal, and one training serves for both."""
STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t (two-sided, 95 %) for 1, 2, ... degrees of freedom.

The mean of three seeds differs from 0 if it is 4.3 standard errors away from 0.
"""
NO_MEANING = "CPU: times mean something as ratios within this run alone"


PAIRS = {
    "bf16 and finite differences": [("gradnorm-bf16", "gradnorm"), ("gradnorm-fd", "gradnorm")],
    "lazy penalties and subsets": [
        (arm, None) for arm in ("gradnorm-lazy2", "gradnorm-lazy4", "gradnorm-subset")
    ],
    "adversarial training": [
        (None, arm) for arm in ("fgsm_rs", "pgd_at", "trades", "gradnorm+fgsm")
    ],
}
"""Pairs of training methods that the second table compares. None means exact gradnorm."""


@dataclasses.dataclass(frozen=True)
class Study:
    """One comparison of training methods: data set, networks and lengths of training."""

    networks: dict[str, dict[str, Any]]
    """Name of each network in the tables -> options of fastgn.train that define it."""
    base: Config
    """Configuration that all trainings share."""
    arms: tuple[str, ...]
    """Names of the training methods that are compared by default."""
    start: dict[str, Any]
    """Options of fastgn.train for the natural training from whose weights all others start."""
    epochs: int
    """Number of epochs of gradnorm. The other methods get as many as cost the same."""
    eps: float
    """Radius of the perturbations that the methods train against."""
    eval_eps: tuple[float, ...]
    """Radii of the attacks.

    Trainings that are made only for the comparison at equal time are attacked at the first radius.
    """
    images: int
    """Number of images per seed that AutoAttack attacks. Each seed has other images."""
    pgd_images: int
    """Number of images that PGD-20 attacks."""
    attack: str = "autoattack"
    ramp_share: float = 0.25
    """Share of the epochs in which the penalty ramps up."""
    warmup_share: float = 0.05
    """Share of the epochs in which the learning rate warms up."""


def digits() -> Study:
    """Returns the comparison on scikit-learn's digits, with a smaller network than the
    quickstart's."""
    base = load_recipe("quickstart_gradnorm")
    base = base.replace_group("architecture", {"initial_checkpoint": None})
    kwargs = [k for k in base.architecture.model_kwargs if not k.startswith("depths")]
    return Study(
        networks={"Swin": {"model_kwargs": [*kwargs, "depths=(1, 1)"]}},
        base=base.replace(
            **{"lr": 4e-3, "smoothing": 0.0, "model_ema_decay": 0.98, "ramp_epochs": 5.0},
            **{"eval_images": 360, "checkpoint_hist": 1},
        ),
        arms=tuple(ARMS),
        start={"epochs": 30, "warmup_epochs": 2.0},
        epochs=15,
        eps=0.025,
        eval_eps=(0.025, 0.05),
        images=30,
        pgd_images=360,
    )


def cifar10() -> Study:
    """Returns the comparison on CIFAR-10. Its networks are narrow, so that AutoAttack is fast."""
    base = Config().replace(
        **{"data": "cifar10", "global_batch_size": 512, "lr": 2e-3, "clip_grad": 1.0},
        **{"smoothing": 0.0, "model_ema_decay": 0.99, "eval_images": 1000, "checkpoint_hist": 1},
    )
    # global_batch_size would accumulate batches of 32
    base = base.replace_group("dataset", {"global_batch_size": None, "batch_size": 512})
    swin = ["patch_size=2", "embed_dim=48", "depths=(2, 2, 2)", "num_heads=(2, 4, 8)"]
    return Study(
        networks={
            "PreActResNet-18, GELU, width 16": {
                **{"model": "preact_resnet18", "activation": "gelu", "model_kwargs": ["width=16"]}
            },
            "Swin": {
                **{"model": "swin_t", "img_size": 32},
                "model_kwargs": [*swin, "window_size=4", "mlp_ratio=2"],
            },
        },
        base=base,
        arms=(
            *("natural", "gradnorm", "gradnorm-bf16", "gradnorm-fd", "edge", "pgd_at", "fgsm_rs"),
        ),
        start={"epochs": 12, "warmup_epochs": 1.0},
        epochs=8,
        eps=4 / 255,
        eval_eps=(4 / 255, 8 / 255, 2 / 255),
        images=1000,
        pgd_images=1000,
    )


STUDIES = {"digits": digits, "cifar10": cifar10}


def smoke(study: Study) -> Study:
    """Returns a comparison of toy size, which only shows that the whole program runs."""
    name, network = next(iter(study.networks.items()))
    small = {"width=16": "width=4", "embed_dim=16": "embed_dim=8"}
    kwargs = [small.get(k, k) for k in network["model_kwargs"]]
    return dataclasses.replace(
        study,
        networks={name: network | {"model_kwargs": kwargs}},
        base=study.base.replace(eval_images=16),
        start={"epochs": 1, "warmup_epochs": 0.0},
        epochs=2,
        eval_eps=study.eval_eps[:1],
        images=2,
        pgd_images=16,
        attack="apgd-ce",
    )


def known_arms(names: Sequence[str] | None, study: Study, base: Config) -> tuple[str, ...]:
    """Returns the named training methods, or if None all of the study that the device supports.

    Raises UserError if a name is unknown or a named method is not supported.
    """
    known = []
    for name in study.arms if names is None else dict.fromkeys(names):
        check(name in ARMS, f"--methods {name!r}: {nearest(name, ARMS)}")
        try:
            base.replace(**ARMS[name])
        except UserError as error:
            if names is not None:
                raise UserError(f"--methods {name}: {error}") from None
            print(f"left out: {name}: {error}")
            continue
        known.append(name)
    return tuple(known)


def reference_of(arms: Sequence[str], precision: str) -> str:
    """Returns the method whose number of epochs is given: exact gradnorm in the device's precision.

    arms: names of the methods that are compared.
    """
    names = ["gradnorm-bf16", "gradnorm"] if precision == "bf16" else ["gradnorm"]
    return next(name for name in [*names, *arms] if name in arms)


def arm_config(study: Study, network: str, arm: str, precision: str) -> Config:
    """Returns the configuration of a training, except for its number of epochs and its seed.

    arm: name of the training method.
    """
    values = {"precision": precision, "eps": study.eps, "attack_eps": study.eps}
    return study.base.replace(
        **values | study.networks[network] | ARMS[arm] | {"eval_eps": study.eps}
    )


def for_epochs(cfg: Config, study: Study, epochs: int) -> Config:
    """Returns the configuration with another number of epochs. It evaluates about six times."""
    return cfg.replace(
        epochs=epochs,
        warmup_epochs=study.warmup_share * epochs,
        ramp_epochs=study.ramp_share * epochs,
        eval_interval=max(1, epochs // 6),
    )


def units_of(cfg: Config) -> tuple[float, float]:
    """Returns two costs of an update: the paper's number of passes, and operations / forward's."""
    passes = count_passes(
        build_objective(cfg.objective),
        schedule_of(cfg.step),
        cfg.objective.attack.attack_weight_grads,
    )
    return passes.paper, passes.units


def epochs_for(reference: int, cost: float, reference_cost: float) -> int:
    """Returns how many epochs, at least 1, cost as much as `reference` epochs of another method.

    cost, reference_cost: cost of one update of each method.
    """
    return max(1, round(reference * reference_cost / cost))


def budgets_of(
    study: Study, units: Mapping[str, float], seconds: Mapping[str, float], reference: str
) -> dict[str, dict[str, int]]:
    """Returns the number of epochs at equal passes and at equal time for each training method.

    If both numbers are nearly the same, they are set to the same. units, seconds: costs of an
    update. reference: name of the method whose number of epochs is given.
    """
    out = {}
    for arm in units:
        passes = epochs_for(study.epochs, units[arm], units[reference])
        times = epochs_for(study.epochs, seconds[arm], seconds[reference])
        if abs(times - passes) <= SAME * passes:
            times = passes
        out[arm] = {"passes": passes, "time": times}
    return out


# ------------------------------------------------------------------------------------------ clock


def measure(configs: Mapping[str, Config], rounds: int, threads: int) -> dict[str, Any]:
    """Returns the seconds per update in each round, for each named configuration.

    The configurations take turns in each round, so that a drift of the machine affects all alike.
    """
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder, session() as world:
        runs, calls = [], {}
        for name, cfg in configs.items():
            cfg = cfg.replace(output=f"{folder}/{name}", eval_images=0)
            run = build(cfg, world)
            runs.append(run)
            batches = next(run.updates_of(0))
            run.ramp.fill_(1.0)

            def call(run: Any = run, batches: Any = batches) -> None:
                for _ in range(SEVERAL):
                    run.compute_gradients(batches, run.ramp, run.update)
                    run.apply_gradients(1e-5)
                    run.update += 1

            calls[name] = call
        timings = interleaved(calls, rounds=rounds, calls=1, warmup=1)
        for run in runs:
            if run.metrics is not None:
                run.metrics.close()
    torch.compiler.reset()
    return {name: [s / SEVERAL for s in t.rounds] for name, t in timings.items()}


def timings(
    configs: Mapping[str, Config], work: Path, rounds: int, threads: int
) -> dict[str, list[float]]:
    """Returns the result of `measure`, or that of an earlier call with the same configurations.

    Other times would give other numbers of epochs, and finished trainings would be made again.
    """
    what = {name: digest(cfg.flat()) for name, cfg in configs.items()}
    path = work / f"timings_{digest(what)}.json"
    if not path.exists():
        write_json(path, measure(configs, rounds, threads))
    return json.loads(path.read_text())


# ----------------------------------------------------------------------------------------- record


def image_list(work: Path, seed: int, count: int, total: int) -> Path:
    """Writes a file that names `count` of `total` images, evenly spaced. Returns its path.

    Each seed has other images, so that the mean over seeds says more about all images.
    """
    count = min(count, total)
    step = total / count
    shift = round(seed * 0.381966 % 1 * step)  # the golden section: no two of few seeds are near
    chosen = sorted({(int(i * step) + shift) % total for i in range(count)})
    path = work / f"images_{count}_of_{total}_s{seed}.txt"
    write_bytes(path, "".join(f"{i}\n" for i in chosen))
    return path


def evaluations_of(
    study: Study, budgets: Sequence[str], images: Path
) -> tuple[tuple[str, ...], ...]:
    """Returns the command-line flags of each evaluation. PGD-20 comes first, because it is fastest.

    budgets: "passes", "time" or both, for which the training is made. images: file that lists
    images.
    """
    all_eps, pgd = map(repr, study.eval_eps), "pgd-20"
    chosen = study.eval_eps if "passes" in budgets else study.eval_eps[:1]
    quick = ("--attacks", "clean", pgd, "--eps", *all_eps, "--num-images", str(study.pgd_images))
    auto = ("--attacks", study.attack, "--image-list", str(images), "--eps")
    return (quick, *((*auto, repr(eps)) for eps in chosen))


def summary_or_none(values: Sequence[float | None]) -> dict[str, float] | None:
    """Returns mean and spread of the values that are not None, or None if all are None."""
    known = [v for v in values if v is not None]
    return summary(known) if known else None


def accuracy(row: Mapping[str, Any], attack: str, eps: float) -> list[float] | None:
    """Returns the accuracy of each seed under an attack, or None if it was not measured for a seed.

    row: results of one training method in the JSON record.
    """
    found = []
    for seed in row["seeds"]:
        same = [r for r in seed["accuracy"] if (r["attack"], r["eps"]) == (attack, eps)]
        if not same:
            return None
        found.append(same[0]["accuracy"])
    return found or None


def difference(
    rows: Sequence[Row], pair: tuple[str, str], budget: str, attack: str, eps: float
) -> str:
    """Returns the mean difference in accuracy of two training methods over the same seeds, in
    points.

    A star marks a difference that Student's t finds significant at 95 %.

    rows: results of the JSON record. budget: "passes" or "time", which both methods have in equal
    amounts.
    """
    found = []
    for name in pair:
        same = [r for r in rows if r["arm"] == name and budget in r["budgets"]]
        found.append(accuracy(same[0], attack, eps) if same else None)
    if found[0] is None or found[1] is None or len(found[0]) != len(found[1]):
        return ""
    points = [100 * (a - b) for a, b in zip(*found, strict=True)]
    mean, n = statistics.fmean(points), len(points)
    if n == 1:
        return f"{mean:+.1f}"
    std = statistics.stdev(points)
    t = STUDENT[n - 2] if n - 2 < len(STUDENT) else 2.0
    return f"{mean:+.1f} ± {std:.1f}{' *' if abs(mean) > t * std / math.sqrt(n) else ''}"


def compare(record: Record) -> Iterator[dict[str, str]]:
    """Yields the rows of the second table.

    Each row compares two training methods that cost the same number of passes or the same time.
    """
    eps, reference = record["eps"], record["reference"]
    attacks = {"clean": ("clean", 0.0), f"AutoAttack {eps:.4g}": ("autoattack", eps)}
    attacks[f"PGD-20 {eps:.4g}"] = ("pgd-20", eps)
    for network in record["networks"]:
        rows = [r for r in record["rows"] if r["network"] == network]
        costs = {r["arm"]: r for r in rows}
        for pair in (pair for pairs in PAIRS.values() for pair in pairs):
            one, other = (name or reference for name in pair)
            for budget in ("passes", "time"):
                cells = {
                    name: difference(rows, (one, other), budget, *attack)
                    for name, attack in attacks.items()
                }
                if one != other and any(cells.values()):
                    ratios = (
                        f"{costs[one][key] / costs[other][key]:.2f}"
                        for key in ("seconds_over", "units")
                    )
                    yield {
                        **{"network": network, "arm": one, "against": other, "equal": budget},
                        **cells,
                        **dict(zip(("time per update", "operations"), ratios, strict=True)),
                    }


def radius_of(cfg: Config) -> float | None:
    """Returns the radius of the attacks that exact gradnorm's penalty approximates, else None.

    To first order, ce_weight CE + gn_weight eps |grad|_1 is ce_weight times the worst cross-entropy
    within the radius gn_weight / ce_weight eps.
    """
    o, exact = cfg.objective.gradnorm, cfg.step.schedule in ("exact", "exact-eager")
    if cfg.objective.method != "gradnorm" or not exact or not o.ce_weight:
        return None
    return o.gn_weight / o.ce_weight * o.eps


def table(record: Record) -> str:
    """Returns this benchmark's Markdown table of all training methods, made from its JSON record.

    Below it is a table of the differences between methods.
    """
    old = record.get("superseded", {})
    rows = [row for row in record["rows"] if row["accuracy"] and row["arm"] not in old]
    several = len(record["networks"]) > 1
    columns = {
        "network": [row["network"] if several else "" for row in rows],
        "arm": [row["arm"] for row in rows],
        "equal": ["both" if len({*r["budgets"]}) > 1 else r["budgets"][0] for r in rows],
        "epochs": [str(row["epochs"]) for row in rows],
        "radius": [f"{row['radius']:.4g}" if row["radius"] is not None else "" for row in rows],
        "operations an update": [f"{row['units']:.3g}" for row in rows],
        "time over natural": [f"{row['seconds_over']:.2f}" for row in rows],
        "s": [plus_minus(row.get("seconds"), ".0f") for row in rows],
        "kJ": [f"{r['joules']['mean'] / 1e3:.1f}" if r.get("joules") else "" for r in rows],
    }
    images, failed = record["images"], [(r, f) for r in record["rows"] for f in r["failed"]]
    notes = [
        f"{record['data']}, {', '.join(record['networks'])}; {device(record)}, "
        f"{record['precision']} where an arm does not say otherwise; "
        f"{over_seeds(record['seeds'])}",
        f"all from one natural start a seed, for Linf eps {record['eps']:.4g}",
        "equal: to gradnorm's passes, or to its time",
        "radius: of the attacks that exact gradnorm's penalty stands for, to first order",
        f"AutoAttack on {images['autoattack, each seed its own']} images a seed, each seed's "
        f"own, the rest on {images['pgd-20']}",
        f"time: {record['time']}",
        *(f"left out: {arm} ({why})" for arm, why in old.items()),
        *([] if record["complete"] else ["not all of it has run yet"]),
        *(f"failed: {row['arm']} (seed {failure['seed']})" for row, failure in failed),
    ]
    first = with_notes(make_table(rows, columns | accuracy_columns(rows)), record, *notes)
    pairs = [row if several else row | {"network": ""} for row in compare(record)]
    if not pairs:
        return first
    second = make_table(pairs, {name: (lambda r, n=name: r[n]) for name in pairs[0]})
    return (
        f"{first}\n\n{second}\n\nDifferences of accuracy in points, arm minus the other, on the "
        "same seeds: mean ± deviation; * significant at 95 % by Student's t; time per update and "
        "operations: ratios of the two arms."
    )


def summary_table(record: Record) -> str:
    """Returns README's Markdown table from the JSON record: each method after as many
    operations."""
    arms = {
        "natural": "natural training",
        "gradnorm": "gradient norm",
        "gradnorm-fd": "gradient norm by finite difference",
        "fgsm_rs": "FGSM from a random start",
        "pgd_at": "PGD-3 adversarial training",
        "trades": "TRADES",
        "gradnorm+fgsm": "gradient norm and FGSM in turn",
    }
    equal = {r["arm"]: r for r in record["rows"] if "passes" in r["budgets"]}
    rows, eps, images = [equal[arm] for arm in arms], record["eps"], record["images"]

    def accuracies(attack: str, eps: float) -> list[str]:
        key = (attack, eps)
        found = [a for r in rows for a in r["accuracy"] if (a["attack"], a["eps"]) == key]
        return [percent(a["accuracy"]) for a in found]

    columns = {
        "method": list(arms.values()),
        "forwards per update": [f"{row['units']:.3g}" for row in rows],
        "clean, %": accuracies("clean", 0),
        "AutoAttack, %": accuracies("autoattack", eps),
        "PGD-20, %": accuracies("pgd-20", eps),
    }
    return (
        f"{make_table(rows, columns)}\n\nA small Swin on scikit-learn's digits, Linf eps {eps:g} "
        f"of the pixels' range 0..1, {over_seeds(record['seeds'])}, equal numbers of operations in "
        f"training; AutoAttack on {images['autoattack, each seed its own']} images per seed, the "
        f"rest on {images['pgd-20']} (`benchmarks/results/{record['file']}`)."
    )


# ------------------------------------------------------------------------------------- the program


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of this program's command line."""
    parser = trials.make_parser(__doc__)
    add = parser.add_argument
    add("--data", choices=STUDIES, default="digits")
    add("--methods", nargs="+", metavar="ARM", help=f"of {', '.join(ARMS)}; default: the data's")
    add("--networks", nargs="+", type=int, metavar="N", help="first, second, ... of the data's")
    seeds = 1 if torch.cuda.is_available() else 3
    add("--seeds", type=positive_int, default=seeds, help="number of seeds, from 0")
    add("--epochs", type=positive_int, help="epochs of gradnorm; the others' follow from it")
    add("--images", type=positive_int, help="number of images that AutoAttack attacks")
    add("--rounds", type=positive_int, default=15, help="rounds of the clock")
    return parser


def choose_study(args: argparse.Namespace) -> Study:
    """Returns the comparison (data set, networks, lengths) that the command line asks for."""
    study = STUDIES[args.data]()
    study = smoke(study) if args.smoke else study
    names = list(study.networks)
    for number in args.networks or ():
        check(1 <= number <= len(names), f"--networks {number}: there are {len(names)}")
    chosen = {n for i, n in enumerate(names, 1) if i in (args.networks or [i])}
    return dataclasses.replace(
        study,
        networks={name: study.networks[name] for name in names if name in chosen},
        epochs=args.epochs or study.epochs,
        images=args.images or study.images,
        base=study.base.replace(**{"data_dir": args.data_dir} if args.data_dir else {}),
    )


@dataclasses.dataclass(frozen=True)
class Planned:
    """One training that is to be made: network, training method and number of epochs."""

    network: str
    arm: str
    epochs: int
    budgets: list[str]
    """Comparisons that the training belongs to: "passes" (equal passes), "time" (equal time) or
    both."""
    trial: Trial


def plan_trials(
    study: Study, arms: Sequence[str], reference: str, args: argparse.Namespace, work: Path
) -> tuple[list[Planned], dict[tuple[str, str], dict[str, Any]]]:
    """Returns all trainings to make, and the cost of an update for each network and method.

    Times updates to find these costs. arms: names of the training methods. reference: name of the
    method whose number of epochs is given. work: folder that holds the trainings.
    """
    precision = trials.device_precision()
    total = len(load_dataset(study.base.dataset).val)
    lists = [image_list(work, seed, study.images, total) for seed in range(args.seeds)]
    plan, costs = [], {}
    for network in study.networks:
        configs = {arm: arm_config(study, network, arm, precision) for arm in arms}
        plain = arm_config(study, network, "natural", precision)
        seconds = timings(configs, work, args.rounds, args.processes if args.processes > 1 else 1)
        units = {arm: units_of(cfg) for arm, cfg in configs.items()}
        least = {arm: min(s) for arm, s in seconds.items()}
        budgets = budgets_of(study, {a: u[1] for a, u in units.items()}, least, reference)
        against = "natural" if "natural" in arms else reference
        for arm in arms:
            costs[network, arm] = {
                "passes": units[arm][0],
                "units": units[arm][1],
                "seconds_over": least[arm] / least[against],
                "radius": radius_of(configs[arm]),
            }
            if torch.cuda.is_available():
                costs[network, arm]["seconds_an_update"] = summary(seconds[arm])
        for seed in range(args.seeds):
            values = study.start | {"seed": seed, "eval_interval": study.start["epochs"]}
            start = Trial(f"start_s{seed}", plain.replace(**values))
            for arm in arms:
                for epochs in dict.fromkeys(budgets[arm].values()):
                    kept = [b for b, e in budgets[arm].items() if e == epochs]
                    cfg = for_epochs(configs[arm], study, epochs).replace(seed=seed)
                    flags = evaluations_of(study, kept, lists[seed])
                    trial = Trial(f"{arm}_s{seed}_e{epochs}", cfg, flags, start)
                    plan.append(Planned(network, arm, epochs, kept, trial))
    return plan, costs


def rows_of(
    plan: Sequence[Planned], costs: Mapping[tuple[str, str], Mapping[str, Any]], work: Path
) -> list[dict[str, Any]]:
    """Returns the results of all finished trainings for the JSON record, one dict per method.

    costs: cost of an update for each network and training method. work: folder of the trainings.
    """
    rows: dict[tuple[str, str, int], dict[str, Any]] = {}
    for one in plan:
        head = {"network": one.network, "arm": one.arm, "budgets": one.budgets}
        row = rows.setdefault(
            (one.network, one.arm, one.epochs),
            {
                **head,
                "epochs": one.epochs,
                **costs[one.network, one.arm],
                "seeds": [],
                "failed": [],
            },
        )
        seed, found = {"seed": one.trial.cfg.run.seed}, trials.result(one.trial, work)
        if found and found["failed"]:
            row["failed"].append(seed | {"why": found["failed"]})
        elif found and found["accuracy"]:
            if not torch.cuda.is_available():
                del found["seconds"]
            row["seeds"].append(seed | found)
    for row in rows.values():
        row["accuracy"] = statistics_of(row["seeds"])
        row["total_units"] = row["epochs"] * row["units"]
        row["total_time_over"] = row["epochs"] * row["seconds_over"]
        for key in ("seconds", "joules"):
            if value := summary_or_none([s.get(key) for s in row["seeds"]]):
                row[key] = value
    return [row for row in rows.values() if row["seeds"] or row["failed"]]


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Makes the trainings that are missing, and writes the JSON record after each."""
    deadline, gpu = time.time() + 60 * args.minutes, torch.cuda.is_available()
    study, precision = choose_study(args), trials.device_precision()
    arms = known_arms(args.methods, study, study.base)
    reference = reference_of(arms, precision)
    free = {"data_dir", "minutes", "processes", "work", "data"}
    free |= {"seeds"} if args.seeds >= parser.get_default("seeds") else set()
    file = f"robustness_{args.data}_{'cuda' if gpu else 'cpu'}.json"
    output, work = output_for(file, parser, args, free), trials.work_folder(args, "robustness")
    print("" if gpu else NO_MEANING)
    plan, costs = plan_trials(study, arms, reference, args, work)
    every = [one.trial for one in plan]
    finished = trials.run_with_starts(every, work, processes=args.processes, deadline=deadline)
    record: dict[str, Any] = {
        "script": "benchmarks/evidence/robustness.py",
        "file": output.name,
        "data": args.data,
        "device": device_name(),
        "meaningful_times": gpu,
        "precision": precision,
        "networks": list(study.networks),
        "architectures": study.networks,
        "reference": reference,
        "reference_epochs": study.epochs,
        "start": study.start,
        "eps": study.eps,
        "eval_eps": sorted(study.eval_eps),
        "images": {"autoattack, each seed its own": study.images, "pgd-20": study.pgd_images},
        "seeds": args.seeds,
        "arms": {arm: ARMS[arm] for arm in arms},
        "time": "an update's, the least of all arms' interleaved rounds (other work adds to it): "
        f"{args.rounds} of {SEVERAL} updates" + ("" if gpu else f"; {NO_MEANING}"),
        **environment(),
        "rows": rows_of(plan, costs, work),
        "complete": finished,
    }
    written = write_record(output, record)
    left = sum(trials.missing(t, work) for t in every)
    print(f"{len(every) - left} of {len(every)} trainings finished -> {written}")
    return trials.exit_status(record["rows"], finished, len(every))


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, runs the benchmark, and returns the exit status.

    The status is 2 for a user's mistake, 1 if every training failed, and else 0.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    return trials.run_alone("robustness", args, lambda: run(parser, args))


if __name__ == "__main__":
    sys.exit(main())
