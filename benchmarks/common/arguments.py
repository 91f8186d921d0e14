"""Makes the command lines of the benchmarks, and chooses the files for their JSON records."""

import argparse
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks.common.records import hold, write_record
from benchmarks.common.tables import Record
from fastgn.errors import UserError
from fastgn.metrics import environment

ON_GPU = torch.cuda.is_available()
"""Whether this machine has a GPU. It decides the defaults of options."""
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
"""The first GPU, or the CPU if there is no GPU."""
MODERN = ON_GPU and torch.cuda.get_device_capability() >= (8, 0)
"""Whether this machine has a GPU that supports bf16."""
PRECISION = "bf16" if MODERN else "fp32"
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def positive_number(kind: type) -> Callable[[str], Any]:
    """Returns a type for argparse, which reads positive, finite numbers. kind: int or float."""

    def number(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} must be positive and finite")
        return value

    return number


class Parser(argparse.ArgumentParser):
    """A parser whose error messages are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


Option = tuple[tuple[str, ...], dict[str, Any]]
"""Names and settings of one flag, as ArgumentParser.add_argument takes them."""


def option(*names: str, positive: type | None = None, **settings: Any) -> Option:
    """Returns a flag for a program. The arguments are those of ArgumentParser.add_argument.

    positive: int or float if the values of the flag are positive numbers of this type. If None, and
    neither `type` nor `choices` is given, the type is that of a number which is the default or is
    the first item of the default.
    """
    default = settings.get("default")
    first = default[0] if isinstance(default, (list, tuple)) and default else default
    if positive is None and not settings.keys() & {"type", "choices"}:
        positive = type(first)
    if positive in (int, float):
        settings["type"] = positive_number(positive)
    return names, settings


class Program:
    """The main function of a benchmark, which reads the command line.

    run: function that takes the options and returns the exit status. Error messages begin with the
    name of its file, and --help shows the docstring of that file. options: flags besides --output.
    """

    def __init__(self, run: Callable[[argparse.Namespace], int], options: Collection[Option]):
        self.run, module = run, sys.modules[run.__module__]
        formatter = argparse.RawDescriptionHelpFormatter
        self.parser = Parser(description=module.__doc__, formatter_class=formatter)
        self.parser.prog = Path(module.__file__ or "").name
        self.parser.add_argument("--output", type=Path, help="where to write the results")
        for names, settings in options:
            self.parser.add_argument(*names, **settings)

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Returns the options. Their field `defaults` is a dict of all default values."""
        args = self.parser.parse_args(argv)
        defaults = {key: self.parser.get_default(key) for key in vars(args) if key != "output"}
        return argparse.Namespace(**vars(args), defaults=defaults)

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Runs the program and returns its exit status.

        If the user made a mistake, prints the mistake in one line and returns 2.
        """
        args = self.parse(argv)
        try:
            return self.run(args)
        except UserError as error:
            print(f"{self.parser.prog}: error: {error}", file=sys.stderr)
            return 2


def program(*options: Option) -> Callable[[Callable[[argparse.Namespace], int]], Program]:
    """Returns a decorator that makes the main function of a benchmark. See `Program`."""
    return lambda run: Program(run, options)


def device_name() -> str:
    """Returns the name of the first GPU, or "cpu" if there is no GPU."""
    return torch.cuda.get_device_name() if ON_GPU else "cpu"


def slugify(name: str) -> str:
    """Returns the name of a device in a form for file names, such as nvidia_h200."""
    return re.sub(r"\W+", "_", name.lower())


def open_record(
    args: argparse.Namespace, file: str, free: Collection[str] = (), *, needs_gpu: bool = False
) -> tuple[Path, Record]:
    """Returns the path of the benchmark's JSON record, and the first entries of the record.

    The path is --output if it is given. Otherwise it is benchmarks/results/<file> if all options
    have their default values, and else runs/<file>. Options in `free` may have other values. If
    needs_gpu is True, a machine without a GPU also gets runs/<file>. The reason is printed.

    Locks the file, so that only this process writes it. "{device}" in `file` stands for the name of
    the device. The entries are file, device, versions of packages, commit and hardware.
    """
    name = device_name()
    file = file.format(device=slugify(name))
    changed = [
        f"other --{key.replace('_', '-')}" for key, default in args.defaults.items()
        if key not in free and getattr(args, key) != default
    ]  # fmt: skip
    changed += ["times of a CPU"] if needs_gpu and not ON_GPU else []
    output = args.output or RESULTS / file
    if changed and not args.output:
        what = ", ".join(changed)
        print(f"benchmarks/results keeps no run with {what}: written to runs/{file}")
        output = ROOT / "runs" / file
    hold(output)
    head = {"file": output.name, "device": name, "meaningful_times": ON_GPU}
    return output, head | environment()


def finish(output: Path, record: Record, table: Callable[[Record], str]) -> int:
    """Writes a complete JSON record, prints its table, and returns the exit status 0."""
    write_record(output, {"complete": True} | record)
    print(f"{table(record)}\n-> {output}")
    return 0
