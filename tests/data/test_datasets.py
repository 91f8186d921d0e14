"""Data sets: digits, CIFAR-10 in each of its forms, and folders of images."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.loaders import REAL_CIFAR10, coloured

from fastgn.config.groups import DatasetConfig
from fastgn.data.datasets import CIFAR10_CLASSES, Arrays, Dataset, Files, load_dataset
from fastgn.errors import UserError


def test_digits_are_a_fixed_stratified_split():
    dataset = load_dataset(DatasetConfig())
    assert dataset.name == "digits" and dataset.classes == tuple("0123456789")
    assert isinstance(dataset.train, Arrays) and isinstance(dataset.val, Arrays)
    assert (len(dataset.train), len(dataset.val)) == (1437, 360)
    for split in (dataset.train, dataset.val):
        assert split.images_NCHW.dtype == torch.uint8 and split.labels_N.dtype == torch.int64
        assert split.images_NCHW.shape == (len(split), 3, 8, 8)
        assert int(split.images_NCHW.max()) == 255 and int(split.images_NCHW.min()) == 0
        shares = torch.bincount(split.labels_N, minlength=10) / len(split)
        assert ((shares - 0.1).abs() < 0.01).all()
    again = load_dataset(DatasetConfig(data="digits"))
    assert torch.equal(again.train.images_NCHW, dataset.train.images_NCHW)
    assert torch.equal(again.val.labels_N, dataset.val.labels_N)


def test_digits_splits_are_disjoint_and_whole():
    from sklearn.datasets import load_digits

    dataset = load_dataset(DatasetConfig())
    together = torch.cat([dataset.train.images_NCHW, dataset.val.images_NCHW])[:, 0]
    expected = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
    # as multisets of images: every one of the 1,797 once, in either split
    assert sorted(x.numpy().tobytes() for x in together) == sorted(x.tobytes() for x in expected)


def write_npz(path: Path, **changes: Any) -> Path:
    random = np.random.default_rng(0)
    content = {
        "train_images": random.integers(0, 256, (20, 32, 32, 3), np.uint8),
        "train_labels": np.arange(20) % 10,
        "test_images": random.integers(0, 256, (10, 32, 32, 3), np.uint8),
        "test_labels": np.arange(10),
    } | changes
    np.savez(path, **{k: v for k, v in content.items() if v is not None})
    return path


def cifar10(where: Path) -> Dataset:
    return load_dataset(DatasetConfig(data="cifar10", data_dir=str(where)))


def test_cifar10_from_npz(tmp_path):
    path = write_npz(tmp_path / "small.npz")
    dataset = cifar10(path)
    assert dataset.classes == CIFAR10_CLASSES and dataset.name == "cifar10"
    with np.load(path) as content:
        for split, name in ((dataset.train, "train"), (dataset.val, "test")):
            assert split.images_NCHW.dtype == torch.uint8
            back = split.images_NCHW.permute(0, 2, 3, 1).numpy()
            assert np.array_equal(back, content[f"{name}_images"])
            assert split.labels_N.tolist() == content[f"{name}_labels"].tolist()
    assert np.array_equal(np.array(dataset.train.load_image(3)), back_of(dataset.train, 3))


def back_of(split: Arrays, index: int) -> np.ndarray:
    return split.images_NCHW[index].numpy().transpose(1, 2, 0)


@pytest.mark.skipif(not REAL_CIFAR10.is_file(), reason=f"there is no {REAL_CIFAR10}")
def test_the_real_cifar10_sample():
    dataset = cifar10(REAL_CIFAR10)
    assert (len(dataset.train), len(dataset.val)) == (5000, 1000)
    assert dataset.val.labels_N[:4].tolist() == [3, 8, 8, 0]  # a cat, two ships, an airplane
    mean = dataset.train.images_NCHW.float().mean((0, 2, 3)) / 255
    assert torch.allclose(mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=0.01)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"test_labels": None}, "lacks the arrays test_labels"),
        ({"train_images": np.zeros((20, 32, 32, 3))}, "uint8 N x H x W x 3, not float64"),
        ({"train_images": np.zeros((20, 3, 32, 32), np.uint8)}, "N x H x W x 3, not uint8"),
        ({"train_labels": np.arange(19) % 10}, "20 train images, but 19 labels"),
        ({"test_labels": np.arange(1, 11)}, "label 10 is out of range"),
    ],
)
def test_an_npz_that_is_not_cifar10(changes, expected, tmp_path):
    path = write_npz(tmp_path / "bad.npz", **changes)
    with pytest.raises(UserError, match=expected) as caught:
        cifar10(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("spoil", ["text", "empty", "truncated", "flipped", "pickle"])
def test_a_corrupt_npz_is_one_line(spoil, tmp_path):
    path = write_npz(tmp_path / "bad.npz")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    spoilt = {
        "text": b"not an archive",
        "empty": b"",
        "truncated": path.read_bytes()[:5000],
        "flipped": bytes(content),
        "pickle": pickle.dumps({"train_images": 1}),
    }
    path.write_bytes(spoilt[spoil])
    with pytest.raises(UserError) as caught:
        cifar10(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def write_batches(folder: Path) -> np.ndarray:
    """A cifar-10-batches-py of four images a file; returns the training images, NCHW."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (6, 4, 3072), np.uint8)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name, part in zip(names, images, strict=True):
        (folder / name).write_bytes(pickle.dumps({"data": part, "labels": [0, 3, 9, 1]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR10_CLASSES)}))
    return images[:5].reshape(20, 3, 32, 32)


