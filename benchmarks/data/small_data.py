"""What the data of a small set cost against the training on them, batch for batch.

    python -m benchmarks.data.small_data --batch-size 128 --precision bf16

The device loader's batch of CIFAR-10's size (noise for pixels), shifted, flipped and smoothed,
beside an update of PreActResNet-18 by gradnorm: `train.build`'s own loader and step, in interleaved
rounds. All other options are fastgn.train's, such as --reprob 0.25 --mixup 0.8. On CUDA, and by
--compile on, the batch is one graph. The share is to stay below 5 %.

Writes benchmarks/results/small_data_<device>.json; on a CPU into runs/ alone.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.common.arguments import RESULTS, ROOT
from benchmarks.common.records import hold
from benchmarks.common.timing import interleaved, summary
from fastgn.config.cli import parse_config
from fastgn.data.batch import Batch
from fastgn.distributed import session
from fastgn.errors import UserError
from fastgn.files import write_json
from fastgn.metrics import environment
from fastgn.run import Run
from fastgn.setup import build

RUN = (
    *("--model", "preact_resnet18", "--activation", "gelu", "--data", "cifar10"),
    *("--eval-images", "0"),
)
TARGET = 0.05


def noise(folder: Path, number: int) -> Path:
    """CIFAR-10 as fastgn.train takes it, of random pixels."""
    draw, path = np.random.default_rng(0), folder / "noise.npz"
    content = {}
    for split, count in (("train", number), ("test", 10)):
        content[f"{split}_images"] = draw.integers(0, 256, (count, 32, 32, 3), np.uint8)
        content[f"{split}_labels"] = np.arange(count) % 10
    np.savez(path, **content)
    return path


def endless(run: Run) -> Iterator[Batch]:
    epoch = 0
    while True:
        yield from run.loader.epoch(epoch)
        epoch += 1


def main() -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=128 if cuda else 8)
    parser.add_argument("--images", type=int, default=50_000, help="in the set")
    parser.add_argument("--rounds", type=int, default=10 if cuda else 3)
    parser.add_argument("--calls", type=int, default=20 if cuda else 1, help="batches a round")
    parser.add_argument("--output", type=Path, help="JSON")
    args, more = parser.parse_known_args()
    name = torch.cuda.get_device_name() if cuda else "cpu"
    results = RESULTS if cuda else ROOT / "runs"
    slug = re.sub(r"\W+", "_", name.lower())
    output = args.output or results / f"small_data_{slug}.json"
    hold(output)
    try:
        with tempfile.TemporaryDirectory() as folder, session() as world:
            data = ("--data-dir", str(noise(Path(folder), args.images)))
            run_args = (*RUN, *data, "--batch-size", str(args.batch_size), *more)
            run = build(parse_config([*run_args, "--output", f"{folder}/run"]), world)
            batches = endless(run)
            batch = next(batches)

            def update() -> None:
                run.compute_gradients([batch], run.ramp, run.update)
                run.apply_gradients(1e-4)

            timings = interleaved(
                {"data": lambda: next(batches), "training": update},
                rounds=args.rounds,
                calls=args.calls,
            )
            if run.metrics is not None:
                run.metrics.close()
    except UserError as error:
        print(f"small_data.py: error: {error}", file=sys.stderr)
        return 2
    pairs = zip(timings["data"].rounds, timings["training"].rounds, strict=True)
    share = summary([data / training for data, training in pairs])
    content = {
        "device": name,
        "meaningful_times": cuda,
        "batch_size": args.batch_size,
        "options": more,
        "data_ms": summary([1e3 * s for s in timings["data"].rounds]),
        "training_ms": summary([1e3 * s for s in timings["training"].rounds]),
        "share": share,
        "enough": share["mean"] < TARGET,
    }
    write_json(output, content | environment())
    print(
        f"data {content['data_ms']['mean']:.2f} ms of {content['training_ms']['mean']:.1f} ms a "
        f"batch: {share['mean']:.2%} ± {share['std']:.2%} (n = {share['n']}), to stay below "
        f"{TARGET:.0%} -> {output}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
