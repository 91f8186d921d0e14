"""Measures images per second of each loader of image files.

`torch` and `dali` are fastgn's loaders of image files.

    python -m benchmarks.data.loader --data-dir FOLDER

The loaders read JPEGs at 224 pixels with the paper's augmentation. Without --data-dir, random JPEGs
are made in the usual sizes of ImageNet. All files are in the page cache, so that decoding and
augmenting are measured, and the disk is not.

The loaders are measured in turn, several times. Each time, some batches are taken as fast as
possible from the middle of an epoch, when the workers run and their queues were emptied. This gives
images per second, and the CPU time per image of all processes (Linux).

Writes benchmarks/results/loader_<device>.json. On a CPU only the ratios mean something.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import io
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.common.arguments import DEVICE, ON_GPU, finish, open_record, option, program
from benchmarks.common.tables import Column, Record, device, make_table, with_notes
from benchmarks.common.timing import interleaved, paired_ratios, summary, synchronize
from fastgn.config import Config
from fastgn.config.groups import AugmentationConfig, DatasetConfig
from fastgn.data.batch import Batch
from fastgn.data.cores import count_cores
from fastgn.data.datasets import Dataset, Files
from fastgn.data.loader import build_loader
from fastgn.errors import check

SIZES = ((500, 375), (375, 500), (500, 333), (500, 500))
"""(Width, height) of the most frequent ImageNet images, in pixels."""
PAPER = AugmentationConfig(aa="rand-m9-mstd0.5-inc1", reprob=0.25, mixup=0.8, cutmix=1.0)
SIDE, CLASSES = 224, 1000
LOADERS = ("torch", "dali")
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
    for path, size in zip(paths, itertools.cycle(SIZES)):
        path.write_bytes(jpeg(size, draw))
    return paths


def files_below(folder: Path) -> list[Path]:
    """Returns the JPEGs below a folder. Raises UserError if there are none."""
    paths = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg")]
    check(bool(paths), f"--data-dir {folder}: the folder holds no JPEG: give another one")
    return paths


def repeated(paths: list[Path], number: int) -> Files:
    """Returns a split of `number` images. If there are fewer files, the files are repeated."""
    listed = itertools.islice(itertools.cycle(map(str, paths)), number)
    return Files(list(listed), torch.arange(number) % CLASSES)


def iterator(name: str, split: Files, batch_size: int, workers: int) -> Iterator[Batch]:
    """Yields the batches of one epoch, as fastgn.train does. name: value of --loader."""
    data = DatasetConfig(loader=name, workers=workers)
    config = dataclasses.replace(Config(), dataset=data, augmentation=PAPER)
    dataset = Dataset("jpeg", split, split, tuple(map(str, range(CLASSES))))
    size = {"img_size": SIDE, "batch_size": batch_size, "grad_accum_steps": 1}
    where: dict[str, Any] = {"rank": 0, "ranks": 1, "device": DEVICE}
    return build_loader(config, dataset, mean=MEAN, std=STD, **size, **where).epoch(0)


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process and of its children."""
    ticks = 0
    for process in ("self", *(child.pid for child in multiprocessing.active_children())):
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(
    loaders: Sequence[str], paths: list[Path], args: argparse.Namespace, workers: int
) -> dict[str, dict[str, list[float]]]:
    """Measures several loaders in turn, --rounds times.

    Returns the name of each loader -> {"images_per_s": speeds, "cpu_ms_an_image": CPU milliseconds
    of all processes per image}, each with one entry per round.

    loaders: values of --loader. paths: JPEG files. args: options of the command line.
    """
    batch_size, batches, rounds = args.batch_size, args.batches, args.rounds
    drain = 2 * workers + 4  # number of batches that empty the queues before a measurement
    split = repeated(paths, batch_size * (drain + rounds * (batches + drain)))
    sources = {name: iterator(name, split, batch_size, workers) for name in loaders}
    cpu_ms: dict[str, list[float]] = {name: [] for name in loaders}

    @contextlib.contextmanager
    def drained(name: str) -> Iterator[None]:
        for _ in range(drain):
            next(sources[name])
        synchronize()
        before_s = cpu_seconds()
        yield
        cpu_ms[name].append(1e3 * (cpu_seconds() - before_s) / (batches * batch_size))

    arms = {name: functools.partial(next, source) for name, source in sources.items()}
    try:
        seconds = interleaved(arms, rounds=rounds, calls=batches, warmup=drain, during=drained)
    finally:
        for source in sources.values():
            source.close()  # type: ignore[attr-defined]
    speeds = {name: [batch_size / s for s in found] for name, found in seconds.items()}
    return {n: {"images_per_s": speeds[n], "cpu_ms_an_image": cpu_ms[n]} for n in loaders}


