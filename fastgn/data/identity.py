"""What tells one data set from another: a run that continues on other images says so."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

from fastgn.data.arrays import Arrays
from fastgn.data.datasets import Dataset, Files
from fastgn.data.images import Encoded
from fastgn.data.shards import Shards

SIZES = 10_000
"""Files of a split whose sizes are looked at: a million questions to a file server take minutes."""

Identity = dict[str, dict[str, Any]]
"""Split -> number of images, and a digest of each part of their list."""


def identity_of(dataset: Dataset) -> Identity:
    """Returns what a checkpoint keeps of the data that it was trained on.

    It does not depend on where the data lie: names begin at the data's folder.
    """
    return {"training": of_split(dataset.train), "validation": of_split(dataset.val)}


def of_split(split: Arrays | Encoded) -> dict[str, Any]:
    """Returns the number of a split's images, and digests of what is known of them."""
    known: dict[str, Any] = {"images": len(split)}
    known["labels"] = digest([split.labels_N.numpy().tobytes()])
    if isinstance(split, Arrays):
        return known | {"content": digest([split.images_NCHW.contiguous().numpy()])}
    known["sizes"] = digest(b"%d " % size for size in sizes_of(split))
    if isinstance(split, Shards):
        return known | {"content": digest([split.crc_N.tobytes()])}
    assert isinstance(split, Files)
    base = os.path.join(split.root, "")
    return known | {
        "names": digest(os.fsencode(path.removeprefix(base)) + b"\0" for path in split.paths)
    }


def digest(parts: Iterable[Any]) -> str:
    """Returns the SHA-256 of buffers, one after the other, in hexadecimal."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def sizes_of(split: Encoded) -> Iterator[int]:
    """Yields the sizes in bytes of at most SIZES images, evenly spread; -1 for one that is gone."""
    for index in range(0, len(split), -(-len(split) // SIZES)):
        if isinstance(split, Shards):
            yield int(split.size_N[index])
        elif isinstance(split, Files):
            try:
                yield os.stat(split.paths[index]).st_size
            except OSError:
                yield -1


def changes_since(before: Identity | None, now: Identity) -> list[str]:
    """Returns how the data differ from the checkpoint's, one phrase per split.

    Only what both know is compared: files and the shards packed from them are the same images.
    before: None for a checkpoint of an older version, which has nothing of its data.
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
