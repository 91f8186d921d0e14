"""Compares training methods under attack, after equal numbers of epochs, as arXiv 2409.20139 does.

An arm is a training method with its options. With each seed, all arms start from the same naturally
trained weights and see the images in the same order. A budget is a number of epochs. Some arms are
also trained with other budgets, so that arms of equal cost can be compared. The cost is the number
of operations (fastgn/step/passes.py counts them), because seconds depend on the machine.

PGD-20 attacks the same images for all arms. AutoAttack's APGD-CE and APGD-T attack those images
that are still classified correctly after PGD-20.

    python -m benchmarks.evidence.robustness --data digits
    python -m benchmarks.evidence.robustness --data cifar10 --data-dir DIR --minutes 9

The same command continues an interrupted one, and does not repeat results that are in the record.

Writes benchmarks/results/robustness_<data>_<device>.json.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.common import tables
from benchmarks.common.arguments import PRECISION, option
from benchmarks.evidence import study
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
    "n_fgsm": {"method": "n_fgsm"},
    "edge": {"method": "edge"},
    "edge-image": {"method": "edge", "edge_rms": "image"},
    "pag": {"method": "pag"},
    "trades": {"method": "trades"},
    "gradnorm+fgsm": {"method": "gradnorm+fgsm"},
    "gradnorm-relu": {"method": "gradnorm", "activation": "relu"},
    **{
        f"{name}-12": {"method": name, **dict.fromkeys(("eps", "attack_eps", "eval_eps"), 12 / 255)}
        for name in ("gradnorm", "fgsm_rs")
    },
}
"""Name of each training method that is compared -> options of fastgn.train in which it differs.

If the precision is not among the options, it is fp32 on a CPU and bf16 on a GPU.
"""
PAIRS = (
    *((f"gradnorm-{name}", "gradnorm") for name in ("bf16", "fd", "lazy2", "lazy4", "subset")),
    *(("gradnorm", name) for name in ("natural", "fgsm_rs", "n_fgsm", "edge", "pag")),
    *(("gradnorm", name) for name in ("pgd_at", "trades", "gradnorm+fgsm")),
    *(("edge", "natural"), ("edge-image", "edge")),
)
"""Pairs of training methods. The second table of this benchmark has a row for each of them."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """A length of training, with the methods and the number of seeds that are trained so long."""

    share: float
    """Number of epochs of the training, divided by `Setting.epochs`."""
    seeds: int
    arms: tuple[str, ...] | None = None
    """Names of the training methods. None means all that are compared."""


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
    """Number of epochs of a training whose length (Budget.share) is 1."""
    budgets: tuple[Budget, ...]
    """Lengths of training, the most informative first."""
    eps: float
    """Radius of the perturbations that the methods train against."""
    eval_eps: tuple[float, ...]
    """Radii of the attacks in the evaluations."""
    curve_eps: tuple[float, ...]
    """Radii besides `eval_eps`, at which only the attacks in `curve_attacks` run."""
    images: int
    """Number of images that are attacked."""
    attack: str = "apgd-ce+t"
    """Attack on the images that are still classified correctly after PGD-20."""
    full_attack: str | None = "autoattack"
    """Slow attack for seed 0 and the first radius. It shows what faster attacks miss."""
    curve_attacks: tuple[str, ...] = ("pgd-20",)
    first_seeds: int = 3
    """Number of seeds whose trainings of all lengths run before those of other seeds."""


def digits() -> Setting:
    """Returns the setting for scikit-learn's digits. Its network is a Swin with two blocks."""
    base = load_recipe("quickstart_gradnorm")
    base = base.replace_group("architecture", {"initial_checkpoint": None})
    kwargs = [k for k in base.architecture.model_kwargs if not k.startswith("depths")]
    return Setting(
        networks={"Swin": {"model_kwargs": [*kwargs, "depths=(1, 1)"]}},
        base=base.replace(
            **{"lr": 4e-3, "smoothing": 0.1, "model_ema_decay": 0.98},
            **{"eval_images": 360, "checkpoint_hist": 1},
        ),
        arms=(
            *("natural", "gradnorm", "gradnorm-fd", "pgd_at", "fgsm_rs", "n_fgsm", "edge"),
            "pag",
        ),
        start={"epochs": 30, "warmup_epochs": 2.0},
        epochs=60,
        budgets=(Budget(1, 8), Budget(0.5, 3), Budget(2, 3), Budget(4, 3, ("gradnorm", "pgd_at"))),
        eps=0.025,
        eval_eps=(0.025, 0.05),
        curve_eps=(0.0125, 0.0375, 0.075),
        images=360,
    )


