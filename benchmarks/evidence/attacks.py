"""Measures the overhead of fastgn.evaluate over direct calls of the attacks.

fastgn's evaluation attacks batch by batch and saves the outcomes of each batch. It is compared with
a plain loop (clean and PGD-20), or with one call of pyautoattack for all images (apgd-ce and the
standard AutoAttack). The overhead should stay below 5 %.

    python -m benchmarks.evidence.attacks --batch-size 128 --images 512 --eps 1/255

AutoAttack runs several attacks in turn, each on the images that are still classified correctly. A
direct call fills its batches with such images, but fastgn's batches become smaller. The overhead
includes this difference.
PGD-20 is also timed with gradients in bf16, and on a GPU with a compiled model. The table shows how
many times as fast this is, and for which share of images the outcome differs.

The model is the CIFAR-10 network of pyautoattack, or --model tiny, three untrained layers. Images
are noise, and labels are the model's own answers, so that both ways attack every image.

Writes benchmarks/results/attacks_<device>.json. On a CPU only the ratios mean something.
"""

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pyautoattack
import torch
import torch.nn.functional as F
from pyautoattack.examples.resnet import ResNet18
from torch import Tensor, nn

from benchmarks.common.arguments import (
    ROOT,
    device_name,
    exit_status,
    gpu_output,
    make_parser,
    positive_int,
)  # fmt: skip
from benchmarks.common.records import write_json
from benchmarks.common.tables import Record, device, make_table, plus_minus, with_notes
from benchmarks.common.timing import Timing, interleaved, paired_ratios, summary
from fastgn.analysis.attacker import Attacker, Precision
from fastgn.analysis.outcomes import make_part, make_rows
from fastgn.analysis.parts import Parts
from fastgn.errors import check, parse_number
from fastgn.metrics import environment

TARGET = 0.05
STEPS = 20
PGD = f"pgd-{STEPS}"
ATTACKS = ("clean", PGD, "apgd-ce", "autoattack")
CALLS = {"clean": 5, PGD: 5}
"""Number of calls per round of the attacks that take little time."""
LABELS = 10


