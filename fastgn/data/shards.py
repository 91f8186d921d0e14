"""Images packed into WebDataset tars: a split is a folder of shards and an index of them.

A shard is a plain tar with the members <key>.<format> and <key>.cls (the label, as text) of each
image, which webdataset reads as it is. Our index says where in it each image lies, so that an image
costs one read at an offset. fastgn.data.pack writes both.
"""

import dataclasses
import hashlib
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fastgn.data.arrays import class_labels
from fastgn.data.images import Encoded, bad_image
from fastgn.data.npz import LABELS, Field, read_npz
from fastgn.errors import UserError, check
from fastgn.files import atomic_open, open_regular

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
            self.files[shard] = open_regular(self._path(shard))
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
        """Reads an index, and looks at the size of each shard.

        Raises UserError, which names the index, unless all of it fits together and each shard is in
        its folder.
        """
        path = folder / name
        values = read_npz(path, FIELDS, str(path))
        labels = values.pop("labels_N")
        texts: dict[str, Any] = {
            name: tuple(values.pop(name)) for name in ("classes", "shards", "sha256")
        }
        labels_N = class_labels(labels, len(texts["classes"]), str(path))
        index = Shards(folder, **texts, **values, labels_N=labels_N)
        wrong = index._wrong()
        check(wrong is None, f"{path} is spoilt: {wrong}")
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

    def _wrong(self) -> str | None:
        """Returns what does not fit together in the index itself, or None."""
        counts = {len(self.shards), len(self.sha256), len(self.shard_bytes)}
        lengths = {len(self), *(len(getattr(self, name)) for name in ARRAYS[1:])}
        if len(counts) != 1 or len(lengths) != 1:
            return "its arrays are not of one length"
        if len(set(self.classes)) < len(self.classes):
            return "it names a class twice"
        for name in self.shards:
            if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
                return f"{name!r} is no name of a shard in its folder"
        for digest in self.sha256:
            if not re.fullmatch("[0-9a-f]{64}", digest):
                return f"{digest!r} is no SHA-256"
        if not len(self):
            return None
        if self.shard_N.min() < 0 or self.shard_N.max() >= len(self.shards):
            return f"an image lies in shard {self.shard_N.max()} of {len(self.shards)}"
        room_N = self.shard_bytes[self.shard_N] - self.offset_N
        if self.offset_N.min() < 0 or self.size_N.min() < 0 or (self.size_N > room_N).any():
            return "an image lies outside its shard"
        if not are_keys(self.key_N):
            return "a key has more than letters, digits, _ and -"
        return None

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
"""Fields of Shards that are NumPy arrays; all but the first have an entry an image."""
FIELDS = {
    "classes": Field("text"),
    "recipe": Field("text", ("",)),
    "shards": Field("text"),
    "sha256": Field("text"),
    "shard_bytes": Field("int64"),
    "shard_N": Field("int32"),
    "offset_N": Field("int64"),
    "size_N": Field("int64"),
    "crc_N": Field("uint32"),
    "key_N": Field("bytes"),
    "labels_N": LABELS,
}
"""What each array of an index must be."""


def sha256_of(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def are_keys(key_N: np.ndarray) -> bool:
    """Returns whether all keys consist of ASCII letters, digits, _ and -, and none is empty."""
    codes = np.frombuffer(key_N.tobytes(), np.uint8).reshape(len(key_N), -1)
    used = codes != 0  # NumPy fills up with zeros
    allowed = np.zeros(256, bool)
    allowed[[*b"-_0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"]] = True
    gaps = used[:, 1:] & ~used[:, :-1]
    return bool(codes.size and used[:, 0].all() and not gaps.any() and allowed[codes[used]].all())
