"""What fastgn.evaluate costs over calling the attacks directly.

    python -m benchmarks.evidence.attacks --batch-size 128 --images 512 --eps 1/255

clean, PGD-20, AutoAttack's apgd-ce and its standard version: batch by batch through
`Attacker.find_correct`, each batch's outcomes saved, as evaluate() does for one model, beside a
plain loop (clean and PGD) or one call of pyautoattack for all images. That call attacks what an
attack before has left in full batches, which evaluate's batches, each by itself, do not: their
price is in the figure. The overhead is to stay below 5 %. Then PGD-20 with gradients in bf16, and
with --compile the compiled model's, beside fp32 ones: how many times as fast, and the share of
verdicts that differ.

--model: autoattack-resnet18, the CIFAR-10 ResNet-18 in pyautoattack (on CUDA, where none is named),
tiny, three untrained layers (on a CPU), or any name that fastgn.train takes, untrained. Images are
noise, or the first test images of --data, an .npz with test_images (uint8 NHWC). A label is what
the model says of the image, so that both ways attack every one.

Writes benchmarks/results/attacks_<device>.json on CUDA; on a CPU, whose seconds mean nothing but by
their ratios, runs/attacks_cpu.json.
"""

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyautoattack
import torch
import torch.nn.functional as F
from pyautoattack.examples.resnet import ResNet18
from torch import Tensor, nn

from benchmarks.common.arguments import RESULTS, ROOT, positive_int
from benchmarks.common.records import hold
from benchmarks.common.timing import Timing, interleaved, summary
from fastgn.analysis.attacker import Attacker, Precision
from fastgn.analysis.outcomes import make_part, make_rows
from fastgn.analysis.parts import Parts
from fastgn.config.groups import ArchitectureConfig
from fastgn.errors import UserError
from fastgn.files import write_json
from fastgn.metrics import environment
from fastgn.models import network

TARGET = 0.05
STEPS = 20
PGD = f"pgd-{STEPS}"
ATTACKS = ("clean", PGD, "apgd-ce", "autoattack")
LABELS = 10


def tiny() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.GELU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GELU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, LABELS)),
    )


def build_network(name: str, img_size: int | None) -> tuple[nn.Module, int]:
    """The model in eval mode on the CPU, and the side of its images. Raises UserError."""
    torch.manual_seed(0)
    if name == "tiny":
        model, side = tiny(), img_size or 16
    elif name == "autoattack-resnet18":
        if img_size not in (None, 32):
            raise UserError(f"--img-size {img_size}: {name} takes 32")
        file = Path(pyautoattack.__file__).parent / "examples" / "model_test.pt"
        model, side = ResNet18(), 32
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    else:
        built, _ = network.build_model(ArchitectureConfig(model=name, img_size=img_size), LABELS)
        model, side = built, built.img_size
    return model.eval().requires_grad_(False), side


def images_of(data: Path | None, count: int, side: int) -> Tensor:
    """count x 3 x side x side in 0..1. Raises UserError."""
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
    """The accuracy, as one would write it without fastgn."""
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
    """Every image's outcome, 0 or 1."""
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
    """Round by round."""
    pairs = zip(above.rounds, below.rounds, strict=True)
    return summary([a / b - less for a, b in pairs])


def radius(text: str) -> float:
    """Of the Linf ball, as 4/255 or 0.0157; an argparse type."""
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text} is no number such as 4/255 or 0.0157") from None
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and at most 1 (0..1 pixels)")
    return value


def parse(cuda: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="autoattack-resnet18" if cuda else "tiny")
    parser.add_argument("--img-size", type=positive_int, help="side in pixels; the model's own")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--data", type=Path, help=".npz with test_images in place of noise")
    parser.add_argument("--images", type=positive_int, default=512 if cuda else 32)
    parser.add_argument("--batch-size", type=positive_int, default=128 if cuda else 16)
    parser.add_argument("--eps", type=radius, default=1 / 255, help="Linf, in 0..1 pixels")
    parser.add_argument("--rounds", type=positive_int, default=3)
    parser.add_argument("--calls", type=positive_int, help="a round, of clean and PGD; 5, or 1")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda)
    parser.add_argument("--smoke", action="store_true", help="toy sizes, two rounds")
    parser.add_argument("--output", type=Path, help="JSON")
    args = parser.parse_args()
    if args.smoke:
        args.model, args.images, args.batch_size, args.rounds = "tiny", 4, 2, 2
        args.img_size, args.data, args.calls, args.compile = 8, None, 1, False
        args.attacks = [name for name in args.attacks if name != "autoattack"]
    args.calls = args.calls or 5
    return args


