"""Lists of files, packed shards, the scan beforehand, and what becomes of bad images."""

import dataclasses
import io
import json
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import tarfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.images import encoded, png_of
from support.processes import on_two_ranks
from support.runs import TINY_SWIN
from support.states import differences, read_state

import fastgn.data.check as checking
import fastgn.data.pack as packing
from fastgn import train
from fastgn.config import Config
from fastgn.config.groups import DatasetConfig
from fastgn.data.batch import draw_epoch_order
from fastgn.data.datasets import (
    Arrays,
    BadImageError,
    Dataset,
    Encoded,
    Files,
    check_classes,
    decode_image,
    load_dataset,
)
from fastgn.data.images import SKIPPED_IN_A_ROW, load_or_next
from fastgn.data.loader import build_loader
from fastgn.data.shards import INDEX, OPEN_SHARDS, Shards
from fastgn.data.subset import Subset
from fastgn.data.torch import map_in_workers
from fastgn.errors import UserError
from fastgn.metrics import read_rows

CPU = torch.device("cpu")
CLASSES = ("ant", "bee", "cat")


def tree(root: Path, train_images: int = 6, val_images: int = 2) -> Path:
    """root/{train,val}/<class>/<index>.jpg, and one PNG a class."""
    for split, count in (("train", train_images), ("val", val_images)):
        for number, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                kind, end = ("PNG", "png") if i == 1 else ("JPEG", "jpg")
                path = root / split / name / f"pic.{i}.{end}"
                path.write_bytes(encoded(number * count + i, kind))
    return root


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 training and 6 validation images in three classes; not to be changed."""
    return tree(tmp_path_factory.mktemp("sources") / "images")


def dataset_at(root: Path) -> Dataset:
    return load_dataset(DatasetConfig(data_dir=str(root)))


def refusal(root: Path) -> str:
    with pytest.raises(UserError) as caught:
        dataset_at(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(split: Arrays | Encoded) -> list[bytes]:
    assert isinstance(split, Encoded)
    return [split.read(i) for i in range(len(split))]


def batches(dataset: Dataset, first: int = 0, **keys: Any) -> tuple[list, list[str]]:
    """An epoch of the torch loader, augmented, and the lines about bad images."""
    settings = {"aa": "rand-m9-mstd0.5-inc1", "mixup": 0.8, "reprob": 0.25, "workers": 0} | keys
    loader = build_loader(
        Config().replace(**settings),
        dataset,
        img_size=16,
        mean=torch.full((1, 3, 1, 1), 0.45),
        std=torch.full((1, 3, 1, 1), 0.225),
        batch_size=4,
        grad_accum_steps=1,
        rank=0,
        ranks=1,
        device=CPU,
    )
    return list(loader.epoch(1, first)), loader.bad_images


# ----------------------------------------------------------------------------------- lists of files


def write_lists(root: Path, source: Path, label: Callable[[str], str]) -> Path:
    """Lists of the source's files, from the last to the first."""
    root.mkdir(exist_ok=True)
    for split in ("train", "val"):
        files = sorted((source / split).rglob("*.*g"), reverse=True)
        lines = [f"{os.path.relpath(f, root)} {label(f.parent.name)}" for f in files]
        (root / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize("kind", ["names", "numbers", "numbers of named classes"])
def test_lists_of_files(kind, source, tmp_path):
    label = {"names": str}.get(kind, lambda name: str(CLASSES.index(name)))
    write_lists(tmp_path, source, label)
    if kind.endswith("classes"):
        (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    dataset, folder = dataset_at(tmp_path), dataset_at(source)
    assert dataset.classes == (("0", "1", "2") if kind == "numbers" else CLASSES)
    assert isinstance(dataset.train, Files)
    for mine, theirs in ((dataset.train, folder.train), (dataset.val, folder.val)):
        assert contents(mine) == contents(theirs)[::-1]
        assert mine.labels_N.tolist() == theirs.labels_N.tolist()[::-1]
        assert mine.labels_N.dtype == torch.int64


def test_a_list_beside_a_folder(source, tmp_path):
    """ImageNet's usual shape: training folders, and a list with numbers for one flat folder."""
    (tmp_path / "train").symlink_to(source / "train")
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "a picture.jpg").write_bytes(encoded(3))
    (tmp_path / "val.txt").write_text("val/a picture.jpg\t2\r\n\n")
    dataset = dataset_at(tmp_path)
    assert dataset.classes == CLASSES and dataset.val.labels_N.tolist() == [2]
    assert contents(dataset.val) == [encoded(3)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train/ant/pic.0.jpg", "train.txt, line 19: 'train/ant/pic.0.jpg' has no label: write"),
        ("train/ant/pic.0.jpg 3", "line 19: label 3 is none of the 3 classes"),
        ("train/ant/pic.0.jpg -1", "line 19: label -1 is none of the 3 classes"),
        ("train/ant/pic.0.jpg dog", "line 19: label dog is none of the 3 classes"),
        ("train/ant/gone.jpg 0", "line 19: no such file: "),
        ("gone/pic.jpg 0", "line 19: no such file: "),
    ],
)
def test_a_bad_line_of_a_list_is_named(line, expected, source, tmp_path):
    write_lists(tmp_path, source, lambda name: str(CLASSES.index(name)))
    (tmp_path / "train").symlink_to(source / "train")
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    with open(tmp_path / "train.txt", "a") as file:
        file.write(line)
    assert expected in refusal(tmp_path)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [("123", "label 3 is none of the 3"), ("018", "label 8 is none of the 3")],
)
def test_numbers_without_names_count_from_0_without_a_gap(numbers, expected, source, tmp_path):
    """Else a list that counts from 1 would train a class that there is not."""
    write_lists(tmp_path, source, lambda name: numbers[CLASSES.index(name)])
    assert expected in refusal(tmp_path)


