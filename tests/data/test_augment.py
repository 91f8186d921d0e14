"""Augmentation against loops over single images, and how often each change happens."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.loaders import CPU, MEAN, STD, loader_of
from timm.data import auto_augment
from timm.data.mixup import rand_bbox
from torch import Tensor

from fastgn.config.groups import AugmentationConfig
from fastgn.data.augment import BatchAugment, flip, shift, to_float
from fastgn.data.batch import Batch
from fastgn.data.datasets import Arrays, Dataset
from fastgn.data.transform import replace_posterize
from fastgn.seeding import seed_all


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


@pytest.mark.slow
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
    loader = loader_of(
        dataset, img_size=9, batch_size=100, crop_padding=2, hflip=0.5, smoothing=0.0
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
    loader: Any = loader_of(dataset, img_size=16, batch_size=4, **keys)
    assert (loader.padding, loader.hflip) == (padding, hflip)


def test_to_float_resizes():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(to_float(images, 8), images.float() / 255)
    larger = to_float(images, 16)
    assert larger.shape == (2, 3, 16, 16)
    assert 0 <= float(larger.min()) and float(larger.max()) <= 1
    assert torch.allclose(to_float(torch.full_like(images, 51), 5), torch.tensor(0.2))
