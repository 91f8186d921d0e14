"""Overhead of fastgn.evaluate over direct calls of the attacks.

fastgn's evaluation attacks batch by batch and saves the outcomes of each batch. It is compared with
a plain loop (clean and PGD-20), or with one call of pyautoattack for all images (apgd-ce and the
standard AutoAttack). The overhead should stay below 5 %.

    python -m benchmarks.evidence.attacks --batch-size 128 --images 512 --eps 1/255

The direct call fills batches with images that an earlier attack has left, and fastgn's batches stay
by themselves: that is in the overhead. PGD-20 is also timed with gradients in bf16, and with
--compile with a compiled model: how many times as fast, and the share of verdicts that differ.

--model: autoattack-resnet18 (the CIFAR-10 network of pyautoattack), tiny (three untrained layers),
or any untrained model of fastgn.train. Images are noise, or the first test images of --data. Labels
are the model's own answers, so that both ways attack every image.

Writes benchmarks/results/attacks_<device>.json. On a CPU only the ratios mean something.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
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
from fastgn.config.groups import ArchitectureConfig
from fastgn.errors import UserError
from fastgn.metrics import environment
from fastgn.models import network as networks

TARGET = 0.05
STEPS = 20
PGD = f"pgd-{STEPS}"
ATTACKS = ("clean", PGD, "apgd-ce", "autoattack")
LABELS = 10


def tiny() -> nn.Module:
    """Returns a network of three layers with random weights."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.GELU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GELU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, LABELS)),
    )


def network(name: str, img_size: int | None) -> tuple[nn.Module, int]:
    """Returns a model in eval mode on the CPU, and the side of its images in pixels.

    Raises UserError if the name or the image size is unknown.
    """
    torch.manual_seed(0)
    if name == "tiny":
        model, side = tiny(), img_size or 16
    elif name == "autoattack-resnet18":
        if img_size not in (None, 32):
            raise UserError(f"--img-size {img_size}: {name} takes only images of 32 pixels")
        file = Path(pyautoattack.__file__).parent / "examples" / "model_test.pt"
        model, side = ResNet18(), 32
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    else:
        built, _ = networks.build_model(ArchitectureConfig(model=name, img_size=img_size), LABELS)
        model, side = built, built.img_size
    return model.eval().requires_grad_(False), side


def images_of(data: Path | None, count: int, side: int) -> Tensor:
    """Returns images (count, 3, side, side) in 0..1, from the file `data` or, if None, random ones.

    Raises UserError if the file does not have such images.
    """
    if data is None:
        return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    try:
        with np.load(data) as arrays:
            images_BHWC = arrays["test_images"][:count]
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"--data {data} cannot be read: {error}") from None
    if images_BHWC.shape != (count, side, side, 3):
        shape = " x ".join(map(str, images_BHWC.shape))
        raise UserError(
            f"--data {data}: {count} images of {side} x {side} x 3 are asked of {shape}"
        )
    return torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).contiguous().float() / 255


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


def radius(text: str) -> float:
    """Returns a radius such as 4/255 or 0.0157. This is a type for argparse."""
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text} is no number such as 4/255 or 0.0157") from None
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and at most 1 (0..1 pixels)")
    return value


def parse() -> argparse.Namespace:
    """Parses the command line and returns the options."""
    cuda = torch.cuda.is_available()
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", default="autoattack-resnet18" if cuda else "tiny")
    add("--img-size", type=positive_int, help="height and width in pixels; default: the model's")
    add("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    add("--data", type=Path, help="an .npz with test_images (N, H, W, 3), uint8, instead of noise")
    add("--images", type=positive_int, default=512 if cuda else 32, help="number of images")
    add("--batch-size", type=positive_int, default=128 if cuda else 16)
    add("--eps", type=radius, default=1 / 255, help="radius in Linf, for pixels in 0..1")
    add("--rounds", type=positive_int, default=3)
    add("--calls", type=positive_int, default=5, help="calls per round of clean and PGD-20")
    add("--compile", action=argparse.BooleanOptionalAction, default=cuda)
    add("--smoke", action="store_true", help="use toy sizes and two rounds")
    args = parser.parse_args()
    if args.smoke:
        args.model, args.images, args.batch_size, args.rounds = "tiny", 4, 2, 2
        args.img_size, args.data, args.calls, args.compile = 8, None, 1, False
        args.attacks = [name for name in args.attacks if name != "autoattack"]
        args.output = args.output or ROOT / "runs" / "attacks_smoke.json"
    return args


def rows(
    args: argparse.Namespace,
    timings: dict[str, Timing],
    found: dict[str, str],
    others: Sequence[str],
) -> list[dict]:
    """Returns the results as a list of dicts for the JSON record, one for each attack.

    timings: name of an attack and of how it was run -> its seconds. found: the same names ->
    outcome of each image, as "0" or "1". others: ways to run PGD-20, such as "compiled", that are
    compared.
    """
    out = []
    for name in args.attacks:
        ours, bits = timings[f"{name}, fp32"], found[f"{name}, fp32"]
        row = {
            "attack": name,
            "calls_a_round": args.calls if name in ("clean", PGD) else 1,
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
    cuda, output = torch.cuda.is_available(), gpu_output(args, "attacks")
    where = torch.device("cuda" if cuda else "cpu")
    model, side = network(args.model, args.img_size)
    images = images_of(args.data, args.images, side).to(where)
    model.to(where)
    with torch.no_grad():
        labels = torch.cat([model(x).argmax(1) for x in images.split(args.batch_size)])
    others = ("bf16", "compiled") if args.compile else ("bf16",)
    arms: dict[str, Callable[[], object]] = {}
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:

        def add(name: str, way: str) -> None:
            precision: Precision = "bf16" if way == "bf16" else "fp32"
            compiled = way == "compiled"
            attacker = Attacker("Linf", 0, args.batch_size, where, precision, compiled)
            arm = f"{name}, {way}"

            def call() -> None:
                file = Path(temporary) / "e.json"
                found[arm] = through_evaluate(attacker, model, images, labels, name, args.eps, file)

            arms[arm] = call

        for name in args.attacks:
            arms[name] = lambda name=name: direct_call(
                model, images, labels, name, args.eps, args.batch_size
            )
            for way in ("fp32", *(others if name == PGD else ())):
                add(name, way)
        calls = {arm: args.calls if arm.startswith(("clean", PGD)) else 1 for arm in arms}
        timings = interleaved(arms, rounds=args.rounds, calls=calls, warmup=1)
    record = {
        "file": output.name,
        "device": device_name(),
        "meaningful_times": cuda,
        "model": args.model,
        "img_size": side,
        "images": "noise" if args.data is None else args.data.name,
        "number": args.images,
        "batch_size": args.batch_size,
        "eps": args.eps,
        "rows": rows(args, timings, found, others),
        **environment(),
    }
    write_json(output, record)
    print(f"{table(record)}\nThe overhead should stay below {TARGET:.0%}. -> {output}")
    return 0


def main() -> int:
    """Parses the command line, runs the benchmark, and returns the exit status: 2 for a user's
    mistake, else 0."""
    args = parse()
    return exit_status("attacks.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