def cifar10() -> Setting:
    """Returns the setting for CIFAR-10 with two small networks, which 2 CPU cores can train."""
    base = Config().replace(
        **{"data": "cifar10", "lr": 2e-3, "clip_grad": 1.0, "model_ema_decay": 0.99},
        **{"smoothing": 0.1, "eval_images": 1000, "checkpoint_hist": 1},
    )
    # global_batch_size would split the 64 images of an update into two small batches
    base = base.replace_group("dataset", {"global_batch_size": None, "batch_size": 64})
    swin = ["patch_size=4", "embed_dim=24", "depths=(1, 2)", "num_heads=(1, 2)", "mlp_ratio=2"]
    return Setting(
        networks={
            "PreActResNet-18, GELU, width 8": {
                **{"model": "preact_resnet18", "activation": "gelu", "model_kwargs": ["width=8"]}
            },
            "Swin": {
                **{"model": "swin_t", "img_size": 32, "model_kwargs": [*swin, "window_size=4"]}
            },
        },
        base=base,
        arms=("natural", "gradnorm", "pgd_at", "fgsm_rs", "n_fgsm", "edge"),
        start={"epochs": 10, "warmup_epochs": 1.0},
        epochs=30,
        budgets=(Budget(1, 3),),
        eps=4 / 255,
        eval_eps=(4 / 255,),
        curve_eps=(1 / 255, 2 / 255, 8 / 255),
        images=1000,
        full_attack=None,
    )


def cifar10_card() -> Setting:
    """Returns the setting for CIFAR-10 with one network, which takes a GPU about 8 minutes.

    Two methods train with a larger radius, at which single-step adversarial training is known to
    collapse.
    """
    setting = cifar10()
    base = setting.base.replace(mixup=0.8, batch_size=128, compile="off")  # compiling takes longer
    kwargs = {"activation": "gelu", "model_kwargs": ["width=32"]}
    return dataclasses.replace(
        setting,
        networks={"PreActResNet-18, GELU, width 32": {"model": "preact_resnet18", **kwargs}},
        base=base,
        arms=(
            *("natural", "gradnorm", "pgd_at", "fgsm_rs", "n_fgsm", "edge"),
            *("gradnorm-relu", "gradnorm-12", "fgsm_rs-12"),
        ),
        curve_eps=(1 / 255, 2 / 255, 8 / 255, 12 / 255),
        curve_attacks=("fgsm", "pgd-20"),
    )


SETTINGS = {"digits": digits, "cifar10": cifar10, "cifar10_card": cifar10_card}


def smoke(setting: Setting) -> Setting:
    """Returns the setting at toy size, which only shows that the whole program runs."""
    return dataclasses.replace(
        setting,
        base=setting.base.replace(eval_images=16),
        start={"epochs": 1, "warmup_epochs": 0.0},
        epochs=2,
        budgets=(setting.budgets[0], Budget(2, 1, ("gradnorm",))),
        eval_eps=setting.eval_eps[:1],
        curve_eps=(2 * setting.eps,),
        images=8,
        attack="apgd-ce",
        full_attack="fgsm",
    )


def arm_config(setting: Setting, network: str, arm: str, precision: str) -> Config:
    """Returns the configuration of a training, except for its number of epochs and its seed.

    network: key of Setting.networks. arm: name of the training method.
    """
    radii = dict.fromkeys(("eps", "attack_eps", "eval_eps"), setting.eps)
    return setting.base.replace(
        **{"precision": precision} | radii | setting.networks[network] | ARMS[arm]
    )


