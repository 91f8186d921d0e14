"""The validation images of an evaluation: the same at every call, shared out over the ranks."""

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastgn.data.augment import to_float
from fastgn.data.datasets import Arrays, Encoded

IMAGES_AT_ONCE = 360
"""Most images that are attacked at once unless the user says otherwise."""


def images_at_once(images: int, ranks: int, img_size: int, device: torch.device) -> int:
    """Returns the batch size of an evaluation, so that each rank has as much to do as the others.

    images: of all ranks. A CPU takes fewer large images at once: a GPU has its memory for them.
    """
    limit = IMAGES_AT_ONCE
    if device.type == "cpu":
        limit = max(8, min(limit, limit * 64**2 // img_size**2))
    batches = ranks * -(-images // (ranks * limit))
    return -(-images // batches)


def is_by_class(split: Any) -> bool:
    """Whether its first images are all of one class: a folder's, and arrays read from one."""
    return not isinstance(split, Arrays) or bool((split.labels_N.diff() >= 0).all())


class Subset:
    """Validation images for evaluation, the same at every call, sharded over ranks, never
    augmented."""

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
        """num: how many images; None takes all. The first ones; of a split sorted by class, as a
        folder is, evenly spaced ones. chosen: the split's indices, in place of num. skip:
        replace a bad image by the next one of the split, and add a line to bad_images."""
        total = len(split)
        num = total if num is None else min(num, total)
        if chosen is not None:
            num, self.name = len(chosen), f"{len(chosen)} named ones of {total}"
        elif num == total or not is_by_class(split):
            chosen = list(range(num))
            self.name = f"all {total}" if num == total else f"first {num} of {total}"
        else:
            chosen = [i * total // num for i in range(num)]
            self.name = f"{num} of {total}, evenly spaced"
        self.size = num
        self.indices = chosen[rank::ranks]
        self.split = split
        self.img_size = img_size
        self.crop_pct = crop_pct
        self.batch_size = batch_size
        self.workers = workers
        self.worker_timeout = worker_timeout
        self.device = device
        self.skip = skip
        self.bad_images: list[str] = []

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(images in 0..1, labels) on the device."""
        if isinstance(self.split, Arrays):
            for start in range(0, len(self.indices), self.batch_size):
                part = self.indices[start : start + self.batch_size]
                images = to_float(self.split.images_NCHW[part].to(self.device), self.img_size)
                yield images, self.split.labels_N[part].to(self.device)
            return
        from fastgn.data.torch import decode, evaluation_transform

        keys = [(0, i) for i in self.indices]
        yield from decode(
            self.split,
            evaluation_transform(self.img_size, self.crop_pct),
            [keys[s : s + self.batch_size] for s in range(0, len(keys), self.batch_size)],
            seed=0,
            workers=min(self.workers, os.cpu_count() or 1),
            device=self.device,
            bad_images=self.bad_images if self.skip else None,
            worker_timeout=self.worker_timeout,
        )
