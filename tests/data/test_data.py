"""Data sets, the Batch contract of both loaders, what depends on what, and the augmentation."""

import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import SHARED
from support.states import differences
from timm.data import auto_augment
from timm.data.mixup import rand_bbox
from torch import Tensor

from fastgn.config import Config
from fastgn.config.groups import AugmentationConfig, DatasetConfig
from fastgn.data.augment import BatchAugment, flip, shift, to_float
from fastgn.data.batch import Batch, Loader, draw_epoch_order, rank_slice
from fastgn.data.datasets import CIFAR10_CLASSES, Arrays, Dataset, Files, load_dataset
from fastgn.data.loader import batch_sizes, build_loader
from fastgn.data.subset import Subset
from fastgn.data.transform import replace_posterize
from fastgn.errors import UserError
from fastgn.seeding import seed_all

CPU = torch.device("cpu")
MEAN, STD = torch.full((1, 3, 1, 1), 0.45), torch.full((1, 3, 1, 1), 0.225)
REAL_CIFAR10 = SHARED / "cifar10_lossless_5k_1k.npz"
FULL: dict[str, Any] = {
    "color_jitter": 0.4,
    "reprob": 0.25,
    "mixup": 0.8,
    "cutmix": 1.0,
    "smoothing": 0.1,
}


def coloured(index: int, side: int) -> np.ndarray:
    """One colour an image, so that an image can be told from its pixels: H x W x 3."""
    return np.full((side, side, 3), (index, 255 - index, 128), np.uint8)


@pytest.fixture(scope="module")
def arrays() -> Dataset:
    """42 images of 8 px with three classes; image i has the colour i."""
    pixels = np.stack([coloured(i, 8) for i in range(42)])
    labels = torch.arange(42) % 3
    split = Arrays(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels)
    return Dataset("arrays", split, split, ("a", "b", "c"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """38 noisy PNGs of uneven sizes in two classes, 6 of them for validation."""
    root = tmp_path_factory.mktemp("data") / "images"
    random = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 3)):
        for name in "ab":
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (20 + index, 24, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index:02d}.png")
    return load_dataset(DatasetConfig(data_dir=str(root)))


def loader_of(
    dataset: Dataset,
    *,
    batch_size: int = 8,
    accum: int = 1,
    rank: int = 0,
    ranks: int = 1,
    compiled: bool = False,
    **keys: Any,
) -> Loader:
    return build_loader(
        Config().replace(**keys),
        dataset,
        img_size=8,
        mean=MEAN,
        std=STD,
        batch_size=batch_size,
        grad_accum_steps=accum,
        rank=rank,
        ranks=ranks,
        device=CPU,
        compiled=compiled,
    )


PLAIN: dict[str, Any] = {"smoothing": 0.0, "crop_padding": 0, "hflip": 0.0}


def indices(batch: Batch) -> list[int]:
    """Which of `arrays`' images an unaugmented batch holds."""
    return (batch.images_BCHW[:, 0, 0, 0] * 255).round().int().tolist()


# ------------------------------------------------------------------------------------------ sources


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
        ({"test_labels": None}, "lacks test_labels"),
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
    with pytest.raises(UserError, match="--data imagefolder accepts any classes"):
        cifar10(write_tree(tmp_path, ("ant", "bee"), ("train", "test")))


def test_cifar10_images_of_two_sizes_name_the_odd_one(tmp_path):
    write_tree(tmp_path, CIFAR10_CLASSES, ("train", "test"))
    odd = tmp_path / "train" / "bird" / "1.png"
    Image.fromarray(coloured(0, 7)).save(odd)
    with pytest.raises(UserError, match=f"{odd} is .7, 7, 3., not .6, 6, 3."):
        cifar10(tmp_path)


def test_image_folder(tmp_path):
    root = write_tree(tmp_path / "pets", ("cat", "dog"), ("fit", "check"))
    dataset = load_dataset(DatasetConfig(data_dir=str(root), train_split="fit", val_split="check"))
    assert dataset.name == "pets" and dataset.classes == ("cat", "dog")
    assert isinstance(dataset.train, Files) and len(dataset.val) == 4
    assert dataset.train.labels_N.tolist() == [0, 0, 1, 1]
    assert dataset.train.paths[2] == str(root / "fit" / "dog" / "0.png")
    assert np.array_equal(np.array(dataset.train.load_image(3)), coloured(21, 6))


