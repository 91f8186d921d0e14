"""Every way to train against every other: robustness by AutoAttack at equal passes, at equal time.

    python -m benchmarks.evidence.robustness --data digits --seeds 3
    python -m benchmarks.evidence.robustness --data cifar10 --data-dir DIR --minutes 9  # goes on

All arms start from the same natural weights of their seed. Each gets the epochs that cost as much
as gradnorm's: once counted in passes (operations in forwards, count_passes), once
in time, by seconds an update that one interleaved run of all arms has measured. On a CPU times mean
something as ratios within that run alone. A training or evaluation that is finished is kept in
--work and not made again, an interrupted one goes on.

Writes benchmarks/results/robustness_<data>_<device>.json and two pictures: accuracy against cost
and against epoch.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.arguments import ROOT, output_for, positive_int
from benchmarks.common.records import write_record
from benchmarks.common.timing import interleaved, summary
from benchmarks.evidence import trials
from benchmarks.evidence.trials import Trial, digest
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
    "gradnorm-fd": {**{"method": "gradnorm", "schedule": "finite-difference", "precision": "fp32"}},
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
"""Name -> fields of fastgn.train's config, over those of its data set: a line an arm. Without a
precision an arm has the device's: fp32 on a CPU, bf16 on a GPU."""
SEVERAL = math.lcm(*(arm.get("lazy_interval", 1) for arm in ARMS.values()))
"""Updates a call of the clock: a lazy schedule's take different times."""
SAME = 0.1
"""Budgets whose epochs differ by less share a training."""
STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom: the mean of three seeds has to be
4.3 standard errors from 0, not 2."""
NO_MEANING = "CPU: times mean something as ratios within this run alone"


@dataclasses.dataclass(frozen=True)
class Study:
    """A data set's setting."""

    networks: dict[str, dict[str, Any]]
    """Name in the tables -> fields of the config."""
    base: Config
    """Shared by all arms."""
    arms: tuple[str, ...]
    """By default; those that config does not know yet are left out."""
    start: dict[str, Any]
    """Of the natural start."""
    epochs: int
    """gradnorm's."""
    eps: float
    """Trained for."""
    eval_eps: tuple[float, ...]
    """The first one alone for a training that only equal time asks for."""
    images: int
    """AutoAttack's; each seed has its own."""
    pgd_images: int
    """PGD-20's."""
    attack: str = "autoattack"
    ramp_share: float = 0.25
    """Of the epochs, however many an arm has."""
    warmup_share: float = 0.05


def digits() -> Study:
    """The quickstart's network with one block less: most of the time goes into AutoAttack."""
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
    """Narrow networks, whose AutoAttack on 1,000 images is a matter of launches, not operations."""
    base = Config().replace(
        **{"data": "cifar10", "global_batch_size": 512, "lr": 2e-3, "clip_grad": 1.0},
        **{"smoothing": 0.0, "model_ema_decay": 0.99, "eval_images": 1000, "checkpoint_hist": 1},
    )
    # per rank and micro-batch; global_batch_size would accumulate batches of 32
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
    """A size that shows that all of it runs."""
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
    """The arms asked for, or the study's that config accepts. Raises UserError."""
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
    """The arm whose epochs are given, and against which differences are taken: exact gradnorm in
    the device's precision."""
    names = ["gradnorm-bf16", "gradnorm"] if precision == "bf16" else ["gradnorm"]
    return next(name for name in [*names, *arms] if name in arms)


def arm_config(study: Study, network: str, arm: str, precision: str) -> Config:
    """Without what the budget and the seed decide."""
    values = {"precision": precision, "eps": study.eps, "attack_eps": study.eps}
    return study.base.replace(
        **values | study.networks[network] | ARMS[arm] | {"eval_eps": study.eps}
    )


