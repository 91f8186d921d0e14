"""Imported first by the programs: what `pip install fastgn` alone, for the kernels, leaves out."""

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


def need_train(program: str) -> None:
    """Ends the program with status 2 and one line unless the extra `train` is installed."""
    missing = [name for name in TRAIN if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"{program}: error: not installed: {', '.join(missing)}; pip install 'fastgn[train]'",
            file=sys.stderr,
        )
        sys.exit(2)
