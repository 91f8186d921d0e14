"""Packs images into WebDataset shards with an index. Training then reads fewer and larger files.

    python -m fastgn.data.pack SOURCE OUTPUT --short-side 256 --quality 90

SOURCE is what --data-dir takes, and OUTPUT can be used as --data-dir afterwards. Without
--short-side the encoded images are copied unchanged, so training sees the same images.

If packing was interrupted, run the same command again to continue. Finished shards are kept, and
damaged ones are made again. Each shard has an index of its own, shard-*.npz, which only this
program reads. If images of SOURCE have changed in the meantime, remove OUTPUT first, because
changed images with unchanged names are not noticed.
"""

import contextlib
import dataclasses
import hashlib
import io
import os
import re
import sys
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

if __name__ == "__main__":  # report a mistake of the user before imports that take seconds
    from fastgn.extras import check_start

    check_start("fastgn.data.pack")

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from fastgn.config.cli import parse_cli
from fastgn.config.groups import DatasetConfig
from fastgn.config.programs import PackConfig
from fastgn.data.datasets import Encoded, load_dataset
from fastgn.data.images import BadImageError, decode_image, open_image
from fastgn.data.shards import INDEX, Shards, compute_sha256
from fastgn.data.torch import map_in_workers
from fastgn.errors import UserError, check, escape, print_stopped
from fastgn.extras import stop_on_signals
from fastgn.files import atomic_open, remove_file
from fastgn.lock import lock_folder

BLOCK = 512
"""Number of bytes in a block of a tar file. The header of each file in it takes one block, and the
file's content is padded with zeros to whole blocks."""


@dataclasses.dataclass(frozen=True)
class Packed:
    """An image as it is written to a shard."""

    format: str
    """Ending of the name that the image gets in the shard, such as "jpg"."""
    content: bytes


@dataclasses.dataclass(frozen=True)
class Packer:
    """Callable that takes the index of an image, and returns the image as Packed.

    For a bad image, it returns the error message if `skip` is set, and raises BadImageError
    otherwise. A Packer can be sent to worker processes.
    """

    split: Encoded
    short_side: int | None
    quality: int
    skip: bool

    def __call__(self, index: int) -> Packed | str:
        try:
            content = self.split.read(index)
            image = decode_image(content, self.split.name(index))
        except BadImageError as error:
            if not self.skip:
                raise
            return str(error)
        short = min(image.size)
        if self.short_side is None or short <= self.short_side:
            with open_image(content) as opened:
                kind = str(opened.format).lower()
            return Packed("jpg" if kind in ("jpeg", "mpo") else kind, content)
        width, height = (max(1, round(side * self.short_side / short)) for side in image.size)
        out = io.BytesIO()
        image.resize((width, height), Image.Resampling.BICUBIC).save(
            out, "JPEG", quality=self.quality
        )
        return Packed("jpg", out.getvalue())


def make_key(split: Encoded, index: int) -> str:
    """Returns the name of an image in its shard.

    The name is short and ASCII. It has no dot, because webdataset splits names at dots.
    """
    if isinstance(split, Shards):
        return split.key_N[index].decode()
    stem = re.sub(r"[^\w-]", "_", Path(split.name(index)).stem, flags=re.ASCII)
    return f"{index:08d}_{stem[:64]}"


def hash_packing(
    cfg: PackConfig, keys: list[str], labels: list[int], classes: tuple[str, ...]
) -> str:
    """Returns a digest of everything that determines the shards, except the bytes of the images.

    keys: names of the images in their shards.
    """
    what = (cfg.short_side, cfg.quality, cfg.shard_size, classes, keys, labels)
    return hashlib.sha256(repr(what).encode()).hexdigest()


