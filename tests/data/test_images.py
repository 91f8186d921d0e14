"""Images of every kind become RGB, and the others are named, or replaced by the next one."""

import io
import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from support.images import encoded, png_of
from support.loaders import loader_of
from support.odd import write_tree
from support.sources import BAD, BMP_REST

from fastgn.config.groups import DatasetConfig
from fastgn.data.datasets import BadImageError, Files, decode_image, load_dataset
from fastgn.errors import UserError


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
    names = ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png")
    root = write_tree(tmp_path, {name: encoded(0, "PNG") for name in names})
    bad = root / "train" / "dog" / "1.png"
    bad.write_bytes(bad.read_bytes()[:40])
    dataset = load_dataset(DatasetConfig(data_dir=str(root)))
    loader = loader_of(dataset, batch_size=4, workers=workers)
    with pytest.raises(UserError) as caught:
        list(loader.epoch(0))
    assert str(caught.value).startswith(f"{bad} cannot be read as an image: ")
    assert "\n" not in str(caught.value)


def test_16_bit_grey_keeps_its_shades():
    """PIL turns every value above 255 into white."""
    shades = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    for end in ("PNG", "TIFF"):
        out = io.BytesIO()
        Image.fromarray(shades).save(out, end)
        pixels = np.array(decode_image(out.getvalue(), "grey"))
        assert np.array_equal(pixels, np.repeat((shades >> 8)[..., None], 3, 2))


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
