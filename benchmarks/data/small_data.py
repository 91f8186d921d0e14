"""Measures the time of the data loader of small images, as a share of the time of an update.

The loader makes a batch of random images with CIFAR-10's size. It shifts and flips the images, and
smooths the labels. The loader and a gradnorm update of PreActResNet-18 on these images are timed in
turn, several times. The loader's time should stay below 5 % of the update's.

    python -m benchmarks.data.small_data --batch-size 128 --train --precision bf16 --mixup 0.8

Loader and update are those of fastgn.train, and so are all options after --train. On CUDA, and with
--compile on, making a batch is one compiled graph.

Writes benchmarks/results/small_data_<device>.json, or without a GPU to runs/.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.common.arguments import ON_GPU, finish, open_record, option, program
from benchmarks.common.tables import Record, cores
from benchmarks.common.timing import interleaved, paired_ratios, summary
from fastgn.config.cli import parse_config
from fastgn.distributed import session
from fastgn.setup import build

RUN = (
    *("--model", "preact_resnet18", "--activation", "gelu", "--data", "cifar10"),
    *("--eval-images", "0"),
)


def noise(folder: Path, number: int) -> Path:
    """Writes `number` random images as an .npz file in CIFAR-10's form, and returns its path."""
    draw, path = np.random.default_rng(0), folder / "noise.npz"
    content = {}
    for split, count in (("train", number), ("test", 10)):
        content[f"{split}_images"] = draw.integers(0, 256, (count, 32, 32, 3), np.uint8)
        content[f"{split}_labels"] = np.arange(count) % 10
    np.savez(path, **content)
    return path


def table(record: Record) -> str:
    """Returns this benchmark's result in one sentence, made from its JSON record."""
    share, options = record["share"], " ".join(record["options"])
    return (
        f"`device`, {cores(record)}: a batch of {record['batch_size']} images as CIFAR-10's takes "
        f"{share['mean']:.2%} ± {share['std']:.2%} (n = {share['n']}) of PreActResNet-18's "
        f"gradnorm update on them, with {options}; torch {record['versions']['torch']} "
        f"(`benchmarks/results/{record['file']}`)."
    )


@program(
    option("--batch-size", default=128 if ON_GPU else 8),
    option("--images", default=50_000, help="number of images in the data set"),
    option("--rounds", default=10 if ON_GPU else 3),
    option("--calls", default=20 if ON_GPU else 1, help="batches per round"),
    option("--train", nargs=argparse.REMAINDER, default=[], help="options of fastgn.train"),
)
def main(args: argparse.Namespace) -> int:
    """Times batches and updates with options of fastgn.train, and writes the JSON record."""
    output, head = open_record(args, "small_data_{device}.json", ("train",), needs_gpu=True)
    with tempfile.TemporaryDirectory() as folder, session() as world:
        data = ("--data-dir", str(noise(Path(folder), args.images)))
        flags = (*RUN, *data, "--batch-size", str(args.batch_size), *args.train)
        run = build(parse_config([*flags, "--output", f"{folder}/run"]), world)
        batches = itertools.chain.from_iterable(map(run.loader.epoch, itertools.count()))
        batch = next(batches)

        def update() -> None:
            run.compute_gradients([batch], run.ramp, run.update)
            run.apply_gradients(1e-4)

        arms = {"data": lambda: next(batches), "training": update}
        timings = interleaved(arms, rounds=args.rounds, calls=args.calls)
        if run.metrics is not None:
            run.metrics.close()
    record = head | {
        "batch_size": args.batch_size,
        "options": args.train,
        **{f"{name}_ms": summary([1e3 * s for s in times]) for name, times in timings.items()},
        "share": summary(paired_ratios(timings["data"], timings["training"])),
    }
    return finish(output, record, table)


if __name__ == "__main__":
    sys.exit(main())