def make_tar_member(name: str, content: bytes) -> bytes:
    """Returns a file as a member of a tar, without time and user, so that the bytes are
    reproducible."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % BLOCK)


def write_shard(
    folder: Path,
    name: str,
    images: Iterable[tuple[str, int, Packed]],
    classes: tuple[str, ...],
    recipe: str,
) -> Shards:
    """Writes a shard and its own index, and returns the index.

    images: (name in the shard, label, image) for each image. recipe: digest from `hash_packing`.
    """
    path = folder / f"{name}.tar"
    rows: list[tuple[str, int, int, int, int]] = []
    with atomic_open(path) as file:
        for key, label, image in images:
            crc, size = zlib.crc32(image.content), len(image.content)
            rows.append((key, label, file.tell() + BLOCK, size, crc))
            file.write(make_tar_member(f"{key}.{image.format}", image.content))
            file.write(make_tar_member(f"{key}.cls", str(label).encode()))
        file.write(bytes(2 * BLOCK))
    keys, labels, offsets, sizes, crcs = zip(*rows, strict=True) if rows else ((),) * 5
    part = Shards(
        folder,
        classes,
        recipe,
        shards=(path.name,),
        sha256=(compute_sha256(path),),
        shard_bytes=np.array([path.stat().st_size], np.int64),
        shard_N=np.zeros(len(rows), np.int32),
        offset_N=np.array(offsets, np.int64),
        size_N=np.array(sizes, np.int64),
        crc_N=np.array(crcs, np.uint32),
        key_N=np.array(keys, np.bytes_),
        labels_N=torch.tensor(labels, dtype=torch.int64),
    )
    part.save(f"{name}.npz")
    return part


def load_finished_shard(folder: Path, name: str, recipe: str) -> Shards | None:
    """Returns the index of a shard if the shard is finished and intact, otherwise None.

    recipe: digest from `hash_packing`. Raises UserError if the shard was made from other images or
    with other options.
    """
    try:
        part = Shards.load(folder, f"{name}.npz")
    except UserError:
        return None
    check(
        part.recipe == recipe,
        f"{folder} holds shards made from other images or with other options: give another "
        "OUTPUT, or remove this folder",
    )
    return part if part.find_fault(0) is None else None


def pack(
    split: Encoded, classes: tuple[str, ...], folder: Path, cfg: PackConfig, bar: tqdm
) -> tuple[Shards, list[str]]:
    """Packs a split. Returns the index of its shards, and a message for each bad image that was
    left out.

    folder: where to write the shards. bar: progress bar. Raises UserError if the folder has shards
    that another program has made. Also raises UserError if an image is bad and may not be left out.
    """
    numbers = range(len(split))
    pieces = [numbers[i : i + cfg.shard_size] for i in numbers[:: cfg.shard_size]]
    keys, labels = [make_key(split, i) for i in numbers], split.labels_N.tolist()
    recipe = hash_packing(cfg, keys, labels, classes)
    theirs = any(folder.glob("shard-*.tar")) or (folder / INDEX).exists()
    check(
        any(folder.glob("shard-*.npz")) or not theirs,
        f"{folder} holds shards or an index that fastgn.data.pack has not made: give another "
        "OUTPUT",
    )
    # Killed processes have left these temporary files.
    # No running process is writing such a temporary file, because the folder is locked.
    for left in folder.glob(".*.tmp"):
        remove_file(left)
    names = [f"shard-{number:06d}" for number in range(len(pieces))]
    parts: list[Shards] = []
    left_out: list[str] = []
    found = [load_finished_shard(folder, name, recipe) for name in names]
    missing = [i for piece, part in zip(pieces, found, strict=True) if part is None for i in piece]
    packer = Packer(split, cfg.short_side, cfg.quality, cfg.on_bad_image == "skip")
    made = map_in_workers(packer, missing, cfg.workers, cfg.worker_timeout)
    with contextlib.closing(made) as packed:

        def images(piece: range) -> Iterator[tuple[str, int, Packed]]:
            for index, image in zip(piece, islice(packed, len(piece)), strict=True):
                bar.update()
                if isinstance(image, Packed):
                    yield keys[index], labels[index], image
                else:
                    left_out.append(image)

        for name, piece, part in zip(names, pieces, found, strict=True):
            if part is None:
                part = write_shard(folder, name, images(piece), classes, recipe)
            else:
                bar.update(len(piece))
            parts.append(part)
    index = Shards.join(parts)
    index.save()
    return index, left_out


def check_apart(cfg: PackConfig) -> None:
    """Raises UserError unless all folders to write are inside OUTPUT and separate from SOURCE.

    If a folder with shards were inside a folder of SOURCE or contained it, the shards would later
    be taken for images of SOURCE.
    """
    source, output = Path(cfg.source).resolve(), Path(cfg.output).resolve()
    splits = {"train": cfg.train_split, "val": cfg.val_split}
    for option, split in splits.items():
        check(
            Path(os.path.normpath(output / split)).is_relative_to(output),
            f"--{option}-split {split} would be written outside of OUTPUT: give a folder's path "
            "relative to SOURCE, without '..'",
        )
    check(output != source, f"OUTPUT {cfg.output} is SOURCE itself: give another folder")
    for name in splits.values():
        written = (output / name).resolve()
        for read in ((source / split).resolve() for split in splits.values()):
            check(
                not (written.is_relative_to(read) or read.is_relative_to(written)),
                f"OUTPUT {cfg.output}: its folder {name} and the folder of images {read} would lie "
                "one inside the other: give another OUTPUT",
            )


def run(cfg: PackConfig) -> None:
    """Packs both splits and prints a summary of each. Raises UserError if a split cannot be
    packed."""
    output = Path(cfg.output)
    check_apart(cfg)
    dataset = load_dataset(
        DatasetConfig(
            data="imagefolder",
            data_dir=cfg.source,
            train_split=cfg.train_split,
            val_split=cfg.val_split,
        )
    )
    for note in dataset.notes:
        print(escape(note))
    with lock_folder(output, f"OUTPUT {output}"):
        splits = {cfg.train_split: dataset.train, cfg.val_split: dataset.val}
        for name, split in splits.items():
            assert isinstance(split, Encoded)
            with tqdm(total=len(split), desc=name, unit="image", disable=None) as bar:
                index, left_out = pack(split, dataset.classes, output / name, cfg, bar)
            print(escape(f"{output / name}: {format_summary(index)}"))
            bad = len(split) - len(index)
            if bad:
                print(f"  {bad} bad images were left out", *map(escape, left_out), sep="\n  ")


def format_summary(index: Shards) -> str:
    """Returns the number of images, the number of shards and the size of a packed split."""
    size = int(index.shard_bytes.sum()) / 1e6
    return f"{len(index)} images in {len(index.shards)} shards, {size:.1f} MB"


def main(args: list[str] | None = None) -> int:
    """Runs the program and returns its exit status.

    2 means that the user made a mistake, which is printed in one line.
    """
    try:
        cfg = parse_cli(PackConfig, sys.argv[1:] if args is None else args, "fastgn.data.pack")
        with stop_on_signals():
            run(cfg)
    except UserError as error:
        print(f"fastgn.data.pack: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print_stopped("fastgn.data.pack")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
