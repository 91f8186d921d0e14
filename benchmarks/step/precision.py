"""Measures the error of gradnorm's gradient in each precision and schedule, against float64.

A schedule is a way to differentiate the penalty. The reference is the gradient of the exact
schedule in float64, with respect to all weights as one vector. Every gradient has the same weights,
buffers and images. The table shows its cosine with the reference, and the L2 norm of the difference
over the norm of the reference.

    python -m benchmarks.step.precision  # three small networks; digits and random images

Random images are given to a network with initial weights. Held-out digits are given to a network
that was first trained on other digits, naturally or by gradnorm, in float32. Training
makes the loss more curved, and so a finite difference less exact. Confident digits are those
held-out ones on which a network has a cross-entropy below SMALL_CE after a longer natural training:
without loss scaling, fp16 loses a part of gradients as small as theirs. Fitted digits are given to
a network that was naturally trained on these digits alone, until its cross-entropy is below
FITTED_CE. In fp16 the scale begins as in a run, and is halved until the gradient is finite. The
spread is over batches and seeds, which change weights, training and images. The step h of a finite
difference is in units of normalised pixels.

Writes benchmarks/results/precision_<device>.json after every case. The same command continues an
interrupted one with the next case. No time is measured, so results from a CPU are valid too.
"""

import argparse
import copy
import importlib.util
import itertools
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.arguments import DEVICE, ON_GPU, finish, open_record, option, program
from benchmarks.common.records import taken_over, write_record
from benchmarks.common.tables import Record, device, make_table, with_notes
from benchmarks.common.timing import summary
from benchmarks.step.arms import Arm
from fastgn.config.groups import ArchitectureConfig, DatasetConfig
from fastgn.data.augment import to_float
from fastgn.data.datasets import Arrays, Dataset, load_dataset
from fastgn.models.network import build_model, choose_kernels
from fastgn.seeding import Stream, make_generator, seed_all
from fastgn.step.precision import PRECISIONS, explain_unsupported
from fastgn.step.schedule import Schedule

SIDE, CLASSES = 32, 10
IMAGES = ("random", "digits", "confident", "fitted")
UPDATES = 100
"""Number of updates in the training on digits, before gradients are compared."""
SMALL_CE = 1e-3
"""Cross-entropy below which the network is confident of an image."""
FITTED_CE = 5e-4
"""Cross-entropy below which training on the measured digits ends."""
MOST_UPDATES = 4000
"""Largest number of updates before a network is confident of enough digits or fits them."""
UNSCALED = "exact, fp16 without loss scaling"
"""Name of an arm that `label` would call "exact, fp16", too."""
WIDTH = 64 if ON_GPU else 8
"""Channels of the first stage of PreActResNet-18. The original network has 64."""
FD_STEPS = (0.07, 0.01, 0.001)
"""Step sizes of finite differences, in normalised pixels. The paper uses 0.07 (eps / sigma)."""
NETWORKS = {
    "tiny Swin": ArchitectureConfig(
        model="swin_t",
        img_size=SIDE,
        model_kwargs=(
            *("patch_size=4", "window_size=4", "embed_dim=32"),
            *("depths=(2, 2)", "num_heads=(2, 4)"),
        ),
    ),
    "tiny ViT": ArchitectureConfig(
        model="vit_tiny_patch16_224",
        img_size=SIDE,
        model_kwargs=("patch_size=8", "embed_dim=48", "depth=4", "num_heads=3"),
    ),
    "PreActResNet-18, GELU": ArchitectureConfig(
        model="preact_resnet18", activation="gelu", model_kwargs=(f"width={WIDTH}",)
    ),
}


METHODS = ("natural", "gradnorm")
"""Training methods by which networks are trained before they get held-out digits."""


def label(arm: Arm) -> str:
    """Returns schedule and precision, such as "exact, bf16", which name results in the record."""
    return f"{arm.schedule}, {arm.precision}"


def choose_arms(fd_steps: Sequence[float]) -> dict[str, Arm]:
    """Returns {name: arm} for the pairs of schedule and precision that the device supports."""
    precisions = [name for name in PRECISIONS if explain_unsupported(name, DEVICE) is None]
    arms = [Arm("gradnorm", precision) for precision in precisions]
    named = {label(arm): arm for arm in arms}
    if "fp16" in precisions:
        named[UNSCALED] = Arm("gradnorm", "fp16")
    for kind in ("finite-difference", "central-difference"):
        for precision in ("fp32", "bf16"):
            if precision in precisions:
                arms = [Arm("gradnorm", precision, Schedule(kind, fd_step=h)) for h in fd_steps]
                named |= {label(arm): arm for arm in arms}
    return named


