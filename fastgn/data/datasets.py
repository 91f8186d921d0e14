"""Where images come from: arrays in memory, or files below a folder."""

import dataclasses
import io
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fastgn.config import DatasetConfig, UserError, check

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A split small enough for memory."""

    images_NCHW: Tensor
    """uint8, RGB."""
    labels_N: Tensor
    """int64."""

    def __len__(self) -> int:
        return len(self.labels_N)

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.images_NCHW[index].permute(1, 2, 0).numpy())


class BadImageError(UserError):
    """An image that cannot be read, named."""


@dataclasses.dataclass(frozen=True)
class Files:
    """A split that is read image by image."""

    paths: Sequence[str]
    labels_N: Tensor
    """int64."""

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """For messages."""
        return self.paths[index]

    def read(self, index: int) -> bytes:
        """The encoded image. Raises BadImageError."""
        try:
            return Path(self.paths[index]).read_bytes()
        except OSError as error:
            reason = error.strerror or error
            raise BadImageError(
                f"{self.name(index)} cannot be read as an image: {reason}"
            ) from None

    def image(self, index: int) -> Image.Image:
        """RGB. Raises BadImageError."""
        return decode_image(self.read(index), self.name(index))


def decode_image(content: bytes, name: str) -> Image.Image:
    """RGB, whatever the format. Raises BadImageError, which calls it `name`."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.convert("RGB")
    except UnidentifiedImageError:  # whose message names an object in memory
        reason = "its format is not known"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error)
    raise BadImageError(f"{name} cannot be read as an image: {reason}")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Training and validation images with the same classes."""

    name: str
    train: Arrays | Files
    val: Arrays | Files
    classes: tuple[str, ...]


def load_dataset(cfg: DatasetConfig) -> Dataset:
    """The configured images. Raises UserError where they are missing, empty or do not fit
    together."""
    kind = cfg.data or ("imagefolder" if cfg.data_dir else "digits")
    if cfg.data_dir is not None:
        check(kind != "digits", f"--data-dir {cfg.data_dir}: digits are embedded, leave it out")
        check(
            Path(cfg.data_dir).exists(),
            f"--data-dir {cfg.data_dir}: there is no such file or folder",
        )
    match kind:
        case "digits":
            return digits()
        case "cifar10":
            return cifar10(cfg.data_dir)
        case _:
            check(cfg.data_dir is not None, "--data imagefolder needs --data-dir")
            return imagefolder(Path(str(cfg.data_dir)), cfg.train_split, cfg.val_split)


def digits() -> Dataset:
    """scikit-learn's 1,797 embedded 8 x 8 digits: a stratified split of 1,437 and 360, always the
    same."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    parts = train_test_split(
        np.arange(len(labels)), test_size=360, stratify=bunch.target, random_state=0
    )
    train, val = (
        Arrays(images[part][:, None].expand(-1, 3, -1, -1).contiguous(), labels[part])
        for part in parts
    )
    return Dataset("digits", train, val, tuple(str(d) for d in range(10)))


def cifar10(data_dir: str | None) -> Dataset:
    """CIFAR-10 from an .npz (train_images uint8 NHWC, train_labels, test_images, test_labels), from
    the python batches, from an image folder (train/<class>/, test/<class>/), or downloaded."""
    path = Path(data_dir) if data_dir else None
    if path is not None and path.suffix == ".npz":
        train, val = from_npz(path)
    elif path is not None and (path / "train").is_dir():
        folder = imagefolder(path, "train", "test")
        check(
            folder.classes == CIFAR10_CLASSES,
            f"--data-dir {path}: CIFAR-10 has the classes {', '.join(CIFAR10_CLASSES)}; found "
            f"{', '.join(folder.classes)} (--data imagefolder takes any)",
        )
        train, val = to_arrays(folder.train), to_arrays(folder.val)
    else:
        train, val = from_torchvision(path)
    return Dataset("cifar10", train, val, CIFAR10_CLASSES)


