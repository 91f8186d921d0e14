"""Checks at the start of a program, before the imports that take seconds.

`pip install fastgn` alone, which is enough for the kernels, does not install what the programs
need. A missing package and a mistake on the command line are each reported in one line.
"""

import contextlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from fastgn.errors import print_stopped

TRAIN = (
    "matplotlib",
    "numpy",
    "PIL",
    "pyautoattack",
    "safetensors",
    "sklearn",
    "tensorboard",
    "timm",
    "tomli_w",
    "torchvision",
    "tqdm",
    "tyro",
)
"""Python modules that `pip install 'fastgn[train]'` installs."""


STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Signals that ask a program to stop.

They come from Ctrl-C, from a scheduler, from SLURM before a time limit, and from a terminal that is
closed.
"""
REPEAT_S = 1.0
"""Seconds within which a second signal is taken for a copy of the first.

A process gets two copies because torchrun passes on a signal that the terminal or the scheduler has
already sent to all processes.
"""


def check_start(program: str) -> None:
    """Ends the program if a package is missing, or if the command line has --help or a mistake.

    During the imports that follow, a signal that asks the program to stop, such as Ctrl-C, ends it
    with a one-line message.
    """

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        print_stopped(program)
        os._exit(128 + number)

    for number in list_heeded():
        signal.signal(number, stop)
    missing = [name for name in TRAIN if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"{program}: error: not installed: {', '.join(missing)}: "
            "run pip install 'fastgn[train]'",
            file=sys.stderr,
        )
        sys.exit(2)
    from fastgn.config.cli import check_command_line

    check_command_line(program)


def list_heeded() -> list[signal.Signals]:
    """Returns the signals that ask a program to stop (STOPS) and that this process does not ignore.

    For example, `nohup` makes a process ignore SIGHUP.
    """
    return [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Makes each signal that asks the program to stop raise KeyboardInterrupt inside the block.

    The block can then clean up. If a second signal comes more than REPEAT_S seconds after the first
    one, it ends the process at once.
    """
    first_s: float | None = None

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal first_s
        if first_s is None:
            first_s = time.monotonic()
            raise KeyboardInterrupt
        if time.monotonic() - first_s > REPEAT_S:
            os._exit(128 + number)

    # a signal that is ignored, for example because of nohup, stays ignored
    before = {number: signal.signal(number, stop) for number in list_heeded()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