def for_epochs(cfg: Config, study: Study, epochs: int) -> Config:
    """Warm-up and ramp as shares of them; evaluated some six times on the way."""
    return cfg.replace(
        epochs=epochs,
        warmup_epochs=study.warmup_share * epochs,
        ramp_epochs=study.ramp_share * epochs,
        eval_interval=max(1, epochs // 6),
    )


def units_of(cfg: Config) -> tuple[float, float]:
    """An update's passes as the paper counts them, and its operations in forwards."""
    passes = count_passes(
        build_objective(cfg.objective),
        schedule_of(cfg.step),
        cfg.objective.attack.attack_weight_grads,
    )
    return passes.paper, passes.units


def epochs_for(reference: int, cost: float, reference_cost: float) -> int:
    """That cost as much as the reference's, at these costs an update; at least 1."""
    return max(1, round(reference * reference_cost / cost))


def budgets_of(
    study: Study, units: Mapping[str, float], seconds: Mapping[str, float], reference: str
) -> dict[str, dict[str, int]]:
    """Arm -> {"passes": epochs, "time": epochs}; the same where they are nearly so."""
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
    """Arm -> its seconds an update in each round, all in turn."""
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
    """As `measure`; of an earlier call with the same arms where there was one, for other times
    would give other epochs."""
    what = {name: digest(cfg.flat()) for name, cfg in configs.items()}
    path = work / f"timings_{digest(what)}.json"
    if not path.exists():
        write_json(path, measure(configs, rounds, threads))
    return json.loads(path.read_text())


# ----------------------------------------------------------------------------------------- record


def image_list(work: Path, seed: int, count: int, total: int) -> Path:
    """A file that names `count` of the validation images, evenly spaced, others for each seed: what
    the seeds' mean says of all images is worth that many more."""
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
    """fastgn.evaluate's flags, a file each: PGD-20 first, for it takes a hundredth of the time."""
    all_eps, pgd = map(repr, study.eval_eps), "pgd-20"
    chosen = study.eval_eps if "passes" in budgets else study.eval_eps[:1]
    quick = ("--attacks", "clean", pgd, "--eps", *all_eps, "--num-images", str(study.pgd_images))
    auto = ("--attacks", study.attack, "--image-list", str(images), "--eps")
    return (quick, *((*auto, repr(eps)) for eps in chosen))


def plus_minus(values: Sequence[float | None]) -> dict[str, float] | None:
    there = [v for v in values if v is not None]
    return summary(there) if there else None


def statistics_of(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy over seeds, a row an attack and eps that all have; images: of a seed."""
    out = []
    for first in results[0]["accuracy"] if results else []:
        key = first["attack"], first["eps"], first["images"]
        values = [
            row["accuracy"]
            for r in results
            for row in r["accuracy"]
            if (row["attack"], row["eps"], row["images"]) == key
        ]
        if len(values) == len(results):
            row = dict(zip(("attack", "eps", "images"), key, strict=True))
            out.append(row | {"accuracy": summary(values)})
    return out


def accuracy(row: Mapping[str, Any], attack: str, eps: float) -> list[float] | None:
    """A row's, seed by seed; None where a seed lacks it."""
    found = []
    for seed in row["seeds"]:
        same = [r for r in seed["accuracy"] if (r["attack"], r["eps"]) == (attack, eps)]
        if not same:
            return None
        found.append(same[0]["accuracy"])
    return found or None


def compare(
    rows: Sequence[Mapping[str, Any]], arm: str, other: str, budget: str, eps: float
) -> str | None:
    """How far an arm is from another on the same seeds, in words; None where one is missing."""
    said = []
    for attack, at in (("clean", 0.0), ("autoattack", eps), ("pgd-20", eps)):
        pair = []
        for name in (arm, other):
            same = [r for r in rows if r["arm"] == name and budget in r["budgets"]]
            pair.append(accuracy(same[0], attack, at) if same else None)
        if pair[0] is None or pair[1] is None or len(pair[0]) != len(pair[1]):
            continue
        points = [100 * (a - b) for a, b in zip(*pair, strict=True)]
        mean, n = statistics.fmean(points), len(points)
        text = f"{attack} {mean:+.1f}"
        if n > 1:
            std = statistics.stdev(points)
            t = STUDENT[n - 2] if n - 2 < len(STUDENT) else 2.0
            shown = abs(mean) > t * std / math.sqrt(n)
            text += f" ± {std:.1f} points ({'shown' if shown else 'not shown'} at 95 %)"
        said.append(text)
    return f"{arm} against {other} at equal {budget}: {', '.join(said)}" if said else None


def notes_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The questions that the run is to answer, and what it says, a network each."""
    reference, eps = record["reference"], record["eps"]
    ways = {
        "Do bf16 or the finite difference cost robustness against exact fp32?": [
            *(("gradnorm-bf16", "gradnorm"), ("gradnorm-fd", "gradnorm")),
        ],
        "What do lazy penalties and subsets cost and save?": [
            (arm, reference) for arm in ("gradnorm-lazy2", "gradnorm-lazy4", "gradnorm-subset")
        ],
        "Where does gradnorm stand against adversarial training?": [
            (reference, arm) for arm in ("fgsm_rs", "pgd_at", "trades", "gradnorm+fgsm")
        ],
    }
    notes = []
    for network in record["networks"]:
        rows = [r for r in record["rows"] if r["network"] == network]
        costs = {r["arm"]: r for r in rows}
        for question, pairs in ways.items():
            answers = []
            for arm, other in pairs:
                for budget in ("passes", "time"):
                    text = compare(rows, arm, other, budget, eps)
                    if text:
                        answers.append(text)
                if arm in costs and other in costs and arm != other:
                    over = costs[arm]["seconds_over"] / costs[other]["seconds_over"]
                    part = costs[arm]["units"] / costs[other]["units"]
                    answers.append(
                        f"an update of {arm} takes {over:.2f} of {other}'s time, {part:.2f} of its "
                        "operations"
                    )
            if answers:
                notes.append({"network": network, "question": question, "answers": answers})
        strengths = strengths_of(rows, record)
        if len(strengths) > 1:
            question = "What strength of the penalty suits which eps?"
            notes.append({"network": network, "question": question, "answers": strengths})
    return notes


def strengths_of(rows: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> list[str]:
    """Exact gradnorm by the radius that its penalty stands for: to first order, ce_weight CE +
    gn_weight eps |grad|_1 is ce_weight times the worst CE within gn_weight / ce_weight eps."""
    out = []
    for row in rows:
        if row["radius"] is None or "passes" not in row["budgets"]:
            continue
        found = [f"clean {100 * statistics.fmean(accuracy(row, 'clean', 0.0) or [math.nan]):.1f} %"]
        for eps in record["eval_eps"]:
            values = accuracy(row, "autoattack", eps)
            if values:
                found.append(f"AutoAttack at {eps:.4g} {100 * statistics.fmean(values):.1f} %")
        out.append(f"{row['arm']}, radius {row['radius']:.4g}: {', '.join(found)}")
    return out


def radius_of(cfg: Config) -> float | None:
    """See strengths_of; None for what is not exact gradnorm."""
    if cfg.objective.method != "gradnorm" or cfg.step.schedule not in ("exact", "exact-eager"):
        return None
    o = cfg.objective.gradnorm
    return o.gn_weight / o.ce_weight * o.eps if o.ce_weight else None


# -------------------------------------------------------------------------------------- pictures


def draw(record: Mapping[str, Any], path: Path) -> list[Path]:
    """What a user decides by: accuracy against cost on the way (PGD-10, lines) and at the end
    (AutoAttack, marks), in time and in passes; and accuracy against epoch."""
    from matplotlib.figure import Figure

    from fastgn.analysis.canvas import to_png

    networks = [n for n in record["networks"] if any(r["network"] == n for r in record["rows"])]
    if not networks:
        return []
    eps, arms = record["eps"], list(dict.fromkeys(r["arm"] for r in record["rows"]))
    colours = {arm: f"C{i % 10}" for i, arm in enumerate(arms)}
    styles = {arm: ("-", "--", ":")[i // 10] for i, arm in enumerate(arms)}
    cost, epoch = (Figure(figsize=(13, 5 * len(networks)), layout="constrained") for _ in range(2))
    axes_of = {
        "cost": cost.subplots(len(networks), 2, squeeze=False),
        "epoch": epoch.subplots(len(networks), 2, squeeze=False),
    }
    unit = {
        "time": ("time, in epochs of natural training", "seconds_over"),
        "passes": ("operations, in forwards of the training set", "units"),
    }
    for line, network in enumerate(networks):
        for row in (r for r in record["rows"] if r["network"] == network):
            style = {"color": colours[row["arm"]], "linestyle": styles[row["arm"]]}
            curve = mean_curve(row["seeds"])
            for axes, (budget, (label, key)) in zip(
                axes_of["cost"][line], unit.items(), strict=True
            ):
                axes.set(xlabel=label, title=f"{network}: equal {budget}")
                axes.set_ylabel(f"robust accuracy at eps {eps:.4g}")
                if budget not in row["budgets"]:
                    continue
                axes.plot(
                    [c["epoch"] * row[key] for c in curve],
                    [c["pgd10"] for c in curve],
                    label=row["arm"],
                    **style,
                )
                final = accuracy(row, "autoattack", eps)
                if final:
                    spread = statistics.stdev(final) if len(final) > 1 else 0
                    axes.errorbar(
                        row["epochs"] * row[key],
                        statistics.fmean(final),
                        spread,
                        **{"fmt": "o", "capsize": 3, "color": colours[row["arm"]]},
                    )
            if "passes" in row["budgets"]:
                for axes, name in zip(axes_of["epoch"][line], ("clean", "pgd10"), strict=True):
                    points = [(c["epoch"], c[name]) for c in curve]
                    axes.plot(*zip(*points, strict=True), label=row["arm"], marker=".", **style)
                    what = f"PGD-10 at {eps:.4g}" if name == "pgd10" else "clean"
                    axes.set(xlabel="epoch", ylabel=f"accuracy, {what}", title=network)
        for axes in (*axes_of["cost"][line], *axes_of["epoch"][line]):
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7, ncols=2)
    cost.suptitle("Robustness against cost: PGD-10 on the way (lines), AutoAttack at the end")
    epoch.suptitle("Accuracy against epoch, at equal passes")
    names = [path.with_name(f"{path.stem}_{kind}.png") for kind in ("cost", "epoch")]
    for name, figure in zip(names, (cost, epoch), strict=True):
        write_bytes(name, to_png(figure))
    return names


def mean_curve(seeds: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The seeds' histories, at the epochs that all have."""
    histories = [{h["epoch"]: h for h in s["history"]} for s in seeds]
    shared = [e for e in histories[0] if all(e in h for h in histories)] if histories else []
    keys = ("epoch", "clean", "pgd10")
    return [{k: statistics.fmean(h[e][k] for h in histories) for k in keys} for e in shared]


# ------------------------------------------------------------------------------------------- main


def parser_of() -> argparse.ArgumentParser:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", choices=STUDIES, default="digits")
    trials.add_arguments(parser)
    add("--methods", nargs="+", metavar="ARM", help=f"of {', '.join(ARMS)}; default: the data's")
    add("--networks", nargs="+", type=int, metavar="N", help="the data's first, second, ...")
    add("--seeds", type=positive_int, default=1 if gpu else 3, help="how many, from 0")
    add("--epochs", type=positive_int, help="of gradnorm; the others' follow")
    add("--images", type=positive_int, help="that AutoAttack attacks")
    add("--rounds", type=positive_int, default=15, help="of the clock")
    add("--plot", type=Path, help="PNG; _cost and _epoch are appended to its name")
    return parser


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    deadline = time.time() + 60 * args.minutes
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    study = STUDIES[args.data]()
    if args.smoke:
        study = smoke(study)
    study = dataclasses.replace(
        study,
        epochs=args.epochs or study.epochs,
        images=args.images or study.images,
        base=study.base.replace(**{"data_dir": args.data_dir} if args.data_dir else {}),
    )
    networks = list(study.networks)
    for number in args.networks or ():
        check(1 <= number <= len(networks), f"--networks {number}: there are {len(networks)}")
    networks = [n for i, n in enumerate(networks, 1) if i in (args.networks or [i])]
    precision = trials.device_precision()
    arms = known_arms(args.methods, study, study.base)
    reference = reference_of(arms, precision)
    free = {"data_dir", "minutes", "processes", "work", "plot", "data"} | (
        {"seeds"} if args.seeds >= parser.get_default("seeds") else set()
    )
    output = output_for(f"robustness_{args.data}_{device}.json", parser, args, free)
    work = trials.work_folder(args, "robustness")
    picture = args.plot or ROOT / "runs" / f"{output.stem}.png"

    total = len(load_dataset(study.base.dataset).val)
    lists = [image_list(work, seed, study.images, total) for seed in range(args.seeds)]

    plan: list[tuple[str, str, int, list[str], Trial]] = []
    costs: dict[tuple[str, str], dict[str, Any]] = {}
    starts: list[Trial] = []
    print("" if gpu else NO_MEANING)
    for network in networks:
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
                "epochs": budgets[arm],
                "radius": radius_of(configs[arm]),
            } | ({"seconds_an_update": summary(seconds[arm])} if gpu else {})
        for seed in range(args.seeds):
            values = study.start | {"seed": seed, "eval_interval": study.start["epochs"]}
            start = Trial(f"start_s{seed}", plain.replace(**values))
            starts.append(start)
            for arm in arms:
                for epochs in dict.fromkeys(budgets[arm].values()):
                    which = [b for b, e in budgets[arm].items() if e == epochs]
                    cfg = for_epochs(configs[arm], study, epochs).replace(seed=seed)
                    name = f"{arm}_s{seed}_e{epochs}"
                    flags = evaluations_of(study, which, lists[seed])
                    trial = Trial(name, cfg, flags, start)
                    plan.append((network, arm, epochs, which, trial))
    record: dict[str, Any] = {
        "script": "benchmarks/evidence/robustness.py",
        "file": output.name,
        "data": args.data,
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "meaningful_times": gpu,
        "precision": precision,
        "networks": networks,
        "architectures": {n: study.networks[n] for n in networks},
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
    }

    def save(complete: bool) -> Path:
        rows: dict[tuple[str, str, int], dict[str, Any]] = {}
        for network, arm, epochs, which, trial in plan:
            found = trials.result(trial, work)
            cost = costs[network, arm]
            row = rows.setdefault(
                (network, arm, epochs),
                {"network": network, "arm": arm, "budgets": which, "epochs": epochs}
                | {k: v for k, v in cost.items() if k != "epochs"}
                | {"seeds": [], "failed": []},
            )
            if found and found["failed"]:
                row["failed"].append({"seed": trial.cfg.run.seed, "why": found["failed"]})
            elif found and found["accuracy"]:
                if not gpu:
                    del found["seconds"]
                row["seeds"].append({"seed": trial.cfg.run.seed} | found)
        for row in rows.values():
            row["accuracy"] = statistics_of(row["seeds"])
            row["total_units"] = row["epochs"] * row["units"]
            row["total_time_over"] = row["epochs"] * row["seconds_over"]
            for key in ("seconds", "joules"):
                value = plus_minus([s.get(key) for s in row["seeds"]])
                if value:
                    row[key] = value
        record["rows"] = [row for row in rows.values() if row["seeds"] or row["failed"]]
        record["complete"] = complete
        record["notes"] = notes_of(record)
        return write_record(output, record)

    options = {"processes": args.processes, "deadline": deadline}
    every = [trial for *_, trial in plan]
    if args.processes > 1:
        finished = trials.run_all(starts, work, **options) and trials.run_all(
            every, work, **options
        )
    else:  # a start right before what needs it, so that a call that stops has whole arms
        order = [t for trial in every for t in (trial.start, trial)]
        finished = trials.run_all(order, work, **options)
    written = save(finished)
    for path in draw(record, picture):
        print(f"picture: {path}")
    left = sum(trials.missing(t, work) for t in every)
    print(f"{len(every) - left} of {len(every)} trainings finished -> {written}")
    if not finished:
        print("stopped: say the same again to go on")
    failed = [(r["arm"], f) for r in record["rows"] for f in r["failed"]]
    for arm, failure in failed:
        print(f"FAILED: {arm}, seed {failure['seed']}: {failure['why']}")
    return int(bool(every) and len(failed) == len(every))


def main(argv: Sequence[str] | None = None) -> int:
    """Its exit status: 2 for a mistake of the user's, 1 where every training failed."""
    parser = parser_of()
    args = parser.parse_args(argv)
    try:
        return run(parser, args)
    except UserError as error:
        print(f"robustness.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
