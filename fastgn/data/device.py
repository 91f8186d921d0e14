"""A loader that keeps a small data set on the device and augments it there.

If its argument `compiled` is True, the augmentation of a batch is compiled into one graph.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastgn.data.augment import BatchAugment, BatchDraws, flip, shift, to_float
from fastgn.data.batch import Batch, draw_epoch_order, rank_slice
from fastgn.data.datasets import Arrays
from fastgn.seeding import Stream, make_generator, seed_all


class DeviceLoader:
    """Loads training batches from a data set that it keeps on the device, see `batch.Loader`."""

    def __init__(
        self,
        split: Arrays,
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
        compiled: bool,
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
        self.make = (
            torch.compile(self._make_batch, fullgraph=True, dynamic=False)
            if compiled
            else self._make_batch
        )

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Yields the micro-batches of an epoch, beginning with number `first`."""
        num = len(self.labels_N)
        draw = make_generator(Stream.AUGMENT, self.seed, epoch)
        order = draw_epoch_order(num, self.seed, epoch).to(self.device)
        offsets = torch.randint(0, 2 * self.padding + 1, (num, 2), generator=draw).to(self.device)
        flipped = (torch.rand(num, generator=draw) < self.hflip).to(self.device)
        for index in range(first, self.batches_per_epoch):
            chosen = order[rank_slice(index, self.batch_size, self.rank, self.ranks)]
            seed_all(Stream.AUGMENT, self.seed, epoch, index, self.rank)
            drawn = self.augment.draw(self.batch_size, self.img_size, self.img_size)
            yield self.make(chosen, offsets, flipped, drawn)

    def _make_batch(
        self, chosen_B: Tensor, offsets_N2: Tensor, flipped_N: Tensor, drawn: BatchDraws
    ) -> Batch:
        """Returns the augmented batch of the chosen images.

        chosen_B: indices of these images in the data set. offsets_N2: first row and column of the
        crop, for each image of the data set. flipped_N: whether each image is mirrored. drawn:
        random choices for erasing and mixing.
        """
        images = to_float(self.images_NCHW[chosen_B], self.img_size)
        if self.padding:
            images = shift(images, offsets_N2[chosen_B], self.padding)
        if self.hflip:
            images = flip(images, flipped_N[chosen_B])
        return self.augment.apply(images, self.labels_N[chosen_B], drawn)
