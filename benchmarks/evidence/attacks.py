"""Measures how many images per second the attacks of fastgn.evaluate take.

    python -m benchmarks.evidence.attacks --batch-size 128 --images 512 --eps 1/255

PGD-20 is also timed with gradients in bf16, and on a GPU with a compiled model. The table shows how
many times as fast each of the two is, and for which share of images its outcome differs.

The model is the CIFAR-10 network of pyautoattack, or with --smoke three untrained layers. Images
are noise, and labels are the model's own answers, so that every image is attacked.

Writes benchmarks/results/attacks_<device>.json. On a CPU only the ratios mean something.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyautoattack
import torch
from pyautoattack.examples.resnet import ResNet18
from torch import nn

from benchmarks.common.arguments import DEVICE, ON_GPU, finish, open_record, option, program
from benchmarks.common.tables import Column, Record, device, make_table, with_notes
from benchmarks.common.timing import interleaved, paired_ratios, summary
from fastgn.analysis.attacker import Attacker, Precision
from fastgn.errors import check, parse_number

ATTACKS = ("clean", "pgd-20", "apgd-ce", "autoattack")
WAYS = ("bf16", "compiled")
"""Ways to run PGD-20 besides the usual one: with gradients in bf16, and with a compiled model."""
CALLS = {"clean": 5, "pgd-20": 5}
"""Attack that takes little time -> number of calls per measurement. Others are called once."""


def network(smoke: bool) -> tuple[nn.Module, int]:
    """Returns a model in eval mode on the CPU, and the side of its images in pixels.

    smoke: whether to return a small untrained network in place of pyautoattack's.
    """
    torch.manual_seed(0)
    if smoke:
        layers = (nn.Conv2d(3, 16, 3, stride=2), nn.GELU(), nn.Flatten(), nn.Linear(784, 10))
        model: nn.Module = nn.Sequential(*layers)
    else:
        file = Path(pyautoattack.__file__).parent / "examples" / "model_test.pt"
        model = ResNet18()
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model.eval().requires_grad_(False), 16 if smoke else 32


def table(record: Record) -> str:
    """Returns this benchmark's Markdown table, made from its JSON record."""
    columns: dict[str, Column] = {"attack": "attack"}
    columns |= {"images/s": "images_per_s:.0f"} if record["meaningful_times"] else {}
    columns["withstand"] = "robust:.1%"
    for way in WAYS:
        columns[f"{way}: times as fast"] = f"{way}/times_as_fast:.2f"
        columns[f"{way}: other verdicts"] = f"{way}/differing_verdicts:.2%"
    note = (
        f"{record['model']} on {device(record, 'a CPU')}: {record['number']} images "
        f"({record['images']}) of {record['img_size']} px in batches of {record['batch_size']}, "
        f"Linf, eps {255 * record['eps']:g}/255"
    )
    return with_notes(make_table(record["rows"], columns), record, note)


@program(
    option("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS)),
    option("--images", default=512 if ON_GPU else 32, help="number of images"),
    option("--batch-size", default=128 if ON_GPU else 16),
    option("--eps", default="1/255", help="radius in Linf, for pixels in 0..1, such as 4/255"),
    option("--rounds", default=3),
    option("--smoke", action="store_true", help="use toy sizes and two rounds"),
)
def main(args: argparse.Namespace) -> int:
    """Times all attacks, and writes the JSON record."""
    eps, where = parse_number(args.eps), DEVICE
    check(0 < eps <= 1, f"--eps {args.eps} must be above 0 and at most 1 (0..1 pixels)")
    output, record = open_record(args, "attacks_{device}.json", needs_gpu=True)
    model, side = network(args.smoke)
    number, size = (4, 2) if args.smoke else (args.images, args.batch_size)
    attacks = [name for name in args.attacks if name != "autoattack" or not args.smoke]
    noise = torch.rand(number, 3, side, side, generator=torch.Generator().manual_seed(0))
    model, images = model.to(where), noise.to(where)
    with torch.no_grad():
        labels = torch.cat([model(x).argmax(1) for x in images.split(size)])
    ways = WAYS if where.type == "cuda" and not args.smoke else WAYS[:1]
    found: dict[str, list[bool]] = {}
    arms: dict[str, Callable[[], object]] = {}

    def attack(attacker: Attacker, name: str, arm: str) -> None:
        found[arm] = []
        for first in range(0, number, size):
            ids = range(first, min(first + size, number))
            x, y, clean = images[ids], labels[ids], None if name == "clean" else [True] * len(ids)
            found[arm] += attacker.find_correct(model, x, y, ids, name, eps, clean)

    for name in attacks:
        for way in ("fp32", *(ways if name == "pgd-20" else ())):
            precision: Precision = "bf16" if way == "bf16" else "fp32"
            attacker = Attacker("Linf", 0, size, where, precision, way == "compiled")
            arm = name if way == "fp32" else f"{name}, {way}"
            arms[arm] = functools.partial(attack, attacker, name, arm)
    calls = {arm: CALLS.get(arm.partition(",")[0], 1) for arm in arms}
    timings = interleaved(arms, rounds=2 if args.smoke else args.rounds, calls=calls, warmup=1)
    rows = []
    for name in attacks:
        row: dict[str, Any] = {"attack": name, "robust": sum(found[name]) / number}
        row["images_per_s"] = summary([number / s for s in timings[name]])
        for way in WAYS:
            if (arm := f"{name}, {way}") in found:
                differ = sum(a != b for a, b in zip(found[name], found[arm], strict=True))
                faster = summary(paired_ratios(timings[name], timings[arm]))
                row[way] = {"times_as_fast": faster, "differing_verdicts": differ / number}
        rows.append(row)
    record |= {"eps": eps, "rows": rows}
    record |= {"img_size": side, "images": "noise", "number": number, "batch_size": size}
    record["model"] = "a small network" if args.smoke else "autoattack-resnet18"
    return finish(output, record, table)


if __name__ == "__main__":
    sys.exit(main())
