"""The training loader: which one, and how many images each of its batches has.

A loader is a module of its own that build_loader imports when it is chosen: device.py, torch.py or
dali.py.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgn.config import Config
from fastgn.data.augment import BatchAugment
from fastgn.data.batch import Loader
from fastgn.data.datasets import Arrays, Dataset
from fastgn.data.trial import dali_or_pil, wants_dali
from fastgn.errors import UserError, check


def batch_sizes(cfg: Config, num_images: int, ranks: int, device: torch.device) -> tuple[int, int]:
    """(images a rank and micro-batch, micro-batches an update). Raises UserError where they do not
    divide or exceed the data."""
    data = cfg.dataset
    batch, accum = data.batch_size, data.grad_accum_steps
    if data.global_batch_size is None:
        batch = batch or (32 if device.type == "cuda" else 8)
    else:
        per_rank, rest = divmod(data.global_batch_size, ranks)
        check(
            rest == 0,
            f"--global-batch-size {data.global_batch_size} does not divide by {ranks} ranks",
        )
        batch = batch or per_rank
        check(
            per_rank % batch == 0,
            f"--global-batch-size {data.global_batch_size} does not divide by {ranks} ranks x "
            f"--batch-size {batch}: take a multiple of {ranks * batch}",
        )
        accum = per_rank // batch
    whole = batch * accum * ranks
    check(
        whole <= num_images,
        f"a global batch of {batch} images x {accum} accumulated x {ranks} ranks = {whole} "
        f"exceeds the {num_images} training images: lower --batch-size",
    )
    mixing = cfg.augmentation.mixup or cfg.augmentation.cutmix
    check(
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
    agree: Callable[[bool], bool] = bool,
    notes: list[str] | None = None,
) -> Loader:
    """Returns the training loader. Its epochs are whole updates, and the remainder is dropped.

    compiled: whether the device loader compiles its augmentation. agree: returns whether any rank
    passes True. notes: takes a line for the user if `auto` could not have what it is meant to.

    Raises UserError if the loader does not fit the data or the augmentation.
    """
    split, augmentation = dataset.train, cfg.augmentation
    kind: str = cfg.dataset.loader
    if kind == "auto":
        kind = "device" if isinstance(split, Arrays) else "torch"
        kind = "try dali" if kind == "torch" and wants_dali(device) else kind
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
        check(
            augmentation.aa is None,
            f"--aa {augmentation.aa} works on PIL images: add --loader torch",
        )
        from fastgn.data.device import DeviceLoader

        padding = augmentation.crop_padding
        if padding is None:
            padding = img_size // (16 if dataset.name == "digits" else 8)
        check(
            padding <= img_size,
            f"--crop-padding {padding} shifts images of {img_size} px out of sight: at most "
            f"{img_size}",
        )
        return DeviceLoader(split, augment, padding=padding, compiled=compiled, **common)
    common |= {
        "workers": min(cfg.dataset.workers, os.cpu_count() or 1),
        "worker_timeout": cfg.dataset.worker_timeout,
        "skip": cfg.dataset.on_bad_image == "skip",
    }

    def make_dali() -> Loader:
        from fastgn.data.dali.loader import DaliLoader

        return DaliLoader(split, augmentation, augment, **common)

    def make_torch() -> Loader:
        from fastgn.data.torch import TorchLoader

        return TorchLoader(split, augmentation, augment, **common)

    if kind == "try dali":
        loader, line = dali_or_pil(make_dali, make_torch, agree)
        if notes is not None and line is not None:
            notes.append(line)
        return loader
    return make_dali() if kind == "dali" else make_torch()
