"""Subsets of the images of a split, over ranks."""

import numpy as np
import pytest
import torch
from PIL import Image
from support.loaders import CPU, indices

from fastgn.data.batch import Batch
from fastgn.data.datasets import Arrays, Files
from fastgn.data.subset import Subset
from fastgn.seeding import seed_all


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
