"""Reads and writes splits that are packed into WebDataset tar files.

A split is a folder with shards and one index. A shard is a plain tar file, which webdataset can
read too. Each image has two members: <key>.<format> is the encoded image, and <key>.cls holds its
label as text. The index says at which offset of which shard an image lies, so that one read loads
the image. fastgn.data.pack writes the shards and the index.
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

from fastgn.data.arrays import convert_labels
from fastgn.data.images import Encoded, make_bad_image_error
from fastgn.data.npz import LABELS, Field, read_npz
from fastgn.errors import UserError, check, find_duplicate
from fastgn.files import atomic_open, open_regular

INDEX = "index.npz"
"""Name of the index file in the folder of its shards."""
OPEN_SHARDS = 128
"""Largest number of shards that a process keeps open. Systems often allow 1,024 open files."""


@dataclasses.dataclass(frozen=True)
class Shards(Encoded):
    """A split in packed shards, described by its index. Images are read from their shards."""

    folder: Path
    classes: tuple[str, ...]
    recipe: str
    """Digest of the images' names and labels, of the classes, and of the options of the packing."""
    shards: tuple[str, ...]
    """File names of the shards."""
    sha256: tuple[str, ...]
    """SHA-256 of each shard, in hexadecimal."""
    shard_bytes: np.ndarray
    """Size of each shard in bytes, int64."""
    shard_N: np.ndarray
    """Index in `shards` of the shard that holds each image, int32."""
    offset_N: np.ndarray
    """Offset of each image in its shard in bytes, int64."""
    size_N: np.ndarray
    """Size of each encoded image in bytes, int64."""
    crc_N: np.ndarray
    """CRC-32 of each encoded image, uint32."""
    key_N: np.ndarray
    """Name of each image in its shard, without the ending, as ASCII bytes."""
    labels_N: Tensor
    """Index of each image's class as `(N,), int64`."""
    files: dict[int, BinaryIO] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    """Index of a shard -> its file, for the shards that this process has open."""

    def name(self, index: int) -> str:
        """Returns the shard and the name of an image, for messages."""
        return f"{self._path(int(self.shard_N[index]))}: {self.key_N[index].decode()}"

    def read(self, index: int) -> bytes:
        """Returns the encoded bytes of an image. Raises BadImageError if they cannot be read, or
        have changed since they were packed."""
        size = int(self.size_N[index])
        try:
            file = self._file(int(self.shard_N[index]))
            content = os.pread(file.fileno(), size, int(self.offset_N[index]))
        except OSError as error:
            raise make_bad_image_error(self.name(index), error.strerror or error) from None
        if len(content) < size:
            reason = f"its shard ends after {len(content)} of its {size} bytes"
            raise make_bad_image_error(self.name(index), reason, "truncated")
        if zlib.crc32(content) != self.crc_N[index]:
            raise make_bad_image_error(
                self.name(index), "its checksum is not the one in the index", "checksum"
            )
        return content

    def _path(self, shard: int) -> Path:
        return self.folder / self.shards[shard]

    def _file(self, shard: int) -> BinaryIO:
        """Returns the open file of a shard.

        Forked workers may share the file, because os.pread does not move its position.
        """
        if shard not in self.files:
            if len(self.files) >= OPEN_SHARDS:
                self.files.pop(next(iter(self.files)))
            self.files[shard] = open_regular(self._path(shard))
        return self.files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"files": {}}

    def find_fault(self, shard: int) -> str | None:
        """Reads a whole shard. Returns in one line how it is damaged, or None if it is intact."""
        path = self._path(shard)
        try:
            digest = compute_sha256(path)
        except OSError as error:
            return f"{path} cannot be read: {error.strerror or error}"
        if digest != self.sha256[shard]:
            return f"{path} has changed since it was packed: its SHA-256 is another one"
        return None

    def save(self, name: str = INDEX) -> None:
        """Writes the index into the folder. The same content always gives a file with the same
        bytes."""
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
        """Reads an index and checks the size of each shard.

        Raises UserError if the fields of the index contradict each other, or if a shard is missing
        or has another size. The message names the file of the index.
        """
        path = folder / name
        values = read_npz(path, FIELDS, str(path))
        labels = values.pop("labels_N")
        texts: dict[str, Any] = {
            name: tuple(values.pop(name)) for name in ("classes", "shards", "sha256")
        }
        labels_N = convert_labels(labels, len(texts["classes"]), str(path))
        index = Shards(folder, **texts, **values, labels_N=labels_N)
        wrong = index._wrong()
        check(wrong is None, f"{path} is damaged: {wrong}")
        for shard, size in enumerate(index.shard_bytes.tolist()):
            where = index._path(shard)
            try:
                found = where.stat().st_size
            except OSError as error:
                raise UserError(
                    f"shard {where} of {path} cannot be read: {error.strerror or error}"
                ) from None
            check(
                found == size,
                f"shard {where} has {found} bytes, but {size} according to {path}: pack the images "
                "again",
            )
        return index

    def _wrong(self) -> str | None:
        """Returns how the fields of this index contradict each other, or None if they do not."""
        counts = {len(self.shards), len(self.sha256), len(self.shard_bytes)}
        lengths = {len(self), *(len(getattr(self, name)) for name in ARRAYS[1:])}
        if len(counts) != 1 or len(lengths) != 1:
            return "its arrays have different lengths"
        twice = find_duplicate(self.classes)
        if twice is not None:
            return f"it has the class {twice} twice"
        for name in self.shards:
            if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
                return f"{name!r} is not the name of a shard in its folder"
        for digest in self.sha256:
            if not re.fullmatch("[0-9a-f]{64}", digest):
                return f"{digest!r} is not a SHA-256"
        if not len(self):
            return None
        if self.shard_N.min() < 0 or self.shard_N.max() >= len(self.shards):
            return f"an image is in shard {self.shard_N.max()} of only {len(self.shards)}"
        room_N = self.shard_bytes[self.shard_N] - self.offset_N
        if self.offset_N.min() < 0 or self.size_N.min() < 0 or (self.size_N > room_N).any():
            return "an image lies outside of its shard"
        if not are_keys(self.key_N):
            return "a key has a character that is not a letter, a digit, _ or -"
        return None

    @staticmethod
    def join(parts: Sequence["Shards"]) -> "Shards":
        """Returns one index for several shards, given the index of each shard."""
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
"""Fields of Shards that are NumPy arrays. All except the first have one entry per image."""
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
"""Name of each array in an index file -> dtype and shape that it must have."""


def compute_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def are_keys(key_N: np.ndarray) -> bool:
    """Returns whether no key is empty and all keys consist of ASCII letters, digits, _ and -."""
    codes = np.frombuffer(key_N.tobytes(), np.uint8).reshape(len(key_N), -1)
    used = codes != 0  # NumPy pads short keys with zeros
    allowed = np.zeros(256, bool)
    allowed[[*b"-_0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"]] = True
    gaps = used[:, 1:] & ~used[:, :-1]
    return bool(codes.size and used[:, 0].all() and not gaps.any() and allowed[codes[used]].all())
