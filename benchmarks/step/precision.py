"""How far the gradient of the gradnorm step is from float64, in each precision and schedule.

    python -m benchmarks.step.precision  # two small networks; digits and random images
    python -m benchmarks.step.precision --cifar10 cifar10.npz

The weights' gradient as `schedule.Step` leaves it, against the exact step in float64 at the same
weights, buffers and images, all parameters as one vector: cosine, and L2 norm of the difference
over that of the reference. Twice: of the whole loss, which is what trains, and of the penalty
alone, which is what a finite difference approximates. h is in normalised units.

Random images meet a network at its initialisation, real ones (held out) a network that was first
trained on others of them for a while, naturally or by gradnorm, in float32: training bends the
loss, and a difference over a finite h sees the bend. Spread is over seeds (weights, training,
images) and batches.

Writes benchmarks/results/precision_<device>.json after every case, and takes over the cases that an
interrupted call with the same options has left there. These are numbers, not times: a CPU's count.
"""

import argparse
import copy
import dataclasses
import importlib.util
import itertools
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.arguments import output_for, positive_float, positive_int
from benchmarks.common.records import earlier, write_record
from benchmarks.common.timing import summary
from fastgn.config.groups import ArchitectureConfig, DatasetConfig
from fastgn.data.augment import to_float
from fastgn.data.datasets import Arrays, load_dataset, read_cifar10
from fastgn.errors import UserError
from fastgn.metrics import environment
from fastgn.models.network import build_model, choose_kernels
from fastgn.objectives import GradnormOptions, ObjectiveConfig, build_objective
from fastgn.seeding import Stream, make_generator, seed_all
from fastgn.step.options import StepOptions
from fastgn.step.schedule import Schedule
from fastgn.step.step import Step

SIDE, CLASSES = 32, 10
FD_STEPS = (0.07, 0.01, 0.001)
"""0.07 is eps / sigma of the paper."""

CE_WEIGHTS = {"whole": 0.8, "penalty": 2.0**-20}
"""Not 0: a central difference finds its direction in the cross-entropy's sweep."""

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


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to compute the gradient."""

    precision: str
    schedule: Schedule = Schedule()

    def __str__(self) -> str:
        return f"{self.schedule}, {self.precision}"


def arms(device: torch.device, fd_steps: Sequence[float]) -> tuple[list[Arm], list[str]]:
    """What this device can do, and a line for each precision that it cannot."""
    precisions, notes = ["fp32"], []
    cuda = device.type == "cuda"
    modern = cuda and torch.cuda.get_device_capability(device) >= (8, 0)
    if modern:
        precisions.append("tf32")
    else:
        notes.append(f"tf32: {'sm_70 and sm_75 have' if cuda else 'a CPU has'} no such products")
    if modern or not cuda:
        precisions += ["bf16", "bf16-pure"]
    else:
        notes.append("bf16, bf16-pure: no bfloat16 products before sm_80")
    found = [Arm(precision) for precision in precisions]
    for kind in ("finite-difference", "central-difference"):
        for precision in ("fp32", "bf16"):
            if precision in precisions:
                found += [Arm(precision, Schedule(kind, fd_step=h)) for h in fd_steps]
    return found, notes


def gradient(model: nn.Module, arm: Arm, ce_weight: float, batch: tuple[Tensor, Tensor]) -> Tensor:
    """All parameters' gradients of one update, float64, on the CPU; `model` stays as it was."""
    model = copy.deepcopy(model)  # BatchNorm counts what it has seen
    objective = build_objective(ObjectiveConfig(gradnorm=GradnormOptions(ce_weight=ce_weight)))
    step = Step(
        model, objective, StepOptions(schedule=arm.schedule, precision=arm.precision, compile=False)
    )
    step([batch], torch.ones((), device=batch[0].device))
    grads = [
        torch.zeros_like(p) if p.grad is None else p.grad
        for p in model.parameters()
        if p.requires_grad
    ]
    return torch.cat([grad.detach().flatten().double().cpu() for grad in grads])


