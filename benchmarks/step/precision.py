"""Measures the error of gradnorm's gradient in each precision and schedule, against float64.

A schedule is a way to differentiate the penalty. The reference is the gradient of the exact
schedule in float64, with respect to all weights as one vector. Every gradient has the same weights,
buffers and images. The table shows its cosine with the reference, and the L2 norm of the difference
over the norm of the reference. Both are computed for the whole loss, which training uses, and for
the penalty alone, which a finite difference approximates.

    python -m benchmarks.step.precision  # two small networks; digits and random images
    python -m benchmarks.step.precision --cifar10 cifar10.npz

Random images are given to a network with initial weights. Held-out real images are given to a
network that was first trained on other real images, naturally or by gradnorm, in float32. Training
makes the loss more curved, and so a finite difference less exact. The spread is over batches and
seeds, which change weights, training and images. The step h of a finite difference is in units of
normalised pixels.

Writes benchmarks/results/precision_<device>.json after every case. The same command continues an
interrupted one with the next case. No time is measured, so results from a CPU are valid too.
"""

import argparse
import copy
import dataclasses
import importlib.util
import itertools
import statistics
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import arguments
from benchmarks.common.arguments import default_device, positive_float, positive_int
from benchmarks.common.records import taken_over, write_record
from benchmarks.common.tables import Record, device, make_table, with_notes
from benchmarks.common.timing import summary
from benchmarks.step.arms import Arm
from fastgn.config.groups import ArchitectureConfig, DatasetConfig
from fastgn.data.augment import to_float
from fastgn.data.datasets import Arrays, load_dataset
from fastgn.metrics import environment
from fastgn.models.network import build_model, choose_kernels
from fastgn.objectives import GradnormOptions, ObjectiveConfig, build_objective
from fastgn.seeding import Stream, make_generator, seed_all
from fastgn.step.precision import PRECISIONS, explain_unsupported
from fastgn.step.schedule import Schedule
from fastgn.step.step import Step

SIDE, CLASSES = 32, 10
FD_STEPS = (0.07, 0.01, 0.001)
"""Step sizes of finite differences, in normalised pixels. The paper uses 0.07 (eps / sigma)."""
CE_WEIGHTS = {"whole": 0.8, "penalty": 2.0**-20}
"""Name of a loss -> the weight of the cross-entropy in it.

The weight for "penalty" is tiny, but not 0. A central difference takes its direction from the
gradient of the weighted cross-entropy, which would otherwise be 0.
"""
NETWORKS = {
    "tiny Swin": ArchitectureConfig(
        model="swin_t",
        img_size=SIDE,
        model_kwargs=(
            *("patch_size=4", "window_size=4", "embed_dim=32"),
            *("depths=(2, 2)", "num_heads=(2, 4)"),
        ),
    ),
    "PreActResNet-18, GELU": ArchitectureConfig(model="preact_resnet18", activation="gelu"),
}


def label(arm: Arm) -> str:
    """Returns the key of an arm's results in the JSON record: its schedule and precision."""
    return f"{arm.schedule}, {arm.precision}"


def choose_arms(fd_steps: Sequence[float]) -> tuple[list[Arm], list[str]]:
    """Returns the arms (pairs of precision and schedule) that the device supports.

    Also returns one line for each precision that it does not support.
    """
    reasons = {
        precision: explain_unsupported(precision, default_device()) for precision in PRECISIONS
    }
    precisions = [precision for precision, why in reasons.items() if why is None]
    arms = [Arm("gradnorm", precision) for precision in precisions]
    for kind in ("finite-difference", "central-difference"):
        for precision in ("fp32", "bf16"):
            if precision in precisions:
                arms += [Arm("gradnorm", precision, Schedule(kind, fd_step=h)) for h in fd_steps]
    return arms, [why for why in reasons.values() if why is not None]


