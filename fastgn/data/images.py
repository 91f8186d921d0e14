"""One encoded image: how it becomes RGB, and what happens where it cannot."""

import abc
import functools
import io
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fastgn.errors import UserError

SKIPPED_IN_A_ROW = 100
"""Bad images one after the other that are no accident: a folder or a shard is gone."""

THINNEST = 1000
"""A longer side over the shorter: to resize the shorter to 256 pixels, as evaluation does, takes
gigabytes beyond."""

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "DIB", "PPM", "JPEG2000", "TGA")
"""The readers of PIL that an image may need. Others start a program (EPS)."""

Loaded = TypeVar("Loaded")


class BadImageError(UserError):
    """An image that cannot be read, named."""

    def __init__(self, line: str, problem: str = "unreadable"):
        """problem: its kind, in a word or two, for counting."""
        super().__init__(line)
        self.problem = problem


class Encoded(abc.ABC):
    """A split that is read image by image."""

    labels_N: Tensor
    """int64."""

    def __len__(self) -> int:
        return len(self.labels_N)

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """For messages."""

    @abc.abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded image. Raises BadImageError."""

    def image(self, index: int) -> Image.Image:
        """RGB. Raises BadImageError."""
        return decode_image(self.read(index), self.name(index))


def bad_image(name: str, reason: object, problem: str = "unreadable") -> BadImageError:
    line = " ".join(str(reason).split())
    return BadImageError(f"{name} cannot be read as an image: {line}", problem)


def open_image(content: bytes) -> Image.Image:
    """Opens an encoded image, whatever its name says it is. Raises what PIL raises."""
    return Image.open(io.BytesIO(content), formats=known_formats())


@functools.cache
def known_formats() -> tuple[str, ...]:
    """Returns those of FORMATS that this version of PIL has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def thin(width: int, height: int) -> bool:
    """Whether an image's sides differ too much."""
    return max(width, height) > THINNEST * min(width, height)


def decode_image(content: bytes, name: str) -> Image.Image:
    """RGB, whatever the format; the orientation in its EXIF is not followed, as in ImageFolder.
    Raises BadImageError, which calls it `name`."""
    if not content:
        raise bad_image(name, "it is empty", "empty")
    try:
        with open_image(content) as image:
            width, height = image.size
            if width < 1 or height < 1:
                raise bad_image(name, f"{width} x {height} pixels are none", "no pixels")
            if thin(width, height):
                raise bad_image(name, f"{width} x {height} pixels are too thin to resize", "thin")
            if image.mode.startswith("I;16"):  # whose values above 255 PIL turns into white
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            if image.mode in ("I", "F"):
                raise bad_image(name, "32-bit pixels have no known range", "32-bit")
            return image.convert("RGB")
    except BadImageError:
        raise
    except UnidentifiedImageError:  # whose message names an object in memory
        problem, reason = "no image", "its format is not known"
    except Image.DecompressionBombError as error:
        problem, reason = "gigantic", str(error)
    except Exception as error:  # PIL's readers raise all kinds of a file that lies
        reason = str(error) or type(error).__name__
        problem = "truncated" if "truncated" in reason.lower() else "broken"
    raise bad_image(name, reason, problem)


def load_or_next(
    load: Callable[[int], Loaded], index: int, total: int, skip: bool
) -> tuple[int, Loaded, list[str]]:
    """What `load` makes of image `index` of a split of `total`; where skipping, of the first after
    it that can be read. Returns that image's index, what was loaded, and a line for each image that
    was bad. Raises BadImageError."""
    bad: list[str] = []
    while True:
        try:
            return index, load(index), bad
        except BadImageError as error:
            if not skip:
                raise
            bad.append(str(error))
            if len(bad) == min(SKIPPED_IN_A_ROW, total):
                raise BadImageError(
                    f"{len(bad)} images in a row are bad, the last one: {error}"
                ) from None
        index = (index + 1) % total
