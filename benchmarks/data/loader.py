"""Measures images per second of each loader of image files, and whether training waits for it.

`torch` and `dali` are fastgn's own loaders. `timm` is timm's create_loader with the same
augmentation. benchmarks/data/small_data.py measures the loader of small images.

    python -m benchmarks.data.loader --need 2000  # images per second that training takes
    python -m benchmarks.data.loader --cost benchmarks/results/cost_swin_b_nvidia_h200.json
    python -m benchmarks.data.loader --data-dir FOLDER --sheet sheet.png

The loaders read JPEGs at 224 pixels with the paper's augmentation. Without --data-dir, random JPEGs
are made in the usual sizes of ImageNet. All files are in the page cache, so that decoding and
augmenting are measured, and the disk is not.

The loaders take turns in several rounds. A round takes some batches from the middle of an epoch,
when the workers run and their queues were emptied. First, batches are taken as fast as possible,
which gives images per second and the CPU time per image of all processes. Then the program pauses
after each batch, as long as an update on it would take at --need images per second. The share of
time in which it still waits for batches is what training would lose.

--sheet draws 32 images twice, as PIL and as DALI augment them, side by side.

Writes benchmarks/results/loader_<device>.json. On a CPU only the ratios mean something.
"""

import argparse
import dataclasses
import importlib.util
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image
from timm.data import create_loader
from timm.data.mixup import Mixup

from benchmarks.common import arguments
from benchmarks.common.arguments import positive_float, positive_int
from benchmarks.common.records import fastest_gradnorm, write_json
from benchmarks.common.tables import Record, cores, make_table, plus_minus, with_notes
from benchmarks.common.timing import paired_ratios, summary, synchronize
from fastgn.config import Config
from fastgn.config.groups import AugmentationConfig, DatasetConfig
from fastgn.data.batch import Batch
from fastgn.data.datasets import Dataset, Files
from fastgn.data.loader import build_loader
from fastgn.data.transform import replace_posterize
from fastgn.errors import check
from fastgn.files import write_bytes
from fastgn.metrics import environment

SIZES = ((500, 375), (375, 500), (500, 333), (500, 500))
"""(Width, height) of the most frequent ImageNet images, in pixels."""
PAPER = AugmentationConfig(aa="rand-m9-mstd0.5-inc1", reprob=0.25, mixup=0.8, cutmix=1.0)
SIDE, CLASSES = 224, 1000
LOADERS = ("torch", "timm", "dali")
MEAN, STD = torch.full((1, 3, 1, 1), 0.45), torch.full((1, 3, 1, 1), 0.225)