def test_what_else_is_no_list(source, tmp_path):
    write_lists(tmp_path, source, str)
    (tmp_path / "classes.txt").write_text("ant\nbee\nant\ncat")
    assert "classes.txt has the class ant twice" in refusal(tmp_path)
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "val.txt").write_text("\n")
    assert "val.txt lists no images: write `path label`" in refusal(tmp_path)
    (tmp_path / "val.txt").unlink()
    line = refusal(tmp_path)
    assert f"{tmp_path / 'val'} is missing" in line and "fastgn.data.pack" in line
    assert "or val.txt should list its images; --val-split names another folder" in line


# --------------------------------------------------------------------------------------------- pack


def pack(source: Path, output: Path, *more: str) -> int:
    return packing.main([str(source), str(output), "--workers", "0", *more])


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source` as it is, 4 images a shard; not to be changed."""
    output = tmp_path_factory.mktemp("packed") / "shards"
    assert pack(source, output, "--shard-size", "4") == 0
    return output


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_packed_images_are_the_same_images(source, packed):
    mine, theirs = dataset_at(packed), dataset_at(source)
    assert mine.classes == theirs.classes == CLASSES
    assert isinstance(mine.train, Shards) and len(mine.train.shards) == 5
    for split, other in ((mine.train, theirs.train), (mine.val, theirs.val)):
        assert contents(split) == contents(other)
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
        assert [*sample.values()] == [contents(dataset.train)[index]]


def test_the_same_bytes_again_with_workers_and_from_shards(source, packed, tmp_path):
    options = ("--shard-size", "4")
    assert pack(source, tmp_path / "a", *options, "--workers", "2") == 0
    assert files_of(tmp_path / "a") == files_of(packed)
    assert pack(packed, tmp_path / "b", *options) == 0
    assert files_of(tmp_path / "b") == files_of(packed)


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
    assert contents(small)[2:6] == contents(large)[2:6]
    for i in (0, 1):
        expected = large.load_image(i).resize(found[i], Image.Resampling.BICUBIC)
        error = np.abs(np.array(small.load_image(i), int) - np.array(expected, int))
        assert error.mean() < 2  # JPEG's
    with Image.open(io.BytesIO(contents(small)[0])) as image:
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
    assert files_of(output) == files_of(packed)

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
        assert files_of(output) == files_of(packed)


def flipped(content: bytes, where: int) -> bytes:
    spoilt = bytearray(content)
    spoilt[where] ^= 0x10
    return bytes(spoilt)


def test_what_is_there_is_not_packed_over(source, packed, tmp_path, capsys):
    before = files_of(packed)
    for more in (["--shard-size", "5"], ["--shard-size", "4", "--short-side", "20"]):
        assert pack(source, packed, *more) == 2
        line = capsys.readouterr().err
        assert "holds shards of other images or options" in line
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "shard-000000.tar").write_bytes(b"another's")
    assert pack(source, tmp_path) == 2
    assert "that fastgn.data.pack has not made" in capsys.readouterr().err
    assert pack(source, source) == 2
    assert "is SOURCE itself" in capsys.readouterr().err
    assert files_of(packed) == before and len(files_of(tmp_path)) == 1


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
    expected = [x for i, x in enumerate(contents(dataset_at(root).train)) if i != 8]
    assert contents(dataset_at(output).train) == expected
    assert dataset_at(output).train.labels_N.tolist() == [0] * 6 + [1] * 5 + [2] * 6


# ------------------------------------------------------------------------------------------- shards


@pytest.fixture
def shards(packed: Path, tmp_path: Path) -> Path:
    """A copy of `packed` that a test may spoil."""
    for name, content in files_of(packed).items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    return tmp_path / "copy"


def test_a_shard_that_does_not_fit_its_index_is_named(shards):
    shard = shards / "train" / "shard-000002.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:-512])
    size = len(content)
    assert f"{shard} has {size - 512} bytes, " in refusal(shards)
    assert f"bytes, not {size} as in " in refusal(shards)
    shard.unlink()
    assert f"{shard}, of {shards}/train/index.npz, cannot be read: No such file" in refusal(shards)


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
    right = contents(dataset_at(shards).val), dataset_at(shards).val.labels_N
    for where in range(0, len(content), 23):
        for version in (flipped(content, where), content[:where]):
            path.write_bytes(version)
            try:
                found = Shards.load(shards / "val")
            except UserError as error:
                assert str(path) in str(error) and "\n" not in str(error)
            else:
                assert contents(found) == right[0] and torch.equal(found.labels_N, right[1])


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
    first = contents(split)
    assert len(split.files) == 5
    there = pickle.loads(pickle.dumps(split))
    assert there.files == {} and contents(there) == first
    monkeypatch.setattr("fastgn.data.shards.OPEN_SHARDS", 2)
    few = dataset_at(packed).train
    assert contents(few) == first and len(few.files) == 2 < OPEN_SHARDS


# --------------------------------------------------------------------------------------- bad images


def test_16_bit_grey_keeps_its_shades():
    """PIL turns every value above 255 into white."""
    shades = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    for end in ("PNG", "TIFF"):
        out = io.BytesIO()
        Image.fromarray(shades).save(out, end)
        pixels = np.array(decode_image(out.getvalue(), "grey"))
        assert np.array_equal(pixels, np.repeat((shades >> 8)[..., None], 3, 2))


BMP_REST = (1, 24, 0, 0, 2835, 2835, 0, 0)
"""Planes, bits a pixel, compression, bytes, resolution and colours of a bitmap's header."""


def float_tiff() -> bytes:
    out = io.BytesIO()
    Image.new("F", (4, 4), 0.5).save(out, "TIFF")
    return out.getvalue()


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is empty"),
    "truncated": (encoded(0, size=(200, 200))[:700], "truncated"),
    "no image": (b"text", "its format is not known"),
    "gigantic": (png_of(30_000, 30_000), "decompression bomb"),
    "32-bit": (float_tiff(), "32-bit pixels have no known range"),
    "thin": (encoded(0, "PNG", (3, 3001)), "3 x 3001 pixels are too thin to resize"),
}


@pytest.mark.parametrize("problem", BAD)
def test_a_bad_image_is_of_a_kind(problem):
    content, reason = BAD[problem]
    with pytest.raises(BadImageError, match="^x.jpg cannot be read as an image: ") as caught:
        decode_image(content, "x.jpg")
    assert caught.value.problem == problem and reason in str(caught.value)


@pytest.mark.parametrize("size", [(0, 40), (40, 0), (0, 0)])
@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "PPM", "TGA"])
def test_an_image_without_pixels_is_bad(kind: str, size: tuple[int, int]) -> None:
    """PIL's readers open none, and do not say why."""
    width, height = size
    content = {
        "PNG": png_of(width, height),
        "GIF": b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + b"\x3b",
        "BMP": b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, width, height, *BMP_REST),
        "PPM": f"P6 {width} {height} 255\n".encode(),
        "TGA": struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, width, height, 24, 0),
    }[kind]
    with pytest.raises(
        BadImageError, match="^x cannot be read as an image: .* gives it no pixels$"
    ):
        decode_image(content, "x")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "GIF", "BMP", "WEBP", "PPM"])
def test_spoilt_bytes_are_an_image_or_a_bad_image(kind):
    """Nothing else leaves decode_image, whatever PIL's readers raise."""
    content, draw = encoded(3, kind, (24, 16)), np.random.default_rng(0)
    for _ in range(150):
        spoilt = bytearray(content)
        for where in draw.integers(0, min(len(content), 400), draw.integers(1, 6)):
            spoilt[where] = draw.integers(256)
        spoilt = spoilt[: draw.integers(1, len(spoilt))] if draw.random() < 0.3 else spoilt
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert decode_image(bytes(spoilt), "x").mode == "RGB"
            except BadImageError as error:
                assert "\n" not in str(error)


def spoil(root: Path) -> dict[int, str]:
    """Makes four of the 18 training images bad: truncated, empty, text, and gone once listed; a
    function of the images alone. Returns index -> name."""
    names = {4: "ant/pic.4.jpg", 5: "ant/pic.5.jpg", 11: "bee/pic.5.jpg", 17: "cat/pic.5.jpg"}
    paths = {i: root / "train" / name for i, name in names.items()}
    paths[4].write_bytes(paths[4].read_bytes()[:300])
    paths[5].write_bytes(b"")
    paths[11].write_text("text")
    return {i: str(path) for i, path in paths.items()}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_replaced_by_the_next(workers, tmp_path):
    """The same in every run, with that one's label, and each named as often as it was met."""
    root = tree(tmp_path / "images")
    names, dataset = spoil(root), dataset_at(root)
    Path(names[17]).unlink()  # while training
    keys = {"on_bad_image": "skip", "workers": workers}
    whole, bad = batches(dataset, **keys)
    order = draw_epoch_order(18, 0, 1)[:16].tolist()
    met = {names[i] for i in order if i in names}
    met |= {names[5]} if 4 in order else set()  # whose replacement is bad as well
    assert {line.partition(" cannot")[0] for line in bad} == met
    part, _ = batches(dataset, first=2, **keys)
    assert differences(whole[2:], part) == []
    # as if the next images had stood there
    stand_in = {4: 6, 5: 6, 11: 12, 17: 0}
    plain = dataset_at(tree(tmp_path / "plain"))
    assert isinstance(plain.train, Files)
    where = [stand_in.get(i, i) for i in range(18)]
    mended = Files([plain.train.paths[i] for i in where], plain.train.labels_N[where])
    expected, _ = batches(Dataset("mended", mended, plain.val, CLASSES))
    assert differences(expected, whole) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_stops_a_run_unless_it_is_to_be_replaced(workers, tmp_path):
    root = tree(tmp_path / "images")
    names, dataset = spoil(root), dataset_at(root)
    for path in names.values():
        Path(path).unlink(missing_ok=True)
    with pytest.raises(UserError) as caught:
        batches(dataset, workers=workers)
    assert str(caught.value).partition(" cannot be read as an image: No such")[0] in names.values()


def test_a_folder_that_is_gone_is_no_accident():
    def load(index: int) -> int:
        tried.append(index)
        raise BadImageError(f"{index} is bad")

    for total in (7, 1000):
        tried: list[int] = []
        with pytest.raises(BadImageError, match="images in a row are bad, the last one: "):
            load_or_next(load, 5, total, skip=True)
        assert len(tried) == min(total, SKIPPED_IN_A_ROW) and tried[-1] == (4 + len(tried)) % total


def test_a_subset_replaces_and_counts(tmp_path):
    root = tree(tmp_path / "images")
    (root / "val" / "bee" / "pic.0.jpg").write_bytes(b"")
    split = dataset_at(root).val
    options: dict[str, Any] = {"img_size": 8, "crop_pct": 1.0, "batch_size": 4, "workers": 0}
    with pytest.raises(UserError, match="it is empty"):
        list(Subset(split, None, device=CPU, **options))
    subset = Subset(split, None, device=CPU, skip=True, **options)
    images, labels = (torch.cat(parts) for parts in zip(*subset, strict=True))
    assert labels.tolist() == [0, 0, 1, 1, 2, 2] and torch.equal(images[2], images[3])
    assert len(subset.bad_images) == 1 and "bee/pic.0.jpg" in subset.bad_images[0]


def die(index: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return index


def test_a_worker_that_dies_is_one_line():
    with pytest.raises(UserError, match=r"^DataLoader worker \(pid.*, lower --workers$") as caught:
        list(map_in_workers(die, range(3), 1, 60.0))
    assert "\n" not in str(caught.value)


def test_a_run_whose_worker_dies_ends_with_a_line(source, tmp_path):
    """Wherever it is; and the other worker, which ignores signals, ends as well."""
    data = write_lists(tmp_path / "data", source, str)
    (data / "train.txt").write_text(200 * (data / "train.txt").read_text())  # one epoch will do
    args = run_args(data, tmp_path / "run", "--workers", "2", "--lr", "1e-4")
    log = tmp_path / "log"
    with open(log, "w") as file:
        process = subprocess.Popen([sys.executable, "-m", "fastgn.train", *args], stderr=file)
    try:
        wait_until(lambda: "update 6/" in log.read_text())
        listing = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        workers = listing.read_text().split()
        os.kill(int(workers[0]), signal.SIGKILL)
        assert process.wait(60) == 2
    finally:
        process.kill()
    said = log.read_text()
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("fastgn.train: error: DataLoader worker (pid")
    wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))


def wait_until(there: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.02)


def run_args(data: Path, output: Path, *more: str) -> list[str]:
    tiny = TINY_SWIN[: TINY_SWIN.index("--data")]
    fixed = ("--data-dir", str(data), "--workers", "0", "--batch-size", "4", "--epochs", "2")
    fixed += ("--warmup-epochs", "0", "--output", str(output), "--log-interval", "3")
    return [*tiny, *fixed, *more]


def test_a_run_counts_and_names_what_it_replaces(tmp_path, capsys):
    """Unbroken, and stopped between two rows and resumed: the same counts."""
    root = tree(tmp_path / "images")
    names = spoil(root)
    Path(names[17]).write_bytes(b"")
    (root / "val" / "ant" / "pic.0.jpg").write_bytes(b"")
    runs = tmp_path / "whole", tmp_path / "broken"
    assert train.main(run_args(root, runs[0], "--on-bad-image", "skip")) == 0
    said = capsys.readouterr().err
    skip = ("--on-bad-image", "skip", "--checkpoint-interval", "1", "--checkpoint-hist", "9")
    assert train.main(run_args(root, runs[1], *skip, "--max-updates", "2")) == 0
    assert len(read_state(runs[1] / "checkpoints" / "update_00000001.pt")["bad_images"]) > 0
    assert train.main(["--resume", str(runs[1] / "checkpoints" / "update_00000001.pt")]) == 0
    assert train.main(["--resume", str(runs[1]), "--max-updates", "8"]) == 0

    rows = [
        [(r["update"], r.get("bad_images")) for r in read_rows(run / "metrics.csv") if "loss" in r]
        for run in runs
    ]
    assert [u for u, _ in rows[0]] == [3, 4, 6, 8]
    counts = dict(rows[0])
    assert sum(n or 0 for n in counts.values()) >= 6
    assert {u: n for u, n in rows[1] if u in (6, 8)} == {u: counts[u] for u in (6, 8)}
    named = [said.count(f"{name} cannot be read as an image") for name in names.values()]
    assert sorted(named) == [0, 1, 1, 1] and "; 1 more, see fastgn.data.check\n" in said
    assert said.count("bad validation images, replaced ") == 1


def test_two_ranks_count_together(tmp_path):
    """Each meets its own half of the bad images; the row and the line have all of them."""
    root = tree(tmp_path / "images")
    names = spoil(root)
    Path(names[17]).write_bytes(b"")
    more = ("--on-bad-image", "skip", "--epochs", "1", "--eval-images", "0")
    one, two = tmp_path / "one", tmp_path / "two"
    assert train.main(run_args(root, one, *more, "--batch-size", "8")) == 0
    args = run_args(root, two, *more, "--log-interval", "3", "--checkpoint-interval", "1")
    said = on_two_ranks(tmp_path, train.main, args)
    counts = [[r["bad_images"] for r in read_rows(run / "metrics.csv")] for run in (one, two)]
    assert counts[0] == counts[1] and sum(counts[0]) >= 4
    assert "bad training images, replaced" in said[0] and "bad training" not in said[1]
    assert said[0].count("cannot be read as an image") == 3


# -------------------------------------------------------------------------------------------- check


def odd_images() -> dict[str, bytes]:
    """Note -> an image that deserves it, and maybe others."""
    out: dict[str, bytes] = {"not JPEG": encoded(0, "PNG"), "tiny": encoded(0, size=(1, 1))}
    for note, mode in (("CMYK", "CMYK"), ("greyscale", "L")):
        file = io.BytesIO()
        Image.new(mode, (40, 40)).save(file, "JPEG")
        out[note] = file.getvalue()
    file = io.BytesIO()
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(file, "PNG")
    out["16-bit"] = file.getvalue()
    file, exif = io.BytesIO(), Image.Exif()
    exif[checking.ORIENTATION] = 6
    Image.new("RGB", (40, 40)).save(file, "JPEG", exif=exif)
    out["EXIF-rotated"] = file.getvalue()
    return out


def test_each_oddity_has_its_note():
    assert checking.find_oddities(encoded(0, size=(40, 40))) == []
    for note, content in odd_images().items():
        assert note in checking.find_oddities(content)
        decode_image(content, note)  # and is none of the bad ones


@pytest.mark.parametrize("workers", ["0", "2"])
def test_check_names_every_bad_image(workers, tmp_path, capsys):
    root, report = tree(tmp_path / "images"), tmp_path / "report.json"
    jpegs = sorted((root / "train").rglob("*.jpg"))
    bad = {str(path): problem for path, problem in zip(jpegs, BAD, strict=False)}
    for path, problem in bad.items():
        Path(path).write_bytes(BAD[problem][0])
    for i, content in enumerate(odd_images().values()):
        (root / "val" / "cat" / f"{i}.jpg").write_bytes(content)
    assert checking.main([str(root), "--workers", workers, "--output", str(report)]) == 1
    found = json.loads(report.read_text())
    assert {row["name"]: row["problem"] for row in found["bad"]} == bad
    assert found["images"] == {"train": 18, "val": 12} and found["classes"] == 3
    counts = {note: row["count"] for note, row in found["notes"].items()}
    # three PNGs of the tree in train, one of the bad ones aside, and three in val
    assert counts == {
        "not JPEG": 8,
        "CMYK": 1,
        "greyscale": 2,
        "16-bit": 1,
        "EXIF-rotated": 1,
        "tiny": 1,
    }
    said = capsys.readouterr()
    assert all(f"  {name} cannot be read as an image: " in said.out for name in bad)
    assert "bad: 1 " in said.out and "CMYK: 1 (converted to RGB)" in said.out
    assert said.err == ""


def test_check_of_sound_data_and_of_shards(source, packed, shards, capsys):
    for root in (source, packed):
        assert checking.main([str(root), "--workers", "0"]) == 0
        assert "bad: none, every image can be read" in capsys.readouterr().out
    shard = shards / "val" / "shard-000000.tar"
    shard.write_bytes(flipped(shard.read_bytes(), -5))  # padding: no image is touched
    assert checking.main([str(shards), "--workers", "0"]) == 1
    out = capsys.readouterr().out
    assert f"bad: 1 spoilt shard\n  {shard} has changed since it was packed" in out


def test_classes_must_be_the_known_ones_in_order(source):
    classes = dataset_at(source).classes
    check_classes(CLASSES, classes, "the model")
    with pytest.raises(UserError, match=r"the model knows 2 classes \(ant, bee, ...\), but the "):
        check_classes(CLASSES[:2], classes, "the model")
    with pytest.raises(
        UserError, match="the model knows class 1 of 3 as cat, but in the data it is bee"
    ):
        check_classes(("ant", "cat", "bee"), classes, "the model")
