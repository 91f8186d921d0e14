"""Reads the files of each batch in worker processes, and draws how to augment each image."""

import itertools
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fastgn.data.batch import draw_epoch_order, rank_slice
from fastgn.data.dali.draws import ARGUMENTS, Recipe
from fastgn.data.dali.jpeg import plain_size
from fastgn.data.images import BadImageError, Encoded, decode_image, is_thin, load_or_next
from fastgn.data.torch import load_in_workers, return_unchanged
from fastgn.errors import UserError, first_line
from fastgn.seeding import Stream, seed_host


class Fed(NamedTuple):
    """A batch of encoded images, and how to augment each of them.

    The values are NumPy arrays inside Feeder, and tensors in what Feeder returns.
    """

    encoded: Any
    """Bytes of all image files one after the other, uint8. DALI might decode some files differently
    than PIL, such as PNGs. Each of these is replaced by a PPM file of its decoded crop."""
    lengths: Any
    """(B,), int64: number of bytes of each file."""
    anchors: Any
    """(B, 2), int32: first row and column of each crop."""
    shapes: Any
    """(B, 2), int32: height and width of each crop."""
    bilinear: Any
    """(B,), int32: 1 if the crop is resized bilinearly, 0 if bicubically."""
    flipped: Any
    """(B,), int32: 1 if the crop is flipped horizontally, else 0."""
    kinds: Any
    """(B, layers), int32: the draws.Kind of each operation on an image. layers is the largest
    number of operations on one image."""
    arguments: Any
    """(B, layers, ARGUMENTS), fp32: arguments of each operation in `kinds`."""
    labels: Any
    """(B,), int64: class of each image."""
    complaints: list[str]
    """Reasons why the batch cannot be used. Usually there are none."""
    replaced: list[str]
    """One line for each bad image that was replaced by another one. Usually there are none."""


