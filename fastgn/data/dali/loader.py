"""Loads training batches with NVIDIA DALI, which augments images as the PIL loader does.

Worker processes read the files, and draw with timm's own objects what to do to each image
(feeder.py, draws.py). DALI gets the bytes and the drawn numbers (operations.py). So one seed gives
the same pictures as in the PIL loader, except for resampling and rounding. To continue, a run needs
only the number of a batch. DALI's readers, shuffling and random operators are not used. DALI's own
worker processes are not used either, because DALI waits for ever if one of them dies.
"""

import atexit
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastgn.config.groups import AugmentationConfig
from fastgn.data.augment import BatchAugment
from fastgn.data.batch import Batch
from fastgn.data.dali.draws import Recipe
from fastgn.data.dali.feeder import Feeder, Source
from fastgn.data.dali.operations import augmented
from fastgn.data.datasets import Arrays
from fastgn.data.images import BadImageError, Encoded
from fastgn.errors import UserError
from fastgn.seeding import Stream, seed_all

AHEAD = 2
"""Number of batches that one pipeline makes before they are needed."""


class DaliLoader:
    """Loads training batches from image files, decoded and augmented by NVIDIA DALI."""

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
        """Sets up the loader. The first batch starts the pipelines.

        hflip: probability of a horizontal flip. skip: whether to replace bad images by others.
        workers: number of threads that decode and augment. A quarter as many processes read files
        and draw random numbers. With fewer than 4 workers the main process reads and draws. On two
        cores this takes 0.35 ms per image, while a separate process would take 0.8 ms.
        """
        if isinstance(split, Arrays):
            raise UserError("--loader dali decodes image files: use --loader device for arrays")
        self.feeder = Feeder(
            split,
            Recipe(cfg, img_size, hflip),
            skip=skip,
            batch_size=batch_size,
            batches_per_epoch=batches_per_epoch,
            seed=seed,
            rank=rank,
            ranks=ranks,
        )
        self.augment = augment
        self.workers = workers
        self.worker_timeout = worker_timeout
        self.bad_images: list[str] = []
        self.batches_per_epoch = batches_per_epoch
        self.seed, self.rank = seed, rank
        self.device = device
        self._source: Source | None = None
        self._pipelines: deque[Any] = deque()
        """The pipelines in the order in which they will give a batch."""
        self._next = -1
        # End the workers before Python exits, because Python would wait for them for ever.
        # The workers ignore the SIGTERM that Python sends them at its exit.
        atexit.register(close_if_alive, weakref.ref(self))

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Yields the batches of an epoch, beginning with batch number `first`.

        Raises UserError if an image is bad.
        """
        for index in range(first, self.batches_per_epoch):
            images, labels = self._take(epoch * self.batches_per_epoch + index)
            seed_all(Stream.AUGMENT, self.seed, epoch, index, self.rank)
            yield self.augment(images, labels)

    def close(self) -> None:
        """Ends the worker processes. The next batch starts new ones."""
        self._pipelines = deque()
        if self._source is not None:
            self._source.close()
        self._source, self._next = None, -1
        end_unused_pipelines()

    def __del__(self) -> None:
        source = getattr(self, "_source", None)  # the attribute is missing if __init__ has failed
        if source is not None:
            source.close()

    def _take(self, position: int) -> tuple[Tensor, Tensor]:
        """Returns (images in 0..1, labels) of the batch at a position (see Feeder), on the device.

        The pipelines go on from one epoch to the next. They start anew if `position` does not
        follow the position of the previous call.
        """
        if self._source is None or position != self._next:
            self.close()
            self._start(position)
        assert self._source is not None
        try:
            pipeline = self._pipelines[0]
            (images,) = pipeline.share_outputs(**self._stream())
            pipeline.release_outputs()
            pipeline.schedule_run()
            self._pipelines.rotate(-1)
        except (RuntimeError, UserError) as error:
            image, failure = self._explain(error, position)
            self.close()
            if image is None or not self.feeder.skip:
                raise failure from None
            self.feeder.spoilt[image] = str(failure)
            return self._take(position)
        labels_B, complaints, replaced = self._source.given.popleft()
        if complaints:
            self.close()
            raise UserError(complaints[0])
        self.bad_images += replaced
        self._next = position + 1
        images_BCHW = torch.from_dlpack(images.as_tensor())
        return images_BCHW, labels_B.to(self.device, non_blocking=True)

    def _stream(self) -> dict[str, Any]:
        """Returns arguments that make DALI write its outputs in PyTorch's CUDA stream.

        DALI's work is then in order with PyTorch's work, without a host sync.
        """
        if self.device.type != "cuda":
            return {}
        return {"cuda_stream": torch.cuda.current_stream(self.device)}

    def _start(self, position: int) -> None:
        """Starts the pipelines at the position of a batch (see Feeder).

        On CUDA there is one pipeline, which makes AHEAD batches before they are needed. On a CPU
        there is one more pipeline than workers, each with one thread. Threads of the same pipeline
        would wait for each other after every operation on a few images.
        """
        cuda = self.device.type == "cuda"
        count = 1 if cuda or not self.workers else self.workers + 1
        self._source = Source(self.feeder, position, self.workers // 4, self.worker_timeout)
        for _ in range(count):
            pipeline = augmented(
                self._source,
                self.feeder.recipe,
                device="gpu" if cuda else "cpu",
                by_dali=uses_operators(self.device),
                batch_size=self.feeder.batch_size,
                num_threads=max(1, self.workers) if cuda else 1,
                device_id=(self.device.index or 0) if cuda else None,
                prefetch_queue_depth=AHEAD if count == 1 else 1,
            )
            self._pipelines.append(pipeline)
        end_unused_pipelines()
        KEPT.append((weakref.ref(self), self._pipelines))
        for pipeline in self._pipelines:
            pipeline.build()
            pipeline.schedule_run()

    def _explain(self, error: Exception, position: int) -> tuple[int | None, UserError]:
        """Returns the index of the image that caused an error inside DALI, and the error for the
        user.

        DALI's error names no file, so PIL looks for an image that it cannot decode. The index is
        None if there is no such image.

        position: position of the batch that DALI should have returned.
        """
        assert self._source is not None
        if self._source.end_reason is not None:
            return None, UserError(f"--loader dali: {self._source.end_reason}")
        ahead = max(AHEAD, len(self._pipelines))
        keys = [k for p in range(ahead + 1) for k in self.feeder.keys(position + p)]
        for _, image in keys:
            if image not in self.feeder.spoilt:
                try:
                    self.feeder.split.load_image(image)
                except BadImageError as bad:
                    return image, bad
        return None, UserError(
            f"--loader dali: {reason_of(error)} (in a batch that begins with "
            f"{self.feeder.split.name(keys[0][1])}; PIL can decode it: try --loader torch)"
        )


KEPT: list[tuple["weakref.ref[DaliLoader]", deque[Any]]] = []
"""Each loader of this process with its pipelines. They are kept here so that the garbage collector
never ends a pipeline.

A pipeline's threads call Python, so the garbage collector may run in one of them. If it ended that
pipeline, the thread would wait for itself.
"""


def uses_operators(device: torch.device) -> bool:
    """Returns whether DALI's own operators resize and augment the images.

    On a CPU the functions of cpu.py resize and augment, because they are 3 times as fast.
    """
    return device.type == "cuda"


def end_unused_pipelines() -> None:
    """Ends the pipelines that no loader has any more."""
    KEPT[:] = [(ref, x) for ref, x in KEPT if getattr(ref(), "_pipelines", None) is x]


def close_if_alive(reference: "weakref.ref[DaliLoader]") -> None:
    """Closes a loader unless it has been garbage-collected."""
    loader = reference()
    if loader is not None:
        loader.close()


def reason_of(error: Exception) -> str:
    """Returns the message of an error of DALI, without the stack trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = [i for i, line in enumerate(lines) if line.startswith("encountered:")]
    return lines[min(after[0] + 1, len(lines) - 1)] if after else lines[0]
