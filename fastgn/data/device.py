"""Small data sets whole on the device, augmented there: no host work after the epoch's start."""

from collections.abc import Iterator

import torch

from fastgn.config import AugmentationConfig
from fastgn.data.augment import BatchAugment, flip, shift, to_float
from fastgn.data.batch import Batch, epoch_order, rank_slice
from fastgn.data.datasets import Arrays
from fastgn.seeding import Stream, generator, seed_all


class DeviceLoader:
    """See batch.Loader."""

    def __init__(
        self,
        split: Arrays,
        cfg: AugmentationConfig,
        augment: BatchAugment,
        *,
        img_size: int,
        padding: int,
        hflip: float,
        batch_size: int,
        batches_per_epoch: int,
        seed: int,
        rank: int,
        ranks: int,
        device: torch.device,
    ):
        self.images_NCHW = split.images_NCHW.to(device)
        self.labels_N = split.labels_N.to(device)
        self.augment = augment
        self.bad_images: list[str] = []
        self.img_size = img_size
        self.padding = padding
        self.hflip = hflip
        self.batch_size = batch_size
        self.batches_per_epoch = batches_per_epoch
        self.seed, self.rank, self.ranks = seed, rank, ranks
        self.device = device

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """See batch.Loader."""
        num = len(self.labels_N)
        draw = generator(Stream.AUGMENT, self.seed, epoch)
        order = epoch_order(num, self.seed, epoch).to(self.device)
        offsets = torch.randint(0, 2 * self.padding + 1, (num, 2), generator=draw).to(self.device)
        flipped = (torch.rand(num, generator=draw) < self.hflip).to(self.device)
        for index in range(first, self.batches_per_epoch):
            chosen = order[rank_slice(index, self.batch_size, self.rank, self.ranks)]
            images = to_float(self.images_NCHW[chosen], self.img_size)
            if self.padding:
                images = shift(images, offsets[chosen], self.padding)
            if self.hflip:
                images = flip(images, flipped[chosen])
            seed_all(Stream.AUGMENT, self.seed, epoch, index, self.rank)
            yield self.augment(images, self.labels_N[chosen])
