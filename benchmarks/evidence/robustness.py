"""Compares training methods under AutoAttack, after equal numbers of operations.

An arm is a training method with its options. With each seed, all arms start from the same naturally
trained weights. Each arm trains for as many epochs as take the same number of operations as exact
gradnorm's (fastgn/step/passes.py counts them).

    python -m benchmarks.evidence.robustness --data digits --seeds 3
    python -m benchmarks.evidence.robustness --data cifar10 --data-dir DIR --minutes 9

The same command continues an interrupted one, and does not repeat results that are in the record.

Writes benchmarks/results/robustness_<data>_<device>.json.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.arguments import option
from benchmarks.common.tables import (
    Record,
    accuracy_columns,
    device,
    make_table,
    over_seeds,
    percent,
    with_notes,
)  # fmt: skip
from benchmarks.evidence.study import Arm, Study, device_precision, paired_difference, study_program
from benchmarks.evidence.trials import Trial
from fastgn.config import Config, load_recipe
from fastgn.objectives import build_objective
from fastgn.resolved import schedule_of
from fastgn.step.passes import count_passes

ARMS: dict[str, dict[str, Any]] = {
    "natural": {"method": "natural"},
    "gradnorm": {"method": "gradnorm"},
    "gradnorm-bf16": {"method": "gradnorm", "precision": "bf16"},
    "gradnorm-fd": {"method": "gradnorm", "schedule": "finite-difference"},
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
PAIRS = (
    *((f"gradnorm-{name}", "gradnorm") for name in ("bf16", "fd", "lazy2", "lazy4", "subset")),
    *(("gradnorm", name) for name in ("fgsm_rs", "pgd_at", "trades", "gradnorm+fgsm")),
)
"""Pairs of training methods that the second table compares."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """Data set, networks and lengths of training of one comparison of training methods."""

    networks: dict[str, dict[str, Any]]
    """Name of each network in the tables -> options of fastgn.train that define it."""
    base: Config
    """Configuration that all trainings share."""
    arms: tuple[str, ...]
    """Names of the training methods that are compared by default."""
    start: dict[str, Any]
    """Options of fastgn.train for the natural training from whose weights all others start."""
    epochs: int
    """Number of epochs of gradnorm. The other methods get as many as take the same operations."""
    eps: float
    """Radius of the perturbations that the methods train against."""
    eval_eps: tuple[float, ...]
    """Radii of the attacks."""
    images: int
    """Number of images that AutoAttack attacks."""
    pgd_images: int
    """Number of images that PGD-20 attacks."""
    attack: str = "autoattack"


def digits() -> Setting:
    """Returns the comparison on scikit-learn's digits. Its Swin has only two blocks."""
    base = load_recipe("quickstart_gradnorm")
    base = base.replace_group("architecture", {"initial_checkpoint": None})
    kwargs = [k for k in base.architecture.model_kwargs if not k.startswith("depths")]
    return Setting(
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


def cifar10() -> Setting:
    """Returns the comparison on CIFAR-10. Its networks are narrow, so that AutoAttack is fast."""
    base = Config().replace(
        **{"data": "cifar10", "global_batch_size": 512, "lr": 2e-3, "clip_grad": 1.0},
        **{"smoothing": 0.0, "model_ema_decay": 0.99, "eval_images": 1000, "checkpoint_hist": 1},
    )
    # with global_batch_size, 512 images would pass through the network in small batches of 32
    base = base.replace_group("dataset", {"global_batch_size": None, "batch_size": 512})
    swin = ["patch_size=2", "embed_dim=48", "depths=(2, 2, 2)", "num_heads=(2, 4, 8)"]
    return Setting(
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
        arms=("natural", "gradnorm", "gradnorm-fd", "edge", "pgd_at", "fgsm_rs"),
        start={"epochs": 12, "warmup_epochs": 1.0},
        epochs=8,
        eps=4 / 255,
        eval_eps=(4 / 255, 8 / 255, 2 / 255),
        images=1000,
        pgd_images=1000,
    )


SETTINGS = {"digits": digits, "cifar10": cifar10}


def smoke(setting: Setting) -> Setting:
    """Returns a comparison of toy size, which only shows that the whole program runs."""
    return dataclasses.replace(
        setting,
        networks=dict(itertools.islice(setting.networks.items(), 1)),
        base=setting.base.replace(eval_images=16),
        start={"epochs": 1, "warmup_epochs": 0.0},
        epochs=2,
        eval_eps=setting.eval_eps[:1],
        images=2,
        pgd_images=16,
        attack="apgd-ce",
    )


def arm_config(setting: Setting, network: str, arm: str, precision: str) -> Config:
    """Returns the configuration of a training, except for its number of epochs and its seed.

    network: key of Setting.networks. arm: name of the training method.
    """
    values = {"precision": precision, "eps": setting.eps, "attack_eps": setting.eps}
    return setting.base.replace(
        **values | setting.networks[network] | ARMS[arm] | {"eval_eps": setting.eps}
    )


def for_epochs(cfg: Config, epochs: int) -> Config:
    """Returns the configuration with another number of epochs and about six evaluations.

    The penalty ramps up in a quarter of the epochs, and the learning rate in a twentieth.
    """
    return cfg.replace(
        epochs=epochs,
        warmup_epochs=0.05 * epochs,
        ramp_epochs=0.25 * epochs,
        eval_interval=max(1, epochs // 6),
    )


def units_of(cfg: Config) -> float:
    """Returns the operations of an update, divided by those of a forward pass."""
    weight_grads = cfg.objective.attack.attack_weight_grads
    return count_passes(build_objective(cfg.objective), schedule_of(cfg.step), weight_grads).units


def evaluations_of(setting: Setting) -> tuple[tuple[str, ...], ...]:
    """Returns the command-line flags of each evaluation. PGD-20 comes first: it is fastest."""
    eps = [repr(eps) for eps in setting.eval_eps]
    few, many = str(setting.images), str(setting.pgd_images)
    quick = ("--attacks", "clean", "pgd-20", "--eps", *eps, "--num-images", many)
    slow = ("--attacks", setting.attack, "--num-images", few, "--eps")
    return (quick, *((*slow, radius) for radius in eps))


def equal_rows(record: Record) -> list[dict[str, Any]]:
    """Returns the rows of the record that have results and the same number of operations.

    Older records also have rows of trainings for equal times, which are left out.
    """
    old = record.get("superseded", {})
    equal = [row for row in record["rows"] if "passes" in row.get("budgets", ("passes",))]
    return [row for row in equal if row["accuracy"] and row["arm"] not in old]


def compare(record: Record) -> Iterator[dict[str, str]]:
    """Yields the rows of the second table, each of which compares two training methods.

    A row is a dict from a heading of the table to the text of its cell.
    """
    eps = record["eps"]
    attacks = {"clean": ("clean", 0.0), f"AutoAttack {eps:.4g}": ("autoattack", eps)}
    attacks[f"PGD-20 {eps:.4g}"] = ("pgd-20", eps)
    rows = {(row["network"], row["arm"]): row for row in equal_rows(record)}
    for network in record["networks"]:
        for arm, against in PAIRS:
            one, other = rows.get((network, arm)), rows.get((network, against))
            if one is None or other is None:
                continue
            found = {name: paired_difference(one, other, *a) for name, a in attacks.items()}
            if any(found.values()):
                yield {
                    **{"network": network, "arm": arm, "against": against},
                    **{name: str(value or "") for name, value in found.items()},
                    "operations": f"{one['units'] / other['units']:.2f}",
                }


def attacked_images(record: Record) -> str:
    """Returns a sentence with the numbers of attacked images."""
    images = record["images"]
    own = images.get("autoattack, each seed its own")  # only in older records
    few = f"{own} images per seed, each seed's own" if own else f"{images['autoattack']} images"
    return f"AutoAttack on {few}, the rest on {images['pgd-20']}"


def table(record: Record) -> str:
    """Returns this benchmark's Markdown table of all training methods, made from its JSON record.

    Below it is a table of the differences between methods.
    """
    rows, several = equal_rows(record), len(record["networks"]) > 1
    columns = {
        "network": [row["network"] if several else "" for row in rows],
        "arm": [row["arm"] for row in rows],
        "epochs": [str(row["epochs"]) for row in rows],
        "operations an update": [f"{row['units']:.3g}" for row in rows],
    }
    failed = [(row, failure) for row in record["rows"] for failure in row["failed"]]
    notes = [
        f"{record['data']}, {', '.join(record['networks'])}; {device(record)}, "
        f"{record['precision']} where an arm does not say otherwise; "
        f"{over_seeds(record['seeds'])}",
        f"all from one natural start a seed, for Linf eps {record['eps']:.4g}",
        "as many epochs as take gradnorm's operations",
        attacked_images(record),
        *(f"left out: {arm} ({why})" for arm, why in record.get("superseded", {}).items()),
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
        "same seeds: mean ± deviation; * significant at 95 % by Student's t; operations: of an "
        "update, ratio of the two arms."
    )


def summary_table(record: Record) -> str:
    """Returns README's Markdown table, which compares methods after equally many operations."""
    arms = {
        "natural": "natural training",
        "gradnorm": "gradient norm",
        "gradnorm-fd": "gradient norm by finite difference",
        "fgsm_rs": "FGSM from a random start",
        "pgd_at": "PGD-3 adversarial training",
        "trades": "TRADES",
        "gradnorm+fgsm": "gradient norm and FGSM in turn",
    }
    equal = {row["arm"]: row for row in equal_rows(record)}
    rows, eps = [equal[arm] for arm in arms], record["eps"]

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
        f"training; {attacked_images(record)} (`benchmarks/results/{record['file']}`)."
    )


def arms_of(network: str, names: Sequence[str], setting: Setting, seeds: int) -> list[Arm]:
    """Returns each training method of a network as an arm of the study.

    network: key of Setting.networks. names: names of the methods. seeds: number of seeds.
    """
    precision, number = device_precision(), list(setting.networks).index(network) + 1
    plain = arm_config(setting, network, "natural", precision)
    plain = plain.replace(**setting.start, eval_interval=setting.start["epochs"])
    whole = setting.epochs * units_of(arm_config(setting, network, "gradnorm", precision))
    arms = []
    for name in names:
        cfg = arm_config(setting, network, name, precision)
        units = units_of(cfg)
        epochs = max(1, round(whole / units))
        head = {"network": network, "arm": name, "epochs": epochs, "units": units}
        runs = [
            Trial(
                f"{name}_n{number}_s{seed}_e{epochs}",
                for_epochs(cfg, epochs).replace(seed=seed),
                evaluations_of(setting),
                Trial(f"start_n{number}_s{seed}", plain.replace(seed=seed)),
            )
            for seed in range(seeds)
        ]
        arms.append(Arm(head | {"total_units": epochs * units}, runs))
    return arms


@study_program(
    option("--methods", nargs="+", choices=ARMS, help="default: those of the data"),
    data=tuple(SETTINGS),
    seeds=1 if torch.cuda.is_available() else 3,
)
def main(args: argparse.Namespace, work: Path) -> Study:
    """Returns the study that the command line asks for. work: folder for the trainings."""
    setting = SETTINGS[args.data]()
    setting = smoke(setting) if args.smoke else setting
    if args.data_dir:
        setting = dataclasses.replace(setting, base=setting.base.replace(data_dir=args.data_dir))
    names = list(dict.fromkeys(args.methods or setting.arms))
    arms = [arms_of(network, names, setting, args.seeds) for network in setting.networks]
    head = {
        "networks": list(setting.networks),
        "architectures": setting.networks,
        "reference_epochs": setting.epochs,
        "start": setting.start,
        "eps": setting.eps,
        "eval_eps": sorted(setting.eval_eps),
        "images": {"autoattack": setting.images, "pgd-20": setting.pgd_images},
        "arms": {name: ARMS[name] for name in names},
    }
    return Study([arm for several in arms for arm in several], head)


if __name__ == "__main__":
    sys.exit(main())
