"""Checks at the start of a program, before the imports that take seconds.

`pip install fastgn` alone, which is enough for the kernels, does not install what the programs
need. A missing package and a mistake on the command line are each reported in one line.
"""

import importlib.util
import sys

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


def check_start(program: str) -> None:
    """Ends the program if a package is missing, for --help, or for a mistake on the command
    line."""
    missing = [name for name in TRAIN if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"{program}: error: not installed: {', '.join(missing)}; pip install 'fastgn[train]'",
            file=sys.stderr,
        )
        sys.exit(2)
    from fastgn.config.cli import check_command_line

    check_command_line(program)
