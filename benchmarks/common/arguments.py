"""Command lines that the benchmarks share, and the files that their records go to."""

import argparse
import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NoReturn

import torch

from benchmarks.common.records import hold
from fastgn.errors import UserError

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def positive_int(text: str) -> int:
    """Returns a whole number of at least 1. This is a type for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def positive_float(text: str) -> float:
    """Returns a positive, finite number. This is a type for argparse."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be positive and finite")
    return value


def share(text: str) -> float:
    """Returns a number from 0 to 1. This is a type for argparse."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} must lie in [0, 1]")
    return value


class Parser(argparse.ArgumentParser):
    """A parser whose error messages are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the option --output. description: text with which --help begins."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=description, formatter_class=formatter)
    parser.add_argument("--output", type=Path, help="JSON file to write the record to")
    return parser


def exit_status(program: str, run: Callable[[], int]) -> int:
    """Calls `run`, which returns the exit status of a program, and returns that status.

    If the user made a mistake (UserError), prints it in one line and returns 2.
    """
    try:
        return run()
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2


def default_device() -> torch.device:
    """Returns the first GPU, or the CPU if there is no GPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """Returns the name of the first GPU, or "cpu" if there is no GPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def slugify(name: str) -> str:
    """Returns the name of a device in a form for file names, such as nvidia_h200."""
    return re.sub(r"\W+", "_", name.lower())


def gpu_output(args: argparse.Namespace, stem: str) -> Path:
    """Returns the path of the benchmark's JSON record: --output, or else <stem>_<device>.json.

    Without --output, the file lies in benchmarks/results if there is a GPU, and in runs/ otherwise.
    Locks the file, so that only this process writes it.
    """
    folder = RESULTS if torch.cuda.is_available() else ROOT / "runs"
    output = args.output or folder / f"{stem}_{slugify(device_name())}.json"
    hold(output)
    return output


def output_for(
    file: str, parser: argparse.ArgumentParser, args: argparse.Namespace, free: Collection[str]
) -> Path:
    """Returns the path of the benchmark's JSON record: --output, or else benchmarks/results/<file>.

    benchmarks/results holds only results with default options. If an option that is not in `free`
    has another value than its default, returns runs/<file> and prints why. Locks the file, so that
    only this process writes it.
    """
    changed = [
        f"--{name.replace('_', '-')}" for name, value in vars(args).items()
        if name not in (*free, "output") and value != parser.get_default(name)
    ]  # fmt: skip
    output = args.output or RESULTS / file
    if changed and not args.output:
        names = ", ".join(changed)
        print(f"benchmarks/results keeps no run with other {names}: written to runs/{file}")
        output = ROOT / "runs" / file
    hold(output)
    return output