def test_grey_palette_and_transparent_images_become_rgb(tmp_path):
    paths = []
    for mode in ("L", "P", "RGBA", "LA", "1", "CMYK", "I;16"):
        name = tmp_path / f"{mode.replace(';', '')}.{'tiff' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (5, 4)).save(name)
        paths.append(str(name))
    split = Files(paths, torch.zeros(len(paths), dtype=torch.int64))
    for index in range(len(paths)):
        image = split.load_image(index)
        assert image.mode == "RGB" and image.size == (5, 4)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("spoil", ["truncated", "text", "empty", "missing"])
def test_a_spoilt_image_names_its_file(kind, spoil, tmp_path):
    path = tmp_path / f"picture.{kind.lower()}"
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(noise).save(path, kind)
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "text": b"text"}.get(spoil, b""))
    if spoil == "missing":
        path.unlink()
    with pytest.raises(UserError) as caught:
        Files([str(path)], torch.zeros(1)).load_image(0)
    assert str(caught.value).startswith(f"{path} cannot be read as an image: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_spoilt_image_names_its_file_from_a_worker(workers, tmp_path):
    root = write_tree(tmp_path, ("cat", "dog"), ("train", "val"))
    bad = root / "train" / "dog" / "1.png"
    bad.write_bytes(bad.read_bytes()[:40])
    dataset = load_dataset(DatasetConfig(data_dir=str(root)))
    loader = loader_of(dataset, batch_size=4, workers=workers)
    with pytest.raises(UserError) as caught:
        list(loader.epoch(0))
    assert str(caught.value).startswith(f"{bad} cannot be read as an image: ")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("kind", ["device", "torch"])
@pytest.mark.parametrize("soft", [False, True])
def test_the_batch_contract(kind, soft, arrays):
    keys = FULL if soft else {"smoothing": 0.0}
    loader = loader_of(arrays, loader=kind, workers=0, **keys)
    batches = list(loader.epoch(0))
    assert len(batches) == loader.batches_per_epoch == 42 // 8
    for images, targets in batches:
        assert images.shape == (8, 3, 8, 8) and images.dtype == torch.float32
        assert images.device == targets.device == CPU and not images.requires_grad
        assert images.is_contiguous()
        assert 0 <= float(images.min()) and float(images.max()) <= 1
        if soft:
            assert targets.shape == (8, 3) and targets.dtype == torch.float32
            assert torch.allclose(targets.sum(1), torch.ones(8), atol=1e-6)
            assert float(targets.min()) >= 0
        else:
            assert targets.shape == (8,) and targets.dtype == torch.int64


def test_the_torch_loader_reads_uneven_files(files):
    loader = loader_of(files, workers=0, **FULL)
    shapes = [(tuple(b.images_BCHW.shape), tuple(b.targets.shape)) for b in loader.epoch(0)]
    assert shapes == [((8, 3, 8, 8), (8, 2))] * 4


@pytest.mark.parametrize("kind", ["device", "torch"])
def test_images_and_labels_stay_together(kind, arrays):
    keys = PLAIN | {"color_jitter": 0.0, "scale": (1.0, 1.0)}
    for batch in loader_of(arrays, loader=kind, workers=0, **keys).epoch(0):
        assert [i % 3 for i in indices(batch)] == batch.targets.tolist()


@pytest.mark.parametrize(("batch_size", "accum", "ranks"), [(4, 1, 3), (3, 2, 2), (5, 4, 2)])
def test_every_image_once_an_epoch_over_ranks(batch_size, accum, ranks, arrays):
    seen: list[list[int]] = []
    for rank in range(ranks):
        loader = loader_of(
            arrays, batch_size=batch_size, accum=accum, rank=rank, ranks=ranks, **PLAIN
        )
        seen.append([i for batch in loader.epoch(2) for i in indices(batch)])
        assert loader.batches_per_epoch % accum == 0
    together = [i for part in seen for i in part]
    whole = batch_size * accum * ranks
    assert len(together) == len(set(together)) == 42 // whole * whole
    assert set(together) == set(draw_epoch_order(42, 0, 2)[: len(together)].tolist())


@pytest.mark.parametrize("kind", ["device", "torch"])
def test_two_ranks_see_together_what_one_sees(kind, arrays):
    """The images and what is done to each; mixing and erasing are drawn for each rank's batch."""
    keys: dict[str, Any] = {"loader": kind, "workers": 0, "hflip": 0.5, "smoothing": 0.0}
    one = loader_of(arrays, batch_size=8, **keys).epoch(1)
    two = [loader_of(arrays, batch_size=4, rank=r, ranks=2, **keys).epoch(1) for r in (0, 1)]
    for whole, *parts in zip(one, *two, strict=True):
        assert torch.equal(whole.images_BCHW, torch.cat([p.images_BCHW for p in parts]))
        assert torch.equal(whole.targets, torch.cat([p.targets for p in parts]))


def test_ranks_mix_differently(arrays):
    first, second = (
        next(iter(loader_of(arrays, batch_size=8, rank=r, ranks=2, **FULL).epoch(0)))
        for r in (0, 1)
    )
    assert not torch.equal(first.targets.max(1).values, second.targets.max(1).values)


@pytest.mark.parametrize("first", [1, 3, 4])
def test_the_device_loader_continues_bitwise(first, arrays):
    loader = loader_of(arrays, hflip=0.5, **FULL)
    unbroken = list(loader.epoch(3))
    continued = list(loader_of(arrays, hflip=0.5, **FULL).epoch(3, first))
    assert len(continued) == 5 - first
    assert differences(unbroken[first:], continued) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_the_torch_loader_continues_bitwise(workers, files):
    """With the paper's whole augmentation, and against an epoch read without workers."""
    keys = FULL | {"aa": "rand-m9-mstd0.5-inc1", "hflip": 0.5}
    unbroken = list(loader_of(files, batch_size=4, workers=0, **keys).epoch(1))
    seed_all(0, 123)  # the state of the generators is no input
    for first in (1, 6):
        continued = list(loader_of(files, batch_size=4, workers=workers, **keys).epoch(1, first))
        assert len(continued) == 8 - first
        assert differences(unbroken[first:], continued) == []


@pytest.mark.parametrize("colour_alone", [False, True])
def test_the_torch_loader_augments(colour_alone, files):
    """timm leaves colour jitter out beside --aa, so each is looked at alone."""
    keys = {"color_jitter": 0.4} if colour_alone else {"aa": "rand-m9-mstd0.5-inc1"}
    plain = {"scale": (1.0, 1.0), "hflip": 0.0, "workers": 0, "color_jitter": 0.0}
    pairs = zip(
        loader_of(files, **plain).epoch(0),
        loader_of(files, **(plain | keys)).epoch(0),
        strict=True,
    )
    differs = [(a.images_BCHW - b.images_BCHW).abs().amax((1, 2, 3)) > 1e-3 for a, b in pairs]
    # RandAugment draws two operations, each with probability 1/2, and some leave noise as it is
    assert int(torch.cat(differs).sum()) >= (32 if colour_alone else 16)


@pytest.mark.parametrize("kind", ["device", "torch"])
def test_epochs_and_seeds_differ(kind, arrays):
    keys: dict[str, Any] = {"loader": kind, "workers": 0, "color_jitter": 0.0}
    keys |= PLAIN | {"scale": (1.0, 1.0)}

    def order(epoch: int, seed: int) -> list[int]:
        return [i for b in loader_of(arrays, seed=seed, **keys).epoch(epoch) for i in indices(b)]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)
    assert order(1, 0) != order(0, 1)


