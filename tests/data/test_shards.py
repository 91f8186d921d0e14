"""Shards that do not fit their index, changed bytes, and labels that do not fit the classes."""

import dataclasses
import os
import pickle

import pytest
import torch
from support.sources import dataset_at, encoded_images, flipped, refusal

from fastgn.data.datasets import BadImageError
from fastgn.data.shards import INDEX, OPEN_SHARDS, Shards
from fastgn.errors import UserError


def test_a_shard_that_does_not_fit_its_index_is_named(shards):
    shard = shards / "train" / "shard-000002.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:-512])
    size = len(content)
    assert f"{shard} has {size - 512} bytes, " in refusal(shards)
    assert f"bytes, but {size} according to " in refusal(shards)
    shard.unlink()
    assert f"shard {shard} of {shards}/train/index.npz cannot be read: No such file" in refusal(
        shards
    )


def test_a_flipped_byte_is_found_when_its_image_is_read(shards):
    split = dataset_at(shards).train
    assert isinstance(split, Shards)
    shard = shards / "train" / "shard-000000.tar"
    shard.write_bytes(flipped(shard.read_bytes(), int(split.offset_N[2]) + 300))
    fresh = dataset_at(shards).train
    with pytest.raises(BadImageError, match=r"00000002_pic_2 cannot be .* checksum is not the "):
        fresh.read(2)
    assert fresh.read(1) == split.read(1)


def test_a_shard_that_vanishes_or_shrinks_while_it_is_read(shards):
    split, again = dataset_at(shards).train, dataset_at(shards).train
    shard = shards / "train" / "shard-000000.tar"
    os.truncate(shard, 1000)
    with pytest.raises(BadImageError, match="its shard ends after"):
        split.read(1)
    shard.unlink()
    with pytest.raises(BadImageError, match="No such file"):
        again.read(0)
    assert again.read(4)  # of the next one


def test_a_spoilt_index_is_one_line_or_the_right_one(shards):
    """Over the whole file, its zip directory included."""
    path = shards / "val" / INDEX
    content = path.read_bytes()
    right = encoded_images(dataset_at(shards).val), dataset_at(shards).val.labels_N
    for where in range(0, len(content), 23):
        for version in (flipped(content, where), content[:where]):
            path.write_bytes(version)
            try:
                found = Shards.load(shards / "val")
            except UserError as error:
                assert str(path) in str(error) and "\n" not in str(error)
            else:
                assert encoded_images(found) == right[0] and torch.equal(found.labels_N, right[1])


def test_labels_beyond_the_classes(shards):
    index = Shards.load(shards / "train")
    index.labels_N[7] = 3
    index.save()
    assert "index.npz: label 3 is out of range: 3 classes are 0 to 2" in refusal(shards)


def test_splits_with_the_same_classes_in_other_orders(shards):
    """By name they fit, and every label would be another class's."""
    index = Shards.load(shards / "val")
    dataclasses.replace(index, classes=("bee", "ant", "cat")).save()
    line = refusal(shards)
    assert "val knows class 0 of 3 as bee, but in the data it is ant" in line


def test_shards_go_to_other_processes_without_their_files(packed, monkeypatch):
    split = dataset_at(packed).train
    first = encoded_images(split)
    assert len(split.files) == 5
    there = pickle.loads(pickle.dumps(split))
    assert there.files == {} and encoded_images(there) == first
    monkeypatch.setattr("fastgn.data.shards.OPEN_SHARDS", 2)
    few = dataset_at(packed).train
    assert encoded_images(few) == first and len(few.files) == 2 < OPEN_SHARDS
