"""Decodes single images to RGB, and handles images that cannot be decoded."""

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
"""Number of consecutive bad images after which a run stops, because a whole folder or shard is then
probably missing."""

THINNEST = 1000
"""Largest ratio of an image's longer side to its shorter side.

Evaluation resizes the shorter side to 256 pixels, which takes gigabytes for thinner images.
"""

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "DIB", "PPM", "JPEG2000", "TGA")
"""PIL's readers that may open an image. Others are not allowed, because some of them, such as EPS,
start a program."""

Loaded = TypeVar("Loaded")


class BadImageError(UserError):
    """An image cannot be read. The message names the image."""

    def __init__(self, line: str, problem: str = "unreadable"):
        """Makes the error. line: its message. problem: kind of fault, such as "truncated", for
        statistics."""
        super().__init__(line)
        self.problem = problem


class Encoded(abc.ABC):
    """A split whose images are read and decoded one by one."""

    labels_N: Tensor
    """Index of each image's class as `(N,), int64`."""

    def __len__(self) -> int:
        return len(self.labels_N)

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """Returns a name of the image for messages."""

    @abc.abstractmethod
    def read(self, index: int) -> bytes:
        """Returns the encoded bytes of an image. Raises BadImageError if they cannot be read."""

    def load_image(self, index: int) -> Image.Image:
        """Returns an image as RGB. Raises BadImageError if it cannot be read or decoded."""
        return decode_image(self.read(index), self.name(index))


def make_bad_image_error(name: str, reason: object, problem: str = "unreadable") -> BadImageError:
    """Returns the error that names an image and says in one line why it cannot be read.

    reason: error or text that says why. problem: kind of fault, see BadImageError.
    """
    line = " ".join(str(reason).split())
    return BadImageError(f"{name} cannot be read as an image: {line}", problem)


def open_image(content: bytes) -> Image.Image:
    """Opens an encoded image. The format is found from the content, not from the file's ending.
    Raises the errors that PIL raises."""
    return Image.open(io.BytesIO(content), formats=list_formats())


@functools.cache
def list_formats() -> tuple[str, ...]:
    """Returns the image formats among FORMATS that the installed version of PIL can read."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def is_thin(width: int, height: int) -> bool:
    """Returns whether an image is too thin to be resized (the ratio of its sides is above
    THINNEST)."""
    return max(width, height) > THINNEST * min(width, height)


def decode_image(content: bytes, name: str) -> Image.Image:
    """Returns an encoded image of any format as RGB. Raises BadImageError if it cannot be decoded.

    The orientation in EXIF data is ignored, as torchvision's ImageFolder does.

    name: name of the image in the error's message.
    """
    if not content:
        raise make_bad_image_error(name, "it is empty", "empty")
    try:
        with open_image(content) as image:
            width, height = image.size
            if is_thin(width, height):
                raise make_bad_image_error(
                    name, f"{width} x {height} pixels are too thin to resize", "thin"
                )
            if image.mode.startswith("I;16"):  # PIL's convert would make all values above 255 white
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            if image.mode in ("I", "F"):
                raise make_bad_image_error(name, "32-bit pixels have no known range", "32-bit")
            return image.convert("RGB")
    except BadImageError:
        raise
    except UnidentifiedImageError:  # PIL's own message shows only the address of an object
        problem, reason = "no image", "its format is not known, or its header gives it no pixels"
    except Image.DecompressionBombError as error:
        problem, reason = "gigantic", str(error)
    except Exception as error:  # PIL raises many kinds of errors for damaged files
        reason = str(error) or type(error).__name__
        problem = "truncated" if "truncated" in reason.lower() else "broken"
    raise make_bad_image_error(name, reason, problem)


def load_or_next(
    load: Callable[[int], Loaded], index: int, total: int, skip: bool
) -> tuple[int, Loaded, list[str]]:
    """Returns (index of the loaded image, what `load` returned, messages about bad images).

    If image `index` is bad and `skip` is set, the first readable image after it is loaded instead.

    total: number of images in the split. Raises BadImageError if an image is bad and `skip` is not
    set, or if too many images in a row are bad.
    """
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
