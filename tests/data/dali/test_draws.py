"""What timm would do to an image, drawn without the image; and what a JPEG's header tells."""

import io
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import auto_augment
from torchvision.transforms import functional

from fastgn.config.groups import AugmentationConfig
from fastgn.data import transform as transform_module
from fastgn.data.dali import draws
from fastgn.data.dali.draws import Drawn, Kind, Layer, Recipe
from fastgn.data.dali.jpeg import plain_size
from fastgn.data.transform import build_train_transform
from fastgn.errors import UserError
from fastgn.seeding import Stream, seed_host

PAPER = "rand-m9-mstd0.5-inc1"
SIDE = 32


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


# ------------------------------------------------------------------------- the same draws as timm's


def spied(monkeypatch: pytest.MonkeyPatch, transform: Any, seen: list) -> None:
    """Writes down what reaches PIL as timm's transform runs: the crop, and every operation with its
    arguments."""
    real_crop = functional.resized_crop
    real = {f: getattr(Image.Image, f) for f in ("transform", "rotate", "point")}

    def crop(image, top, left, height, width, size, interpolation):
        seen.append(("crop", top, left, height, width, interpolation.value))
        return real_crop(image, top, left, height, width, size, interpolation)

    def affine(self, size, method, data, resample, fillcolor):
        seen.append(("affine", tuple(data), resample.name, fillcolor))
        return real["transform"](self, size, method, data, resample, fillcolor=fillcolor)

    def rotate(self, angle, resample, fillcolor):
        seen.append(("rotate", angle, resample.name, fillcolor))
        return real["rotate"](self, angle, resample, fillcolor=fillcolor)

    monkeypatch.setattr("timm.data.transforms.F.resized_crop", crop)
    monkeypatch.setattr(Image.Image, "transform", affine)
    monkeypatch.setattr(Image.Image, "rotate", rotate)
    for name in ("autocontrast", "equalize", "invert", "posterize", "solarize"):
        monkeypatch.setattr(ImageOps, name, noting(getattr(ImageOps, name), name, seen))
    for name in ("Color", "Contrast", "Brightness", "Sharpness"):
        enhancer = getattr(auto_augment.ImageEnhance, name)
        monkeypatch.setattr(enhancer, "enhance", noting(enhancer.enhance, name, seen))
    flip = noting(functional.hflip, "flip", seen)
    monkeypatch.setattr("torchvision.transforms.transforms.F.hflip", flip)
    for step in transform.transforms:
        for op in transform_module.list_operations(step):
            if op.aug_fn is auto_augment.solarize_add:
                op.aug_fn = noting(op.aug_fn, "solarize_add", seen)
            elif op.aug_fn is transform_module.posterize:
                op.aug_fn = noting(op.aug_fn, "posterize_to", seen)


def noting(real: Any, name: str, seen: list) -> Any:
    def call(image, *args, **kwargs):
        seen.append((name, *args))
        return real(image, *args, **kwargs)

    return call


NAMES = {
    Kind.AUTO_CONTRAST: "autocontrast",
    Kind.EQUALIZE: "equalize",
    Kind.INVERT: "invert",
    Kind.SOLARIZE: "solarize",
    Kind.SOLARIZE_ADD: "solarize_add",
    Kind.COLOR: "Color",
    Kind.CONTRAST: "Contrast",
    Kind.BRIGHTNESS: "Brightness",
    Kind.SHARPNESS: "Sharpness",
}


def expected_of(seen: list) -> Drawn:
    """What PIL was asked for, as a Drawn."""
    crop, flipped, layers = None, False, []
    rotated = False
    for name, *args in seen:
        match name:
            case "crop":
                crop = args
            case "flip":
                flipped = True
            case "rotate":  # which asks for a transform, unless there is nothing to turn
                rotated = args[0] % 360 != 0
                assert args[2] == draws.FILL
            case "affine":
                assert args[2] == draws.FILL
                layers.append(Layer(Kind[args[1]], args[0]))
                rotated = False
            case "posterize_to":
                bits = args[0]
                if bits < 8:
                    layers.append(Layer(Kind.POSTERIZE, (0xFF & ~(2 ** (8 - bits) - 1),)))
            case "posterize":
                pass  # by the one above
            case _:
                kind = next(k for k, v in NAMES.items() if v == name)
                layers.append(Layer(kind, tuple(args)))
    assert crop is not None and not rotated
    return Drawn(*crop[:4], crop[4] == "bilinear", flipped, tuple(layers))


@pytest.mark.parametrize(
    "keys",
    [
        {"aa": PAPER},
        {"aa": PAPER, "train_interpolation": "random"},
        {"aa": "rand-m5-n3-mstd101", "train_interpolation": "bilinear"},
        {"aa": "rand-m10-tweights"},
        {"aa": "original-mstd0.5"},
        {"aa": "v0"},
        {"color_jitter": 0.4},
        {"color_jitter": 0.0},
    ],
    ids=str,
)
def test_the_draws_are_those_of_timm(keys, monkeypatch):
    """timm's transform runs on real images with PIL's own functions spied on: same seed, same crop,
    flip, operations and numbers, in the same order."""
    cfg = AugmentationConfig(**keys)
    drawer = Recipe(cfg, SIDE, 0.5)
    transform = build_train_transform(cfg, SIDE, 0.5)
    seen: list = []
    spied(monkeypatch, transform, seen)
    for index in range(150):
        width, height = 20 + index % 37, 16 + index % 53
        seed_host(Stream.IMAGE, 0, 0, index)
        transform(picture(width, height))
        after = torch.rand(1)
        expected = expected_of(seen)
        seen.clear()
        seed_host(Stream.IMAGE, 0, 0, index)
        drawn = drawer.draw(width, height)
        assert torch.equal(torch.rand(1), after)
        assert drawn[:6] == expected[:6]
        assert [layer.kind for layer in drawn.layers] == [x.kind for x in expected.layers]
        for layer, right in zip(drawn.layers, expected.layers, strict=True):
            assert layer.arguments == pytest.approx(right.arguments, abs=1e-9)
        assert {layer.kind for layer in drawn.layers} <= drawer.kinds
        assert len(drawn.layers) <= drawer.layers


