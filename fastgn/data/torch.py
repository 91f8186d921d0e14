"""The PIL loader: worker processes decode images and augment them with timm's transforms."""

import atexit
import contextlib
import ctypes
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
from fastgn.data.batch import Batch, draw_epoch_order, explain_worker_death, rank_slice
from fastgn.data.cores import count_cores
from fastgn.data.datasets import Arrays, Encoded
from fastgn.data.images import load_or_next
from fastgn.data.transform import build_train_transform
from fastgn.errors import UserError
from fastgn.extras import STOPS
from fastgn.seeding import Stream, seed_all, seed_host

Key = tuple[int, int]
"""(epoch, index of the image). This pair and the run's seed determine the augmented image."""


class Decoded(Dataset):
    """Dataset that decodes and augments an image, given (epoch, index of the image).

    An item is (image as `(3, H, W), uint8`, label, messages). There is one message for each bad
    image that this image replaces.
    """

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
        index, image, bad = load_or_next(self.split.load_image, index, len(self), self.skip)
        return self.transform(image), int(self.split.labels_N[index]), bad


def collate(items: list[tuple[Tensor, int, list[str]]]) -> tuple[Tensor, Tensor, list[str]]:
    """Joins items of `Decoded` into a batch. Returns (images, labels, messages of all items)."""
    images, labels = default_collate([item[:2] for item in items])
    return images, labels, [line for _, _, bad in items for line in bad]


def decode_batches(
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
    """Yields (images in 0..1, labels) on the device for each list of (epoch, index of an image).

    transform: turns a decoded image into a tensor `(3, H, W), uint8`. bad_images: list that
    receives a message for each bad image, which is then replaced. If it is None, a bad image raises
    UserError.
    """
    made = load_in_workers(
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


def load_in_workers(
    items: Dataset, workers: int, worker_timeout: float, **options: Any
) -> Generator[Any, None, None]:
    """Yields the items of a dataset in order, made in worker processes.

    The worker processes end when the iterator does.

    options: further arguments of torch's DataLoader.

    Raises UserError if a worker raises a UserError, if a worker dies, or if nothing arrives for
    worker_timeout seconds.
    """
    loader = DataLoader(
        items,
        num_workers=workers,
        timeout=worker_timeout if workers else 0,
        worker_init_fn=set_up_worker,
        # without this generator, DataLoader would draw a number from the run's default generator
        generator=torch.Generator(),
        **options,
    )
    with hold_signals():
        iterator = iter(loader)
        open_iterators.add(iterator)
    try:
        yield from iterator
    except UserError as error:
        # keep only the last line, because the message of a worker begins with its traceback
        message = str(error.args[0]).strip().splitlines()[-1]
        raise UserError(re.sub(r"^fastgn[.\w]*Error: ", "", message)) from None
    except RuntimeError as error:
        if str(error).startswith("DataLoader timed out"):
            raise kill_stalled_workers(iterator, worker_timeout) from None
        raise explain_worker_death(error) or error from None
    except (ConnectionError, EOFError):  # a worker has died, and its shared memory is gone
        dead = RuntimeError("DataLoader worker has died")
        raise explain_worker_death(dead) or dead from None
    finally:
        stop_workers(iterator)


@contextlib.contextmanager
def hold_signals() -> Iterator[None]:
    """Holds back signals that ask the process to stop, until the with block has ended.

    A process that starts inside the block holds these signals back as well, until `set_up_worker`
    makes it ignore them. Otherwise a signal to the process group would kill a worker that has just
    started.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


open_iterators: weakref.WeakSet = weakref.WeakSet()
"""Iterators of `load_in_workers` whose workers still run, for example after an error elsewhere."""


def stop_workers(iterator: Any) -> None:
    """Ends the workers of a DataLoader's iterator.

    Otherwise Python would send them a signal at its exit and wait for them to end. They ignore the
    signal, so Python would wait for ever.
    """
    getattr(iterator, "_shutdown_workers", lambda: None)()


def kill_stalled_workers(iterator: Any, worker_timeout: float) -> UserError:
    """Kills the workers of an iterator. Returns the error that names the worker that has stalled.

    The workers must be killed, because they ignore other signals and Python would wait for them at
    its exit.
    """
    number = iterator._task_info[iterator._rcvd_idx][0]
    # make torch forget the workers, because it would raise an error when it notices their death
    signal_handling._remove_worker_pids(id(iterator))
    iterator._worker_pids_set = False
    for worker in iterator._workers:
        worker.kill()
    return UserError(
        f"worker process {iterator._workers[number].pid} of the data loader has given nothing for "
        f"{worker_timeout:g} s, and was ended: the disk or network may have stopped; "
        "--worker-timeout sets how long to wait"
    )


@atexit.register
def stop_all_workers() -> None:
    """Ends the workers of all open iterators when Python exits."""
    for iterator in list(open_iterators):
        stop_workers(iterator)


class Mapped(Dataset):
    """A dataset whose item at an index is the result of a function of the index."""

    def __init__(self, function: Callable[[int], Any]):
        self.function = function

    def __getitem__(self, index: int) -> Any:
        return self.function(index)


def map_in_workers(
    function: Callable[[int], Any],
    indices: Sequence[int],
    workers: int,
    worker_timeout: float,
) -> Generator[Any, None, None]:
    """Yields the function's results for the indices in order, computed in worker processes.

    Raises UserError if the function does, or if a worker dies or stalls.
    """
    ahead = {"prefetch_factor": 16} if workers else {}
    options: dict[str, Any] = {
        "batch_size": None,
        "sampler": indices,
        "collate_fn": return_unchanged,
    }
    workers = min(workers, count_cores())
    return load_in_workers(Mapped(function), workers, worker_timeout, **options, **ahead)


def return_unchanged(result: Any) -> Any:
    """Returns its argument. torch's DataLoader would otherwise convert results to tensors."""
    return result


PR_SET_PDEATHSIG = 1
"""Number of the operation of Linux's prctl that asks for a signal when the parent process dies."""


def set_up_worker(worker: int) -> None:
    """Makes a worker ignore signals that ask it to stop, and end if the main process is killed.

    A worker may ignore such a signal, because the main process gets it too. The main process saves
    its state and then ends its workers.
    """
    torch.set_num_threads(1)
    # ask Linux to kill the worker when the main process ends, because a waiting worker would go on
    with contextlib.suppress(AttributeError, OSError):  # prctl exists only on Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # hide errors, because the thread that sends tensors would print one if the main process ends
    sys.excepthook = lambda *error: None
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


class TorchLoader:
    """Loads training batches with PIL and timm in worker processes, see `batch.Loader`."""

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
        self.transform = build_train_transform(cfg, img_size, hflip)
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
        """Yields the micro-batches of an epoch, beginning with number `first`."""
        order = draw_epoch_order(len(self.split), self.seed, epoch).tolist()
        indices = range(first, self.batches_per_epoch)
        slices = (rank_slice(i, self.batch_size, self.rank, self.ranks) for i in indices)
        batches = ([(epoch, k) for k in order[s]] for s in slices)
        decoded = decode_batches(
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


def build_evaluation_transform(img_size: int, crop_pct: float) -> Any:
    """Returns timm's transform for evaluation, which resizes the shorter side bicubically and takes
    a centre crop.

    crop_pct: share of the resized image's side that the crop keeps.
    """
    return create_transform(img_size, crop_pct=crop_pct, interpolation="bicubic", normalize=False)
