"""Digests that identify a data set, so that a resumed run can report that its images have
changed."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

from fastgn.data.arrays import Arrays
from fastgn.data.datasets import Dataset, Files
from fastgn.data.images import Encoded
from fastgn.data.shards import Shards

SIZES = 10_000
"""Largest number of files per split whose sizes are read.

Reading the sizes of a million files from a file server takes minutes.
"""

Identity = dict[str, dict[str, Any]]
"""Name of a split -> dict with the number of its images, and with a digest for each of its
properties, such as the labels."""


def describe_dataset(dataset: Dataset) -> Identity:
    """Returns the digests that a checkpoint keeps about the data that it was trained on.

    They stay the same if the data set is moved, because paths are relative to the data set's
    folder.
    """
    return {"training": describe_split(dataset.train), "validation": describe_split(dataset.val)}


def describe_split(split: Arrays | Encoded) -> dict[str, Any]:
    """Returns the number of images of a split, and digests of properties that are cheap to read.

    For arrays these are the labels and the pixels. For files they are the labels, and the files'
    names and sizes. For shards they are the labels, and the images' sizes and checksums.
    """
    known: dict[str, Any] = {"images": len(split)}
    known["labels"] = hash_parts([split.labels_N.numpy().tobytes()])
    if isinstance(split, Arrays):
        return known | {"content": hash_parts([split.images_NCHW.contiguous().numpy()])}
    known["sizes"] = hash_parts(b"%d " % size for size in read_sizes(split))
    if isinstance(split, Shards):
        return known | {"content": hash_parts([split.crc_N.tobytes()])}
    assert isinstance(split, Files)
    base = os.path.join(split.root, "")
    return known | {
        "names": hash_parts(os.fsencode(path.removeprefix(base)) + b"\0" for path in split.paths)
    }


def hash_parts(parts: Iterable[Any]) -> str:
    """Returns the SHA-256 of consecutive buffers, in hexadecimal."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def read_sizes(split: Encoded) -> Iterator[int]:
    """Yields the sizes in bytes of at most SIZES images, evenly spaced. -1 means a missing file."""
    for index in range(0, len(split), -(-len(split) // SIZES)):
        if isinstance(split, Shards):
            yield int(split.size_N[index])
        elif isinstance(split, Files):
            try:
                yield os.stat(split.paths[index]).st_size
            except OSError:
                yield -1


def describe_changes(before: Identity | None, now: Identity) -> list[str]:
    """Returns how a data set differs from that of a checkpoint, as one phrase per changed split.

    Only properties that both descriptions have are compared. So a data set of files and the shards
    packed from it count as the same images.

    before: result of `describe_dataset` in the checkpoint. It is None if the checkpoint was written
    by an older version of fastgn, which did not save it. now: result for the present data set.
    """
    if before is None:
        return ["the checkpoint does not say which images it was made with"]
    found = []
    for name, split in now.items():
        was = before.get(name, {})
        if was.get("images") != split["images"]:
            found.append(f"{was.get('images')} {name} images are now {split['images']}")
            continue
        parts = [part for part, value in split.items() if was.get(part, value) != value]
        if parts:
            found.append(f"the {' and '.join(parts)} of the {name} images have changed")
    return found
