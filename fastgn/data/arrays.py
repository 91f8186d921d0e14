"""Splits of a data set that are held as arrays in memory."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastgn.data.images import Encoded
from fastgn.data.npz import IMAGES, LABELS, read_npz
from fastgn.errors import UserError, check


@dataclasses.dataclass(frozen=True)
class Arrays:
    """The images and labels of a split that fits into memory.

    Raises UserError unless the tensors have the shapes and dtypes that the fields name.
    """

    images_NCHW: Tensor
    """RGB images as `(N, 3, H, W), uint8`."""
    labels_N: Tensor
    """Index of each image's class as `(N,), int64`."""

    def __post_init__(self) -> None:
        images, labels = self.images_NCHW, self.labels_N
        check(
            images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3,
            f"images should be uint8 N x 3 x H x W, not {images.dtype} {tuple(images.shape)}",
        )
        check(images.numel() > 0, f"images of {tuple(images.shape)} have no pixels")
        check(
            labels.dtype == torch.int64 and labels.shape == images.shape[:1],
            f"labels of {len(images)} images should be int64 of that length, not {labels.dtype} "
            f"{tuple(labels.shape)}",
        )

    def __len__(self) -> int:
        return len(self.labels_N)

    def load_image(self, index: int) -> Image.Image:
        """Returns one image as a PIL image."""
        return Image.fromarray(self.images_NCHW[index].permute(1, 2, 0).numpy())


def convert_labels(labels: np.ndarray, classes: int, where: str) -> Tensor:
    """Returns integer labels of shape `(N,)` or `(N, 1)` as a tensor `(N,), int64`.

    Raises UserError if a label is not in 0 to `classes` - 1. The message begins with `where`.
    """
    labels = labels.reshape(-1)
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise UserError(
            f"{where}: label {outside[0]} is out of range: {classes} classes are 0 to {classes - 1}"
        )
    return torch.from_numpy(labels.astype(np.int64))


def read_arrays(path: Path, splits: tuple[str, ...], classes: int, where: str) -> list[Arrays]:
    """Reads the images and labels of each split from an .npz file.

    A split has the arrays {split}_images, `(N, H, W, 3), uint8`, and {split}_labels, `(N,)`
    integers. splits: names of the splits, such as train. classes: number of classes.

    Raises UserError if an array is missing or has another shape or dtype, or if a split's images
    and labels differ in number. The message begins with `where`.
    """
    fields = {f"{split}_images": IMAGES for split in splits}
    fields |= {f"{split}_labels": LABELS for split in splits}
    values = read_npz(path, fields, where)
    found = []
    for split in splits:
        images, labels = values[f"{split}_images"], values[f"{split}_labels"]
        check(
            len(images) == len(labels) > 0,
            f"{where} has {len(images)} {split} images, but {len(labels)} labels",
        )
        check(images.size > 0, f"{where}: {split} images of {images.shape[1:3]} have no pixels")
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        found.append(Arrays(pixels, convert_labels(labels, classes, where)))
    return found


def decode_all(split: Arrays | Encoded) -> Arrays:
    """Returns a split with all images decoded. Raises UserError if the images differ in size."""
    if isinstance(split, Arrays):
        return split
    images = [torch.from_numpy(np.array(split.load_image(i))) for i in range(len(split))]
    odd = next((i for i, x in enumerate(images) if x.shape != images[0].shape), None)
    if odd is not None:
        raise UserError(
            f"{split.name(odd)} has shape {tuple(images[odd].shape)}, but the first image has "
            f"{tuple(images[0].shape)}: resize all images to the same size"
        )
    return Arrays(torch.stack(images).permute(0, 3, 1, 2).contiguous(), split.labels_N)
