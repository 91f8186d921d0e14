"""What every loader promises: its batches, its order, its ranks, and where it continues."""

from itertools import islice
from typing import Any

import pytest
import torch
from support.loaders import CPU, FULL, PLAIN, indices, loader_of
from support.states import differences

from fastgn.config import Config
from fastgn.data.batch import draw_epoch_order, rank_slice
from fastgn.data.datasets import Arrays, Dataset
from fastgn.data.loader import batch_sizes, describe_left_out
from fastgn.errors import UserError
from fastgn.seeding import seed_all


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
        ({"batch_size": 22}, 2, r"takes 44 images \(22 x 1 micro-batches x 2 processes\), but"),
        (
            {"batch_size": 43},
            1,
            "43 images, but there are only 42 training images: use a",
        ),
        ({"global_batch_size": 44}, 2, "use a lower --global-batch-size"),
        ({"batch_size": 7, "cutmix": 1.0}, 1, "so --batch-size 7 must be even"),
        ({"global_batch_size": 14, "mixup": 0.1}, 2, "so --batch-size 7 must be even"),
    ],
)
def test_batch_sizes_that_cannot_be(keys, ranks, expected):
    with pytest.raises(UserError, match=expected):
        batch_sizes(Config().replace(**keys), 42, ranks, CPU)


def test_many_images_left_out_are_noted():
    assert describe_left_out(60, 15, 4) == describe_left_out(60, 3, 19) == []
    (line,) = describe_left_out(60, 1, 32)
    assert line.startswith("28 of the 60 training images are left out of each epoch")


def test_an_epoch_can_be_left_early(files):
    """As --max-updates does, with workers still reading."""
    loader = loader_of(files, batch_size=4, workers=2, smoothing=0.0)
    assert len(list(islice(loader.epoch(0), 2))) == 2
    assert len(list(loader.epoch(0))) == 8
