"""What the scripts' command lines share."""

import argparse
from collections.abc import Collection
from pathlib import Path

from benchmarks.common.records import hold

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def positive_int(text: str) -> int:
    """Of 1 or more; an argparse type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def positive_float(text: str) -> float:
    """Finite; an argparse type."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be positive and finite")
    return value


def output_for(
    file: str, parser: argparse.ArgumentParser, args: argparse.Namespace, free: Collection[str]
) -> Path:
    """--output, or else benchmarks/results/FILE; runs/FILE for a run that is not of the kind kept
    there, which says so. free: the options that may have another value than their default.

    This process is the only one that writes there from here on.
    """
    output = choose_output(file, parser, args, free)
    hold(output)
    return output


def choose_output(
    file: str, parser: argparse.ArgumentParser, args: argparse.Namespace, free: Collection[str]
) -> Path:
    """Returns the path that `output_for` describes."""
    if args.output is not None:
        return args.output
    free = {*free, "output"}
    changed = [
        name for name, value in vars(args).items()
        if name not in free and value != parser.get_default(name)
    ]  # fmt: skip
    if not changed:
        return RESULTS / file
    names = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
    print(f"not the run that benchmarks/results keeps ({names}): written to runs/{file}")
    return ROOT / "runs" / file
