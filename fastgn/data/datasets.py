"""Loads data sets: arrays in memory, files in folders or lists, or packed shards."""

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
from fastgn.config.inputs import check_data_dir
from fastgn.data.arrays import Arrays, decode_all, read_arrays
from fastgn.data.folders import find_images
from fastgn.data.images import BadImageError, Encoded, decode_image, make_bad_image_error
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
    """A split whose images are separate files."""

    paths: Sequence[str]
    labels_N: Tensor
    """Index of each image's class as `(N,), int64`."""
    root: str = ""
    """Folder of the data set. The digest of the images' paths leaves this folder out, so that it
    stays the same if the data set is moved."""

    def name(self, index: int) -> str:
        """Returns the image's path, for messages."""
        return self.paths[index]

    def read(self, index: int) -> bytes:
        """Returns the encoded bytes of an image. Raises BadImageError if its file cannot be
        read."""
        try:
            with open_regular(self.paths[index]) as file:
                return file.read()
        except OSError as error:
            raise make_bad_image_error(self.name(index), error.strerror or error) from None


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Training and validation images with the same classes."""

    name: str
    train: Arrays | Encoded
    val: Arrays | Encoded
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """Messages for the user about files that were left out, and about files that a list names
    twice."""


def check_classes(known: Sequence[str], classes: Sequence[str], who: str) -> None:
    """Raises UserError unless the data set has the known classes in the same order.

    Labels are numbers, so with another order of the classes a label would mean another class.

    known: the classes of a model or split. classes: the classes of the data set. who: name of the
    model or split, with which the message begins.
    """
    check(
        len(known) == len(classes),
        f"{who} knows {len(known)} classes ({', '.join(known[:3])}, ...), but the data has "
        f"{len(classes)} ({', '.join(classes[:3])}, ...): give the --data-dir that it was "
        "trained on",
    )
    other = next(
        (i for i, pair in enumerate(zip(known, classes, strict=True)) if len(set(pair)) > 1), None
    )
    if other is not None:
        raise UserError(
            f"{who} knows class {other} of {len(known)} as {known[other]}, but in the data it "
            f"is {classes[other]}: give the --data-dir that it was trained on"
        )


def load_dataset(cfg: DatasetConfig) -> Dataset:
    """Returns the configured data set.

    Raises UserError if images are missing or cannot be read, or if the splits have different
    classes.
    """
    with report_file_errors(cfg):
        check_data_dir(cfg.kind, cfg.data_dir)
        match cfg.kind:
            case "digits":
                return read_digits()
            case "cifar10":
                return read_cifar10(cfg.data_dir)
            case _:
                check(
                    cfg.data_dir is not None,
                    "--data imagefolder needs --data-dir: add --data-dir DIR",
                )
                return read_image_folder(Path(str(cfg.data_dir)), cfg.train_split, cfg.val_split)


def load_validation(cfg: DatasetConfig) -> tuple[Arrays | Encoded, tuple[str, ...]]:
    """Returns the configured validation images and their classes.

    A folder without training images is accepted. If a folder has training images, both splits must
    have the same classes. Raises UserError if the images cannot be loaded.
    """
    root = Path(str(cfg.data_dir))
    with report_file_errors(cfg):
        folder = cfg.data_dir is not None and cfg.kind == "imagefolder"
        if folder and root.exists() and not split_exists(root, cfg.train_split):
            found = find_split(root, cfg.val_split, "--val-split")
            return found.images, found.classes
    dataset = load_dataset(cfg)
    return dataset.val, dataset.classes


@contextlib.contextmanager
def report_file_errors(cfg: DatasetConfig) -> Iterator[None]:
    """Turns an OSError inside the `with` block into a UserError that names --data-dir and the
    file."""
    try:
        yield
    except OSError as error:
        where = "" if error.filename in (None, cfg.data_dir) else f" {error.filename}"
        raise UserError(
            f"--data-dir {cfg.data_dir}:{where} cannot be read: {error.strerror or error}"
        ) from None


def split_exists(root: Path, split: str) -> bool:
    """Returns whether a folder has a split, as a folder or as a list."""
    return (root / split).exists() or (root / f"{split}.txt").exists()


def read_digits() -> Dataset:
    """Returns scikit-learn's 1,797 digits of 8 x 8 pixels.

    The split into 1,437 training and 360 validation images is stratified and always the same.
    """
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


def read_cifar10(data_dir: str | None) -> Dataset:
    """Returns CIFAR-10 from `data_dir`. If `data_dir` is None, downloads CIFAR-10.

    data_dir can be an .npz file with train_images, train_labels, test_images and test_labels, where
    images are NHWC, uint8. It can also be a folder with the python batches, or a folder with
    train/<class>/ and test/<class>/.
    """
    path = Path(data_dir) if data_dir else None
    notes: tuple[str, ...] = ()
    if path is not None and path.suffix == ".npz":
        train, val = read_arrays(path, ("train", "test"), 10, f"--data-dir {path}")
    elif path is not None and (path / "train").is_dir():
        folder = read_image_folder(path, "train", "test")
        check(
            folder.classes == CIFAR10_CLASSES,
            f"--data-dir {path}: CIFAR-10 has the classes {', '.join(CIFAR10_CLASSES)}, but the "
            f"folder has {', '.join(folder.classes)}: use --data imagefolder, which accepts any "
            "classes",
        )
        train, val, notes = decode_all(folder.train), decode_all(folder.val), folder.notes
    else:
        train, val = read_torchvision(path)
    return Dataset("cifar10", train, val, CIFAR10_CLASSES, notes)


def read_torchvision(path: Path | None) -> tuple[Arrays, Arrays]:
    """Returns CIFAR-10's training and test images from its python batches.

    The batches are read below `path`. If `path` is None, they are downloaded to the user's cache.
    The batches are pickle files, which could run code, so torchvision checks their checksums before
    it opens them.
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
            raise UserError(
                f"CIFAR-10 cannot be downloaded ({error}): give its folder as --data-dir DIR"
            ) from None
        raise UserError(
            f"--data-dir {path}: there is no CIFAR-10: it should be an .npz file, or a folder with "
            "train/ and test/ or with a complete cifar-10-batches-py/"
        ) from None
    train, val = (
        Arrays(torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(p.targets))
        for p in parts
    )
    return train, val