def test_an_image_looks_different_in_every_epoch(arrays):
    """Beyond its place: the same image's offsets, flip and PIL augmentation are drawn anew."""
    noise = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
    split = Arrays(noise, torch.arange(8) % 2)
    dataset = Dataset("noise", split, split, ("a", "b"))
    for kind in ("device", "torch"):
        keys: dict[str, Any] = {"loader": kind, "workers": 0, "smoothing": 0.0, "hflip": 0.5}
        loader = loader_of(dataset, crop_padding=2, **keys)
        by_image = []
        for epoch in (0, 1):
            back = torch.argsort(draw_epoch_order(8, 0, epoch))
            by_image.append(next(iter(loader.epoch(epoch))).images_BCHW[back])
        same = (by_image[0] == by_image[1]).flatten(1).all(1)
        assert int(same.sum()) <= 2, kind


def test_augmentation_does_not_touch_the_data_set(arrays):
    before = arrays.train.images_NCHW.clone()
    for kind in ("device", "torch"):
        list(loader_of(arrays, loader=kind, workers=0, **FULL).epoch(0))
    assert torch.equal(arrays.train.images_NCHW, before)


def test_rank_slices_tile_the_order():
    covered = [k for i in range(3) for r in range(4) for k in range(60)[rank_slice(i, 5, r, 4)]]
    assert covered == list(range(60))