def test_the_distribution_of_the_papers_policy():
    """4,000 images: two of 15 operations with replacement, each applied to half of the images;
    magnitudes 9 + N(0, 0.5) of 10, at most 10."""
    drawer = Recipe(AugmentationConfig(aa=PAPER), 224, 0.5)
    drawn = []
    for index in range(4000):
        seed_host(Stream.IMAGE, 1, 0, index)
        drawn.append(drawer.draw(500, 375))
    layers = [layer for d in drawn for layer in d.layers]
    assert len(layers) == pytest.approx(4000, abs=4 * (8000 / 4) ** 0.5)
    counts = Counter(layer.kind for layer in layers)
    for kind in set(Kind) - {Kind.NONE, Kind.BILINEAR}:
        share = (5 if kind == Kind.BICUBIC else 1) / 15
        spread = (8000 * share / 2 * (1 - share / 2)) ** 0.5
        assert counts[kind] == pytest.approx(8000 * share / 2, abs=4 * spread), kind
    assert counts[Kind.BILINEAR] == 0
    factors = np.array([x.arguments[0] for x in layers if x.kind == Kind.SHARPNESS])
    sides = np.abs(factors - 1)
    assert sides.max() == pytest.approx(0.9) and 0.6 < sides.min()
    assert sides.mean() == pytest.approx(0.81, abs=0.02)
    assert (factors > 1).mean() == pytest.approx(0.5, abs=0.15)
    assert np.mean([d.flipped for d in drawn]) == pytest.approx(0.5, abs=0.04)
    areas = np.array([d.height * d.width for d in drawn]) / (500 * 375)
    assert areas.min() >= 0.07 and areas.max() <= 1
    ratios = np.log([d.width / d.height for d in drawn])
    assert np.abs(ratios).max() < np.log(4 / 3) + 0.02


@pytest.mark.parametrize(
    ("policy", "what"), [("rand-m9-t3a", "GaussianBlur"), ("augmix-m5", "AugMixAugment")]
)
def test_what_is_not_covered_is_refused(policy, what):
    cfg = AugmentationConfig(aa=policy)
    with pytest.raises(UserError, match=f"--aa {policy}: the DALI loader has no {what}: add"):
        Recipe(cfg, SIDE, 0.5)


def test_a_policy_that_timm_does_not_know():
    with pytest.raises(UserError, match="as in rand-m9-mstd0.5-inc1"):
        Recipe(AugmentationConfig(aa="rand-q9"), SIDE, 0.5)


def test_no_bits_make_black():
    """Magnitude 10 of timm's increasing posterize keeps none, which Pillow refuses."""
    transform = build_train_transform(AugmentationConfig(aa="rand-m10-inc1-p1"), SIDE, 0.0)
    op = next(o for o in transform.transforms[1].ops if o.name == "PosterizeIncreasing")
    assert np.array(op(picture(9, 9))).max() == 0
    for bits in (1, 4, 8):
        image = picture(9, 9)
        ours = transform_module.posterize(image, bits)
        assert np.array_equal(ours, auto_augment.posterize(image, bits))


# --------------------------------------------------------------------------------- a JPEG's header


def encoded(image: Image.Image, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, **({"format": "JPEG"} | options))
    return out.getvalue()


@pytest.mark.parametrize(
    ("image", "options"),
    [
        (picture(31, 17), {}),
        (picture(31, 17), {"progressive": True}),
        (picture(31, 17), {"subsampling": 0, "quality": 100}),
        (picture(31, 17).convert("L"), {}),
        (picture(31, 17), {"exif": Image.Exif(), "comment": b"x" * 300, "icc_profile": b"y" * 9}),
    ],
)
def test_a_plain_jpeg(image, options):
    assert plain_size(encoded(image, **options)) == (31, 17)


def rgb_jpeg() -> bytes:
    return encoded(picture(31, 17), keep_rgb=True)


@pytest.mark.parametrize(
    "content",
    [
        encoded(picture(31, 17).convert("CMYK")),
        encoded(picture(31, 17), format="PNG"),
        rgb_jpeg(),
        encoded(picture(31, 17))[:-2],
        encoded(picture(31, 17)) + b"\0",
        encoded(picture(31, 17))[:20] + b"\xff\xd9",
        b"\xff\xd8\xff\xd9",
        b"\xff\xd8" + b"\xff" * 40 + b"\xff\xd9",
        b"text",
        b"",
    ],
)
def test_what_is_not_plain(content):
    assert plain_size(content) is None


def test_no_header_breaks_it():
    """Any byte of the header changed, or any piece cut out: a size or None."""
    content = encoded(picture(31, 17))
    draw = np.random.default_rng(0)
    for _ in range(2000):
        spoilt = bytearray(content)
        spoilt[draw.integers(2, 650)] = draw.integers(256)
        cut = draw.integers(2, 600)
        for changed in (bytes(spoilt), bytes(content[:cut] + content[cut + draw.integers(90) :])):
            size = plain_size(changed)
            assert size is None or (len(size) == 2 and min(size) > 0)