def read_image_folder(root: Path, train_split: str, val_split: str) -> Dataset:
    """Returns both splits of a folder. Raises UserError unless both have the same classes."""
    train = find_split(root, train_split, "--train-split")
    val = find_split(root, val_split, "--val-split", train.classes)
    unlike = sorted(set(train.classes) ^ set(val.classes))
    check(
        not unlike,
        f"--data-dir {root}: {train_split} has {len(train.classes)} classes, {val_split} has "
        f"{len(val.classes)}; {', '.join(unlike[:3])} {'is' if len(unlike) == 1 else 'are'} in "
        "only one of them: give both the same classes",
    )
    check_classes(val.classes, train.classes, f"--data-dir {root}: {val_split}")
    notes = (*train.notes, *val.notes)
    return Dataset(root.name, train.images, val.images, train.classes, notes)


class Split(NamedTuple):
    """The training or validation images that were found in a data set's folder."""

    images: Encoded
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """Messages for the user, for example about files that were left out."""


def find_split(root: Path, split: str, option: str, known: tuple[str, ...] | None = None) -> Split:
    """Finds the images of one split of a folder.

    These are shards with an index in root/<split>/, or else the files listed in root/<split>.txt,
    or else the files root/<split>/<class>/<image>.

    option: flag that names the split, for messages. known: classes of the training images.

    Raises UserError if none of the three exists, or if the split has no image or only one class.
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
        found = find_files(root, split, option)
    check(
        len(found.images) > 0,
        f"--data-dir {root}: {folder} holds no images: add images, or give another --data-dir",
    )
    check(
        len(found.classes) > 1,
        f"--data-dir {root}: {folder} has {len(found.classes)} class, but at least 2 are needed",
    )
    return found


def find_files(root: Path, split: str, option: str) -> Split:
    """Finds the images root/<split>/<class>/<image>. Raises UserError if the folder has no
    classes. option: flag that names the split, for messages."""
    folder = root / split
    hint = (
        f"it should hold one folder of images per class or the shards of fastgn.data.pack, or "
        f"{split}.txt should list its images; {option} names another folder"
    )
    check(
        folder.is_dir() or root.name != split,
        f"--data-dir {root}: {folder} is missing: give the folder above, --data-dir {root.parent}",
    )
    check(folder.is_dir(), f"--data-dir {root}: {folder} is missing; {hint}")
    check(
        not any(folder.glob("shard-*.tar")),
        f"--data-dir {root}: {folder} has shards without {INDEX}: run fastgn.data.pack again to "
        "finish them",
    )
    tree = find_images(folder, f"--data-dir {root}")
    check(bool(tree.classes), f"--data-dir {root}: {folder} has no folder in it; {hint}")
    images = Files(tree.paths, torch.tensor(tree.labels), str(root))
    return Split(images, tuple(tree.classes), tuple(tree.describe_left_out(folder)))
