"""Small encoded images and folders of them."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def save_image(path: Path, side: int = 16, seed: int = 0) -> None:
    """Writes a PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def image_folder(
    root: Path, train_classes: str = "ab", val_classes: str = "ab", images: int = 4
) -> Path:
    """Writes train/ and val/ with one folder per class, and returns the root.

    train_classes, val_classes: one letter per class.
    """
    for split, names in (("train", train_classes), ("val", val_classes)):
        for name in names:
            for index in range(images):
                save_image(root / split / name / f"{index}.png", seed=index)
    return root


def encoded(index: int, kind: str = "JPEG", size: tuple[int, int] = (40, 36)) -> bytes:
    """Returns an encoded image without noise, whose colour depends on its index."""
    width, height = size
    pixels = np.full((height, width, 3), (index * 5 % 256, 255 - index * 5 % 256, 128), np.uint8)
    pixels[: height // 2] //= 2
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def png_of(width: int, height: int) -> bytes:
    """Returns a PNG that claims to be of this size and has almost no data."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + encoded(0, "PNG")[33:]
