"""Small data sets, and loaders of them."""

from typing import Any

import numpy as np
import torch

from fastgn.config import Config
from fastgn.data.batch import Batch, Loader
from fastgn.data.datasets import Dataset
from fastgn.data.loader import build_loader
from support import SHARED

CPU = torch.device("cpu")
MEAN = torch.full((1, 3, 1, 1), 0.45)
STD = torch.full((1, 3, 1, 1), 0.225)
REAL_CIFAR10 = SHARED / "cifar10_lossless_5k_1k.npz"
FULL: dict[str, Any] = {
    "color_jitter": 0.4,
    "reprob": 0.25,
    "mixup": 0.8,
    "cutmix": 1.0,
    "smoothing": 0.1,
}


def coloured(index: int, side: int) -> np.ndarray:
    """Returns an image of one colour, (H, W, 3), by which a test finds its index."""
    return np.full((side, side, 3), (index, 255 - index, 128), np.uint8)


def loader_of(
    dataset: Dataset,
    *,
    img_size: int = 8,
    batch_size: int = 8,
    accum: int = 1,
    rank: int = 0,
    ranks: int = 1,
    compiled: bool = False,
    **keys: Any,
) -> Loader:
    """Builds a loader on the CPU. img_size: height and width of its images.

    keys: options that differ from the defaults.
    """
    return build_loader(
        Config().replace(**keys),
        dataset,
        img_size=img_size,
        mean=MEAN,
        std=STD,
        batch_size=batch_size,
        grad_accum_steps=accum,
        rank=rank,
        ranks=ranks,
        device=CPU,
        compiled=compiled,
    )


PLAIN: dict[str, Any] = {"smoothing": 0.0, "crop_padding": 0, "hflip": 0.0}


def indices(batch: Batch) -> list[int]:
    """Returns which images of the fixture `arrays` a batch without augmentation holds."""
    return (batch.images_BCHW[:, 0, 0, 0] * 255).round().int().tolist()
