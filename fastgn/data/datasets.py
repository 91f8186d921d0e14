"""Where images come from: arrays in memory, files below a folder or in a list, or packed shards."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastgn.config.groups import DatasetConfig
from fastgn.data.images import BadImageError, Encoded, bad_image, decode_image
from fastgn.data.shards import INDEX, Shards, read_npz
from fastgn.errors import UserError, check

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


@dataclasses.dataclass(frozen=True)
class Files(Encoded):
    """A split whose images are files of their own."""

    paths: Sequence[str]
    labels_N: Tensor
    """int64."""

    def name(self, index: int) -> str:
        """For messages."""
        return self.paths[index]

    def read(self, index: int) -> bytes:
        """The encoded image. Raises BadImageError."""
        try:
            return Path(self.paths[index]).read_bytes()
        except OSError as error:
            raise bad_image(self.name(index), error.strerror or error) from None


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Training and validation images with the same classes."""

    name: str
    train: Arrays | Encoded
    val: Arrays | Encoded
    classes: tuple[str, ...]


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


def load_validation(cfg: DatasetConfig) -> tuple[Arrays | Encoded, tuple[str, ...]]:
    """The configured validation images and their classes. A folder needs no training images; where
    it has them, both must have the same classes. Raises UserError."""
    root = Path(str(cfg.data_dir))
    folder = cfg.data_dir is not None and cfg.data in (None, "imagefolder")
    if folder and root.exists() and not is_there(root, cfg.train_split):
        return split_below(root, cfg.val_split, "--val-split")
    dataset = load_dataset(cfg)
    return dataset.val, dataset.classes


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
    values = read_npz(path, keys, f"--data-dir {path}")
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


def to_arrays(files: Arrays | Encoded) -> Arrays:
    """Decodes every image of a split; they must all have one size."""
    if isinstance(files, Arrays):
        return files
    images = [torch.from_numpy(np.array(files.image(i))) for i in range(len(files))]
    odd = next((i for i, x in enumerate(images) if x.shape != images[0].shape), None)
    if odd is not None:
        raise UserError(
            f"{files.name(odd)} is {tuple(images[odd].shape)}, not {tuple(images[0].shape)}"
        )
    return Arrays(torch.stack(images).permute(0, 3, 1, 2).contiguous(), files.labels_N)


def imagefolder(root: Path, train_split: str, val_split: str) -> Dataset:
    """Shards in root/<split>/ (their index is there), or files listed in root/<split>.txt, or
    root/<split>/<class>/<image>, for each split what is found first; the classes of both must be
    the same."""
    train, classes = split_below(root, train_split, "--train-split")
    val, val_classes = split_below(root, val_split, "--val-split", classes)
    unlike = sorted(set(classes) ^ set(val_classes))
    check(
        not unlike,
        f"--data-dir {root}: {train_split} has {len(classes)} classes, {val_split} has "
        f"{len(val_classes)}; {', '.join(unlike[:3])} {'is' if len(unlike) == 1 else 'are'} in "
        "one alone",
    )
    check_classes(val_classes, classes, f"--data-dir {root}: {val_split}")
    return Dataset(root.name, train, val, classes)


def split_below(
    root: Path, split: str, option: str, known: tuple[str, ...] | None = None
) -> tuple[Encoded, tuple[str, ...]]:
    """A split and its classes. known: those of the training images."""
    folder, listed = root / split, root / f"{split}.txt"
    found: Encoded
    if (folder / INDEX).exists():
        found = Shards.load(folder)
        classes = found.classes
    elif listed.exists():
        found, classes = files_listed(root, listed, known)
    else:
        found, classes = files_below(root, split, option)
    check(
        len(classes) > 1,
        f"--data-dir {root}: {folder} has {len(classes)} class; at least 2 are needed",
    )
    return found, classes


def files_listed(
    root: Path, path: Path, known: tuple[str, ...] | None
) -> tuple[Files, tuple[str, ...]]:
    """A line is `path label`, the path from root; the label is a class's name, or its number, from
    0. The classes are the lines of root/classes.txt; where there is none, `known`; else the names
    in the list, sorted, or its numbers."""
    rows: list[tuple[int, str, str]] = []
    for number, line in enumerate(lines_of(path), 1):
        parts = line.rsplit(maxsplit=1)
        check(len(parts) != 1, f"{path}, line {number}: {line!r} has no label: write `path label`")
        if parts:
            rows.append((number, parts[0], parts[1]))
    check(bool(rows), f"{path} lists no image: a line is `path label`")
    labels = {label for _, _, label in rows}
    named = root / "classes.txt"
    if named.exists():
        classes = tuple(line.strip() for line in lines_of(named) if line.strip())
        known_by = str(named)
    elif known is not None:
        classes, known_by = known, "the training images"
    elif all(label.lstrip("-").isdecimal() for label in labels):
        classes, known_by = tuple(map(str, range(len(labels)))), "the list's number of labels"
    else:
        classes, known_by = tuple(sorted(labels)), str(path)
    numbers = {str(i): i for i in range(len(classes))} | {c: i for i, c in enumerate(classes)}
    check(len(set(classes)) == len(classes), f"{named} names a class twice")
    below: dict[str, set[str]] = {}
    for number, name, label in rows:
        check(
            label in numbers,
            f"{path}, line {number}: label {label} is out of range: {len(classes)} classes by "
            f"{known_by}, 0 to {len(classes) - 1} or their names",
        )
        folder, base = os.path.split(root / name)
        if folder not in below:  # one listing a folder: a question for each file takes minutes
            below[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        check(base in below[folder], f"{path}, line {number}: there is no {root / name}")
    return Files(
        [str(root / name) for _, name, _ in rows],
        torch.tensor([numbers[label] for _, _, label in rows]),
    ), classes


def lines_of(path: Path) -> list[str]:
    try:  # the names of files need not be UTF-8
        return path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def files_below(root: Path, split: str, option: str) -> tuple[Files, tuple[str, ...]]:
    from torchvision.datasets import ImageFolder

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
    try:
        listing = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise UserError(f"--data-dir {root}: {str(error).splitlines()[0]}; {hint}") from None
    return Files([path for path, _ in listing.samples], torch.tensor(listing.targets)), tuple(
        listing.classes
    )