def main() -> int:
    cuda = torch.cuda.is_available()
    args = parse(cuda)
    card = torch.cuda.get_device_name() if cuda else "cpu"
    folder = RESULTS if cuda and not args.smoke else ROOT / "runs"
    slug = re.sub(r"\W+", "_", card.lower())
    output = args.output or folder / f"attacks_{slug}.json"
    hold(output)
    device = torch.device("cuda" if cuda else "cpu")
    try:
        model, side = build_network(args.model, args.img_size)
        images = images_of(args.data, args.images, side).to(device)
    except UserError as error:
        print(f"attacks.py: error: {error}", file=sys.stderr)
        return 2
    model.to(device)
    with torch.no_grad():
        labels = torch.cat([model(x).argmax(1) for x in images.split(args.batch_size)])
    others = ("bf16", "compiled") if args.compile else ("bf16",)
    arms: dict[str, Callable[[], object]] = {}
    found: dict[str, str] = {}
    calls = {}
    with tempfile.TemporaryDirectory() as temporary:

        def add(name: str, way: str) -> None:
            precision: Precision = "bf16" if way == "bf16" else "fp32"
            compiled = way == "compiled"
            attacker = Attacker("Linf", 0, args.batch_size, device, precision, compiled)
            arm = f"{name}, {way}"

            def run() -> None:
                found[arm] = through_evaluate(
                    attacker, model, images, labels, name, args.eps, Path(temporary) / "e.json"
                )

            arms[arm] = run

        for name in args.attacks:
            arms[name] = lambda name=name: direct_call(
                model, images, labels, name, args.eps, args.batch_size
            )
            add(name, "fp32")
            for way in others if name == PGD else ():
                add(name, way)
        for arm in arms:
            calls[arm] = args.calls if arm.startswith(("clean", PGD)) else 1
        timings = interleaved(arms, rounds=args.rounds, calls=calls, warmup=1)
    rows = []
    for name in args.attacks:
        ours, bits = timings[f"{name}, fp32"], found[f"{name}, fp32"]
        row = {
            "attack": name,
            "calls_a_round": calls[name],
            "robust": bits.count("1") / len(bits),
            "overhead": ratio(ours, timings[name], less=1),
        }
        row["enough"] = row["overhead"]["mean"] < TARGET
        if cuda:
            row["images_per_s"] = summary([args.images / s for s in ours.rounds])
            row["direct_images_per_s"] = summary([args.images / s for s in timings[name].rounds])
        for way in others if name == PGD else ():
            other = found[f"{name}, {way}"]
            differ = sum(a != b for a, b in zip(bits, other, strict=True)) / len(bits)
            speed = ratio(ours, timings[f"{name}, {way}"])
            row[way] = {"times_as_fast": speed, "differing_verdicts": differ}
            print(
                f"{name}, {way}: {speed['mean']:.2f} ± {speed['std']:.2f} times as fast, "
                f"{differ:.2%} other verdicts"
            )
        rows.append(row)
        value = row["overhead"]
        print(
            f"{name}: {value['mean']:+.1%} ± {value['std']:.1%} (n = {value['n']}) over the direct "
            f"call, to stay below {TARGET:.0%}; {row['robust']:.1%} of the images withstand"
        )
    content = {
        "device": card,
        "meaningful_times": cuda,
        "model": args.model,
        "img_size": side,
        "images": "noise" if args.data is None else args.data.name,
        "number": args.images,
        "batch_size": args.batch_size,
        "eps": args.eps,
        "rows": rows,
    }
    write_json(output, content | environment())
    print(f"-> {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
