"""Images a second of each loader, and whether a training step waits for them.

    python benchmarks/loader.py --need 2000  # images a second that the step takes
    python benchmarks/loader.py --cost benchmarks/results/cost_nvidia_h200.json

`device`: CIFAR-10's number and size of arrays, with its augmentation. `torch`: JPEGs of ImageNet's
usual sizes, made here and read from the page cache, at 224 pixels with the paper's augmentation:
decoding and augmenting count, the disk does not. Both are `data.build_loader`'s own.

A round is a number of batches in the middle of an epoch, workers running and their queues drained.
First the consumer takes every batch at once, which gives images a second; then it works as long on
a batch as --need allows, and the share of its time that it waits is what training would lose.

Writes benchmarks/results/loader_<device>.json; on a CPU into runs/ alone, for its times are those
of one machine.
"""

import argparse
import dataclasses
import io
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timing import summary, synchronize

from fastgn.checkpoint import write_bytes, write_json
from fastgn.config import AugmentationConfig, Config, DatasetConfig, UserError, check
from fastgn.data import build_loader
from fastgn.data.batch import Batch
from fastgn.data.datasets import Arrays, Dataset, Files
from fastgn.metrics import environment

ROOT = Path(__file__).parent.parent
SIZES = ((500, 375), (375, 500), (500, 333), (500, 500))
"""Width and height of the most frequent ImageNet images."""
PAPER = AugmentationConfig(aa="rand-m9-mstd0.5-inc1", reprob=0.25, mixup=0.8, cutmix=1.0)
MEAN, STD = torch.full((1, 3, 1, 1), 0.45), torch.full((1, 3, 1, 1), 0.225)


@dataclasses.dataclass(frozen=True)
class Case:
    """A loader and what it loads."""

    loader: str
    images: str
    dataset: Dataset
    augmentation: AugmentationConfig
    img_size: int


