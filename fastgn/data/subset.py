"""Chooses the images of an evaluation, the same ones each time, and divides them among ranks."""

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from fastgn.data.augment import to_float
from fastgn.data.cores import count_cores
from fastgn.data.datasets import Arrays, Encoded

IMAGES_AT_ONCE = 360
"""Largest number of images that are attacked at once, unless the user sets another."""


def choose_batch_size(images: int, ranks: int, img_size: int, device: torch.device) -> int:
    """Returns the batch size of an evaluation, chosen so that all ranks have the same number of
    batches.

    images: number of images on all ranks together. On a CPU, batches of large images are smaller.
    """
    limit = IMAGES_AT_ONCE
    if device.type == "cpu":
        limit = max(8, min(limit, limit * 64**2 // img_size**2))
    batches = ranks * -(-images // (ranks * limit))
    return -(-images // batches)


def is_by_class(split: Any) -> bool:
    """Returns whether a split may be sorted by class, so that its first images all have the same
    class."""
    return not isinstance(split, Arrays) or bool((split.labels_N.diff() >= 0).all())


class Subset:
    """Images for evaluation, which are not augmented. Each rank iterates over its own images.

    The iterator yields (images in 0..1 as `(B, 3, H, W), fp32`, labels as `(B,), int64`) on the
    device.
    """

    def __init__(
        self,
        split: Arrays | Encoded,
        num: int | None,
        *,
        img_size: int,
        crop_pct: float,
        batch_size: int,
        workers: int,
        worker_timeout: float = 600.0,
        device: torch.device,
        rank: int = 0,
        ranks: int = 1,
        skip: bool = False,
        chosen: list[int] | None = None,
    ):
        """Chooses the images of a split.

        num: number of images. None means all. If the split may be sorted by class, the chosen
        images are evenly spaced. Otherwise they are the first ones. chosen: indices of the images,
        instead of `num`.

        crop_pct: share of the resized image's side that the centre crop keeps. skip: whether to
        replace a bad image by the next one of the split and add a message to bad_images.
        """
        total = len(split)
        num = total if num is None else min(num, total)
        if chosen is not None:
            num, self.name = len(chosen), f"{len(chosen)} listed ones of {total}"
        elif num == total or not is_by_class(split):
            chosen = list(range(num))
            self.name = f"all {total}" if num == total else f"first {num} of {total}"
        else:
            chosen = [i * total // num for i in range(num)]
            self.name = f"{num} of {total}, evenly spaced"
        self.size = num
        self.indices = chosen[rank::ranks]
        self.ranks = ranks
        self.split = split
        self.img_size = img_size
        self.crop_pct = crop_pct
        self.batch_size = batch_size
        self.workers = workers
        self.worker_timeout = worker_timeout
        self.device = device
        self.skip = skip
        self.bad_images: list[str] = []

    @property
    def most_batches(self) -> int:
        """Number of batches of the rank that has the most images."""
        return -(-self.size // (self.ranks * self.batch_size))

    def __iter__(self) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yields (images, labels), see `Subset`."""
        if isinstance(self.split, Arrays):
            for start in range(0, len(self.indices), self.batch_size):
                part = self.indices[start : start + self.batch_size]
                images = to_float(self.split.images_NCHW[part].to(self.device), self.img_size)
                yield images, self.split.labels_N[part].to(self.device)
            return
        from fastgn.data.torch import build_evaluation_transform, decode_batches

        keys = [(0, i) for i in self.indices]
        yield from decode_batches(
            self.split,
            build_evaluation_transform(self.img_size, self.crop_pct),
            [keys[s : s + self.batch_size] for s in range(0, len(keys), self.batch_size)],
            seed=0,
            workers=min(self.workers, count_cores()),
            device=self.device,
            bad_images=self.bad_images if self.skip else None,
            worker_timeout=self.worker_timeout,
        )
