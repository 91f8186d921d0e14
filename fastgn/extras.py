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
"""Modules that the extra `train` installs."""


STOPS = (signal.SIGINT, signal.SIGTERM)
"""Signals of a terminal's Ctrl-C and of a scheduler that wants the machine back."""
REPEAT_S = 1.0
"""A signal that follows another within so many seconds is the same one: torchrun passes on what a
terminal or a scheduler has sent to all processes."""


def check_start(program: str) -> None:
    """Ends the program if a package is missing, for --help, or for a mistake on the command line.

    A signal during the imports that follow ends it with a line.
    """

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        print_stopped(program)
        os._exit(128 + number)

    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)
    missing = [name for name in TRAIN if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"{program}: error: not installed: {', '.join(missing)}; pip install 'fastgn[train]'",
            file=sys.stderr,
        )
        sys.exit(2)
    from fastgn.config.cli import check_command_line

    check_command_line(program)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Makes SIGTERM end the block as SIGINT does, by KeyboardInterrupt, so that it can clean up. If
    it takes longer to do so, another signal ends the process at once."""
    first_s: float | None = None

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal first_s
        if first_s is None:
            first_s = time.monotonic()
            raise KeyboardInterrupt
        if time.monotonic() - first_s > REPEAT_S:
            os._exit(128 + number)

    before = {n: signal.getsignal(n) for n in STOPS}
    heeded = [n for n in STOPS if before[n] is not signal.SIG_IGN]  # as after `nohup`
    for number in heeded:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])
