"""Compares training methods under AutoAttack, after equal numbers of passes and equal times.

An arm is a training method with its options. With each seed, all arms start from the same naturally
trained weights. Each arm trains for as many epochs as cost the same as gradnorm's. The cost is
counted once in passes (operations in units of a forward pass, fastgn/step/passes.py), and once in
time. For the time, all arms take turns in one run that measures seconds per update.

    python -m benchmarks.evidence.robustness --data digits --seeds 3
    python -m benchmarks.evidence.robustness --data cifar10 --data-dir DIR --minutes 9

The same command continues an interrupted one, and does not repeat results that are in the record.
On a CPU, only the ratios of times within that run mean something.

Writes benchmarks/results/robustness_<data>_<device>.json.
"""

import argparse
import dataclasses
import itertools
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.arguments import positive_int
from benchmarks.common.tables import (
    Record,
    accuracy_columns,
    device,
    make_table,
    over_seeds,
    percent,
    plus_minus,
    with_notes,
)  # fmt: skip
from benchmarks.common.timing import interleaved, summary
from benchmarks.evidence.digests import digest, digests_of
from benchmarks.evidence.study import (
    Arm,
    Results,
    Study,
    device_precision,
    make_parser,
    paired_difference,
    run_program,
)  # fmt: skip
from benchmarks.evidence.trials import Trial
from fastgn.config import Config, load_recipe
from fastgn.data.datasets import load_dataset
from fastgn.distributed import session
from fastgn.errors import check_name
from fastgn.files import write_bytes
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
NO_MEANING = "CPU: times mean something as ratios within this run alone"


PAIRS = (
    *(("gradnorm-bf16", None), ("gradnorm-fd", None)),
    *(("gradnorm-lazy2", None), ("gradnorm-lazy4", None), ("gradnorm-subset", None)),
    *((None, "fgsm_rs"), (None, "pgd_at"), (None, "trades"), (None, "gradnorm+fgsm")),
)
"""Pairs of training methods that the second table compares. None means exact gradnorm."""


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
    # global_batch_size would accumulate batches of 32
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
        arms=("natural", "gradnorm", "gradnorm-bf16", "gradnorm-fd", "edge", "pgd_at", "fgsm_rs"),
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
    name, network = next(iter(setting.networks.items()))
    small = {"width=16": "width=4", "embed_dim=16": "embed_dim=8"}
    kwargs = [small.get(k, k) for k in network["model_kwargs"]]
    return dataclasses.replace(
        setting,
        networks={name: network | {"model_kwargs": kwargs}},
        base=setting.base.replace(eval_images=16),
        start={"epochs": 1, "warmup_epochs": 0.0},
        epochs=2,
        eval_eps=setting.eval_eps[:1],
        images=2,
        pgd_images=16,
        attack="apgd-ce",
    )


def reference_of(arms: Sequence[str], precision: str) -> str:
    """Returns the name of the reference method, which is exact gradnorm.

    The setting gives the reference's number of epochs, and those of the other methods follow from
    it. arms: names of the methods that are compared. If exact gradnorm in the device's precision is
    not among them, the reference is gradnorm in fp32, and without that it is the first method.
    precision: the device's precision.
    """
    names = ["gradnorm-bf16", "gradnorm"] if precision == "bf16" else ["gradnorm"]
    return next(name for name in [*names, *arms] if name in arms)


def arm_config(setting: Setting, network: str, arm: str, precision: str) -> Config:
    """Returns the configuration of a training, except for its number of epochs and its seed.

    arm: name of the training method.
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


def units_of(cfg: Config) -> tuple[float, float]:
    """Returns two costs of an update: the paper's number of passes, and operations in forwards."""
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
    setting: Setting, units: Mapping[str, float], seconds: Mapping[str, float], reference: str
) -> dict[str, dict[str, int]]:
    """Returns the number of epochs at equal passes and at equal time for each training method.

    If both numbers are nearly the same, they are set to the same. units, seconds: costs of an
    update. reference: name of the method whose number of epochs is given.
    """
    out = {}
    for arm in units:
        passes = epochs_for(setting.epochs, units[arm], units[reference])
        times = epochs_for(setting.epochs, seconds[arm], seconds[reference])
        if abs(times - passes) <= SAME * passes:
            times = passes
        out[arm] = {"passes": passes, "time": times}
    return out


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


