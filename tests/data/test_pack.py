"""fastgn.data.pack: the same images in shards, again and again, and after an interruption."""

import io
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.images import encoded
from support.runs import contents
from support.sources import (
    CLASSES,
    batches,
    dataset_at,
    encoded_images,
    flipped,
    pack,
    refusal,
    tree,
)
from support.states import differences

import fastgn.data.pack as packing
from fastgn.data.shards import Shards


def test_packed_images_are_the_same_images(source, packed):
    mine, theirs = dataset_at(packed), dataset_at(source)
    assert mine.classes == theirs.classes == CLASSES
    assert isinstance(mine.train, Shards) and len(mine.train.shards) == 5
    for split, other in ((mine.train, theirs.train), (mine.val, theirs.val)):
        assert encoded_images(split) == encoded_images(other)
        assert torch.equal(split.labels_N, other.labels_N)
    assert mine.train.name(5) == f"{packed}/train/shard-000001.tar: 00000005_pic_5"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_sees_the_same_of_shards_as_of_files(workers, source, packed):
    of_files, _ = batches(dataset_at(source))
    of_shards, _ = batches(dataset_at(packed), workers=workers)
    assert len(of_files) == 4 and differences(of_files, of_shards) == []


def test_shards_are_plain_webdataset_tars(source, packed):
    """Members grouped by key as webdataset.tariterators does, without our index."""
    dataset = dataset_at(source)
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted((packed / "train").glob("shard-*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", info.name)
                assert info.isreg() and match is not None
                file = tar.extractfile(info)
                assert file is not None and match[2] not in samples.get(match[1], {})
                samples.setdefault(match[1], {})[match[2]] = file.read()
    assert len(samples) == len(dataset.train) == 18
    for index, sample in enumerate(samples.values()):  # in the order of the source
        assert sorted(sample) == ["cls", "png" if index % 6 == 1 else "jpg"]
        assert int(sample.pop("cls")) == int(dataset.train.labels_N[index])
        assert [*sample.values()] == [encoded_images(dataset.train)[index]]


def test_the_same_bytes_again_with_workers_and_from_shards(source, packed, tmp_path):
    options = ("--shard-size", "4")
    assert pack(source, tmp_path / "a", *options, "--workers", "2") == 0
    assert contents(tmp_path / "a") == contents(packed)
    assert pack(packed, tmp_path / "b", *options) == 0
    assert contents(tmp_path / "b") == contents(packed)


def test_larger_images_alone_are_resized(tmp_path):
    root, sizes = tmp_path / "images", [(60, 40), (40, 60), (24, 500), (20, 30), (7, 7), (24, 24)]
    for split in ("train", "val"):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for i, size in enumerate(sizes):
                (root / split / name / f"{i}.jpg").write_bytes(encoded(i, size=size))
    assert pack(root, tmp_path / "small", "--short-side", "24", "--quality", "95") == 0
    small, large = dataset_at(tmp_path / "small").train, dataset_at(root).train
    found = [small.load_image(i).size for i in range(6)]
    assert found == [(36, 24), (24, 36), (24, 500), (20, 30), (7, 7), (24, 24)]
    assert encoded_images(small)[2:6] == encoded_images(large)[2:6]
    for i in (0, 1):
        expected = large.load_image(i).resize(found[i], Image.Resampling.BICUBIC)
        error = np.abs(np.array(small.load_image(i), int) - np.array(expected, int))
        assert error.mean() < 2  # JPEG's
    with Image.open(io.BytesIO(encoded_images(small)[0])) as image:
        assert image.format == "JPEG"


def test_packing_goes_on_where_it_was(source, packed, tmp_path, monkeypatch):
    """Stopped in the third shard; then a spoilt shard, a lost one and what a kill left."""
    whole, calls = packing.write_shard, []

    def counted(folder: Path, name: str, *rest: Any) -> Shards:
        if len(calls) == 2 and not (folder / "shard-000002.tar").exists():
            raise KeyboardInterrupt
        calls.append(name)
        return whole(folder, name, *rest)

    output, options = tmp_path / "out", ("--shard-size", "4")
    monkeypatch.setattr(packing, "write_shard", counted)
    assert pack(source, output, *options) == 130
    assert calls == ["shard-000000", "shard-000001"]
    assert "has shards without index.npz: run fastgn.data.pack again to finish" in refusal(output)
    (output / "train" / ".shard-000002.tar.99.tmp").write_bytes(b"half")
    monkeypatch.setattr(packing, "write_shard", whole)
    assert pack(source, output, *options) == 0
    assert contents(output) == contents(packed)

    for name, spoil in (
        ("shard-000001.tar", lambda p: p.write_bytes(flipped(p.read_bytes(), 600))),
        ("shard-000003.tar", Path.unlink),
        ("shard-000004.npz", lambda p: p.write_bytes(p.read_bytes()[:300])),
    ):
        calls.clear()
        spoil(output / "train" / name)
        monkeypatch.setattr(
            packing, "write_shard", lambda f, n, *r: (calls.append(n), whole(f, n, *r))[1]
        )
        assert pack(source, output, *options) == 0
        assert calls == [name[:12]]
        assert contents(output) == contents(packed)


def test_what_is_there_is_not_packed_over(source, packed, tmp_path, capsys):
    before = contents(packed)
    for more in (["--shard-size", "5"], ["--shard-size", "4", "--short-side", "20"]):
        assert pack(source, packed, *more) == 2
        line = capsys.readouterr().err
        assert "holds shards made from other images or with other options" in line
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "shard-000000.tar").write_bytes(b"another's")
    assert pack(source, tmp_path) == 2
    assert "that fastgn.data.pack has not made" in capsys.readouterr().err
    assert pack(source, source) == 2
    assert "is SOURCE itself" in capsys.readouterr().err
    assert contents(packed) == before and len(contents(tmp_path)) == 1


@pytest.mark.parametrize("workers", ["0", "2"])
def test_packing_a_bad_image(workers, tmp_path, capsys):
    root, output = tree(tmp_path / "images"), tmp_path / "out"
    bad = root / "train" / "bee" / "pic.2.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    options = ("--shard-size", "6", "--workers", workers)
    assert pack(root, output, *options) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"fastgn.data.pack: error: {bad} cannot be read") and err.count("\n") == 1
    assert not list(output.rglob("*.tmp"))
    assert pack(root, output, *options, "--on-bad-image", "skip") == 0
    out = capsys.readouterr().out
    assert "17 images in 3 shards" in out and f"1 bad images were left out\n  {bad} cannot" in out
    expected = [x for i, x in enumerate(encoded_images(dataset_at(root).train)) if i != 8]
    assert encoded_images(dataset_at(output).train) == expected
    assert dataset_at(output).train.labels_N.tolist() == [0] * 6 + [1] * 5 + [2] * 6
