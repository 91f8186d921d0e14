"""The PIL loader: worker processes decode and augment with timm's transforms."""

import re
import signal
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastgn.config import AugmentationConfig, UserError
from fastgn.data.augment import BatchAugment
from fastgn.data.batch import Batch, epoch_order, rank_slice
from fastgn.data.datasets import Arrays, Files
from fastgn.data.recipe import train_transform
from fastgn.seeding import Stream, seed_all, seed_host

Key = tuple[int, int]
"""(epoch, index): all that an augmented image depends on, but for the seed."""


class Decoded(Dataset):
    """Key -> (uint8 3 x H x W, label)."""

    def __init__(self, split: Arrays | Files, transform: Any, seed: int):
        self.split = split
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        epoch, index = key
        seed_host(Stream.IMAGE, self.seed, epoch, index)
        return self.transform(self.split.image(index)), int(self.split.labels_N[index])


def decode(
    split: Arrays | Files,
    transform: Any,
    batches: Iterable[list[Key]],
    *,
    seed: int,
    workers: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images in 0..1, labels) on the device for each list of keys. Raises UserError on a bad
    image."""
    loader = DataLoader(
        Decoded(split, transform, seed),
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=start_worker,
        # workers take their seeds from the keys: leave torch's own alone
        generator=torch.Generator(),
    )
    iterator = iter(loader)
    try:
        for images, labels in iterator:
            images = images.to(device, non_blocking=True).float().div_(255)
            yield images, labels.to(device, non_blocking=True)
    except UserError as error:  # a worker's comes with its traceback in front
        message = str(error).strip().splitlines()[-1]
        raise UserError(re.sub(r"^fastgn[.\w]*Error: ", "", message)) from None
    finally:  # workers that ignore signals have to be told to end
        getattr(iterator, "_shutdown_workers", lambda: None)()


def start_worker(worker: int) -> None:
    """A signal to the whole process group is the main process's to handle: it saves, then ends
    the workers."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class TorchLoader:
    """See batch.Loader."""

    def __init__(
        self,
        split: Arrays | Files,
        cfg: AugmentationConfig,
        augment: BatchAugment,
        *,
        img_size: int,
        hflip: float,
        workers: int,
        batch_size: int,
        batches_per_epoch: int,
        seed: int,
        rank: int,
        ranks: int,
        device: torch.device,
    ):
        self.split = split
        self.transform = train_transform(cfg, img_size, hflip)
        self.augment = augment
        self.workers = workers
        self.batch_size = batch_size
        self.batches_per_epoch = batches_per_epoch
        self.seed, self.rank, self.ranks = seed, rank, ranks
        self.device = device

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """See batch.Loader."""
        order = epoch_order(len(self.split), self.seed, epoch).tolist()
        indices = range(first, self.batches_per_epoch)
        slices = (rank_slice(i, self.batch_size, self.rank, self.ranks) for i in indices)
        batches = ([(epoch, k) for k in order[s]] for s in slices)
        decoded = decode(
            self.split,
            self.transform,
            batches,
            seed=self.seed,
            workers=self.workers,
            device=self.device,
        )
        for index, (images, labels) in zip(indices, decoded, strict=True):
            seed_all(Stream.AUGMENT, self.seed, epoch, index, self.rank)
            yield self.augment(images, labels)


def evaluation_transform(img_size: int, crop_pct: float) -> Any:
    """Resize of the shorter side and centre crop, bicubic (timm's)."""
    return create_transform(img_size, crop_pct=crop_pct, interpolation="bicubic", normalize=False)