def distance(value: Tensor, reference: Tensor) -> dict[str, float]:
    """Cosine and relative L2 error of a float64 vector."""
    # by hand: F.cosine_similarity rounds 1 - 1e-14 to 1
    cosine = float(value @ reference / (value.norm() * reference.norm()))
    return {
        "cosine": cosine,
        "relative_error": float((value - reference).norm() / reference.norm()),
    }


def train(
    model: nn.Module, method: str, split: Arrays, updates: int, seed: int, device: torch.device
) -> float:
    """In float32, with AdamW; returns the last batch's cross-entropy."""
    step = Step(model, build_objective(ObjectiveConfig(method=method)), StepOptions(compile=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ramp, ce = torch.ones((), device=device), float("nan")
    for batch in batches(split, updates, 32, seed, 0, device):
        optimizer.zero_grad()
        ce = step([batch], ramp).ce
        optimizer.step()
    return float(ce)


def batches(
    split: Arrays | None, number: int, size: int, seed: int, part: int, device: torch.device
) -> Iterable[tuple[Tensor, Tensor]]:
    """(images in 0..1, labels), drawn anew for each seed and part; random ones without a split."""
    draw = make_generator(Stream.EVALUATION, seed, part)
    for _ in range(number):
        if split is None:
            images = torch.rand(size, 3, SIDE, SIDE, generator=draw)
            labels = torch.randint(CLASSES, (size,), generator=draw)
        else:
            chosen = torch.randint(len(split), (size,), generator=draw)
            images = to_float(split.images_NCHW[chosen], SIDE)
            labels = split.labels_N[chosen]
        yield images.to(device), labels.to(device)


def sources(names: Sequence[str], cifar10_file: str | None) -> tuple[dict[str, Any], list[str]]:
    """Name -> (train, held out) or None, and a line for each that is not here."""
    found: dict[str, Any] = {}
    notes = []
    for name in names:
        if name == "random":
            found[name] = None
        elif name == "digits":
            if importlib.util.find_spec("sklearn") is None:
                notes.append("digits: scikit-learn, which embeds them, is not installed")
                continue
            data = load_dataset(DatasetConfig(data="digits"))
            found[name] = (data.train, data.val)
        elif cifar10_file is None:
            notes.append("cifar10: no --cifar10 FILE was given")
        else:
            data = read_cifar10(cifar10_file)
            found[name] = (data.train, data.val)
    return found, notes


def measure(
    network: str,
    width: int,
    split: tuple[Arrays, Arrays] | None,
    method: str | None,
    todo: Sequence[Arm],
    *,
    seeds: int,
    num_batches: int,
    batch_size: int,
    updates: int,
    device: torch.device,
) -> dict[str, Any]:
    """Every arm of one network on one kind of images, after training by `method`."""
    found: dict[Arm, dict[str, list[dict[str, float]]]] = {
        arm: {part: [] for part in CE_WEIGHTS} for arm in todo
    }
    config = NETWORKS[network]
    if config.model == "preact_resnet18":
        config = dataclasses.replace(config, model_kwargs=(f"width={width}",))
    last_ce, parameters = [], 0
    for seed in range(seeds):
        seed_all(Stream.EVALUATION, seed)
        plain, report = build_model(config, CLASSES)
        plain.to(device)
        if split is not None and method is not None:
            last_ce.append(train(plain, method, split[0], updates, seed, device))
        fused, _ = build_model(config, CLASSES, choose_kernels("auto", device))
        fused.to(device).load_state_dict(plain.state_dict())
        reference, parameters = plain.double(), report.parameters
        held_out = None if split is None else split[1]
        for images, labels in batches(held_out, num_batches, batch_size, seed, 1, device):
            for part, ce_weight in CE_WEIGHTS.items():
                exact = gradient(reference, Arm("fp32"), ce_weight, (images.double(), labels))
                for arm in todo:
                    value = gradient(fused, arm, ce_weight, (images, labels))
                    found[arm][part].append(distance(value, exact))
    return {
        "network": network,
        "parameters": parameters,
        "trained_by": method,
        "updates": updates if method else 0,
        "last_cross_entropy": last_ce,
        "arms": [
            {
                "arm": str(arm),
                "schedule": arm.schedule.kind,
                "fd_step": arm.schedule.fd_step if "difference" in arm.schedule.kind else None,
                "precision": arm.precision,
            }
            | {
                part: {key: summary([d[key] for d in values]) for key in values[0]}
                for part, values in parts.items()
            }
            for arm, parts in found.items()
        ],
    }


def taken_over(
    output: Path, same: dict[str, Any], todo: Sequence[Arm], updates: int
) -> list[dict[str, Any]]:
    """The cases of an interrupted call that asked for the same."""
    record = earlier(output)
    if record.get("complete", True) or any(record.get(key) != value for key, value in same.items()):
        return []
    return [
        {"commit": record["commit"]} | case
        for case in record["cases"]
        if [row["arm"] for row in case["arms"]] == [str(arm) for arm in todo]
        and case["updates"] in (0, updates)
    ]


def main() -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument(
        "--images",
        nargs="+",
        choices=("random", "digits", "cifar10"),
        default=["random", "digits", "cifar10"],
    )
    parser.add_argument("--cifar10", metavar="FILE", help="as fastgn.train's --data-dir")
    parser.add_argument("--seeds", type=positive_int, default=3)
    parser.add_argument("--batches", type=positive_int, default=2, help="for each seed")
    parser.add_argument("--batch-size", type=positive_int, default=8)
    parser.add_argument(
        "--updates", type=positive_int, default=100, help="of training on real images"
    )
    parser.add_argument(
        "--width",
        type=positive_int,
        default=64 if cuda else 8,
        help="of PreActResNet-18; 64 is He's",
    )
    parser.add_argument("--fd-steps", nargs="+", type=positive_float, default=FD_STEPS, metavar="H")
    parser.add_argument("--output", type=Path, help="JSON")
    args = parser.parse_args()

    device = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name() if cuda else "cpu"
    slug = re.sub(r"\W+", "_", name.lower())
    output = output_for(f"precision_{slug}.json", parser, args, free=("cifar10",))
    try:
        todo, notes = arms(device, args.fd_steps)
        splits, more = sources(args.images, args.cifar10)
    except UserError as error:
        print(f"precision.py: error: {error}", file=sys.stderr)
        return 2
    for note in notes + more:
        print(f"left out: {note}")
    record = environment()
    head = {"device": name, "compiled": False}
    head |= {key: getattr(args, key) for key in ("seeds", "batches", "batch_size", "width")}
    cases = taken_over(output, head | {"versions": record["versions"]}, todo, args.updates)

    def save(complete: bool) -> None:
        content = head | {"complete": complete, "left_out": notes + more, "cases": cases}
        write_record(output, content | record)

    for images, split in splits.items():
        methods = [None] if split is None else ["natural", "gradnorm"]
        for network, method in itertools.product(args.networks, methods):
            keys = [(case["network"], case["images"], case["trained_by"]) for case in cases]
            if (network, images, method) in keys:
                continue
            case = measure(
                network,
                args.width,
                split,
                method,
                todo,
                seeds=args.seeds,
                num_batches=args.batches,
                batch_size=args.batch_size,
                updates=args.updates,
                device=device,
            )
            cases.append({"images": images, "commit": record["commit"]} | case)
            save(complete=False)
            trained = f"after {args.updates} updates of {method}" if method else "untrained"
            print(f"{network}, {trained}, {images}: relative error (cosine) of the gradient")
            for row in case["arms"]:
                cells = [
                    f"{part} {row[part]['relative_error']['mean']:.2e} "
                    f"({row[part]['cosine']['mean']:.6f})"
                    for part in CE_WEIGHTS
                ]
                print(f"  {row['arm']:36} {', '.join(cells)}", flush=True)
    save(complete=True)
    print(f"{len(cases)} cases -> {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
