"""Images a second of each loader, and whether a training step waits for them.

    python -m benchmarks.data.loader --need 2000  # images a second that the step takes
    python -m benchmarks.data.loader --cost benchmarks/results/cost_nvidia_h200.json
    python -m benchmarks.data.loader --data-dir FOLDER --sheet sheet.png  # of any images below it

`device`: CIFAR-10's number and size of arrays, with its augmentation. The others: JPEGs at 224
pixels with the paper's augmentation, from the page cache: decoding and augmenting count, the disk
does not. The files are those below --data-dir, or ones of ImageNet's usual sizes, made here.
`torch` and `dali` are `data.build_loader`'s own, `timm` is timm's create_loader with the same
recipe, as timm's training script has it.

The loaders take turns, round after round. A round is a number of batches in the middle of an epoch,
workers running and their queues drained. First the consumer takes every batch at once, which gives
images a second, and CPU seconds an image of all processes; then it works as long on a batch as
--need allows, and the share of its time that it waits is what training would lose.

--sheet draws 32 of the images twice, the PIL loader's and DALI's side by side.

Writes benchmarks/results/loader_<device>.json; on a CPU its times are those of one machine, and the
ratios alone mean something.
"""

import argparse
import dataclasses
import importlib.util
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
import torchvision
from PIL import Image
from timm.data import create_loader
from timm.data.mixup import Mixup

from benchmarks.common.arguments import RESULTS, ROOT, positive_int
from benchmarks.common.records import hold
from benchmarks.common.timing import summary, synchronize
from fastgn.config import Config
from fastgn.config.groups import AugmentationConfig, DatasetConfig
from fastgn.data.batch import Batch
from fastgn.data.datasets import Arrays, Dataset, Files
from fastgn.data.loader import build_loader
from fastgn.data.transform import replace_posterize
from fastgn.errors import UserError, check
from fastgn.files import write_bytes, write_json
from fastgn.metrics import environment

SIZES = ((500, 375), (375, 500), (500, 333), (500, 500))
"""Width and height of the most frequent ImageNet images."""
PAPER = AugmentationConfig(aa="rand-m9-mstd0.5-inc1", reprob=0.25, mixup=0.8, cutmix=1.0)
LOADERS = ("device", "torch", "timm", "dali")
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


def files_below(folder: Path) -> list[Path]:
    """Raises UserError where there is none."""
    paths = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg")]
    check(bool(paths), f"--data-dir {folder}: there are no JPEGs below it")
    return paths