def gradient(
    model: nn.Module, arm: Arm, batch: tuple[Tensor, Tensor], scaled: bool = True
) -> Tensor:
    """Returns the gradient of all P parameters as one vector (P,), in float64 on the CPU.

    scaled: whether the losses are scaled in fp16.
    """
    model = copy.deepcopy(model)  # a copy, because BatchNorm changes its running statistics
    compute, ramp = arm.step(model), torch.ones((), device=batch[0].device)
    loss_scale = compute.step.loss_scale
    if loss_scale is not None and not scaled:
        loss_scale.scale.fill_(1.0)
    while True:
        model.zero_grad()
        compute([batch], ramp)
        trained = [p for p in model.parameters() if p.requires_grad]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        whole = torch.cat([grad.detach().flatten().double().cpu() for grad in grads])
        if loss_scale is None or bool(whole.isfinite().all()) or bool(loss_scale.is_exhausted()):
            return whole
        loss_scale.update(torch.ones((), dtype=torch.bool, device=ramp.device))


def distance(value: Tensor, reference: Tensor) -> dict[str, float]:
    """Returns the cosine of the angle between two float64 vectors, and the L2 norm of value -
    reference divided by that of reference, with the keys cosine and relative_error."""
    # not computed with F.cosine_similarity, because that rounds 1 - 1e-14 to 1
    cosine = float(value @ reference / (value.norm() * reference.norm()))
    error = float((value - reference).norm() / reference.norm())
    return {"cosine": cosine, "relative_error": error}


def train(
    model: nn.Module, method: str, given: Iterable[tuple[Tensor, Tensor]], decay: float = 1e-2
) -> list[float]:
    """Trains a model in float32 with AdamW. Returns the cross-entropy of each batch.

    method: training method. given: batches of images (B, 3, H, W) and labels (B,). decay: weight
    decay.
    """
    step = Arm(method).step(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=decay)
    ramp, found = torch.ones((), device=DEVICE), []
    for batch in given:
        optimizer.zero_grad()
        found.append(float(step([batch], ramp).ce))
        optimizer.step()
    return found