def from_npz(path: Path) -> tuple[Arrays, Arrays]:
    keys = ("train_images", "train_labels", "test_images", "test_labels")
    try:
        with np.load(path) as content:
            missing = [k for k in keys if k not in content]
            check(not missing, f"--data-dir {path}: the .npz lacks {', '.join(missing)}")
            values = [content[k] for k in keys]
    except UserError:
        raise
    except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"--data-dir {path} cannot be read as .npz: {error}") from None
    splits = []
    for images, labels in (values[:2], values[2:]):
        check(
            images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3,
            f"--data-dir {path}: images should be uint8 N x H x W x 3, not {images.dtype} "
            f"{images.shape}",
        )
        check(
            len(images) == len(labels) > 0,
            f"--data-dir {path}: {len(images)} images, {len(labels)} labels",
        )
        check(
            0 <= labels.min() and labels.max() < 10,
            f"--data-dir {path}: labels run from {labels.min()} to {labels.max()}, CIFAR-10 has "
            "0 to 9",
        )
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        splits.append(Arrays(pixels, torch.from_numpy(labels.astype(np.int64))))
    return splits[0], splits[1]


def from_torchvision(path: Path | None) -> tuple[Arrays, Arrays]:
    """The python batches, below `path` or downloaded to the user's cache."""
    from torchvision.datasets import CIFAR10

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastgn"
    root = path or cache
    if path is not None and (path / "data_batch_1").is_file():
        root = path.parent
    try:
        parts = [CIFAR10(str(root), train=train, download=path is None) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        if path is None:
            raise UserError(f"CIFAR-10 cannot be downloaded ({error}); give --data-dir") from None
        raise UserError(
            f"--data-dir {path}: no CIFAR-10 there: neither an .npz, nor train/ and test/ folders, "
            "nor cifar-10-batches-py/ whole"
        ) from None
    train, val = (
        Arrays(torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(p.targets))
        for p in parts
    )
    return train, val


def to_arrays(files: Arrays | Files) -> Arrays:
    """Decodes every image of a split; they must all have one size."""
    if isinstance(files, Arrays):
        return files
    images = [torch.from_numpy(np.array(files.image(i))) for i in range(len(files))]
    odd = next((i for i, x in enumerate(images) if x.shape != images[0].shape), None)
    if odd is not None:
        raise UserError(
            f"{files.paths[odd]} is {tuple(images[odd].shape)}, not {tuple(images[0].shape)}"
        )
    return Arrays(torch.stack(images).permute(0, 3, 1, 2).contiguous(), files.labels_N)


def imagefolder(root: Path, train_split: str, val_split: str) -> Dataset:
    """root/<split>/<class>/<image>; the classes of both splits must be the same."""
    train, classes = files_below(root, train_split, "--train-split")
    val, val_classes = files_below(root, val_split, "--val-split")
    unlike = sorted(set(classes) ^ set(val_classes))
    check(
        not unlike,
        f"--data-dir {root}: {train_split} has {len(classes)} classes, {val_split} has "
        f"{len(val_classes)}; {', '.join(unlike[:3])} {'is' if len(unlike) == 1 else 'are'} in "
        "one alone",
    )
    return Dataset(root.name, train, val, classes)


def files_below(root: Path, split: str, option: str) -> tuple[Files, tuple[str, ...]]:
    from torchvision.datasets import ImageFolder

    folder = root / split
    hint = f"it should hold one folder of images a class ({option} names another folder)"
    check(folder.is_dir(), f"--data-dir {root}: {folder} is missing; {hint}")
    try:
        listing = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise UserError(f"--data-dir {root}: {str(error).splitlines()[0]}; {hint}") from None
    check(
        len(listing.classes) > 1,
        f"--data-dir {root}: {folder} has {len(listing.classes)} class; {hint}",
    )
    return Files([path for path, _ in listing.samples], torch.tensor(listing.targets)), tuple(
        listing.classes
    )
