"""Folders, lists and shards of the same small images."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import fastgn.data.pack as packing
from fastgn.config import Config
from fastgn.config.groups import DatasetConfig
from fastgn.data.datasets import Arrays, Dataset, Encoded, load_dataset
from fastgn.data.loader import build_loader
from fastgn.errors import UserError
from support.images import encoded, png_of
from support.loaders import CPU

CLASSES = ("ant", "bee", "cat")


def tree(root: Path, train_images: int = 6, val_images: int = 2) -> Path:
    """Writes {train,val}/<class>/<name>.jpg, and one PNG per class, and returns the root."""
    for split, count in (("train", train_images), ("val", val_images)):
        for number, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                kind, end = ("PNG", "png") if i == 1 else ("JPEG", "jpg")
                path = root / split / name / f"pic.{i}.{end}"
                path.write_bytes(encoded(number * count + i, kind))
    return root


def dataset_at(root: Path) -> Dataset:
    """Loads the data set in a folder."""
    return load_dataset(DatasetConfig(data_dir=str(root)))


def refusal(root: Path) -> str:
    """Returns the one-line message with which the data set in a folder is refused."""
    with pytest.raises(UserError) as caught:
        dataset_at(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def encoded_images(split: Arrays | Encoded) -> list[bytes]:
    """Returns the encoded bytes of each image of a split."""
    assert isinstance(split, Encoded)
    return [split.read(i) for i in range(len(split))]


def batches(dataset: Dataset, first: int = 0, **keys: Any) -> tuple[list, list[str]]:
    """Returns an augmented epoch of the torch loader, and the lines about bad images."""
    settings = {"aa": "rand-m9-mstd0.5-inc1", "mixup": 0.8, "reprob": 0.25, "workers": 0} | keys
    loader = build_loader(
        Config().replace(**settings),
        dataset,
        img_size=16,
        mean=torch.full((1, 3, 1, 1), 0.45),
        std=torch.full((1, 3, 1, 1), 0.225),
        batch_size=4,
        grad_accum_steps=1,
        rank=0,
        ranks=1,
        device=CPU,
    )
    return list(loader.epoch(1, first)), loader.bad_images


def write_lists(root: Path, source: Path, label: Callable[[str], str]) -> Path:
    """Writes lists of the source's files, from the last to the first. label: class -> its text."""
    root.mkdir(exist_ok=True)
    for split in ("train", "val"):
        files = sorted((source / split).rglob("*.*g"), reverse=True)
        lines = [f"{os.path.relpath(f, root)} {label(f.parent.name)}" for f in files]
        (root / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return root


def pack(source: Path, output: Path, *more: str) -> int:
    """Runs fastgn.data.pack and returns its exit status."""
    return packing.main([str(source), str(output), "--workers", "0", *more])


def flipped(content: bytes, where: int) -> bytes:
    """Returns the bytes with one bit changed."""
    spoilt = bytearray(content)
    spoilt[where] ^= 0x10
    return bytes(spoilt)


BMP_REST = (1, 24, 0, 0, 2835, 2835, 0, 0)
"""Planes, bits a pixel, compression, bytes, resolution and colours of a bitmap's header."""


def float_tiff() -> bytes:
    """Returns an encoded image whose pixels are 32-bit numbers."""
    out = io.BytesIO()
    Image.new("F", (4, 4), 0.5).save(out, "TIFF")
    return out.getvalue()


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is empty"),
    "truncated": (encoded(0, size=(200, 200))[:700], "truncated"),
    "no image": (b"text", "its format is not known"),
    "gigantic": (png_of(30_000, 30_000), "decompression bomb"),
    "32-bit": (float_tiff(), "32-bit pixels have no known range"),
    "thin": (encoded(0, "PNG", (3, 3001)), "3 x 3001 pixels are too thin to resize"),
}