def gradient(model: nn.Module, arm: Arm, ce_weight: float, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Returns the gradient of all parameters as one vector (P,), in float64 on the CPU."""
    model = copy.deepcopy(model)  # because BatchNorm updates its running statistics
    objective = build_objective(ObjectiveConfig(gradnorm=GradnormOptions(ce_weight=ce_weight)))
    step = Step(model, objective, arm.options())
    step([batch], torch.ones((), device=batch[0].device))
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    return torch.cat([grad.detach().flatten().double().cpu() for grad in grads])


def distance(value: Tensor, reference: Tensor) -> dict[str, float]:
    """Returns the cosine of two float64 vectors and the relative L2 error of the first."""
    # by hand, because F.cosine_similarity rounds 1 - 1e-14 to 1
    cosine = float(value @ reference / (value.norm() * reference.norm()))
    error = float((value - reference).norm() / reference.norm())
    return {"cosine": cosine, "relative_error": error}


def train(model: nn.Module, method: str, split: Arrays, updates: int, seed: int) -> float:
    """Trains in float32 with AdamW. Returns the cross-entropy of the last batch."""
    step = Arm(method).step(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ramp, ce = torch.ones((), device=default_device()), float("nan")
    for batch in batches(split, updates, 32, seed, 0):
        optimizer.zero_grad()
        ce = step([batch], ramp).ce
        optimizer.step()
    return float(ce)


def batches(
    split: Arrays | None, number: int, size: int, seed: int, part: int
) -> Iterable[tuple[Tensor, Tensor]]:
    """Yields `number` batches of images (B, 3, H, W) in 0..1 and labels (B,).

    split: images to draw from. If None, the images are random. seed, part: seeds of the draws.
    """
    draw, where = make_generator(Stream.EVALUATION, seed, part), default_device()
    for _ in range(number):
        if split is None:
            images = torch.rand(size, 3, SIDE, SIDE, generator=draw)
            labels = torch.randint(CLASSES, (size,), generator=draw)
        else:
            chosen = torch.randint(len(split), (size,), generator=draw)
            images, labels = to_float(split.images_NCHW[chosen], SIDE), split.labels_N[chosen]
        yield images.to(where), labels.to(where)


def sources(names: Sequence[str], cifar10_file: str | None) -> tuple[dict[str, Any], list[str]]:
    """Returns the image sets that are used: name -> (training images, held-out images).

    The value for "random" is None. Also returns one line for each set that is missing.
    """
    found: dict[str, Any] = {}
    notes = []
    for name in names:
        if name == "random":
            found[name] = None
        elif name == "digits" and importlib.util.find_spec("sklearn") is None:
            notes.append("digits: scikit-learn, which embeds them, is not installed")
        elif name == "cifar10" and cifar10_file is None:
            notes.append("cifar10: no --cifar10 FILE was given")
        else:
            file = cifar10_file if name == "cifar10" else None
            data = load_dataset(DatasetConfig(data=name, data_dir=file))
            found[name] = (data.train, data.val)
    return found, notes


def measure(
    network: str,
    args: argparse.Namespace,
    split: tuple[Arrays, Arrays] | None,
    method: str | None,
    arms: Sequence[Arm],
) -> dict[str, Any]:
    """Returns the gradient errors of all arms, for one network.

    split: training and held-out images, or None for random images. method: training method that the
    network is first trained with, or None for no training.
    """
    where, config = default_device(), NETWORKS[network]
    if config.model == "preact_resnet18":
        config = dataclasses.replace(config, model_kwargs=(f"width={args.width}",))
    found: dict[tuple[Arm, str], list[dict[str, float]]] = {
        pair: [] for pair in itertools.product(arms, CE_WEIGHTS)
    }
    last_ce, parameters = [], 0
    for seed in range(args.seeds):
        seed_all(Stream.EVALUATION, seed)
        plain, report = build_model(config, CLASSES)
        plain.to(where)
        if split is not None and method is not None:
            last_ce.append(train(plain, method, split[0], args.updates, seed))
        fused, _ = build_model(config, CLASSES, choose_kernels("auto", where))
        fused.to(where).load_state_dict(plain.state_dict())
        reference, parameters = plain.double(), report.parameters
        held_out = None if split is None else split[1]
        for images, labels in batches(held_out, args.batches, args.batch_size, seed, 1):
            for part, ce_weight in CE_WEIGHTS.items():
                double = (images.double(), labels)
                exact = gradient(reference, Arm("gradnorm"), ce_weight, double)
                for arm in arms:
                    value = gradient(fused, arm, ce_weight, (images, labels))
                    found[arm, part].append(distance(value, exact))
    rows = []
    for arm in arms:
        row: dict[str, Any] = {"arm": label(arm), "precision": arm.precision}
        for part in CE_WEIGHTS:
            values = found[arm, part]
            row[part] = {key: summary([d[key] for d in values]) for key in values[0]}
        rows.append(row)
    return {
        **{"network": network, "parameters": parameters, "trained_by": method},
        **{"updates": args.updates if method else 0, "last_cross_entropy": last_ce, "arms": rows},
    }


def table(record: Record) -> str:
    """Returns a Markdown table with a column for each network and way of training it."""
    cases: dict[str, list[dict]] = {}
    for case in record["cases"]:
        state = f"after {case['trained_by']}" if case["trained_by"] else "untrained"
        cases.setdefault(f"{case['network']}, {state}", []).append(case)
    names = [row["arm"] for row in record["cases"][0]["arms"]]

    def cell(same: list[dict], index: int) -> str:
        values = [case["arms"][index]["whole"] for case in same]
        error, cosine = (
            statistics.fmean(value[key]["mean"] for value in values)
            for key in ("relative_error", "cosine")
        )
        return f"{error:.1e} ({cosine:.4f})"

    columns = {"step": names}
    for heading, same in cases.items():
        columns[heading] = [cell(same, index) for index in range(len(names))]
    images = ", ".join(dict.fromkeys(case["images"] for case in record["cases"]))
    number = record["cases"][0]["arms"][0]["whole"]["relative_error"]["n"]
    note = (
        f"{device(record)}: relative L2 error (cosine) of all weights' gradient against the exact "
        f"one in float64, mean over {number} batches of {record['batch_size']} for each kind of "
        f"images ({images})"
    )
    return with_notes(make_table(names, columns), record, note)


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Makes the measurements that are missing in the JSON record, and writes it after each."""
    name = arguments.device_name()
    file = f"precision_{arguments.slugify(name)}.json"
    output = arguments.output_for(file, parser, args, free=("cifar10",))
    arms, notes = choose_arms(args.fd_steps)
    splits, missing = sources(args.images, args.cifar10)
    for note in notes + missing:
        print(f"left out: {note}")
    record = environment()
    head = {"file": output.name, "device": name, "arms": [label(arm) for arm in arms]}
    options = ("seeds", "batches", "batch_size", "updates", "width")
    head |= {key: getattr(args, key) for key in options}
    before = taken_over(output, head | {"versions": record["versions"], "complete": False})
    cases = before.get("cases", [])

    def save(complete: bool) -> dict[str, Any]:
        content = head | {"complete": complete, "left_out": notes + missing, "cases": cases}
        write_record(output, content | record)
        return content | record

    for images, split in splits.items():
        methods = [None] if split is None else ["natural", "gradnorm"]
        for network, method in itertools.product(args.networks, methods):
            keys = [(case["network"], case["images"], case["trained_by"]) for case in cases]
            if (network, images, method) in keys:
                continue
            case = measure(network, args, split, method, arms)
            cases.append({"images": images, "commit": record["commit"]} | case)
            save(complete=False)
            print(f"{network}, {images}, trained by {method}", flush=True)
    print(table(save(complete=True)))
    print(f"{len(cases)} cases -> {output}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit status: 2 for a user's mistake, else 0."""
    kinds, width = ("random", "digits", "cifar10"), 64 if torch.cuda.is_available() else 8
    parser = arguments.make_parser(__doc__)
    add = parser.add_argument
    add("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    add("--images", nargs="+", choices=kinds, default=list(kinds), help="kinds of images")
    add("--cifar10", metavar="FILE", help="CIFAR-10, as fastgn.train --data-dir takes it")
    add("--seeds", type=positive_int, default=3, help="number of seeds, from 0")
    add("--batches", type=positive_int, default=2, help="number of batches per seed")
    add("--batch-size", type=positive_int, default=8)
    add("--updates", type=positive_int, default=100, help="updates of training on real images")
    add("--width", type=positive_int, default=width, help="width of PreActResNet-18; He's has 64")
    add("--fd-steps", nargs="+", type=positive_float, default=FD_STEPS, metavar="H")
    args = parser.parse_args(argv)
    return arguments.exit_status("precision.py", lambda: run(parser, args))


if __name__ == "__main__":
    sys.exit(main())
