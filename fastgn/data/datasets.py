"""Where images come from: arrays in memory, files below a folder or in a list, or packed shards."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgn.config.groups import DatasetConfig
from fastgn.data.arrays import Arrays, decode_all, read_arrays
from fastgn.data.folders import find_images
from fastgn.data.images import BadImageError, Encoded, bad_image, decode_image
from fastgn.data.lists import read_list
from fastgn.data.shards import INDEX, Shards
from fastgn.errors import UserError, check
from fastgn.files import open_regular

__all__ = [
    "Arrays",
    "BadImageError",
    "Dataset",
    "Encoded",
    "Files",
    "check_classes",
    "decode_image",
    "load_dataset",
]

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Files(Encoded):
    """A split whose images are files of their own."""

    paths: Sequence[str]
    labels_N: Tensor
    """int64."""
    root: str = ""
    """The folder that names of images begin at, wherever it lies today."""

    def name(self, index: int) -> str:
        """For messages."""
        return self.paths[index]

    def read(self, index: int) -> bytes:
        """The encoded image. Raises BadImageError."""
        try:
            with open_regular(self.paths[index]) as file:
                return file.read()
        except OSError as error:
            raise bad_image(self.name(index), error.strerror or error) from None


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Training and validation images with the same classes."""

    name: str
    train: Arrays | Encoded
    val: Arrays | Encoded
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """Lines for the user: what was left out of folders, and what lists have twice."""


def check_classes(known: Sequence[str], classes: Sequence[str], who: str) -> None:
    """Raises UserError, which begins with `who`, unless the data's classes are the known ones, in
    the same order: a label is a number, and would name another class."""
    check(
        len(known) == len(classes),
        f"{who} knows {len(known)} classes ({', '.join(known[:3])}, ...), the data has "
        f"{len(classes)} ({', '.join(classes[:3])}, ...): give its own --data-dir",
    )
    other = next(
        (i for i, pair in enumerate(zip(known, classes, strict=True)) if len(set(pair)) > 1), None
    )
    if other is not None:
        raise UserError(
            f"{who} knows class {other} of {len(known)} as {known[other]}, the data has "
            f"{classes[other]} there: give its own --data-dir"
        )


def load_dataset(cfg: DatasetConfig) -> Dataset:
    """Returns the configured images. Raises UserError if they are missing, cannot be read, or do
    not fit together."""
    kind = cfg.data or ("imagefolder" if cfg.data_dir else "digits")
    with naming(cfg):
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


def load_validation(cfg: DatasetConfig) -> tuple[Arrays | Encoded, tuple[str, ...]]:
    """Returns the configured validation images and their classes.

    A folder needs no training images. If it has them, both must have the same classes. Raises
    UserError.
    """
    root = Path(str(cfg.data_dir))
    with naming(cfg):
        folder = cfg.data_dir is not None and cfg.data in (None, "imagefolder")
        if folder and root.exists() and not is_there(root, cfg.train_split):
            found = find_split(root, cfg.val_split, "--val-split")
            return found.images, found.classes
    dataset = load_dataset(cfg)
    return dataset.val, dataset.classes


@contextlib.contextmanager
def naming(cfg: DatasetConfig) -> Iterator[None]:
    """Turns what the file system refuses, such as a folder that may not be read or a name that is
    too long, into a UserError."""
    try:
        yield
    except OSError as error:
        where = "" if error.filename in (None, cfg.data_dir) else f" {error.filename}"
        raise UserError(
            f"--data-dir {cfg.data_dir}:{where} cannot be read: {error.strerror or error}"
        ) from None


