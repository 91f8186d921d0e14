"""Data sets that several of these tests read and none changes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.loaders import coloured
from support.runs import contents
from support.sources import pack, tree

from fastgn.config.groups import DatasetConfig
from fastgn.data.datasets import Arrays, Dataset, load_dataset


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


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 training and 6 validation images in three classes; not to be changed."""
    return tree(tmp_path_factory.mktemp("sources") / "images")


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source` as it is, 4 images a shard; not to be changed."""
    output = tmp_path_factory.mktemp("packed") / "shards"
    assert pack(source, output, "--shard-size", "4") == 0
    return output


@pytest.fixture
def shards(packed: Path, tmp_path: Path) -> Path:
    """A copy of `packed` that a test may spoil."""
    for name, content in contents(packed).items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    return tmp_path / "copy"
