"""Images packed into WebDataset tars: a split is a folder of shards and an index of them.

A shard is a plain tar with the members <key>.<format> and <key>.cls (the label, as text) of each
image, which webdataset reads as it is. Our index says where in it each image lies, so that an image
costs one read at an offset. fastgn.data.pack writes both.
"""

import dataclasses
import hashlib
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fastgn.data.images import Encoded, bad_image
from fastgn.errors import UserError, check
from fastgn.files import atomic_open

INDEX = "index.npz"
"""The index's name, in the folder of its shards."""
OPEN_SHARDS = 128
"""Kept open by a process: 1,024 files are a usual limit, and each worker has its own."""


@dataclasses.dataclass(frozen=True)
class Shards(Encoded):
    """The index of a split, all of it arrays; an image is read from its shard."""

    folder: Path
    classes: tuple[str, ...]
    recipe: str
    """Of what it was packed from and how: a digest."""
    shards: tuple[str, ...]
    """Names of the files."""
    sha256: tuple[str, ...]
    """Of each shard, in hexadecimal."""
    shard_bytes: np.ndarray
    """int64: size of each shard."""
    shard_N: np.ndarray
    """int32: which shard an image lies in."""
    offset_N: np.ndarray
    """int64: where in it, in bytes."""
    size_N: np.ndarray
    """int64: bytes."""
    crc_N: np.ndarray
    """uint32: CRC-32 of them."""
    key_N: np.ndarray
    """ASCII: the members' names without their endings."""
    labels_N: Tensor
    """int64."""
    files: dict[int, BinaryIO] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    """The shards that this process has open."""

    def name(self, index: int) -> str:
        """For messages."""
        return f"{self._path(int(self.shard_N[index]))}: {self.key_N[index].decode()}"

    def read(self, index: int) -> bytes:
        """The encoded image. Raises BadImageError where it is not the one that was packed."""
        size = int(self.size_N[index])
        try:
            file = self._file(int(self.shard_N[index]))
            content = os.pread(file.fileno(), size, int(self.offset_N[index]))
        except OSError as error:
            raise bad_image(self.name(index), error.strerror or error) from None
        if len(content) < size:
            reason = f"its shard ends after {len(content)} of its {size} bytes"
            raise bad_image(self.name(index), reason, "truncated")
        if zlib.crc32(content) != self.crc_N[index]:
            raise bad_image(self.name(index), "its checksum is not the index's", "checksum")
        return content

    def _path(self, shard: int) -> Path:
        return self.folder / self.shards[shard]

    def _file(self, shard: int) -> BinaryIO:
        """A descriptor that a forked worker has inherited serves too: pread moves no position."""
        if shard not in self.files:
            if len(self.files) >= OPEN_SHARDS:
                self.files.pop(next(iter(self.files)))
            self.files[shard] = open(self._path(shard), "rb", buffering=0)
        return self.files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"files": {}}

    def spoilt(self, shard: int) -> str | None:
        """What is wrong with a shard as a whole, in a line; reads all of it."""
        path = self._path(shard)
        try:
            digest = sha256_of(path)
        except OSError as error:
            return f"{path} cannot be read: {error.strerror or error}"
        if digest != self.sha256[shard]:
            return f"{path} has changed since it was packed: its SHA-256 is not its index's"
        return None

    def save(self, name: str = INDEX) -> None:
        """Writes the index into the folder; the same one gives the same bytes."""
        with atomic_open(self.folder / name) as file:
            np.savez(
                file,
                classes=np.array(self.classes),
                recipe=np.array(self.recipe),
                shards=np.array(self.shards),
                sha256=np.array(self.sha256),
                labels_N=self.labels_N.numpy(),
                **{name: getattr(self, name) for name in ARRAYS},
            )

    @staticmethod
    def load(folder: Path, name: str = INDEX) -> "Shards":
        """Raises UserError: an index that is spoilt, or a shard that is not there or of another
        size."""
        path = folder / name
        texts = ("classes", "recipe", "shards", "sha256")
        values = read_npz(path, (*texts, "labels_N", *ARRAYS), str(path))
        classes, recipe, shards, sha256, labels, *rest = values
        arrays: dict[str, Any] = dict(zip(ARRAYS, rest, strict=True))
        index = Shards(
            folder,
            tuple(classes.tolist()),
            recipe.item(),
            tuple(shards.tolist()),
            tuple(sha256.tolist()),
            **arrays,
            labels_N=torch.from_numpy(labels),
        )
        lengths = {len(array) for array in (labels, *rest[1:])}
        right = len(lengths) == 1 and len(shards) == len(sha256) == len(index.shard_bytes)
        check(right, f"{path} is spoilt: its arrays are not of one length")
        outside = labels[(labels < 0) | (labels >= len(classes))]
        if len(outside):
            raise UserError(
                f"{path}: label {outside[0]} is out of range, it has {len(classes)} classes"
            )
        for shard, size in enumerate(index.shard_bytes.tolist()):
            where = index._path(shard)
            try:
                found = where.stat().st_size
            except OSError as error:
                raise UserError(
                    f"{where}, of {path}, cannot be read: {error.strerror or error}"
                ) from None
            check(found == size, f"{where} has {found} bytes, {path} says {size}: pack it again")
        return index

    @staticmethod
    def join(parts: Sequence["Shards"]) -> "Shards":
        """One index from those of each shard."""
        arrays: dict[str, Any] = {
            name: np.concatenate([getattr(p, name) for p in parts]) for name in ARRAYS
        }
        counts = [len(part) for part in parts]
        arrays["shard_N"] = np.repeat(np.arange(len(parts), dtype=np.int32), counts)
        return dataclasses.replace(
            parts[0],
            shards=tuple(part.shards[0] for part in parts),
            sha256=tuple(part.sha256[0] for part in parts),
            labels_N=torch.cat([part.labels_N for part in parts]),
            files={},
            **arrays,
        )


ARRAYS = ("shard_bytes", "shard_N", "offset_N", "size_N", "crc_N", "key_N")
"""Fields of Shards that are NumPy arrays."""


def sha256_of(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_npz(path: Path, keys: Sequence[str], where: str) -> list[np.ndarray]:
    """Raises UserError, which begins with `where`; the file's own checksums are looked at."""
    try:
        with np.load(path) as content:
            missing = [key for key in keys if key not in content]
            check(not missing, f"{where}: the .npz lacks {', '.join(missing)}")
            return [content[key] for key in keys]
    except UserError:
        raise
    except (
        OSError,
        EOFError,
        ValueError,
        AttributeError,
        NotImplementedError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise UserError(f"{where} cannot be read as .npz: {error}") from None
