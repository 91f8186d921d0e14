"""Images: one Batch contract, whatever they come from (see batch.py).

A loader is a module of its own that build_loader imports when it is chosen: device.py, torch.py or
dali.py.
"""

import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

if sys.argv[:1] == ["-m"]:  # python -m fastgn.data.pack or check, which imports this first
    from fastgn.extras import need_train

    need_train("fastgn.data")

from fastgn import config  # its check: ours is a program
from fastgn.config import Config, UserError
from fastgn.data.augment import BatchAugment, to_float
from fastgn.data.batch import Batch, Loader, worker_death
from fastgn.data.datasets import (
    Arrays,
    Dataset,
    Encoded,
    check_classes,
    load_dataset,
    load_validation,
)

__all__ = [
    "Batch",
    "Dataset",
    "Loader",
    "Subset",
    "batch_sizes",
    "build_loader",
    "check_classes",
    "load_dataset",
    "load_validation",
    "worker_death",
]


def batch_sizes(cfg: Config, num_images: int, ranks: int, device: torch.device) -> tuple[int, int]:
    """(images a rank and micro-batch, micro-batches an update). Raises UserError where they do not
    divide or exceed the data."""
    data = cfg.dataset
    batch, accum = data.batch_size, data.grad_accum_steps
    if data.global_batch_size is None:
        batch = batch or (32 if device.type == "cuda" else 8)
    else:
        per_rank, rest = divmod(data.global_batch_size, ranks)
        config.check(
            rest == 0,
            f"--global-batch-size {data.global_batch_size} does not divide by {ranks} ranks",
        )
        batch = batch or per_rank
        config.check(
            per_rank % batch == 0,
            f"--global-batch-size {data.global_batch_size} does not divide by {ranks} ranks x "
            f"--batch-size {batch}: take a multiple of {ranks * batch}",
        )
        accum = per_rank // batch
    whole = batch * accum * ranks
    config.check(
        whole <= num_images,
        f"a global batch of {batch} images x {accum} accumulated x {ranks} ranks = {whole} "
        f"exceeds the {num_images} training images: lower --batch-size",
    )
    mixing = cfg.augmentation.mixup or cfg.augmentation.cutmix
    config.check(
        not mixing or batch % 2 == 0,
        f"--mixup and --cutmix pair images: --batch-size {batch} is odd",
    )
    return batch, accum


def build_loader(
    cfg: Config,
    dataset: Dataset,
    *,
    img_size: int,
    mean: Tensor,
    std: Tensor,
    batch_size: int,
    grad_accum_steps: int,
    rank: int,
    ranks: int,
    device: torch.device,
    compiled: bool = False,
) -> Loader:
    """The training loader; its epochs are whole updates, the remainder is dropped. compiled: the
    device loader's augmentation."""
    split, augmentation = dataset.train, cfg.augmentation
    kind = cfg.dataset.loader
    if kind == "auto":
        kind = "device" if isinstance(split, Arrays) else "torch"
    hflip = augmentation.hflip
    if hflip is None:
        hflip = 0.0 if dataset.name == "digits" else 0.5
    common: dict[str, Any] = {
        "img_size": img_size,
        "hflip": hflip,
        "batch_size": batch_size,
        "batches_per_epoch": len(split)
        // (batch_size * grad_accum_steps * ranks)
        * grad_accum_steps,
        "seed": cfg.run.seed,
        "rank": rank,
        "ranks": ranks,
        "device": device,
    }
    augment = BatchAugment(augmentation, len(dataset.classes), mean, std, device)
    if kind == "device":
        if not isinstance(split, Arrays):
            raise UserError("--loader device: image folders need --loader torch or dali")
        config.check(
            augmentation.aa is None,
            f"--aa {augmentation.aa} works on PIL images: add --loader torch",
        )
        from fastgn.data.device import DeviceLoader

        padding = augmentation.crop_padding
        if padding is None:
            padding = img_size // (16 if dataset.name == "digits" else 8)
        return DeviceLoader(split, augment, padding=padding, compiled=compiled, **common)
    workers = min(cfg.dataset.workers, os.cpu_count() or 1)
    skip = cfg.dataset.on_bad_image == "skip"
    if kind == "dali":
        from fastgn.data.dali import DaliLoader

        return DaliLoader(split, augmentation, augment, workers=workers, skip=skip, **common)
    from fastgn.data.torch import TorchLoader

    return TorchLoader(split, augmentation, augment, workers=workers, skip=skip, **common)


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
        )