def image_list(work: Path, seed: int, count: int, total: int) -> Path:
    """Writes a file that names `count` of `total` images, evenly spaced. Returns its path.

    Each seed has other images, so that the mean over seeds says more about all images.
    """
    count = min(count, total)
    step = total / count
    shift = round(seed * 0.381966 % 1 * step)  # golden section: spreads the seeds evenly
    chosen = sorted({(int(i * step) + shift) % total for i in range(count)})
    path = work / f"images_{count}_of_{total}_s{seed}.txt"
    write_bytes(path, "".join(f"{i}\n" for i in chosen))
    return path


def evaluations_of(
    setting: Setting, budgets: Sequence[str], images: Path
) -> tuple[tuple[str, ...], ...]:
    """Returns the command-line flags of each evaluation. PGD-20 comes first, because it is fastest.

    budgets: comparisons that the training is made for, "passes", "time" or both. images: file that
    lists the images for AutoAttack.
    """
    all_eps, pgd = map(repr, setting.eval_eps), "pgd-20"
    chosen = setting.eval_eps if "passes" in budgets else setting.eval_eps[:1]
    quick = ("--attacks", "clean", pgd, "--eps", *all_eps, "--num-images", str(setting.pgd_images))
    auto = ("--attacks", setting.attack, "--image-list", str(images), "--eps")
    return (quick, *((*auto, repr(eps)) for eps in chosen))


def compare(record: Record) -> Iterator[dict[str, str]]:
    """Yields the rows of the second table.

    Each row compares two training methods that cost the same number of passes or the same time.
    """
    eps, reference = record["eps"], record["reference"]
    attacks = {"clean": ("clean", 0.0), f"AutoAttack {eps:.4g}": ("autoattack", eps)}
    attacks[f"PGD-20 {eps:.4g}"] = ("pgd-20", eps)
    rows = {(r["network"], r["arm"], budget): r for r in record["rows"] for budget in r["budgets"]}
    for network in record["networks"]:
        for pair, budget in itertools.product(PAIRS, ("passes", "time")):
            names = [name or reference for name in pair]
            one, other = (rows.get((network, name, budget)) for name in names)
            if one is None or other is None or one is other:
                continue
            found = {name: paired_difference(one, other, *a) for name, a in attacks.items()}
            if any(found.values()):
                cells = {name: str(value or "") for name, value in found.items()}
                yield {
                    **{"network": network, "arm": names[0], "against": names[1], "equal": budget},
                    **cells,
                    "time per update": f"{one['seconds_over'] / other['seconds_over']:.2f}",
                    "operations": f"{one['units'] / other['units']:.2f}",
                }


