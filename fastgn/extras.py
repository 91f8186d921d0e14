"""How a program begins, before the imports that take seconds.

`pip install fastgn` alone, for the kernels, leaves out what the programs need: that is said in one
line. So is a mistake on the command line.
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
"""Modules of the extra `train`."""


def begin(program: str) -> None:
    """Ends the program here if its extra is not installed, for --help, or for a mistaken flag."""
    missing = [name for name in TRAIN if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"{program}: error: not installed: {', '.join(missing)}; pip install 'fastgn[train]'",
            file=sys.stderr,
        )
        sys.exit(2)
    from fastgn.config.cli import answer_early

    answer_early(program)