class Feeder(Dataset):
    """Reads the files of a batch, and draws how to augment each image.

    An item is a batch. Its index is the position of the batch, which is epoch * batches_per_epoch +
    number of the batch in the epoch.
    """

    def __init__(
        self,
        split: Encoded,
        recipe: Recipe,
        *,
        skip: bool,
        batch_size: int,
        batches_per_epoch: int,
        seed: int,
        rank: int,
        ranks: int,
    ):
        self.split = split
        self.recipe = recipe
        self.skip = skip
        self.spoilt: dict[int, str] = {}
        """Index of an image that failed inside DALI -> PIL's message about it."""
        self.batch_size = batch_size
        self.batches_per_epoch = batches_per_epoch
        self.seed, self.rank, self.ranks = seed, rank, ranks
        self._order = (-1, torch.empty(0))

    def keys(self, position: int) -> list[tuple[int, int]]:
        """Returns (epoch, index of the image) for each image of the batch at a position (see
        Feeder)."""
        epoch, index = divmod(position, self.batches_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, draw_epoch_order(len(self.split), self.seed, epoch))
        chosen = self._order[1][rank_slice(index, self.batch_size, self.rank, self.ranks)]
        return [(epoch, image) for image in chosen.tolist()]

    def __getitem__(self, position: int) -> Fed:
        size, layers = self.batch_size, max(1, self.recipe.layers)
        fed = Fed(
            np.zeros(0, np.uint8),
            np.zeros(size, np.int64),
            np.zeros((size, 2), np.int32),
            np.ones((size, 2), np.int32),
            np.zeros(size, np.int32),
            np.zeros(size, np.int32),
            np.zeros((size, layers), np.int32),
            np.zeros((size, layers, ARGUMENTS), np.float32),
            np.zeros(size, np.int64),
            [],
            [],
        )
        contents = []
        for place, (epoch, image) in enumerate(self.keys(position)):
            try:
                content = self.fill(fed, place, epoch, image)
            except BadImageError as error:  # the loader reports the bad image later
                content = BLACK
                fed.complaints.append(str(error))
            fed.lengths[place] = len(content)
            contents.append(np.frombuffer(content, np.uint8))
        arrays: list[Any] = [np.concatenate(contents), *fed[1:-2]]
        return Fed._make([*map(torch.from_numpy, arrays), fed.complaints, fed.replaced])

    def fill(self, fed: Fed, place: int, epoch: int, image: int) -> bytes:
        """Returns an image's encoded bytes, and writes into `fed` how to augment the image.

        place: the image's index in the batch. A bad image may be replaced by another one. Raises
        BadImageError if the image is bad and is not replaced.
        """
        seed_host(Stream.IMAGE, self.seed, epoch, image)
        image, (content, decoded, size), bad = load_or_next(
            self.read, image, len(self.split), self.skip
        )
        fed.replaced.extend(bad)
        drawn = self.recipe.draw(*size)
        if decoded is None:
            fed.anchors[place] = drawn.top, drawn.left
        else:
            box = (drawn.left, drawn.top, drawn.left + drawn.width, drawn.top + drawn.height)
            content = ppm(decoded.crop(box))
        fed.shapes[place] = drawn.height, drawn.width
        fed.bilinear[place], fed.flipped[place] = drawn.bilinear, drawn.flipped
        for layer, (kind, arguments) in enumerate(drawn.layers):
            fed.kinds[place, layer] = kind
            fed.arguments[place, layer, : len(arguments)] = arguments
        fed.labels[place] = int(self.split.labels_N[image])
        return content

    def read(self, image: int) -> tuple[bytes, Image.Image | None, tuple[int, int]]:
        """Returns (encoded bytes, decoded picture or None, (width, height)) of the image at an
        index.

        The picture is None if DALI decodes the bytes just as PIL does. Raises BadImageError if the
        image cannot be read or decoded.
        """
        if image in self.spoilt:
            raise BadImageError(self.spoilt[image])
        content = self.split.read(image)
        size = plain_size(content)
        if size and not is_thin(*size) and size[0] * size[1] <= (Image.MAX_IMAGE_PIXELS or 0):
            return content, None, size
        decoded = decode_image(content, self.split.name(image))
        return content, decoded, decoded.size


def ppm(image: Image.Image) -> bytes:
    """Returns a picture as a PPM file, which is exact and quick to decode."""
    return b"P6 %d %d 255\n" % image.size + image.tobytes()


BLACK = ppm(Image.new("RGB", (1, 1)))


class Source:
    """Gives DALI one batch after the other, and keeps the labels and messages for the loader."""

    def __init__(self, feeder: Feeder, position: int, workers: int, worker_timeout: float):
        """Starts the workers with the batch at a position, which is epoch * batches_per_epoch +
        number of the batch in the epoch. feeder: makes the batches in the workers."""
        positions = itertools.count(position)
        options: dict[str, Any] = {"sampler": positions, "collate_fn": return_unchanged}
        self.batches = load_in_workers(feeder, workers, worker_timeout, batch_size=None, **options)
        self.given: deque[tuple[Tensor, list[str], list[str]]] = deque()
        """The fields (labels, complaints, replaced) of Fed for each batch that DALI has taken but
        not yet returned."""
        self.end_reason: str | None = None
        """Reason why there are no more batches, or None if there are."""

    def __call__(self) -> tuple[Any, ...]:
        """Returns the next batch as the arrays that DALI's pipeline takes."""
        try:
            fed = next(self.batches)
        except (RuntimeError, UserError) as error:
            self.end_reason = first_line(error)
            raise
        self.given.append((fed.labels, fed.complaints, fed.replaced))
        encoded = [x.numpy() for x in fed.encoded.split(fed.lengths.tolist())]
        return encoded, *(x.numpy() for x in fed[2:-3])

    def close(self) -> None:
        """Ends the worker processes."""
        self.batches.close()