def jpeg(size: tuple[int, int], draw: torch.Generator) -> bytes:
    """About 110 KB, ImageNet's mean: smooth shapes with a photograph's grain."""
    width, height = size
    coarse = torch.rand(1, 3, height // 24, width // 24, generator=draw)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
    grain = torch.randn(1, height, width, generator=draw)
    pixels = (255 * (smooth + 0.062 * grain)).clamp(0, 255).to(torch.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(out, "JPEG", quality=90)
    return out.getvalue()


def jpeg_folder(folder: Path, number: int) -> list[Path]:
    draw = torch.Generator().manual_seed(0)
    paths = [folder / f"{i:05d}.jpg" for i in range(number)]
    for i, path in enumerate(paths):
        write_bytes(path, jpeg(SIZES[i % len(SIZES)], draw))
    return paths


def arrays_case(number: int) -> Case:
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (number, 3, 32, 32), dtype=torch.uint8, generator=draw)
    split = Arrays(pixels, torch.arange(number) % 10)
    dataset = Dataset("cifar10", split, split, tuple("0123456789"))
    augmentation = AugmentationConfig(reprob=0.25, mixup=0.8, cutmix=1.0)
    return Case("device", f"{number} arrays, 32 x 32", dataset, augmentation, 32)


def jpeg_case(folder: Path, number: int, epoch: int) -> Case:
    """An epoch as long as the measurement, over few files."""
    paths = [str(path) for path in jpeg_folder(folder, number)]
    kib = statistics.fmean(Path(path).stat().st_size for path in paths) / 1024
    listed = (paths * (epoch // number + 1))[:epoch]
    split = Files(listed, torch.arange(epoch) % 1000)
    dataset = Dataset("jpeg", split, split, tuple(map(str, range(1000))))
    images = f"{number} JPEGs, {kib:.0f} KiB in the mean"
    return Case("torch", images, dataset, PAPER, 224)


def iterator(case: Case, batch_size: int, workers: int, device: torch.device) -> Iterator[Batch]:
    """One epoch of the trainer's own loader."""
    data = DatasetConfig(loader=case.loader, workers=workers)
    loader = build_loader(
        dataclasses.replace(Config(), dataset=data, augmentation=case.augmentation),
        case.dataset,
        img_size=case.img_size,
        mean=MEAN,
        std=STD,
        batch_size=batch_size,
        grad_accum_steps=1,
        rank=0,
        ranks=1,
        device=device,
    )
    return loader.epoch(0)


@dataclasses.dataclass(frozen=True)
class Round:
    """What a consumer saw."""

    images: int
    seconds: float
    waited_s: float


def consume(batches: Iterator[Batch], number: int, work_s: float) -> Round:
    """Takes a number of batches and works work_s on each: asleep, as a host that has queued a step
    is."""
    images, waited_s = 0, 0.0
    synchronize()
    began = time.perf_counter()
    for _ in range(number):
        asked = time.perf_counter()
        batch = next(batches)
        synchronize()
        waited_s += time.perf_counter() - asked
        images += len(batch.images_BCHW)
        time.sleep(work_s)
    return Round(images, time.perf_counter() - began, waited_s)


def measure(
    case: Case,
    *,
    batch_size: int,
    workers: int,
    batches: int,
    rounds: int,
    need: float | None,
    device: torch.device,
) -> dict[str, Any]:
    """A loader's row. need: images a second that the consumer would take."""
    source = iterator(case, batch_size, workers, device)
    try:
        consume(source, warmup(case, workers), 0)
        free = [consume(source, batches, 0) for _ in range(rounds)]
        work_s = batch_size / need if need else 0
        paced = [consume(source, batches, work_s) for _ in range(rounds)] if need else []
    finally:
        source.close()  # ends its workers
    rates = summary([r.images / r.seconds for r in free])
    return {
        "loader": case.loader,
        "images": case.images,
        "img_size": case.img_size,
        "batch_size": batch_size,
        "workers": workers if case.loader == "torch" else 0,
        "images_per_s": rates,
        "need_images_per_s": need,
        "wait_share": summary([r.waited_s / r.seconds for r in paced]) if paced else None,
        "enough": rates["mean"] >= need if need else None,
    }


def warmup(case: Case, workers: int) -> int:
    """Batches until the queues hold nothing that the workers made before anyone asked."""
    return 2 * workers + 2 if case.loader == "torch" else 2


def need_of(cost: Path) -> float:
    """The fastest gradnorm step's images a second in benchmarks/cost.py's record. Raises
    UserError."""
    try:
        record = json.loads(cost.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--cost {cost} cannot be read: {error}") from None
    rows = [row for row in record.get("rows", ()) if row.get("method") == "gradnorm"]
    rates = [row["images_per_s"] for row in rows if row.get("images_per_s")]
    check(bool(rates), f"--cost {cost}: it has no gradnorm row with images_per_s (of a GPU)")
    return max(rates)


def main() -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loaders", nargs="+", choices=("device", "torch"), default=None)
    needs = parser.add_mutually_exclusive_group()
    needs.add_argument("--need", type=float, metavar="IMAGES_PER_S", help="what the step takes")
    needs.add_argument("--cost", type=Path, help="benchmarks/cost.py's JSON, for the same")
    parser.add_argument("--batch-size", type=int, default=64 if cuda else 16)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of the torch loader")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=30 if cuda else 4, help="a round")
    parser.add_argument("--files", type=int, default=512 if cuda else 64, help="JPEGs to make")
    parser.add_argument("--smoke", action="store_true", help="toy sizes")
    parser.add_argument("--output", type=Path, help="JSON")
    args = parser.parse_args()
    if args.smoke:
        args.batch_size, args.workers, args.rounds, args.batches, args.files = 2, 1, 2, 2, 4

    device = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name() if cuda else "cpu"
    slug = re.sub(r"\W+", "_", name.lower())
    results = ROOT / "benchmarks" / "results" if cuda else ROOT / "runs"
    output = args.output or results / f"loader_{slug}.json"
    need, why = args.need, None
    try:
        check(need is None or need > 0, f"--need {need} must be positive")
        workers = min(args.workers, os.cpu_count() or 1)  # as build_loader has it
        check(workers >= 0, f"--workers {workers} must be at least 0")
        if args.cost is not None and args.cost.exists():
            need = need_of(args.cost)
        elif args.cost is not None:
            why = f"--cost {args.cost}: there is no such file"
            print(f"{why}: images a second alone, no waiting")
    except UserError as error:
        print(f"loader.py: error: {error}", file=sys.stderr)
        return 2

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for loader in args.loaders or ("device", "torch"):
            taken = (2 * args.rounds + 1) * args.batches + 2 * workers + 4
            if loader == "torch":
                case = jpeg_case(Path(folder), args.files, taken * args.batch_size)
            else:
                case = arrays_case(max(50_000, taken * args.batch_size))
            row = measure(
                case,
                batch_size=args.batch_size,
                workers=workers,
                batches=args.batches,
                rounds=args.rounds,
                need=need,
                device=device,
            )
            rows.append(row)
            content = {"device": name, "meaningful_times": cuda and not args.smoke, "rows": rows}
            content |= {"need_unknown": why, "batches_per_round": args.batches}
            write_json(output, content | environment())
            print(line_of(row), flush=True)
    print(f"{'; '.join(map(line_of, rows))} -> {output}")
    return 0


def line_of(row: dict[str, Any]) -> str:
    rate, waits = row["images_per_s"], row["wait_share"]
    text = f"{row['loader']}: {rate['mean']:.0f} ± {rate['std']:.0f} images/s"
    if waits is not None:
        text += f" of {row['need_images_per_s']:.0f} needed, waits {100 * waits['mean']:.0f} %"
    return text


if __name__ == "__main__":
    sys.exit(main())