def files_case(loader: str, paths: list[Path], epoch: int) -> Case:
    """An epoch as long as the measurement, over few files."""
    kib = statistics.fmean(path.stat().st_size for path in paths) / 1024
    listed = (list(map(str, paths)) * (epoch // len(paths) + 1))[:epoch]
    split = Files(listed, torch.arange(epoch) % 1000)
    dataset = Dataset("jpeg", split, split, tuple(map(str, range(1000))))
    images = f"{len(paths)} JPEGs, {kib:.0f} KiB in the mean"
    return Case(loader, images, dataset, PAPER, 224)


def iterator(case: Case, batch_size: int, workers: int, device: torch.device) -> Iterator[Batch]:
    """One epoch of the trainer's own loader, or of timm's."""
    if case.loader == "timm":
        return timm_batches(case, batch_size, workers, device)
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


class TimmImages(torch.utils.data.Dataset):
    """What timm's create_loader takes: it sets `transform`."""

    transform: Any = None

    def __init__(self, split: Files):
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.split.load_image(index)), int(self.split.labels_N[index])


def timm_batches(
    case: Case, batch_size: int, workers: int, device: torch.device
) -> Iterator[Batch]:
    """timm's loader and its mixing. Erasing is the workers' on a CPU, the device's on CUDA."""
    cfg = case.augmentation
    assert isinstance(case.dataset.train, Files)
    loader = create_loader(
        TimmImages(case.dataset.train),
        case.img_size,
        batch_size,
        is_training=True,
        use_prefetcher=device.type == "cuda",
        re_prob=cfg.reprob,
        re_mode=cfg.remode,
        scale=cfg.scale,
        hflip=0.5,
        color_jitter=cfg.color_jitter,
        auto_augment=cfg.aa,
        interpolation=cfg.train_interpolation,
        num_workers=workers,
        persistent_workers=False,
        pin_memory=device.type == "cuda",
        device=device,
    )
    for step in getattr(loader.dataset.transform, "transforms", ()):
        replace_posterize(step)
    mix = Mixup(cfg.mixup, cfg.cutmix, switch_prob=0.5, label_smoothing=0.1, num_classes=1000)
    for images, labels in loader:
        yield Batch(*mix(images, labels.to(device)))


@dataclasses.dataclass(frozen=True)
class Round:
    """What a consumer saw."""

    images: int
    seconds: float
    waited_s: float
    cpu_s: float


def consume(batches: Iterator[Batch], number: int, work_s: float) -> Round:
    """Takes a number of batches and works work_s on each: asleep, as a host that has queued a step
    is."""
    images, waited_s = 0, 0.0
    synchronize()
    cpu = cpu_seconds()
    began = time.perf_counter()
    for _ in range(number):
        asked = time.perf_counter()
        batch = next(batches)
        synchronize()
        waited_s += time.perf_counter() - asked
        images += len(batch.images_BCHW)
        time.sleep(work_s)
    seconds = time.perf_counter() - began
    return Round(images, seconds, waited_s, cpu_seconds() - cpu)


def cpu_seconds() -> float:
    """Of this process and those below it that live, threads included (Linux)."""
    parents, used = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has just ended
            continue
        number = int(path.parent.name)
        parents[number] = int(fields[1])
        used[number] = int(fields[11]) + int(fields[12])
    total, me = 0, os.getpid()
    for number in used:
        above = number
        while above not in (me, 0):
            above = parents.get(above, 0)
        total += used[number] if above else 0
    return total / os.sysconf("SC_CLK_TCK")


def measure(
    cases: list[Case],
    *,
    batch_size: int,
    workers: int,
    batches: int,
    rounds: int,
    need: float | None,
    device: torch.device,
) -> list[dict[str, Any]]:
    """A row a loader. need: images a second that the consumer would take."""
    sources = [iterator(case, batch_size, workers, device) for case in cases]
    free: list[list[Round]] = [[] for _ in cases]
    paced: list[list[Round]] = [[] for _ in cases]
    work_s = batch_size / need if need else 0
    try:
        for number in range(rounds + 1):
            for source, case, these, those in zip(sources, cases, free, paced, strict=True):
                consume(source, warmup(case, workers), 0)
                if not number:
                    continue  # what is compiled and cached
                these.append(consume(source, batches, 0))
                if need:
                    those.append(consume(source, batches, work_s))
    finally:
        for source in sources:
            source.close()  # type: ignore[attr-defined]
    return [
        {
            "loader": case.loader,
            "images": case.images,
            "img_size": case.img_size,
            "batch_size": batch_size,
            "workers": 0 if case.loader == "device" else workers,
            "images_per_s": summary([r.images / r.seconds for r in these]),
            "cpu_ms_an_image": summary([1e3 * r.cpu_s / r.images for r in these]),
            "need_images_per_s": need,
            "wait_share": summary([r.waited_s / r.seconds for r in those]) if those else None,
            "enough": statistics.fmean(r.images / r.seconds for r in these) >= need
            if need
            else None,
            "rounds": [
                {"images_per_s": r.images / r.seconds, "cpu_ms_an_image": 1e3 * r.cpu_s / r.images}
                for r in these
            ],
        }
        for case, these, those in zip(cases, free, paced, strict=True)
    ]


def over(rows: list[dict[str, Any]], name: str, base: str) -> dict[str, dict[str, float]] | None:
    """How many times a loader is as fast as another, and how many times less CPU time it takes,
    round by round."""
    found = {row["loader"]: row["rounds"] for row in rows}
    if not {name, base} <= found.keys():
        return None
    pairs = list(zip(found[name], found[base], strict=True))
    speeds = [x["images_per_s"] / y["images_per_s"] for x, y in pairs]
    cpu = [y["cpu_ms_an_image"] / x["cpu_ms_an_image"] for x, y in pairs]
    return {
        "images_per_s": summary(speeds) | {"median": statistics.median(speeds)},
        "cpu_ms_an_image": summary(cpu) | {"median": statistics.median(cpu)},
    }


def warmup(case: Case, workers: int) -> int:
    """Batches until the queues hold nothing that the workers made before anyone asked."""
    return 2 if case.loader == "device" else 2 * workers + 4


def sheet(paths: list[Path], file: Path, device: torch.device) -> None:
    """Eight rows of four pairs: left by PIL, right by DALI."""
    pair = []
    for loader in ("torch", "dali"):
        plain = AugmentationConfig(aa=PAPER.aa)
        case = dataclasses.replace(files_case(loader, paths, 32), augmentation=plain)
        pair.append(next(iterator(case, 32, 0, device)).images_BCHW.cpu())
    together = torch.stack(pair, 1).flatten(0, 1)
    grid = torchvision.utils.make_grid(together, nrow=8, padding=4, pad_value=1.0)
    pixels = (255 * grid).round().to(torch.uint8).permute(1, 2, 0).numpy()
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    write_bytes(file, out.getvalue())
    difference = (255 * (pair[0] - pair[1])).abs().mean((1, 2, 3))
    print(f"{file}: mean difference {difference.mean():.2f} of 255, worst {difference.max():.2f}")


def need_of(cost: Path) -> float:
    """The fastest gradnorm step's images a second in benchmarks/step/cost.py's record. Raises
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
    parser.add_argument("--loaders", nargs="+", choices=LOADERS, default=None)
    parser.add_argument("--data-dir", type=Path, help="JPEGs to read")
    parser.add_argument("--sheet", type=Path, help="PNG of 32 images by PIL and DALI; nothing else")
    needs = parser.add_mutually_exclusive_group()
    needs.add_argument("--need", type=float, metavar="IMAGES_PER_S", help="what the step takes")
    needs.add_argument("--cost", type=Path, help="benchmarks/step/cost.py's JSON, for the same")
    parser.add_argument("--batch-size", type=positive_int, default=64 if cuda else 16)
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="of every loader but device"
    )
    parser.add_argument("--rounds", type=positive_int, default=3)
    parser.add_argument("--batches", type=positive_int, default=30 if cuda else 4, help="a round")
    parser.add_argument(
        "--files", type=positive_int, default=512 if cuda else 64, help="JPEGs to make"
    )
    parser.add_argument("--smoke", action="store_true", help="toy sizes")
    parser.add_argument("--output", type=Path, help="JSON")
    args = parser.parse_args()
    if args.smoke:
        args.batch_size, args.workers, args.rounds, args.batches, args.files = 2, 1, 2, 2, 4

    torch.set_num_threads(
        1
    )  # as torchrun has it: the loaders have threads or processes of their own
    device = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name() if cuda else "cpu"
    slug = re.sub(r"\W+", "_", name.lower())
    results = RESULTS if cuda else ROOT / "runs"
    output = args.output or results / f"loader_{slug}.json"
    hold(output)
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

    with tempfile.TemporaryDirectory() as folder:
        try:
            below = files_below(args.data_dir) if args.data_dir else None
        except UserError as error:
            print(f"loader.py: error: {error}", file=sys.stderr)
            return 2
        paths = below or jpeg_folder(Path(folder), args.files)
        if args.sheet:
            sheet(paths, args.sheet, device)
            return 0
        taken = (args.rounds + 1) * (2 * workers + 4) + 2 * args.rounds * args.batches
        epoch = taken * args.batch_size
        cases = [
            arrays_case(max(50_000, epoch)) if x == "device" else files_case(x, paths, epoch)
            for x in args.loaders or installed()
        ]
        rows = measure(
            cases,
            batch_size=args.batch_size,
            workers=workers,
            batches=args.batches,
            rounds=args.rounds,
            need=need,
            device=device,
        )
    ratios = {f"dali over {x}": over(rows, "dali", x) for x in ("torch", "timm")}
    content = {"device": name, "meaningful_times": cuda and not args.smoke, "rows": rows}
    content |= {"ratios": {k: v for k, v in ratios.items() if v}}
    content |= {"need_unknown": why, "batches_per_round": args.batches}
    write_json(output, content | environment())
    for ratio, value in content["ratios"].items():
        speed, cpu = value["images_per_s"], value["cpu_ms_an_image"]
        print(
            f"{ratio}: {speed['mean']:.2f} ± {speed['std']:.2f} times as fast, "
            f"{cpu['mean']:.2f} ± {cpu['std']:.2f} times less CPU time (n = {cpu['n']})"
        )
    print(f"{'; '.join(map(line_of, rows))} -> {output}")
    return 0


def installed() -> list[str]:
    """The loaders that can run here."""
    try:
        found = importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        found = False
    return [x for x in LOADERS if x != "dali" or found]


def line_of(row: dict[str, Any]) -> str:
    rate, waits = row["images_per_s"], row["wait_share"]
    text = f"{row['loader']}: {rate['mean']:.0f} ± {rate['std']:.0f} images/s, "
    text += f"{row['cpu_ms_an_image']['mean']:.2f} CPU ms an image"
    if waits is not None:
        text += f" of {row['need_images_per_s']:.0f} needed, waits {100 * waits['mean']:.0f} %"
    return text


if __name__ == "__main__":
    sys.exit(main())