# -------------------------------------------------------------------------------------- batch sizes


@pytest.mark.parametrize(
    ("keys", "ranks", "expected"),
    [
        ({}, 1, (8, 1)),
        ({"batch_size": 4, "grad_accum_steps": 3}, 2, (4, 3)),
        ({"global_batch_size": 24}, 2, (12, 1)),
        ({"global_batch_size": 24, "batch_size": 4}, 2, (4, 3)),
        ({"global_batch_size": 42, "batch_size": 21}, 1, (21, 2)),
    ],
)
def test_batch_sizes(keys, ranks, expected):
    assert batch_sizes(Config().replace(**keys), 42, ranks, CPU) == expected


@pytest.mark.parametrize(
    ("keys", "ranks", "expected"),
    [
        ({"global_batch_size": 25}, 2, "--global-batch-size 25 is not a multiple of 2 ranks"),
        ({"global_batch_size": 24, "batch_size": 5}, 2, "take a multiple of 10"),
        ({"batch_size": 22}, 2, "22 images x 1 accumulated x 2 ranks = 44 exceeds the 42"),
        ({"batch_size": 7, "cutmix": 1.0}, 1, "so --batch-size 7 must be even"),
        ({"global_batch_size": 14, "mixup": 0.1}, 2, "so --batch-size 7 must be even"),
    ],
)
def test_batch_sizes_that_cannot_be(keys, ranks, expected):
    with pytest.raises(UserError, match=expected):
        batch_sizes(Config().replace(**keys), 42, ranks, CPU)


# ------------------------------------------------------------------------------------------- subset


def subset(split: Arrays | Files, num: int | None, rank: int = 0, ranks: int = 1) -> Subset:
    return Subset(
        split,
        num,
        img_size=8,
        crop_pct=0.8,
        batch_size=3,
        workers=0,
        device=CPU,
        rank=rank,
        ranks=ranks,
    )


@pytest.mark.parametrize("ranks", [1, 2, 3, 11])
def test_a_subset_of_arrays_is_sharded_without_loss(ranks, arrays):
    shards = [subset(arrays.val, 10, rank, ranks) for rank in range(ranks)]
    together: list[int] = []
    for shard in shards:
        assert shard.size == 10 and shard.name == "first 10 of 42"
        for images, labels in shard:
            assert len(images) == len(labels) <= 3
            found = indices(Batch(images, labels))
            assert [i % 3 for i in found] == labels.tolist()
            together += found
    assert sorted(together) == list(range(10))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_subset_of_files_is_spread_and_sharded_without_loss(ranks, files):
    shards = [subset(files.val, 4, rank, ranks) for rank in range(ranks)]
    assert {s.name for s in shards} == {"4 of 6, evenly spaced"}
    assert sorted(i for s in shards for i in s.indices) == [0, 1, 3, 4]
    assert sorted(int(y) for s in shards for _, labels in s for y in labels) == [0, 0, 1, 1]


def test_a_subset_of_more_than_there_is_takes_all(files, arrays):
    for split, total in ((files.val, 6), (arrays.val, 42)):
        for num in (None, total, total + 1):
            found = subset(split, num)
            assert (found.size, found.name) == (total, f"all {total}")
            assert sum(len(labels) for _, labels in found) == total