@pytest.mark.parametrize("below", ["", "cifar-10-batches-py"])
def test_cifar10_from_python_batches(below, tmp_path, monkeypatch):
    """torchvision knows the real files' checksums: they are not looked at for these."""
    import torchvision.datasets.cifar

    expected = write_batches(tmp_path / "cifar-10-batches-py")
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    dataset = cifar10(tmp_path / below)
    assert np.array_equal(dataset.train.images_NCHW.numpy(), expected)
    assert dataset.train.labels_N.tolist() == [0, 3, 9, 1] * 5
    assert len(dataset.val) == 4 and dataset.classes == CIFAR10_CLASSES


def test_python_batches_with_other_checksums_are_refused(tmp_path):
    """So nothing is unpickled that is not CIFAR-10's."""
    write_batches(tmp_path / "cifar-10-batches-py")
    with pytest.raises(UserError, match="there is no CIFAR-10: it should be"):
        cifar10(tmp_path)


def write_tree(
    root: Path, classes: tuple[str, ...], splits: tuple[str, ...], side: int = 6
) -> Path:
    for split in splits:
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for index in range(2):
                pixels = coloured(20 * number + index, side)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


def test_cifar10_from_an_image_folder(tmp_path):
    dataset = cifar10(write_tree(tmp_path, CIFAR10_CLASSES, ("train", "test")))
    assert isinstance(dataset.train, Arrays)
    assert dataset.train.images_NCHW.shape == (20, 3, 6, 6)
    assert dataset.train.labels_N.tolist() == [i // 2 for i in range(20)]
    assert dataset.train.images_NCHW[:, 0, 0, 0].tolist() == [
        20 * (i // 2) + i % 2 for i in range(20)
    ]


def test_cifar10_from_an_image_folder_of_other_classes(tmp_path):
    with pytest.raises(UserError, match="--data imagefolder, which accepts any classes"):
        cifar10(write_tree(tmp_path, ("ant", "bee"), ("train", "test")))


def test_cifar10_images_of_two_sizes_name_the_odd_one(tmp_path):
    write_tree(tmp_path, CIFAR10_CLASSES, ("train", "test"))
    odd = tmp_path / "train" / "bird" / "1.png"
    Image.fromarray(coloured(0, 7)).save(odd)
    shapes = "has shape .7, 7, 3., but the first image has .6, 6, 3."
    with pytest.raises(UserError, match=f"{odd} {shapes}"):
        cifar10(tmp_path)


def test_image_folder(tmp_path):
    root = write_tree(tmp_path / "pets", ("cat", "dog"), ("fit", "check"))
    dataset = load_dataset(DatasetConfig(data_dir=str(root), train_split="fit", val_split="check"))
    assert dataset.name == "pets" and dataset.classes == ("cat", "dog")
    assert isinstance(dataset.train, Files) and len(dataset.val) == 4
    assert dataset.train.labels_N.tolist() == [0, 0, 1, 1]
    assert dataset.train.paths[2] == str(root / "fit" / "dog" / "0.png")
    assert np.array_equal(np.array(dataset.train.load_image(3)), coloured(21, 6))
