"""Arrays and indices of shards that anybody may have made: read as they should be, or refused in a
line that names the file."""

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.odd import PICTURE, folder, load, often, refusal, train_a_few, write_tree

import fastgn.data.pack as packing
from fastgn.data import npz as archives
from fastgn.data.arrays import Arrays
from fastgn.data.shards import FIELDS, INDEX, Shards
from fastgn.errors import UserError

# ------------------------------------------------------------------------------------------- arrays

DTYPES = (
    *("bool", "int8", "uint8", "int16", ">i4", "int64", "uint64", "float16", "float64"),
    *("complex64", "U3", "S3", "object", "datetime64[s]"),
)
SHAPES = ((20,), (20, 1), (20, 2), (1, 20), (), (19,), (20, 1, 1), (4, 5))


@often
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.sampled_from(SHAPES),
    odd=st.sampled_from((0, 9, 10, 127, -1, 2**62)),
    where=st.integers(0, 18),
)
@example("int64", (20, 1), 9, 3)
@example(">i4", (20,), 9, 3)
@example("uint64", (20,), 2**62, 3)
@example("float64", (20,), 0, 3)
@example("bool", (20,), 0, 3)
@example("complex64", (20,), 0, 3)
@example("int64", (20, 2), 0, 3)
def test_labels_are_one_dimension_of_integers(dtype, shape, odd, where):
    labels = np.arange(int(np.prod(shape))) % 10
    labels.reshape(-1)[where if shape else 0] = odd
    with folder() as root, np.errstate(all="ignore"):
        labels = labels.reshape(shape).astype(dtype)
        path = write_arrays(root / "data.npz", train_labels=labels)
        values = labels.tolist() if labels.dtype.kind in "iu" else []
        right = shape in ((20,), (20, 1)) and values and 0 <= labels.min() <= labels.max() < 10
        if not right:
            assert str(path) in refusal(path, "cifar10")
            return
        dataset = load(path, "cifar10")
        assert dataset.train.labels_N.dtype == torch.int64
        assert dataset.train.labels_N.tolist() == labels.reshape(-1).tolist()
        train_a_few("labels", path, "cifar10")


def write_arrays(path: Path, **changes: Any) -> Path:
    content = {
        "train_images": np.full((20, 16, 16, 3), 7, np.uint8),
        "train_labels": np.arange(20) % 10,
        "test_images": np.full((10, 16, 16, 3), 8, np.uint8),
        "test_labels": np.arange(10),
    } | changes
    np.savez(path, **{k: v for k, v in content.items() if v is not None})
    return path


@often
@given(
    dtype=st.sampled_from(("uint8", "int8", "uint16", "float32", "object", "bool")),
    shape=st.sampled_from(
        ((20, 16, 16, 3), (20, 5, 7, 3), (20, 3, 16, 16), (20, 16, 16, 1), (20, 16, 48))
        + ((20, 0, 16, 3), (20, 16, 0, 3), (0, 16, 16, 3), (20, 16, 16, 0), (21, 16, 16, 3))
    ),
)
@example("uint8", (20, 16, 16, 3))
@example("uint8", (20, 0, 16, 3))
def test_images_are_bytes_with_pixels(dtype, shape):
    with folder() as root:
        path = write_arrays(root / "data.npz", train_images=np.zeros(shape, dtype))
        if dtype == "uint8" and shape in ((20, 16, 16, 3), (20, 5, 7, 3)):
            dataset = load(path, "cifar10")
            assert tuple(dataset.train.images_NCHW.shape) == (20, 3, *shape[1:3])
        else:
            assert str(path) in refusal(path, "cifar10")


@pytest.mark.parametrize("key", ["train_images", "train_labels", "test_images", "test_labels"])
def test_each_array_of_an_npz_is_needed(key, tmp_path):
    path = write_arrays(tmp_path / "data.npz", **{key: None})
    assert f"--data-dir {path}: the .npz lacks the arrays {key}" in refusal(path, "cifar10")


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64), "should be uint8 N x 3 x"),
        (torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.zeros(4).long(), "not torch.uint8"),
        (torch.zeros(4, 3, 0, 8, dtype=torch.uint8), torch.zeros(4).long(), "have no pixels"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4), "should be int64"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, 1).long(), "(4, 1)"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4).bool(), "torch.bool"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(3).long(), "(3,)"),
    ],
)
def test_tensors_that_are_no_split(images, labels, said):
    with pytest.raises(UserError) as caught:
        Arrays(images, labels)
    assert said in str(caught.value)


def npy(dtype: str, shape: tuple[int, ...], content: bytes = b"") -> bytes:
    """An array's file whose header says anything."""
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


