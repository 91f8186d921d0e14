"""The PIL loader: worker processes decode and augment with timm's transforms."""

import atexit
import contextlib
import ctypes
import os
import re
import signal
import sys
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data._utils import signal_handling

from fastgn.config.groups import AugmentationConfig
from fastgn.data.augment import BatchAugment
from fastgn.data.batch import Batch, epoch_order, rank_slice, worker_death
from fastgn.data.datasets import Arrays, Encoded
from fastgn.data.images import load_or_next
from fastgn.data.transform import train_transform
from fastgn.errors import UserError
from fastgn.seeding import Stream, seed_all, seed_host

Key = tuple[int, int]
"""(epoch, index): all that an augmented image depends on, but for the seed."""


class Decoded(Dataset):
    """Key -> (uint8 3 x H x W, label, a line for each bad image that another stands for)."""

    def __init__(self, split: Arrays | Encoded, transform: Any, seed: int, skip: bool):
        self.split = split
        self.transform = transform
        self.seed = seed
        self.skip = skip

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: Key) -> tuple[Tensor, int, list[str]]:
        epoch, index = key
        seed_host(Stream.IMAGE, self.seed, epoch, index)
        index, image, bad = load_or_next(self.split.image, index, len(self), self.skip)
        return self.transform(image), int(self.split.labels_N[index]), bad


def collate(items: list[tuple[Tensor, int, list[str]]]) -> tuple[Tensor, Tensor, list[str]]:
    images, labels = default_collate([item[:2] for item in items])
    return images, labels, [line for _, _, bad in items for line in bad]


def decode(
    split: Arrays | Encoded,
    transform: Any,
    batches: Iterable[list[Key]],
    *,
    seed: int,
    workers: int,
    device: torch.device,
    bad_images: list[str] | None,
    worker_timeout: float,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images in 0..1, labels) on the device for each list of keys. Raises UserError on a bad
    image, or, where there is a list bad_images, replaces it and adds a line to that."""
    made = from_workers(
        Decoded(split, transform, seed, skip=bad_images is not None),
        workers,
        worker_timeout,
        batch_sampler=batches,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
    )
    with contextlib.closing(made):
        for images, labels, bad in made:
            if bad_images is not None:
                bad_images += bad
            images = images.to(device, non_blocking=True).float().div_(255)
            yield images, labels.to(device, non_blocking=True)


def from_workers(
    items: Dataset, workers: int, worker_timeout: float, **options: Any
) -> Generator[Any, None, None]:
    """Yields DataLoader's results, in order; its workers end with the iterator.

    Raises UserError: a worker's own, or one that says that a worker has died, or has made nothing
    for worker_timeout seconds.
    """
    loader = DataLoader(
        items,
        num_workers=workers,
        timeout=worker_timeout if workers else 0,
        worker_init_fn=start_worker,
        # workers take their seeds from the keys: leave torch's own alone
        generator=torch.Generator(),
        **options,
    )
    iterator = iter(loader)
    live.add(iterator)
    try:
        yield from iterator
    except UserError as error:  # a worker's comes with its traceback in front
        message = str(error.args[0]).strip().splitlines()[-1]
        raise UserError(re.sub(r"^fastgn[.\w]*Error: ", "", message)) from None
    except RuntimeError as error:
        if str(error).startswith("DataLoader timed out"):
            raise end_stalled(iterator, worker_timeout) from None
        raise worker_death(error) or error from None
    except (ConnectionError, EOFError):  # what it had handed over went with it
        dead = RuntimeError("DataLoader worker has died")
        raise worker_death(dead) or dead from None
    finally:
        shut_down(iterator)


live: weakref.WeakSet = weakref.WeakSet()
"""Iterators of `from_workers`, which an error elsewhere may leave open."""


def shut_down(iterator: Any) -> None:
    """Tells its workers, which ignore signals, to end: Python's exit would send one, and wait."""
    getattr(iterator, "_shutdown_workers", lambda: None)()


def end_stalled(iterator: Any, worker_timeout: float) -> UserError:
    """Kills an iterator's workers, and returns what to say of the one that was waited for.

    Workers ignore all other signals, and Python would wait for them at its end.
    """
    number = iterator._task_info[iterator._rcvd_idx][0]
    # else torch would report that they died, wherever the main process happens to be
    signal_handling._remove_worker_pids(id(iterator))
    iterator._worker_pids_set = False
    for worker in iterator._workers:
        worker.kill()
    return UserError(
        f"worker process {iterator._workers[number].pid} of the data loader has made nothing for "
        f"{worker_timeout:g} s, and was ended: the disk or network may stand still; "
        "--worker-timeout sets how long to wait"
    )


@atexit.register
def shut_down_all() -> None:
    for iterator in list(live):
        shut_down(iterator)


class Mapped(Dataset):
    """Index -> what a function makes of it."""

    def __init__(self, function: Callable[[int], Any]):
        self.function = function

    def __getitem__(self, index: int) -> Any:
        return self.function(index)


def in_order(
    function: Callable[[int], Any],
    indices: Sequence[int],
    workers: int,
    worker_timeout: float,
) -> Generator[Any, None, None]:
    """Yields the function's results for the indices, made in worker processes. Raises UserError."""
    ahead = {"prefetch_factor": 16} if workers else {}
    options: dict[str, Any] = {"batch_size": None, "sampler": indices, "collate_fn": as_it_is}
    workers = min(workers, os.cpu_count() or 1)
    return from_workers(Mapped(function), workers, worker_timeout, **options, **ahead)


def as_it_is(result: Any) -> Any:
    return result


PR_SET_PDEATHSIG = 1


def start_worker(worker: int) -> None:
    """A signal to the whole process group is the main process's to handle: it saves, then ends
    the workers. They end with it where it is killed."""
    torch.set_num_threads(1)
    with contextlib.suppress(AttributeError, OSError):  # Linux's prctl: a worker that waits to hand
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # over bytes never looks
    # the thread that hands over tensors would print that the main process has left
    sys.excepthook = lambda *error: None
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class TorchLoader:
    """See batch.Loader."""

    def __init__(
        self,
        split: Arrays | Encoded,
        cfg: AugmentationConfig,
        augment: BatchAugment,
        *,
        img_size: int,
        hflip: float,
        workers: int,
        worker_timeout: float,
        skip: bool,
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
        self.worker_timeout = worker_timeout
        self.skip = skip
        self.bad_images: list[str] = []
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
            bad_images=self.bad_images if self.skip else None,
            worker_timeout=self.worker_timeout,
        )
        for index, (images, labels) in zip(indices, decoded, strict=True):
            seed_all(Stream.AUGMENT, self.seed, epoch, index, self.rank)
            yield self.augment(images, labels)


def evaluation_transform(img_size: int, crop_pct: float) -> Any:
    """Resize of the shorter side and centre crop, bicubic (timm's)."""
    return create_transform(img_size, crop_pct=crop_pct, interpolation="bicubic", normalize=False)