def for_epochs(cfg: Config, epochs: int) -> Config:
    """Returns the configuration with another number of epochs, and with about six evaluations.

    The warm-up of the learning rate takes a twentieth of the epochs. With --method edge, the weight
    of the penalty grows from 1 to 10. In arXiv 2409.20139, this takes 100 epochs.
    """
    ramp = {"ramp_start": 1 / 19, "ramp_epochs": 2.0 * epochs}
    return cfg.replace(
        **{"epochs": epochs, "warmup_epochs": 0.05 * epochs, "eval_interval": max(1, epochs // 6)},
        **(ramp if cfg.objective.method == "edge" else {}),
    )


def units_of(cfg: Config) -> float:
    """Returns the number of operations in an update, divided by that of a forward pass."""
    weight_grads = cfg.objective.attack.attack_weight_grads
    return count_passes(build_objective(cfg.objective), schedule_of(cfg.step), weight_grads).units


def evaluations_of(setting: Setting, full: bool) -> tuple[tuple[str, ...], ...]:
    """Returns the command-line flags of each evaluation.

    full: whether to run the slow attack Setting.full_attack, too.
    """

    def evaluation(eps: Sequence[float], *attacks: str) -> tuple[str, ...]:
        images = ("--num-images", str(setting.images))
        return ("--attacks", *attacks, "--eps", *map(repr, eps), *images)

    found = [evaluation(setting.eval_eps, "clean", "pgd-20", setting.attack) + ("--successive",)]
    found += [evaluation(setting.curve_eps, *setting.curve_attacks)] if setting.curve_eps else []
    if full and setting.full_attack is not None:
        found.append(evaluation(setting.eval_eps[:1], setting.full_attack))
    return tuple(found)


def equal_rows(record: tables.Record) -> list[dict[str, Any]]:
    """Returns the rows of the JSON record that have results.

    Leaves out old trainings of equal time (not operations), and trainings repeated later.
    """
    old = record.get("superseded", {})
    equal = [row for row in record["rows"] if "passes" in row.get("budgets", ("passes",))]
    return [row for row in equal if row["accuracy"] and row["arm"] not in old]


def compare(record: tables.Record) -> Iterator[dict[str, str]]:
    """Yields the rows of this benchmark's second table. Each row compares two training methods.

    A row is a dict: heading of a column -> text of the cell. record: the benchmark's JSON record.
    """
    attacks = {"clean": ("clean", 0.0)}
    for attack in ("autoattack", "apgd-ce+t", "pgd-20"):
        attacks[f"{tables.ATTACKS[attack]} {record['eps']:.4g}"] = (attack, record["eps"])
    rows = {
        (row.get("network", ""), tables.make_cell(row, "budget:g"), row["arm"]): row
        for row in equal_rows(record)
    }
    groups = dict.fromkeys(key[:2] for key in rows)
    for (network, budget), (arm, against) in itertools.product(groups, PAIRS):
        one, other = (rows.get((network, budget, name)) for name in (arm, against))
        if one and other:
            points = {k: study.differences(one, other, *a) for k, a in attacks.items()}
            yield {
                **{"network": network, "budget": budget, "arm": arm, "against": against},
                "seeds": str(len(points["clean"])),
                **{name: study.mean_difference(found) for name, found in points.items()},
                "operations": f"{one['units'] / other['units']:.2f}" if "units" in one else "",
            }


def attacked_images(record: tables.Record) -> str:
    """Returns a text with the numbers of attacked images, for the line below a table."""
    images = record["images"]
    if isinstance(images, int):
        attack = tables.ATTACKS[record.get("attack", "apgd-ce+t")]
        rest = f", {attack} on those that PGD-20 leaves" if "budgets" in record else ""
        return f"{images} images{rest}"
    own = images.get("autoattack, each seed its own")  # only in older records
    few = f"{own} images per seed, each seed's own" if own else f"{images['autoattack']} images"
    pgd = images.get("pgd-20") or images["pgd"]
    return f"AutoAttack on {few}, the rest on {pgd}, so that the two attacks cannot be compared"


def table(record: tables.Record) -> str:
    """Returns this benchmark's Markdown table of all training methods, made from its JSON record.

    Below it is a table of the differences between methods.
    """
    rows, networks = equal_rows(record), record.get("networks", ["Swin"])
    columns: dict[str, tables.Column] = {"network": "network"} if len(networks) > 1 else {}
    columns |= {"arm": "arm", "budget": "budget:g", "epochs": "epochs"}
    columns["seeds"] = lambda r: str(len(r["seeds"])) if "budget" in r else ""
    columns["operations an update"] = "units:.3g"
    notes = [
        f"{record['data']}, {', '.join(networks)}; {tables.device(record)}, "
        f"{record['precision']} where an arm does not say otherwise",
        "mean ± deviation" if "budgets" in record else tables.over_seeds(record["seeds"]),
        f"all from one natural start a seed, for Linf eps {record['eps']:.4g}",
        *(["as many epochs as take gradnorm's operations"] if "reference" in record else []),
        attacked_images(record),
        *(f"left out: {arm} ({why})" for arm, why in record.get("superseded", {}).items()),
        *([] if record["complete"] else ["not all of it has run yet"]),
        *(f"failed: {r['arm']} (seed {f['seed']})" for r in record["rows"] for f in r["failed"]),
    ]
    columns |= tables.accuracy_columns(rows)
    first = tables.with_notes(tables.make_table(rows, columns), record, *notes)
    note = "arm minus the other, on the same seeds; operations: of an update, ratio of the two arms"
    pairs = [row if len(networks) > 1 else row | {"network": ""} for row in compare(record)]
    return study.with_differences(first, pairs, note)


TITLES = {
    "natural": "natural training",
    "gradnorm": "gradient norm",
    "gradnorm-fd": "gradient norm by finite difference",
    "fgsm_rs": "FGSM from a random start",
    "n_fgsm": "FGSM after strong noise",
    "pgd_at": "PGD-3 adversarial training",
    "trades": "TRADES",
    "gradnorm+fgsm": "gradient norm and FGSM in turn",
    "edge": "edge regularisation",
    "pag": "gradients aligned with pictures of the class",
}
"""Name of a training method -> its name in README's table, in the order of that table."""


def summary_table(record: tables.Record) -> str:
    """Returns README's Markdown table, which compares methods after trainings of full length."""
    equal = {row["arm"]: row for row in equal_rows(record) if row.get("budget", 1) == 1}
    near = (0.0, record["eps"])
    rows = [
        {**equal[arm], "accuracy": [a for a in equal[arm]["accuracy"] if a["eps"] in near]}
        for arm in TITLES if arm in equal
    ]  # fmt: skip
    columns: dict[str, tables.Column] = {
        "method": lambda r: TITLES[r["arm"]],
        "forwards per update": "units:.3g",
    }
    columns |= tables.accuracy_columns(rows)
    lengths = "operations" if "reference" in record else "epochs"
    earlier = ", by an earlier version that trained without label smoothing" * (
        "reference" in record
    )
    return (
        f"{tables.make_table(rows, columns)}\n\nAccuracy in %. A small Swin on scikit-learn's "
        f"digits, Linf eps {record['eps']:g} of the pixels' range 0..1, "
        f"{tables.over_seeds(record['seeds'])}, equal numbers of {lengths} in training{earlier}; "
        f"{attacked_images(record)} (`benchmarks/results/{record['file']}`)."
    )


def arms_of(network: str, names: Sequence[str], setting: Setting, seeds: int) -> list[study.Arm]:
    """Returns an Arm of the study for each training method and length of training of a network.

    network: key of Setting.networks. names: names of the methods. seeds: number of seeds.
    """
    number = list(setting.networks).index(network) + 1
    natural = arm_config(setting, network, "natural", PRECISION)
    natural = natural.replace(**setting.start, eval_interval=setting.start["epochs"])
    arms = []
    for place, budget in enumerate(setting.budgets):
        for name in (name for name in names if budget.arms is None or name in budget.arms):
            cfg = arm_config(setting, network, name, PRECISION)
            units, epochs = units_of(cfg), max(1, round(budget.share * setting.epochs))
            # a network with another activation starts from weights of its own
            own = {key: ARMS[name][key] for key in ("activation",) if key in ARMS[name]}
            start, plain = "_".join(("start", *own.values())), natural.replace(**own)
            runs = [
                Trial(
                    f"{name}_n{number}_s{seed}_e{epochs}",
                    for_epochs(cfg, epochs).replace(seed=seed),
                    evaluations_of(setting, full=seed == place == 0),
                    Trial(f"{start}_n{number}_s{seed}", plain.replace(seed=seed)),
                    wave=2 if seed >= setting.first_seeds else min(place, 1),
                )
                for seed in range(min(seeds, budget.seeds))
            ]
            head = {"network": network, "arm": name, "budget": budget.share, "epochs": epochs}
            arms.append(study.Arm(head | {"units": units, "total_units": epochs * units}, runs))
    return arms


def study_of(setting: Setting, names: Sequence[str], args: argparse.Namespace) -> study.Study:
    """Returns the study of a setting. names: names of the training methods, keys of ARMS.

    args: options of the command line, of which --seeds, --smoke and --data-dir are used.
    """
    setting = smoke(setting) if args.smoke else setting
    if args.data_dir:
        setting = dataclasses.replace(setting, base=setting.base.replace(data_dir=args.data_dir))
    arms = [arms_of(network, names, setting, args.seeds) for network in setting.networks]
    head = {
        "networks": list(setting.networks),
        "architectures": setting.networks,
        "reference_epochs": setting.epochs,
        "start": setting.start,
        "eps": setting.eps,
        "eval_eps": sorted(setting.eval_eps),
        "budgets": [dataclasses.asdict(budget) for budget in setting.budgets],
        "images": setting.images,
        "attack": setting.attack,
        "arms": {name: ARMS[name] for name in names},
    }
    return study.Study([arm for several in arms for arm in several], head)


@study.study_program(
    option("--methods", nargs="+", choices=ARMS, help="default: those of the data"),
    data=tuple(SETTINGS),
    seeds=8,
)
def main(args: argparse.Namespace) -> study.Study:
    """Returns the study that the command line asks for."""
    setting = SETTINGS[args.data]()
    return study_of(setting, list(dict.fromkeys(args.methods or setting.arms)), args)


if __name__ == "__main__":
    sys.exit(main())
