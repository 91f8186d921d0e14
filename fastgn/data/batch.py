"""The contract that every loader keeps."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastgn.errors import UserError
from fastgn.seeding import Stream, generator


class Batch(NamedTuple):
    """A rank's micro-batch, on the device."""

    images_BCHW: Tensor
    """fp32 in 0..1, not normalised."""
    targets: Tensor
    """int64 B, or fp32 B x K where targets are soft."""


class Loader(Protocol):
    """Training batches. All ranks' batches of one step are one contiguous piece of the epoch's
    order, and what an image looks like depends on (seed, epoch, image) or (seed, epoch, batch,
    rank) alone: position (epoch, first) is all that a resumed run needs."""

    batches_per_epoch: int
    bad_images: list[str]
    """A line for each image replaced (--on-bad-image skip) in the batches handed out; who reads it
    empties it."""

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Micro-batches first, first + 1, ... of an epoch."""
        ...


def epoch_order(num_images: int, seed: int, epoch: int) -> Tensor:
    """The epoch's permutation, int64, the same on every rank."""
    return torch.randperm(num_images, generator=generator(Stream.ORDER, seed, epoch))


def rank_slice(index: int, batch_size: int, rank: int, ranks: int) -> slice:
    """Where a rank's micro-batch `index` lies in the epoch's order."""
    start = (index * ranks + rank) * batch_size
    return slice(start, start + batch_size)


def worker_death(error: RuntimeError) -> UserError | None:
    """What to say where an error is torch's, of a worker process that has died."""
    line = str(error).strip(" .")
    if not line.startswith("DataLoader worker"):
        return None
    return UserError(f"{line}: where the memory was short, lower --workers")
