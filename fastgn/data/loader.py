"""Chooses and builds the loader of the training images, and the sizes of its batches.

Each loader has a module of its own (device.py, torch.py or dali/loader.py), which is imported only
if this loader is chosen.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgn.config import Config
from fastgn.data.augment import BatchAugment
from fastgn.data.batch import Loader
from fastgn.data.cores import count_cores
from fastgn.data.datasets import Arrays, Dataset
from fastgn.data.images import Encoded
from fastgn.data.trial import choose_dali_or_pil, wants_dali
from fastgn.errors import UserError, check

NOTED_SHARE = 0.05
"""Share of the training images. If a larger share is left out of each epoch, a line says so."""


def batch_sizes(cfg: Config, num_images: int, ranks: int, device: torch.device) -> tuple[int, int]:
    """Returns (images per rank and micro-batch, micro-batches per update).

    num_images: number of training images. Raises UserError if the batch sizes of the options are
    not multiples of each other, or if an update needs more images than there are.
    """
    data = cfg.dataset
    batch, accum = data.batch_size, data.grad_accum_steps
    if data.global_batch_size is None:
        batch = batch or default_batch_size(device)
    else:
        per_rank, rest = divmod(data.global_batch_size, ranks)
        check(
            rest == 0,
            f"--global-batch-size {data.global_batch_size} is not a multiple of {ranks} ranks: "
            f"take a multiple of {ranks}",
        )
        batch = batch or per_rank
        check(
            per_rank % batch == 0,
            f"--global-batch-size {data.global_batch_size} is not a multiple of {ranks} ranks x "
            f"--batch-size {batch}: take a multiple of {ranks * batch}",
        )
        accum = per_rank // batch
    whole = batch * accum * ranks
    flag = "--batch-size" if data.global_batch_size is None else "--global-batch-size"
    factors = f" ({batch} x {accum} micro-batches x {ranks} processes)" * (whole > batch)
    check(
        whole <= num_images,
        f"an update takes {whole} images{factors}, but there are only {num_images} training "
        f"images: use a lower {flag}",
    )
    mixing = cfg.augmentation.mixup or cfg.augmentation.cutmix
    check(
        not mixing or batch % 2 == 0,
        f"--mixup and --cutmix mix pairs of images, so --batch-size {batch} must be even",
    )
    return batch, accum


def default_batch_size(device: torch.device) -> int:
    """Returns the default number of images per rank and micro-batch, for a run in which no option
    gives this number."""
    return 32 if device.type == "cuda" else 8


def divide_again(
    cfg: Config, images: int, num_images: int, ranks: int, device: torch.device, divisor: int
) -> tuple[int, int]:
    """Returns (images per rank and micro-batch, micro-batches per update) of a resumed run.

    Before it was resumed, the run may have had another number of ranks. A micro-batch gets the
    largest size up to --batch-size that divides the number of images per rank and update.

    images: number of images per update over all ranks. num_images: number of training images.
    divisor: number that must divide the size of a micro-batch. Raises UserError if no size fits.
    """
    data, augmentation = cfg.dataset, cfg.augmentation
    per_rank, rest = divmod(images, ranks)
    given = data.batch_size or (per_rank if data.global_batch_size else default_batch_size(device))
    step = math.lcm(divisor, 2 if augmentation.mixup or augmentation.cutmix else 1)
    fitting = [n for n in range(step, given + 1, step) if per_rank % n == 0]
    check(
        images <= num_images,
        f"the checkpoint's global batch of {images} images exceeds the {num_images} training "
        "images: give the --data-dir that the run was trained on",
    )
    check(
        rest == 0 and bool(fitting),
        f"the checkpoint's global batch of {images} images cannot be divided among {ranks} ranks "
        f"in micro-batches of at most {given} images: continue with another number of ranks, or "
        "another --batch-size",
    )
    return fitting[-1], per_rank // fitting[-1]


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
    """Returns the loader of the training images.

    An epoch is a whole number of updates. Images that are too few for another update are left out
    of the epoch.

    mean, std: the model's normalisation. compiled: whether the device loader compiles its
    augmentation. agree: function that returns True on all ranks if it gets True on any rank.
    notes: list to which a message is added if `--loader auto` cannot use DALI, or if many images
    are left out of each epoch.

    Raises UserError if the loader does not support the data or the augmentation.
    """
    split, augmentation = dataset.train, cfg.augmentation
    images = batch_size * grad_accum_steps * ranks
    updates = len(split) // images
    batches_per_epoch = updates * grad_accum_steps
    if notes is not None:
        notes += describe_left_out(len(split), updates, images)
    common: dict[str, Any] = {
        "img_size": img_size,
        "hflip": choose_flip_probability(cfg, dataset),
        "batch_size": batch_size,
        "batches_per_epoch": batches_per_epoch,
        "seed": cfg.run.seed,
        "rank": rank,
        "ranks": ranks,
        "device": device,
    }
    augment = BatchAugment(augmentation, len(dataset.classes), mean, std, device)
    kind = choose_loader(cfg, split, device)
    if kind == "device":
        return build_device_loader(cfg, dataset, augment, compiled, common)
    common |= {
        "workers": min(cfg.dataset.workers, count_cores()),
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
        loader, line = choose_dali_or_pil(make_dali, make_torch, agree)
        if notes is not None and line is not None:
            notes.append(line)
        return loader
    return make_dali() if kind == "dali" else make_torch()


def describe_left_out(images: int, updates: int, images_per_update: int) -> list[str]:
    """Returns a line about the training images that are left out of each epoch, because they are
    too few for another update.

    Returns no line if they are at most 5 % of all images. images: number of training images.
    updates: number of updates per epoch.
    """
    left_out = images - updates * images_per_update
    if left_out <= NOTED_SHARE * images:
        return []
    return [
        f"{left_out} of the {images} training images are left out of each epoch, others in each "
        f"epoch, because an update takes {images_per_update} images: use fewer images per update "
        "to leave out fewer"
    ]


def choose_flip_probability(cfg: Config, dataset: Dataset) -> float:
    """Returns the probability of a horizontal flip. It is 0 for digits, because flips change
    them."""
    if cfg.augmentation.hflip is not None:
        return cfg.augmentation.hflip
    return 0.0 if dataset.name == "digits" else 0.5


def choose_loader(cfg: Config, split: Arrays | Encoded, device: torch.device) -> str:
    """Returns the kind of loader to use, which is "device", "torch" or "dali". Returns "try dali"
    if a trial must first show that DALI works."""
    if cfg.dataset.loader != "auto":
        return cfg.dataset.loader
    if isinstance(split, Arrays):
        return "device"
    return "try dali" if wants_dali(device) else "torch"


def build_device_loader(
    cfg: Config, dataset: Dataset, augment: BatchAugment, compiled: bool, common: dict[str, Any]
) -> Loader:
    """Returns the loader that keeps the whole data set on the device.

    compiled: whether to compile the augmentation. common: arguments that all loaders take. Raises
    UserError if the data are files, or if an option needs another loader.
    """
    from fastgn.data.device import DeviceLoader

    split, policy, side = dataset.train, cfg.augmentation.aa, common["img_size"]
    if not isinstance(split, Arrays):
        raise UserError("--loader device: image folders need --loader torch or --loader dali")
    check(policy is None, f"--aa {policy} works on PIL images: add --loader torch")
    padding = cfg.augmentation.crop_padding
    if padding is None:
        padding = side // (16 if dataset.name == "digits" else 8)
    check(
        padding <= side,
        f"--crop-padding {padding} shifts images of {side} px out of sight: use at most {side}",
    )
    return DeviceLoader(split, augment, padding=padding, compiled=compiled, **common)