def fit(model: nn.Module, chosen: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """Trains a model naturally on some batches alone, until the cross-entropy of each is below
    FITTED_CE. Returns their cross-entropies."""
    for _ in range(MOST_UPDATES // UPDATES):
        given = itertools.islice(itertools.cycle(chosen), UPDATES)
        found = train(model, "natural", given, decay=0.0)[-len(chosen) :]
        if max(found) < FITTED_CE:
            break
    return found


def confident(
    model: nn.Module, data: Dataset, number: int, size: int, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Trains a model naturally until its cross-entropy is below SMALL_CE on enough held-out images.

    Returns these images, as `number` batches of `size`. seed: seed for the training. Raises
    RuntimeError if there are too few after MOST_UPDATES updates.
    """
    images, labels = to_float(data.val.images_NCHW, SIDE).to(DEVICE), data.val.labels_N.to(DEVICE)
    for part in range(MOST_UPDATES // UPDATES):
        train(model, "natural", batches(data.train, UPDATES, 32, seed, part))
        with torch.no_grad():
            losses_N = F.cross_entropy(model.eval()(images), labels, reduction="none")
        model.train()
        found = (losses_N < SMALL_CE).nonzero()[: number * size, 0]
        if len(found) == number * size:
            return list(zip(images[found].split(size), labels[found].split(size), strict=True))
    raise RuntimeError(f"confident of {len(found)} images, should be {number * size}")


def batches(
    split: Arrays | None, number: int, size: int, seed: int, part: int
) -> Iterable[tuple[Tensor, Tensor]]:
    """Yields `number` batches of images (B, 3, H, W) in 0..1 and labels (B,).

    split: images to draw from. If None, the images are random. size: number of images per batch.
    seed, part: seeds for the choice of images.
    """
    draw = make_generator(Stream.EVALUATION, seed, part)
    for _ in range(number):
        if split is None:
            images = torch.rand(size, 3, SIDE, SIDE, generator=draw)
            labels = torch.randint(CLASSES, (size,), generator=draw)
        else:
            chosen = torch.randint(len(split), (size,), generator=draw)
            images, labels = to_float(split.images_NCHW[chosen], SIDE), split.labels_N[chosen]
        yield images.to(DEVICE), labels.to(DEVICE)


def measure(
    network: str, args: argparse.Namespace, method: str | None, arms: Mapping[str, Arm]
) -> dict[str, Any]:
    """Measures the gradient errors of one network for all arms (pairs of schedule and precision).

    network: key of NETWORKS. method: training method by which the network is first trained on
    digits, "long training" until it is confident of the measured digits, or "fitting" for training
    on them. If None, the network is not trained, and the images are random.
    """
    digits = None if method is None else load_dataset(DatasetConfig(data="digits"))
    config = NETWORKS[network]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    last_ce, parameters = [], 0
    for seed in range(args.seeds):
        seed_all(Stream.EVALUATION, seed)
        plain, report = build_model(config, CLASSES)
        plain.to(DEVICE)
        held_out = None if digits is None else digits.val
        chosen = list(batches(held_out, args.batches, args.batch_size, seed, 1))
        if method == "fitting":
            last_ce += fit(plain, chosen)
        elif digits is not None and method == "long training":
            chosen = confident(plain, digits, args.batches, args.batch_size, seed)
        elif digits is not None and method is not None:
            given = batches(digits.train, UPDATES, 32, seed, 0)
            last_ce.append(train(plain, method, given)[-1])
        fused, _ = build_model(config, CLASSES, choose_kernels("auto", DEVICE))
        fused.to(DEVICE).load_state_dict(plain.state_dict())
        reference, parameters = plain.double(), report.parameters
        for images, labels in chosen:
            exact = gradient(reference, Arm("gradnorm"), (images.double(), labels))
            for name, arm in arms.items():
                value = gradient(fused, arm, (images, labels), scaled=name != UNSCALED)
                found[name].append(distance(value, exact))
    rows = []
    for name, values in found.items():
        errors = {key: summary([value[key] for value in values]) for key in values[0]}
        rows.append({"arm": name, "precision": arms[name].precision, "whole": errors})
    case = {"network": network, "parameters": parameters, "trained_by": method}
    case["updates"] = UPDATES if method in METHODS else None
    return case | {"last_cross_entropy": last_ce, "arms": rows}


def table(record: Record) -> str:
    """Returns a Markdown table of gradient errors.

    A row is a schedule with its precision. A column is a network and how it was trained.
    """
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


@program(
    option("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS)),
    option("--images", nargs="+", choices=IMAGES, default=[*IMAGES], help="kinds of images"),
    option("--seeds", default=3, help="number of seeds, from 0"),
    option("--batches", default=2, help="number of batches per seed"),
    option("--batch-size", default=8),
    option("--fd-steps", nargs="+", default=FD_STEPS, metavar="H"),
)
def main(args: argparse.Namespace) -> int:
    """Makes the measurements that the JSON record lacks. Writes the record after each."""
    output, head = open_record(args, "precision_{device}.json")
    arms = choose_arms(args.fd_steps)
    if importlib.util.find_spec("sklearn") is None:
        print("left out: digits, because scikit-learn is not installed")
        args.images = [images for images in args.images if images == "random"]
    options = {key: getattr(args, key) for key in ("seeds", "batches", "batch_size")}
    head |= options | {"arms": list(arms), "width": WIDTH}
    same = {key: head[key] for key in (*options, "arms", "width", "device", "versions")}
    cases = taken_over(output, same | {"complete": False}).get("cases", [])
    record = head | {"complete": False, "cases": cases}
    methods = {"random": [None], "digits": METHODS}
    methods |= {"confident": ["long training"], "fitted": ["fitting"]}
    for images, network in itertools.product(args.images, args.networks):
        for method in methods[images]:
            if (network, method) in [(case["network"], case["trained_by"]) for case in cases]:
                continue
            case = measure(network, args, method, arms)
            cases.append({"images": images, "commit": head["commit"]} | case)
            write_record(output, record)
            print(f"{network}, {images}, trained by {method}", flush=True)
    return finish(output, record | {"complete": True}, table)


if __name__ == "__main__":
    sys.exit(main())