def radius_of(cfg: Config) -> float | None:
    """Returns the radius of the attacks that exact gradnorm's penalty approximates, else None.

    To first order, the loss ce_weight * CE + gn_weight * eps * |grad|_1 is ce_weight times the
    largest cross-entropy within the radius gn_weight * eps / ce_weight.
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


def choose_arms(names: Sequence[str] | None, setting: Setting) -> tuple[str, ...]:
    """Returns the named training methods without repetitions, or if None all of the setting.

    Raises UserError if a name is unknown.
    """
    for name in names or ():
        check_name(name, ARMS, f"--methods {name!r}")
    return tuple(dict.fromkeys(names or setting.arms))


def arms_of(
    network: str,
    configs: Mapping[str, Config],
    seconds: Mapping[str, Sequence[float]],
    setting: Setting,
    reference: str,
    lists: Sequence[Path],
) -> Iterator[Arm]:
    """Yields each method of a network, with its epochs for equal passes and for equal time.

    A method whose two numbers of epochs are the same is yielded once. configs: configuration of
    each method. seconds: seconds per update of each method, by round. reference: name of the method
    whose number of epochs is given. lists: files with the images of each seed.
    """
    costs = {arm: units_of(cfg) for arm, cfg in configs.items()}
    units, least = {a: c[1] for a, c in costs.items()}, {a: min(s) for a, s in seconds.items()}
    against = least["natural" if "natural" in least else reference]
    plain = arm_config(setting, network, "natural", device_precision())
    plain = plain.replace(**setting.start, eval_interval=setting.start["epochs"])
    number = list(setting.networks).index(network) + 1
    for arm, budgets in budgets_of(setting, units, least, reference).items():
        for epochs in dict.fromkeys(budgets.values()):
            kept = [budget for budget, e in budgets.items() if e == epochs]
            head = {
                **{"network": network, "arm": arm, "budgets": kept, "epochs": epochs},
                **{"passes": costs[arm][0], "units": units[arm]},
                "seconds_over": least[arm] / against,
                "radius": radius_of(configs[arm]),
                "total_units": epochs * units[arm],
                "total_time_over": epochs * least[arm] / against,
            }
            if torch.cuda.is_available():
                head["seconds_an_update"] = summary(seconds[arm])
            cfg = for_epochs(configs[arm], epochs)
            yield Arm(
                head,
                [
                    Trial(
                        f"{arm}_n{number}_s{seed}_e{epochs}",
                        cfg.replace(seed=seed),
                        evaluations_of(setting, kept, images),
                        Trial(f"start_n{number}_s{seed}", plain.replace(seed=seed)),
                    )
                    for seed, images in enumerate(lists)
                ],
            )


def plan(args: argparse.Namespace, work: Path, before: Results) -> Study:
    """Returns the study that the command line asks for. Times updates unless `before` has times.

    New times could change the numbers of epochs, so that finished trainings could not be used.
    work: folder that holds the trainings. before: record of an earlier call.
    """
    gpu, setting = torch.cuda.is_available(), SETTINGS[args.data]()
    setting = smoke(setting) if args.smoke else setting
    if args.data_dir:
        setting = dataclasses.replace(setting, base=setting.base.replace(data_dir=args.data_dir))
    names, precision = choose_arms(args.methods, setting), device_precision()
    reference = reference_of(names, precision)
    print("" if gpu else NO_MEANING)
    total = len(load_dataset(setting.base.dataset).val)
    lists = [image_list(work, seed, setting.images, total) for seed in range(args.seeds)]
    timings, arms = {}, []
    for network in setting.networks:
        configs = {arm: arm_config(setting, network, arm, precision) for arm in names}
        key = digest([digests_of(cfg) for cfg in configs.values()])
        timings[key] = before.get("timings", {}).get(key)
        if timings[key] is None:
            timings[key] = measure(configs, args.rounds, args.processes)
        arms += arms_of(network, configs, timings[key], setting, reference, lists)
    head = {
        "meaningful_times": gpu,
        "networks": list(setting.networks),
        "architectures": setting.networks,
        "reference": reference,
        "reference_epochs": setting.epochs,
        "start": setting.start,
        "eps": setting.eps,
        "eval_eps": sorted(setting.eval_eps),
        "images": {"autoattack, each seed its own": setting.images, "pgd-20": setting.pgd_images},
        "arms": {arm: ARMS[arm] for arm in names},
        "time": "an update's, the least of all arms' interleaved rounds (other work adds to it): "
        f"{args.rounds} of {SEVERAL} updates" + ("" if gpu else f"; {NO_MEANING}"),
        "timings": timings,
    }
    return Study(arms, head)


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, runs the benchmark, and returns the exit status.

    The status is 2 for a user's mistake, 1 if every training failed, and else 0.
    """
    seeds = 1 if torch.cuda.is_available() else 3
    parser = make_parser(__doc__, data=tuple(SETTINGS), seeds=seeds)
    add = parser.add_argument
    add("--methods", nargs="+", metavar="ARM", help=f"of {', '.join(ARMS)}; default: the data's")
    add("--rounds", type=positive_int, default=15, help="rounds of the clock")
    return run_program("robustness", parser, argv, plan)


if __name__ == "__main__":
    sys.exit(main())
