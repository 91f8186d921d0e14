"""fastgn.data.check names every bad image and each oddity."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.images import encoded
from support.sources import BAD, CLASSES, dataset_at, flipped, tree

import fastgn.data.check as checking
from fastgn.data.datasets import check_classes, decode_image
from fastgn.errors import UserError


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