@pytest.mark.parametrize(
    "labels",
    [
        npy("<i8", (2**62,)),
        npy("<i8", (20,), bytes(8)),
        npy("<i8", (20,), bytes(8 * 21)),
        npy("<i8", (-20,), bytes(8 * 20)),
        npy("|O", (20,), pickle.dumps([0] * 20)),
        npy("<M8[s]", (20,), bytes(8 * 20)),
        npy("nothing", (20,), bytes(8 * 20)),
        b"\x93NUMPY\x03\x00" + bytes(100),
        b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535,
        b"text",
        b"",
    ],
)
def test_a_header_that_lies_is_refused(labels, tmp_path):
    path = write_arrays(tmp_path / "data.npz", train_labels=None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("train_labels.npy", labels)
    assert str(path) in refusal(path, "cifar10")


def test_an_npy_is_no_npz(tmp_path):
    with open(tmp_path / "data.npz", "wb") as file:
        np.save(file, np.zeros((20, 16, 16, 3), np.uint8))
    assert "data.npz cannot be read as .npz" in refusal(tmp_path / "data.npz", "cifar10")


def test_an_archive_that_would_fill_the_memory_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "INFLATED_BYTES", 2**16)
    path = tmp_path / "data.npz"
    np.savez_compressed(path, train_images=np.zeros((400, 32, 32, 3), np.uint8))
    with zipfile.ZipFile(write_arrays(tmp_path / "other.npz", train_images=None)) as other:
        with zipfile.ZipFile(path, "a") as archive:
            for name in other.namelist():
                archive.writestr(name, other.read(name))
    monkeypatch.setattr(np.lib.format, "read_array", None)  # nothing is read
    assert "in memory: the file is refused" in refusal(path, "cifar10")


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickles_do_not_go_off(tmp_path):
    """In an array of objects, in CIFAR-10's own batches, and in place of an archive."""
    bomb = Bomb(tmp_path / "PWNED")
    path = write_arrays(tmp_path / "data.npz", train_labels=np.array([bomb] * 20, object))
    assert "train_labels should be integers N or N x 1, not object" in refusal(path, "cifar10")
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (batches / name).write_bytes(pickle.dumps(bomb))
    assert "there is no CIFAR-10" in refusal(tmp_path, "cifar10")
    path.write_bytes(pickle.dumps(bomb))
    assert "cannot be read as .npz" in refusal(path, "cifar10")
    assert not bomb.path.exists()


# -------------------------------------------------------------------------------- indices of shards

SPOILT: dict[str, list[Any]] = {
    "shards": [
        *("../a.tar", "/etc/passwd", "a/b.tar", "", "..", ".a.tar", "a\nb.tar", "\x1b[31m.tar"),
    ],
    "sha256": ["", "0" * 63, "G" * 64],
    "shard_bytes": [-1, 2**62, 5],
    "shard_N": [-1, 1, 2**31 - 1],
    "offset_N": [-1, 2**62, 2**63 - 1],
    "size_N": [-1, 2**62, 2**63 - 1],
    "key_N": ["", "../x", "a/b", "a.b", "\x1b[31m", "a\nb", "\xff"],
    "labels_N": [-1, 2, 2**62],
    "classes": ["bee"],
}
"""Field of an index -> values that no entry of it may have."""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images in two classes, in shards; not to be changed."""
    root = tmp_path_factory.mktemp("packed")
    write_tree(root / "images", {f"{c}/{i}.png": PICTURE for c in ("ant", "bee") for i in (0, 1)})
    assert packing.main([str(root / "images"), str(root / "shards"), "--workers", "0"]) == 0
    return root / "shards"


@often
@given(data=st.data(), field=st.sampled_from(sorted(FIELDS)))
def test_each_field_of_an_index_is_checked(packed, data, field):
    """Left out, of another type or shape, of another length, or with a value out of range."""
    with np.load(packed / "train" / INDEX) as content:
        values = {name: content[name] for name in content.files}
    changes = ["leave out", "number", "objects", "floats", "booleans", "2-D"]
    changes += [] if field == "recipe" else ["shorter", "longer"]
    changes += ["value"] * 4 if field in SPOILT else []
    change = data.draw(st.sampled_from(changes))
    value = values.pop(field)
    flat = value.reshape(-1)
    made = {
        "number": lambda: np.array(7),
        "objects": lambda: value.astype(object),
        "floats": lambda: np.full(value.shape, 0.5),
        "booleans": lambda: np.full(value.shape, True),
        "2-D": lambda: np.stack([flat, flat], 1),
        "shorter": lambda: value[:-1],
        "longer": lambda: np.concatenate([value, value[-1:]]),
    }
    if change in made:
        values[field] = made[change]()
    elif change == "value":
        bad = data.draw(st.sampled_from(SPOILT[field]))
        items = value.tolist()
        items[data.draw(st.integers(0, len(items) - 1)) if field != "classes" else 0] = (
            bad.encode("latin1") if field == "key_N" else bad
        )
        values[field] = np.array(items, value.dtype if value.dtype.kind in "iu" else None)
    with folder() as root:
        (root / "shard-000000.tar").symlink_to(packed / "train" / "shard-000000.tar")
        np.savez(root / INDEX, **values)
        with pytest.raises(UserError) as caught:
            Shards.load(root)
        assert str(root) in str(caught.value) and str(caught.value).isprintable()


def test_the_index_as_it_was_written_is_read(packed, tmp_path):
    index = Shards.load(packed / "train")
    assert len(index) == 4 and index.read(3) == PICTURE
    train_a_few("shards", link_to(packed, tmp_path / "data"))


def link_to(root: Path, name: Path) -> Path:
    name.mkdir()
    for split in ("train", "val"):
        (name / split).symlink_to(root / split)
    return name