def tiny() -> nn.Module:
    """Returns a network of three layers with random weights."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.GELU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GELU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, LABELS)),
    )


def network(name: str) -> tuple[nn.Module, int]:
    """Returns a model in eval mode on the CPU, and the side of its images in pixels.

    name: "tiny" or "autoattack-resnet18".
    """
    torch.manual_seed(0)
    model, side = tiny(), 16
    if name == "autoattack-resnet18":
        file = Path(pyautoattack.__file__).parent / "examples" / "model_test.pt"
        model, side = ResNet18(), 32
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model.eval().requires_grad_(False), side


def direct_call(
    model: nn.Module, images_BCHW: Tensor, labels_B: Tensor, name: str, eps: float, size: int
) -> float:
    """Returns the accuracy under an attack, computed by calling the attack without fastgn.

    name: name of the attack. size: batch size.
    """
    device = images_BCHW.device
    if name not in ("clean", PGD):
        custom = {"version": "custom", "attacks": [name]}
        attack = pyautoattack.AutoAttack(
            model, eps=eps, seed=0, device=device, **({} if name == "autoattack" else custom)
        )
        _, said_B = attack.run_standard_evaluation(images_BCHW, labels_B, batch_size=size)
        return float((said_B == labels_B).float().mean())
    right = torch.zeros((), device=device)
    for x, y in zip(images_BCHW.split(size), labels_B.split(size), strict=True):
        at = x
        if name == PGD:
            at = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
            for _ in range(STEPS):
                at.requires_grad_()
                (grad,) = torch.autograd.grad(F.cross_entropy(model(at), y), at)
                moved = at.detach() + 2.5 * eps / STEPS * grad.sign()
                at = (x + (moved - x).clamp(-eps, eps)).clamp(0, 1)
        with torch.no_grad():
            right += (model(at).argmax(1) == y).sum()
    return float(right) / len(labels_B)


def through_evaluate(
    attacker: Attacker,
    model: nn.Module,
    images_BCHW: Tensor,
    labels_B: Tensor,
    name: str,
    eps: float,
    output: Path,
) -> str:
    """Attacks images with fastgn's own functions and returns one character per image.

    "1" means that the image is still classified correctly, "0" that it is not. name: name of the
    attack. output: file to which the outcomes are saved.
    """
    size, parts, done = attacker.batch_size, Parts(output, [name, attacker.precision]), []
    for first in range(0, len(labels_B), size):
        x, y = images_BCHW[first : first + size], labels_B[first : first + size]
        ids, clean = range(first, first + len(y)), None if name == "clean" else [True] * len(y)
        began = time.perf_counter()
        right = attacker.find_correct(model, x, y, ids, name, eps, clean)
        done.append(make_part(0, first // size, right, time.perf_counter() - began))
        parts.put(done[-1], name, f"{eps:.8f}", first // size)
    parts.remove()
    return make_rows(done, [(name, eps)], len(labels_B))[0]["correct"]


def ratio(above: Timing, below: Timing, less: float = 0) -> dict[str, float]:
    """Returns mean and spread of the ratio of two times in each round, minus `less`.

    above: numerator. below: denominator.
    """
    return summary([r - less for r in paired_ratios(above.rounds, below.rounds)])


def make_options() -> argparse.ArgumentParser:
    """Returns the parser of this program's command line."""
    cuda = torch.cuda.is_available()
    parser = make_parser(__doc__)
    add = parser.add_argument
    models = ("autoattack-resnet18", "tiny")
    add("--model", choices=models, default=models[0] if cuda else models[1])
    add("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    add("--images", type=positive_int, default=512 if cuda else 32, help="number of images")
    add("--batch-size", type=positive_int, default=128 if cuda else 16)
    add("--eps", default="1/255", help="radius in Linf, for pixels in 0..1, such as 4/255")
    add("--rounds", type=positive_int, default=3)
    add("--smoke", action="store_true", help="use toy sizes and two rounds")
    return parser


def rows(
    args: argparse.Namespace,
    timings: dict[str, Timing],
    found: dict[str, str],
    others: Sequence[str],
) -> list[dict]:
    """Returns the results as a list of dicts for the JSON record, one for each attack.

    timings: name such as "pgd-20, fp32", or "pgd-20" for the direct call -> seconds. found: the
    same names -> outcome of each image, as `through_evaluate` returns it. others: further ways to
    run PGD-20, such as "compiled".
    """
    out = []
    for name in args.attacks:
        ours, bits = timings[f"{name}, fp32"], found[f"{name}, fp32"]
        row = {
            "attack": name,
            "calls_a_round": CALLS.get(name, 1),
            "robust": bits.count("1") / len(bits),
            "overhead": ratio(ours, timings[name], less=1),
        }
        row["enough"] = row["overhead"]["mean"] < TARGET
        if torch.cuda.is_available():
            row["images_per_s"] = summary([args.images / s for s in ours.rounds])
            row["direct_images_per_s"] = summary([args.images / s for s in timings[name].rounds])
        for way in others if name == PGD else ():
            pairs = zip(bits, found[f"{name}, {way}"], strict=True)
            row[way] = {
                "times_as_fast": ratio(ours, timings[f"{name}, {way}"]),
                "differing_verdicts": sum(a != b for a, b in pairs) / len(bits),
            }
        out.append(row)
    return out


def table(record: Record) -> str:
    """Returns this benchmark's Markdown table, made from its JSON record."""
    columns = {
        "attack": lambda r: r["attack"],
        "over the direct call": lambda r: (
            f"{100 * r['overhead']['mean']:+.1f} ± {100 * r['overhead']['std']:.1f} %"
        ),
        "images/s": lambda r: plus_minus(r.get("images_per_s"), ".0f"),
        "withstand": lambda r: f"{r['robust']:.1%}",
    }
    for way in ("bf16", "compiled"):
        columns[f"{way}: times as fast"] = lambda r, way=way: plus_minus(
            r.get(way, {}).get("times_as_fast"), ".2f"
        )
        columns[f"{way}: other verdicts"] = lambda r, way=way: (
            f"{r[way]['differing_verdicts']:.2%}" if way in r else ""
        )
    note = (
        f"{record['model']} on {device(record, 'a CPU')}: {record['number']} images "
        f"({record['images']}) of {record['img_size']} px in batches of {record['batch_size']}, "
        f"Linf, eps {255 * record['eps']:g}/255"
    )
    rounds = record["rows"][0]["overhead"]["n"]
    spread = f"mean ± deviation over {rounds} interleaved rounds"
    return with_notes(make_table(record["rows"], columns), record, note, spread)


def run(args: argparse.Namespace) -> int:
    """Times all attacks through fastgn and by direct calls, and writes the JSON record."""
    cuda, eps = torch.cuda.is_available(), parse_number(args.eps)
    check(0 < eps <= 1, f"--eps {args.eps} must be above 0 and at most 1 (0..1 pixels)")
    output = gpu_output(args, "attacks")
    where = torch.device("cuda" if cuda else "cpu")
    model, side = network(args.model)
    noise = torch.rand(args.images, 3, side, side, generator=torch.Generator().manual_seed(0))
    model, images = model.to(where), noise.to(where)
    with torch.no_grad():
        labels = torch.cat([model(x).argmax(1) for x in images.split(args.batch_size)])
    others = ("bf16", "compiled") if cuda and not args.smoke else ("bf16",)
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "e.json"

        def ours(attacker: Attacker, name: str, arm: str) -> None:
            found[arm] = through_evaluate(attacker, model, images, labels, name, eps, file)

        arms: dict[str, Callable[[], object]] = {}
        for name in args.attacks:
            arms[name] = functools.partial(
                direct_call, model, images, labels, name, eps, args.batch_size
            )
            for way in ("fp32", *(others if name == PGD else ())):
                precision: Precision = "bf16" if way == "bf16" else "fp32"
                attacker = Attacker("Linf", 0, args.batch_size, where, precision, way == "compiled")
                arms[f"{name}, {way}"] = functools.partial(ours, attacker, name, f"{name}, {way}")
        calls = {arm: CALLS.get(arm.partition(",")[0], 1) for arm in arms}
        timings = interleaved(arms, rounds=args.rounds, calls=calls, warmup=1)
    record = {
        "file": output.name,
        "device": device_name(),
        "meaningful_times": cuda,
        "model": args.model,
        "img_size": side,
        "images": "noise",
        "number": args.images,
        "batch_size": args.batch_size,
        "eps": eps,
        "rows": rows(args, timings, found, others),
        **environment(),
    }
    write_json(output, record)
    print(f"{table(record)}\nThe overhead should stay below {TARGET:.0%}. -> {output}")
    return 0


def main() -> int:
    """Runs the benchmark and returns its exit status: 2 for a user's mistake, else 0."""
    args = make_options().parse_args()
    if args.smoke:
        args.model, args.images, args.batch_size, args.rounds = "tiny", 4, 2, 2
        args.attacks = [name for name in args.attacks if name != "autoattack"]
        args.output = args.output or ROOT / "runs" / "attacks_smoke.json"
    return exit_status("attacks.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
