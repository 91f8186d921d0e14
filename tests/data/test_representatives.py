"""What pag's gradients point to, against means and distances taken by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastgn.config import Config
from fastgn.data import representatives as room
from fastgn.data.datasets import Arrays, Dataset, load_dataset
from fastgn.data.representatives import compute_representatives
from fastgn.errors import UserError


def made(cfg: Config, dataset: Dataset, img_size: int):
    return compute_representatives(
        cfg, dataset, img_size=img_size, crop_pct=0.875, batch_size=7, device=torch.device("cpu")
    )


def config(kind: str, **values) -> Config:
    return Config().replace(method="pag", pag_representative=kind, workers=0, **values)


@pytest.fixture
def arrays() -> Dataset:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8, generator=draw)
    split = Arrays(images, torch.arange(30) % 3)
    return Dataset("cifar10", split, split, ("a", "b", "c"))


def test_class_means_of_arrays_are_over_all_images(arrays: Dataset) -> None:
    found, labels = made(config("class-mean", pag_images=1), arrays, 8)
    pixels = arrays.train.images_NCHW.float() / 255
    want = torch.stack([pixels[arrays.train.labels_N == c].mean(0) for c in range(3)])
    assert labels is None and torch.allclose(found, want, atol=1e-6)


def test_a_random_image_is_of_its_class_and_goes_by_the_seed(arrays: Dataset) -> None:
    pixels = arrays.train.images_NCHW.float() / 255
    chosen = []
    for seed in (0, 0, 1):
        found, labels = made(config("random-image", seed=seed), arrays, 8)
        which = [(pixels - image).abs().amax((1, 2, 3)).argmin().item() for image in found]
        assert labels is None and torch.allclose(pixels[which], found, atol=1e-6)
        assert [index % 3 for index in which] == [0, 1, 2]
        chosen.append(which)
    assert chosen[0] == chosen[1] != chosen[2]


def test_nearest_neighbours_are_among_all_training_images(arrays: Dataset) -> None:
    found, labels = made(config("nearest-neighbour"), arrays, 8)
    order = torch.arange(30).view(10, 3).T.flatten()  # by class
    assert torch.allclose(found, arrays.train.images_NCHW[order].float() / 255)
    assert torch.equal(labels, arrays.train.labels_N[order])


def folder(root: Path) -> Path:
    """5 images of a colour in each of two classes, the colour the image's number."""
    for split in ("train", "val"):
        for index, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for number in range(5):
                pixels = np.full((16, 16, 3), 100 * index + 10 * number, np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def test_class_means_of_files_are_over_a_sample(tmp_path: Path) -> None:
    data = {"data_dir": str(folder(tmp_path)), "data": "imagefolder"}
    for count, want in ((5, [20, 120]), (100, [20, 120])):
        cfg = config("class-mean", pag_images=count, **data)
        found, _ = made(cfg, load_dataset(cfg.dataset), 8)
        assert found.shape == (2, 3, 8, 8)
        assert torch.allclose(found.mean((1, 2, 3)) * 255, torch.tensor(want).float(), atol=0.1)
    cfg = config("class-mean", pag_images=1, **data)
    found, _ = made(cfg, load_dataset(cfg.dataset), 8)
    assert set((found.mean((1, 2, 3)) * 25.5).round().tolist()) <= {0, 1, 2, 3, 4, *range(10, 15)}
    assert torch.allclose(found.amax((1, 2, 3)), found.amin((1, 2, 3)), atol=1e-3), "one image each"
    with pytest.raises(UserError, match="nearest-neighbour keeps all 10 training images"):
        cfg = config("nearest-neighbour", **data)
        made(cfg, load_dataset(cfg.dataset), 8)


def test_too_many_images_or_none_are_refused(arrays: Dataset, monkeypatch) -> None:
    monkeypatch.setattr(room, "LARGEST_BYTES", 30 * 3 * 64 * 4)
    made(config("nearest-neighbour"), arrays, 8)
    with pytest.raises(UserError, match="at 9 px: .* use class-mean or random-image"):
        made(config("nearest-neighbour"), arrays, 9)
    without = Dataset("cifar10", arrays.train, arrays.val, ("a", "b", "c", "d"))
    with pytest.raises(UserError, match="--method pag: class d has no training image"):
        made(config("class-mean"), without, 8)