def is_there(root: Path, split: str) -> bool:
    """Whether a folder has a split, in whatever form."""
    return (root / split).exists() or (root / f"{split}.txt").exists()


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
    notes: tuple[str, ...] = ()
    if path is not None and path.suffix == ".npz":
        train, val = read_arrays(path, ("train", "test"), 10, f"--data-dir {path}")
    elif path is not None and (path / "train").is_dir():
        folder = imagefolder(path, "train", "test")
        check(
            folder.classes == CIFAR10_CLASSES,
            f"--data-dir {path}: CIFAR-10 has the classes {', '.join(CIFAR10_CLASSES)}; found "
            f"{', '.join(folder.classes)} (--data imagefolder takes any)",
        )
        train, val, notes = decode_all(folder.train), decode_all(folder.val), folder.notes
    else:
        train, val = from_torchvision(path)
    return Dataset("cifar10", train, val, CIFAR10_CLASSES, notes)


def from_torchvision(path: Path | None) -> tuple[Arrays, Arrays]:
    """Returns CIFAR-10's python batches, below `path` or downloaded to the user's cache.

    They are pickles, and could run code: torchvision compares their checksums with those of the
    originals before it opens one.
    """
    from torchvision.datasets import CIFAR10

    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    root = path or Path(cache) / "fastgn"
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


def imagefolder(root: Path, train_split: str, val_split: str) -> Dataset:
    """Finds both splits of a folder. Raises UserError unless their classes are the same."""
    train = find_split(root, train_split, "--train-split")
    val = find_split(root, val_split, "--val-split", train.classes)
    unlike = sorted(set(train.classes) ^ set(val.classes))
    check(
        not unlike,
        f"--data-dir {root}: {train_split} has {len(train.classes)} classes, {val_split} has "
        f"{len(val.classes)}; {', '.join(unlike[:3])} {'is' if len(unlike) == 1 else 'are'} in "
        "one alone",
    )
    check_classes(val.classes, train.classes, f"--data-dir {root}: {val_split}")
    notes = (*train.notes, *val.notes)
    return Dataset(root.name, train.images, val.images, train.classes, notes)


class Split(NamedTuple):
    """A split of a folder."""

    images: Encoded
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """See Dataset."""


def find_split(root: Path, split: str, option: str, known: tuple[str, ...] | None = None) -> Split:
    """Finds shards in root/<split>/ (their index is there), or files listed in root/<split>.txt, or
    root/<split>/<class>/<image>: what is there first, in this order.

    option: what names another split. known: the classes of the training images.

    Raises UserError if there is none of them, or less than one image or two classes.
    """
    folder, listed = root / split, root / f"{split}.txt"
    if (folder / INDEX).exists():
        shards = Shards.load(folder)
        found = Split(shards, shards.classes)
    elif listed.exists():
        rows = read_list(root, listed, known)
        images = Files(rows.paths, torch.tensor(rows.labels), str(root))
        found = Split(images, rows.classes, tuple(rows.notes))
    else:
        found = files_below(root, split, option)
    check(len(found.images) > 0, f"--data-dir {root}: {folder} has no image")
    check(
        len(found.classes) > 1,
        f"--data-dir {root}: {folder} has {len(found.classes)} class; at least 2 are needed",
    )
    return found


def files_below(root: Path, split: str, option: str) -> Split:
    """Finds the images of root/<split>/<class>/. Raises UserError if there are none."""
    folder = root / split
    hint = (
        f"it should hold one folder of images a class, or the shards of fastgn.data.pack, or be "
        f"listed in {split}.txt ({option} names another)"
    )
    check(folder.is_dir(), f"--data-dir {root}: {folder} is missing; {hint}")
    check(
        not any(folder.glob("shard-*.tar")),
        f"--data-dir {root}: {folder} has shards without {INDEX}: fastgn.data.pack, called again, "
        "finishes them",
    )
    tree = find_images(folder, f"--data-dir {root}")
    check(bool(tree.classes), f"--data-dir {root}: {folder} has no folder in it; {hint}")
    images = Files(tree.paths, torch.tensor(tree.labels), str(root))
    return Split(images, tuple(tree.classes), tuple(tree.note(folder)))