def jpeg(size: tuple[int, int], draw: torch.Generator) -> bytes:
    """Returns a random JPEG of smooth shapes with grain.

    It has about 110 KB, which is the mean size of ImageNet's files.
    """
    width, height = size
    coarse = torch.rand(1, 3, height // 24, width // 24, generator=draw)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
    grain = torch.randn(1, height, width, generator=draw)
    pixels = (255 * (smooth + 0.062 * grain)).clamp(0, 255).to(torch.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(out, "JPEG", quality=90)
    return out.getvalue()


def jpeg_folder(folder: Path, number: int) -> list[Path]:
    """Writes `number` random JPEGs into a folder and returns their paths."""
    draw = torch.Generator().manual_seed(0)
    paths = [folder / f"{i:05d}.jpg" for i in range(number)]
    for i, path in enumerate(paths):
        write_bytes(path, jpeg(SIZES[i % len(SIZES)], draw))
    return paths


def files_below(folder: Path) -> list[Path]:
    """Returns the JPEGs below a folder. Raises UserError if there are none."""
    paths = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg")]
    check(bool(paths), f"--data-dir {folder}: the folder holds no JPEG: give another one")
    return paths


def repeated(paths: list[Path], number: int) -> Files:
    """Returns a split of `number` images. If there are fewer files, the files are repeated."""
    listed = (list(map(str, paths)) * (number // len(paths) + 1))[:number]
    return Files(listed, torch.arange(number) % CLASSES)


def iterator(
    name: str,
    split: Files,
    batch_size: int,
    workers: int,
    device: torch.device,
    augmentation: AugmentationConfig = PAPER,
) -> Iterator[Batch]:
    """Yields the batches of one epoch, from fastgn.train's own loader or from timm's."""
    if name == "timm":
        return timm_batches(split, batch_size, workers, device)
    data = DatasetConfig(loader=name, workers=workers)
    config = dataclasses.replace(Config(), dataset=data, augmentation=augmentation)
    dataset = Dataset("jpeg", split, split, tuple(map(str, range(CLASSES))))
    size = {"img_size": SIDE, "batch_size": batch_size, "grad_accum_steps": 1}
    where: dict[str, Any] = {"rank": 0, "ranks": 1, "device": device}
    return build_loader(config, dataset, mean=MEAN, std=STD, **size, **where).epoch(0)


class TimmImages(torch.utils.data.Dataset):
    """Images in the form that timm's create_loader takes. It sets the attribute `transform`."""

    transform: Any = None

    def __init__(self, split: Files):
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.split.load_image(index)), int(self.split.labels_N[index])


def timm_batches(
    split: Files, batch_size: int, workers: int, device: torch.device
) -> Iterator[Batch]:
    """Yields the mixed batches of timm's loader. On CUDA, random erasing happens on the device."""
    loader = create_loader(
        TimmImages(split),
        SIDE,
        batch_size,
        is_training=True,
        use_prefetcher=device.type == "cuda",
        re_prob=PAPER.reprob,
        re_mode=PAPER.remode,
        scale=PAPER.scale,
        hflip=0.5,
        color_jitter=PAPER.color_jitter,
        auto_augment=PAPER.aa,
        interpolation=PAPER.train_interpolation,
        num_workers=workers,
        persistent_workers=False,
        pin_memory=device.type == "cuda",
        device=device,
    )
    for step in getattr(loader.dataset.transform, "transforms", ()):
        replace_posterize(step)
    smoothing: dict[str, Any] = {"label_smoothing": 0.1, "num_classes": CLASSES}
    mix = Mixup(PAPER.mixup, PAPER.cutmix, switch_prob=0.5, **smoothing)
    for images, labels in loader:
        yield Batch(*mix(images, labels.to(device)))


@dataclasses.dataclass(frozen=True)
class Round:
    """Number of images that were taken from a loader in one round, and the times."""

    images: int
    seconds: float
    waited_s: float
    """Seconds in which the loop that takes batches had to wait for them."""
    cpu_s: float
    """CPU seconds of all processes during the round."""


def consume(batches: Iterator[Batch], number: int, work_s: float) -> Round:
    """Takes `number` batches from a loader, pauses after each one, and returns the times.

    work_s: seconds of each pause. It stands for a training step, during which the host sleeps.
    """
    images, waited_s = 0, 0.0
    synchronize()
    cpu, began = cpu_seconds(), time.perf_counter()
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
    """Returns the CPU seconds of this process and its living descendants (Linux)."""
    parents, used = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:  # the process has just ended
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
    loaders: Sequence[str],
    paths: list[Path],
    *,
    batch_size: int,
    workers: int,
    batches: int,
    rounds: int,
    need: float | None,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Returns one dict of results for each loader.

    need: images per second that training takes. None leaves the waiting time unmeasured.
    """
    drain = 2 * workers + 4  # batches that empty the queues before a measurement
    split = repeated(paths, batch_size * ((rounds + 1) * drain + 2 * rounds * batches))
    sources = [iterator(name, split, batch_size, workers, device) for name in loaders]
    free: list[list[Round]] = [[] for _ in loaders]
    paced: list[list[Round]] = [[] for _ in loaders]
    try:
        for number in range(rounds + 1):
            for source, these, those in zip(sources, free, paced, strict=True):
                consume(source, drain, 0)
                if not number:
                    continue  # the first round compiles and fills caches
                these.append(consume(source, batches, 0))
                if need:
                    those.append(consume(source, batches, batch_size / need))
    finally:
        for source in sources:
            source.close()  # type: ignore[attr-defined]
    kib = statistics.fmean(path.stat().st_size for path in paths) / 1024
    images = f"{len(paths)} JPEGs, {kib:.0f} KiB in the mean"
    size = {"images": images, "img_size": SIDE, "batch_size": batch_size, "workers": workers}
    rows = []
    for name, these, those in zip(loaders, free, paced, strict=True):
        seen = [
            {"images_per_s": r.images / r.seconds, "cpu_ms_an_image": 1e3 * r.cpu_s / r.images}
            for r in these
        ]
        row = {"loader": name, **size, "need_images_per_s": need, "rounds": seen}
        row |= {key: summary([r[key] for r in seen]) for key in seen[0]}
        waits = [r.waited_s / r.seconds for r in those]
        rows.append(row | {"wait_share": summary(waits) if waits else None})
    return rows


def over(rows: list[dict[str, Any]], name: str, base: str) -> dict[str, dict[str, float]] | None:
    """Returns the speed of loader `name` over that of loader `base`, and the ratio of CPU times.

    Returns None if one of the two was not measured.
    """
    found = {row["loader"]: row["rounds"] for row in rows}
    if not {name, base} <= found.keys():
        return None
    ratios = {}
    for key, order in (("images_per_s", (name, base)), ("cpu_ms_an_image", (base, name))):
        values = paired_ratios(*([r[key] for r in found[n]] for n in order))
        ratios[key] = summary(values) | {"median": statistics.median(values)}
    return ratios


def sheet(paths: list[Path], file: Path, device: torch.device) -> None:
    """Draws eight rows of four pairs of images into a file: left from PIL, right from DALI."""
    pair = []
    for loader in ("torch", "dali"):
        plain = AugmentationConfig(aa=PAPER.aa)
        batch = next(iterator(loader, repeated(paths, 32), 32, 0, device, plain))
        pair.append(batch.images_BCHW.cpu())
    together = torch.stack(pair, 1).flatten(0, 1)
    grid = torchvision.utils.make_grid(together, nrow=8, padding=4, pad_value=1.0)
    pixels = (255 * grid).round().to(torch.uint8).permute(1, 2, 0).numpy()
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    write_bytes(file, out.getvalue())
    difference = (255 * (pair[0] - pair[1])).abs().mean((1, 2, 3))
    print(f"{file}: mean difference {difference.mean():.2f} of 255, worst {difference.max():.2f}")


def installed() -> list[str]:
    """Returns the names of the loaders that can run on this machine."""
    try:
        found = importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        found = False
    return [x for x in LOADERS if x != "dali" or found]


def table(record: Record) -> str:
    """Returns this benchmark's Markdown table, made from its JSON record."""
    ratios, gpu = record.get("ratios", {}), record["meaningful_times"]

    def ratio(row: Any, key: str) -> str:
        return plus_minus(ratios.get(f"dali over {row['loader']}", {}).get(key), ".2f")

    columns = {
        "loader": lambda r: r["loader"],
        "images/s": lambda r: plus_minus(r["images_per_s"], ".0f") if gpu else "",
        "CPU ms an image": lambda r: plus_minus(r["cpu_ms_an_image"], ".1f") if gpu else "",
        "waiting": lambda r: f"{100 * r['wait_share']['mean']:.1f} %" if r["wait_share"] else "",
        "dali: times as fast": lambda r: ratio(r, "images_per_s"),
        "dali: times less CPU time": lambda r: ratio(r, "cpu_ms_an_image"),
    }
    # on a CPU, times mean nothing except as ratios
    rows = [r for r in record["rows"] if gpu or f"dali over {r['loader']}" in ratios]
    row = record["rows"][-1]
    return with_notes(
        make_table(rows, columns),
        record,
        f"{cores(record)}: {row['images']}, {row['img_size']} px, the paper's augmentation, batch "
        f"{row['batch_size']}, {row['workers']} workers",
        f"mean ± deviation over {row['images_per_s']['n']} interleaved rounds",
        "timm: its create_loader",
    )


def run(args: argparse.Namespace) -> int:
    """Measures the loaders and writes the JSON record, or with --sheet draws images to compare."""
    if args.smoke:
        args.batch_size, args.workers, args.rounds, args.batches, args.files = 2, 1, 2, 2, 4
    torch.set_num_threads(1)  # as torchrun does: the loaders have their own threads and processes
    cuda = torch.cuda.is_available()
    device, need = arguments.default_device(), args.need
    output = arguments.gpu_output(args, "loader")
    workers = min(args.workers, os.cpu_count() or 1)  # as build_loader does
    check(workers >= 0, f"--workers {workers} must be at least 0")
    if args.cost is not None and args.cost.exists():
        need = fastest_gradnorm(args.cost, "--cost")[1]["images_per_s"]
    elif args.cost is not None:
        print(f"--cost {args.cost}: there is no such file: waiting is not measured")
    with tempfile.TemporaryDirectory() as folder:
        below = files_below(args.data_dir) if args.data_dir else None
        paths = below or jpeg_folder(Path(folder), args.files)
        if args.sheet:
            sheet(paths, args.sheet, device)
            return 0
        size = {"batch_size": args.batch_size, "batches": args.batches, "rounds": args.rounds}
        rows = measure(installed(), paths, **size, workers=workers, need=need, device=device)
    ratios = {f"dali over {x}": over(rows, "dali", x) for x in ("torch", "timm")}
    record = {
        "file": output.name,
        "device": arguments.device_name(),
        "meaningful_times": cuda and not args.smoke,
        "rows": rows,
        "ratios": {k: v for k, v in ratios.items() if v},
        "batches_per_round": args.batches,
        **environment(),
    }
    write_json(output, record)
    print(f"{table(record)}\n-> {output}")
    return 0


def main() -> int:
    """Runs the benchmark and returns its exit status: 2 for a user's mistake, else 0."""
    cuda = torch.cuda.is_available()
    parser = arguments.make_parser(__doc__)
    add = parser.add_argument
    add("--data-dir", type=Path, help="folder with JPEGs to read")
    add("--sheet", type=Path, help="PNG to draw 32 images into, from PIL and DALI")
    needs = parser.add_mutually_exclusive_group()
    needs.add_argument("--need", type=positive_float, metavar="IMAGES_PER_S", help="the step's")
    needs.add_argument("--cost", type=Path, help="record of cost.py with the speed of the step")
    add("--batch-size", type=positive_int, default=64 if cuda else 16)
    add("--workers", type=int, default=os.cpu_count(), help="processes of each loader")
    add("--rounds", type=positive_int, default=3)
    add("--batches", type=positive_int, default=30 if cuda else 4, help="batches per round")
    add("--files", type=positive_int, default=512 if cuda else 64, help="number of JPEGs to make")
    add("--smoke", action="store_true", help="use toy sizes")
    args = parser.parse_args()
    return arguments.exit_status("loader.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