def installed() -> list[str]:
    """Returns the names of the loaders that can run on this machine."""
    find = importlib.util.find_spec
    return [*LOADERS] if find("nvidia") and find("nvidia.dali") else ["torch"]


def table(record: Record) -> str:
    """Returns this benchmark's Markdown table, made from its JSON record.

    On a CPU only the ratios mean something, and the row of torch holds them.
    """
    gpu, row = record["meaningful_times"], record["rows"][-1]
    rows = [
        r | {"ratios": record["ratios"].get(f"dali over {r['loader']}")}
        for r in record["rows"]
        if r["loader"] in (LOADERS if gpu else LOADERS[:1])
    ]
    columns: dict[str, Column] = {"loader": "loader"}
    if gpu:
        columns |= {"images/s": "images_per_s:.0f", "CPU ms an image": "cpu_ms_an_image:.1f"}
    columns["dali: times as fast"] = "ratios/images_per_s:.2f"
    columns["dali: times less CPU time"] = "ratios/cpu_ms_an_image:.2f"
    notes = [
        f"{device(record, '{} CPU cores'.format(record['hardware']['cpu_count']))}: "
        f"{row['images']}, {row['img_size']} px, the paper's augmentation, batch "
        f"{row['batch_size']}, {row['workers']} workers",
        f"mean ± deviation over {row['images_per_s']['n']} interleaved rounds",
    ]
    return with_notes(make_table(rows, columns), record, *notes)


@program(
    option("--data-dir", type=Path, help="folder with JPEGs to read"),
    option("--batch-size", default=64 if ON_GPU else 16),
    option("--workers", type=int, default=os.cpu_count(), help="processes of each loader"),
    option("--rounds", default=3),
    option("--batches", default=30 if ON_GPU else 4, help="batches per round"),
    option("--files", default=512 if ON_GPU else 64, help="JPEGs to make"),
    option("--smoke", action="store_true", help="use toy sizes"),
)
def main(args: argparse.Namespace) -> int:
    """Measures the loaders, and writes the JSON record."""
    output, record = open_record(args, "loader_{device}.json", needs_gpu=True)
    if args.smoke:
        args.batch_size, args.workers, args.rounds, args.batches, args.files = 2, 1, 2, 2, 4
    torch.set_num_threads(1)  # as torchrun does, because loaders have threads of their own
    workers = min(args.workers, count_cores())  # build_loader has the same limit
    check(workers >= 0, f"--workers {workers} must be at least 0")
    with tempfile.TemporaryDirectory() as folder:
        below = files_below(args.data_dir) if args.data_dir else None
        paths = below or jpeg_folder(Path(folder), args.files)
        found = measure(installed(), paths, args, workers)
        kib = statistics.fmean(path.stat().st_size for path in paths) / 1024
    size = {"images": f"{len(paths)} JPEGs, {kib:.0f} KiB in the mean", "img_size": SIDE}
    size |= {"batch_size": args.batch_size, "workers": workers}
    rows = [
        {"loader": name} | size | {key: summary(numbers) for key, numbers in values.items()}
        for name, values in found.items()
    ]
    record |= {"rows": rows, "ratios": {}}
    if "dali" in found:
        speeds, cpu_ms = ([found[n][key] for n in LOADERS] for key in found["dali"])
        faster, less = paired_ratios(*reversed(speeds)), paired_ratios(*cpu_ms)
        ratios = {"images_per_s": summary(faster), "cpu_ms_an_image": summary(less)}
        record["ratios"]["dali over torch"] = ratios
    record["meaningful_times"] &= not args.smoke
    return finish(output, record, table)


if __name__ == "__main__":
    sys.exit(main())
