"""The interface of all data loaders, and functions that the loaders share."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastgn.errors import UserError
from fastgn.seeding import Stream, make_generator


class Batch(NamedTuple):
    """One rank's micro-batch, on the device."""

    images_BCHW: Tensor
    """Images in 0..1 as fp32, not normalised."""
    targets: Tensor
    """Class indices `(B,), int64`, or soft targets `(B, K), fp32`."""


class Loader(Protocol):
    """Loads training batches. To continue, a resumed run needs only the epoch and the batch number.

    The images that all ranks use for one update follow each other in the shuffled order of the
    epoch. How an image is augmented depends only on (seed, epoch, image) or on (seed, epoch, batch,
    rank).
    """

    batches_per_epoch: int
    """Number of micro-batches per epoch on each rank."""
    bad_images: list[str]
    """Messages about images that were replaced because of --on-bad-image skip.

    The list covers the batches yielded since it was last emptied. The caller that reads the list
    should empty it.
    """

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Yields the micro-batches `first`, `first` + 1, ... of an epoch."""
        ...


def draw_epoch_order(num_images: int, seed: int, epoch: int) -> Tensor:
    """Returns the order of the images in an epoch, `(N,), int64`. All ranks get the same order."""
    return torch.randperm(num_images, generator=make_generator(Stream.ORDER, seed, epoch))


def rank_slice(index: int, batch_size: int, rank: int, ranks: int) -> slice:
    """Returns the slice of an epoch's shuffled images that is the micro-batch number `index` of a
    rank. index: number of the micro-batch in the epoch, counted from 0."""
    start = (index * ranks + rank) * batch_size
    return slice(start, start + batch_size)


def explain_worker_death(error: RuntimeError) -> UserError | None:
    """Returns the error to raise if `error` says that a worker process has died, or None if not."""
    torch_message = str(error).strip(" .")
    if not torch_message.startswith("DataLoader worker"):
        return None
    return UserError(f"{torch_message}: if the memory was full, lower --workers")