def test_a_subset_is_never_augmented(arrays, files):
    """Whatever the generators hold: arrays' own pixels, and PIL's resize and centre crop."""
    for images, _ in subset(arrays.val, 6):
        expected = arrays.val.images_NCHW[indices(Batch(images, images))].float() / 255
        assert torch.equal(images, expected)
    seed_all(0, 1)
    first = torch.cat([images for images, _ in subset(files.val, None)])
    seed_all(0, 2)
    assert torch.equal(first, torch.cat([images for images, _ in subset(files.val, None)]))
    source = files.val.load_image(0)  # 24 x 20
    resized = source.resize((12, 10), Image.Resampling.BICUBIC)  # 8 px are 0.8 of its shorter side
    crop = np.array(resized.crop((2, 1, 10, 9))).transpose(2, 0, 1)
    assert torch.equal((first[0] * 255).round().to(torch.uint8), torch.from_numpy(crop))


# ------------------------------------------------------------------------------------- augmentation


def augmented(images: Tensor, labels: Tensor, num_classes: int = 5, **keys: Any) -> Batch:
    cfg = AugmentationConfig(**keys)
    return BatchAugment(cfg, num_classes, MEAN, STD, CPU)(images.clone(), labels)


def smoothed(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """1 - s on the label and s / K everywhere."""
    return torch.eye(num_classes)[labels] * (1 - smoothing) + smoothing / num_classes


def test_smoothing_targets():
    labels = torch.tensor([0, 4, 2])
    batch = augmented(torch.rand(3, 3, 8, 8), labels, smoothing=0.1)
    assert torch.allclose(batch.targets, smoothed(labels, 5, 0.1), atol=1e-7)
    assert torch.equal(augmented(torch.rand(3, 3, 8, 8), labels, smoothing=0.0).targets, labels)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup(seed, smoothing):
    """Image i with image B - 1 - i; the share is found at one pixel and holds for all of them and
    for the targets."""
    images, labels = torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    np.random.seed(seed)
    batch = augmented(images, labels, mixup=0.8, smoothing=smoothing)
    other = images.flip(0)
    pixel = (images - other).abs().argmax()  # where the share can be told best
    share = (batch.images_BCHW - other).flatten()[pixel] / (images - other).flatten()[pixel]
    assert 0 <= share <= 1
    assert torch.allclose(batch.images_BCHW, share * images + (1 - share) * other, atol=1e-5)
    one = smoothed(labels, 5, smoothing)
    assert torch.allclose(batch.targets, share * one + (1 - share) * one.flip(0), atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_cutmix(seed):
    """A box from image B - 1 - i, and targets by its true area."""
    images, labels = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    np.random.seed(seed)
    batch = augmented(images, labels, cutmix=1.0, smoothing=0.1)
    np.random.seed(seed)
    np.random.rand()  # whether to mix
    top, bottom, left, right = rand_bbox(images.shape, np.random.beta(1.0, 1.0))
    pasted = torch.zeros(16, 16, dtype=torch.bool)
    pasted[top:bottom, left:right] = True
    assert torch.equal(batch.images_BCHW, torch.where(pasted, images.flip(0), images))
    share = 1 - float(pasted.float().mean())
    one = smoothed(labels, 5, 0.1)
    assert torch.allclose(batch.targets, share * one + (1 - share) * one.flip(0), atol=1e-6)


def test_mixup_and_cutmix_take_turns():
    images, labels = torch.rand(4, 3, 16, 16), torch.arange(4)
    kinds = set()
    for seed in range(20):
        seed_all(0, seed)
        mixed = augmented(images, labels, mixup=0.8, cutmix=1.0).images_BCHW
        kept = (mixed == images) | (mixed == images.flip(0))
        kinds.add("cutmix" if kept.all() else "mixup")
    assert kinds == {"mixup", "cutmix"}


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_random_erasing_stays_within_0_and_1(mode):
    seed_all(0, 5)
    images = torch.rand(32, 3, 16, 16) * 0.98 + 0.01
    batch = augmented(images, torch.arange(32) % 5, reprob=0.5, remode=mode, smoothing=0.0)
    erased = (batch.images_BCHW - images).abs().amax(1) > 1e-5
    shares = erased.float().mean((1, 2))
    assert 6 <= int((shares > 0).sum()) <= 26  # a fair coin for each of 32 images
    assert float(shares.max()) <= 0.5  # timm erases a third at most, by its default
    assert 0 <= float(batch.images_BCHW.min()) and float(batch.images_BCHW.max()) <= 1
    hole = int(shares.argmax())
    values = batch.images_BCHW[hole][:, erased[hole]]
    if mode == "pixel":
        assert float(values.std(1).min()) > 0.05
    else:
        assert float(values.std(1).max()) < 1e-5
    if mode == "const":  # zero in normalised units is the mean colour
        assert torch.allclose(values, torch.full_like(values, 0.45), atol=1e-6)


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_a_graphs_erasing_is_the_box_by_box_one(mode):
    """All images at once: the same boxes for the same seed, 0..1 within, the image outside."""
    images, labels = torch.rand(32, 3, 16, 16), torch.arange(32) % 5
    cfg = AugmentationConfig(reprob=0.5, remode=mode, smoothing=0.0)
    augment = BatchAugment(cfg, 5, MEAN, STD, CPU)
    seed_all(0, 7)
    by_box = augment(images.clone(), labels).images_BCHW
    seed_all(0, 7)
    drawn = augment.draw(32, 16, 16)
    at_once = augment.apply(images.clone(), labels, drawn).images_BCHW
    erased = torch.zeros(32, 1, 16, 16, dtype=torch.bool)
    for hole, (top, bottom, left, right) in zip(erased, drawn.boxes_B4.tolist(), strict=True):
        hole[:, top:bottom, left:right] = True
    assert 6 <= int(erased.flatten(1).any(1).sum()) <= 26
    for result in (by_box, at_once):
        assert torch.equal((result != images).any(1, keepdim=True), erased)
        assert 0 <= float(result.min()) and float(result.max()) <= 1
    if mode == "const":
        assert torch.equal(by_box, at_once)


@pytest.mark.parametrize("keys", [{"mixup": 0.8}, {"cutmix": 1.0}], ids=str)
def test_mixing_in_place_is_the_graphs(keys, monkeypatch):
    images, labels = torch.rand(6, 3, 16, 16), torch.arange(6) % 5
    seed_all(0, 3)
    in_place = augmented(images, labels, **keys)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    seed_all(0, 3)
    graphs = augmented(images, labels, **keys)
    assert not torch.equal(in_place.images_BCHW, images)
    assert torch.allclose(in_place.images_BCHW, graphs.images_BCHW, atol=1e-6)
    assert torch.equal(in_place.targets, graphs.targets)


def test_the_device_loader_compiled(arrays):
    """The same batches as eager, of one graph, whatever is drawn; and no other graph after it."""
    keys = {"reprob": 0.5, "mixup": 0.8, "cutmix": 1.0, "batch_size": 4}
    torch._dynamo.reset()
    eager, compiled = (loader_of(arrays, compiled=c, **keys) for c in (False, True))
    torch._dynamo.utils.counters.clear()
    for epoch in range(3):
        pairs = list(zip(eager.epoch(epoch), compiled.epoch(epoch), strict=True))
        assert len(pairs) == eager.batches_per_epoch
        for one, another in pairs:
            assert torch.allclose(one.images_BCHW, another.images_BCHW, atol=1e-6)
            assert torch.allclose(one.targets, another.targets, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", sorted(auto_augment.NAME_TO_OP))
def test_timms_operations_take_every_magnitude(name):
    """Pillow refuses to keep 0 bits, which timm's strongest posterize asks for: black, as ever."""
    noise = np.random.default_rng(0).integers(1, 256, (9, 7, 3), np.uint8)
    for magnitude in range(11):
        seed_all(0, magnitude)
        op = auto_augment.AugmentOp(name, prob=1.0, magnitude=magnitude, hparams={})
        replace_posterize(auto_augment.RandAugment([op], 1))
        image = op(Image.fromarray(noise))
        assert image.mode == "RGB" and image.size == (7, 9)
        if name == "PosterizeIncreasing" and magnitude == 10:
            assert not np.array(image).any()


@pytest.mark.parametrize("padding", [1, 3])
def test_shift_against_a_loop(padding):
    images = torch.rand(9, 3, 5, 7)
    offsets = torch.randint(0, 2 * padding + 1, (9, 2))
    offsets[:2] = torch.tensor([[0, 0], [2 * padding, 2 * padding]])
    expected = torch.zeros_like(images)
    for b in range(9):
        for row in range(5):
            for column in range(7):
                y = row + int(offsets[b, 0]) - padding
                x = column + int(offsets[b, 1]) - padding
                if 0 <= y < 5 and 0 <= x < 7:
                    expected[b, :, row, column] = images[b, :, y, x]
    moved = shift(images, offsets, padding)
    assert torch.equal(moved, expected) and moved.is_contiguous()


def test_flip_against_a_loop():
    images = torch.rand(4, 3, 5, 7)
    flipped = torch.tensor([True, False, False, True])
    out = flip(images, flipped)
    for b in range(4):
        for column in range(7):
            source = 6 - column if flipped[b] else column
            assert torch.equal(out[b, :, :, column], images[b, :, :, source])


def test_the_device_loader_shifts_and_flips_as_often_as_asked():
    """Over one epoch of 400 images with a marked pixel in the middle: all offsets, half flipped."""
    pixels = torch.zeros(400, 3, 9, 9, dtype=torch.uint8)
    pixels[:, 0, 4, 4] = 255
    pixels[:, 1, 4, 5] = 255  # to the right of the first, or to its left once flipped
    split = Arrays(pixels, torch.zeros(400, dtype=torch.int64))
    dataset = Dataset("marked", split, split, ("a", "b"))
    loader = build_loader(
        Config().replace(crop_padding=2, hflip=0.5, smoothing=0.0),
        dataset,
        img_size=9,
        mean=MEAN,
        std=STD,
        batch_size=100,
        grad_accum_steps=1,
        rank=0,
        ranks=1,
        device=CPU,
    )
    images = torch.cat([b.images_BCHW for b in loader.epoch(0)])
    red, green = (images[:, c].flatten(1).argmax(1) for c in (0, 1))
    assert set((red // 9).tolist()) == {2, 3, 4, 5, 6}
    mirrored = green - red
    assert set(mirrored.tolist()) == {-1, 1}
    assert 150 < int((mirrored == -1).sum()) < 250


@pytest.mark.parametrize(
    ("name", "keys", "padding", "hflip"),
    [
        ("digits", {}, 1, 0.0),
        ("cifar10", {}, 2, 0.5),
        ("digits", {"hflip": 0.5, "crop_padding": 3}, 3, 0.5),
        ("cifar10", {"hflip": 0.0, "crop_padding": 0}, 0, 0.0),
    ],
)
def test_defaults_of_shift_and_flip(name, keys, padding, hflip, arrays):
    """At 16 px: 1/16 of the side for digits, which are never mirrored, 1/8 for CIFAR-10."""
    dataset = Dataset(name, arrays.train, arrays.val, arrays.classes)
    loader: Any = build_loader(
        Config().replace(**keys),
        dataset,
        img_size=16,
        mean=MEAN,
        std=STD,
        batch_size=4,
        grad_accum_steps=1,
        rank=0,
        ranks=1,
        device=CPU,
    )
    assert (loader.padding, loader.hflip) == (padding, hflip)


def test_to_float_resizes():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(to_float(images, 8), images.float() / 255)
    larger = to_float(images, 16)
    assert larger.shape == (2, 3, 16, 16)
    assert 0 <= float(larger.min()) and float(larger.max()) <= 1
    assert torch.allclose(to_float(torch.full_like(images, 51), 5), torch.tensor(0.2))


def test_an_epoch_can_be_left_early(files):
    """As --max-updates does, with workers still reading."""
    loader = loader_of(files, batch_size=4, workers=2, smoothing=0.0)
    assert len(list(islice(loader.epoch(0), 2))) == 2
    assert len(list(loader.epoch(0))) == 8
