"""Resizes and augments images on a CPU, one at a time, with PyTorch's kernels and PIL.

DALI's own CPU operators take three times as long, because each operator has a fixed cost and
handles only a few images at a time. In this module, an array for an image is uint8, H x W x 3.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

from fastgn.data.dali.draws import FILL, WARPS, Kind

PILLOW: dict[Kind, Callable[[Image.Image, float], Image.Image]] = {
    Kind.AUTO_CONTRAST: lambda image, _: ImageOps.autocontrast(image),
    Kind.EQUALIZE: lambda image, _: ImageOps.equalize(image),
    Kind.INVERT: lambda image, _: ImageOps.invert(image),
    Kind.POSTERIZE: lambda image, mask: image.point([v & int(mask) for v in range(256)] * 3),
    Kind.SOLARIZE: lambda image, least: ImageOps.solarize(image, int(least)),
    Kind.SOLARIZE_ADD: lambda image, more: image.point(
        [min(255, v + int(more)) if v < 128 else v for v in range(256)] * 3
    ),
    Kind.COLOR: lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    Kind.CONTRAST: lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    Kind.BRIGHTNESS: lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    Kind.SHARPNESS: lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
}
"""Kind of operation -> function of (image, argument) that applies the operation with PIL."""


def augment_crop(
    side: int,
    crop: np.ndarray,
    bilinear: np.ndarray,
    flipped: np.ndarray,
    kinds: np.ndarray,
    arguments: np.ndarray,
) -> np.ndarray:
    """Resizes a decoded crop, and applies all operations to it. Returns an image, side x side x 3.

    side: width and height of the result. crop: the crop, in its own size. The other arguments are
    one image's entries in the fields of feeder.Fed with the same names.
    """
    image = resize(side, crop, "bilinear" if bilinear else "bicubic", bool(flipped))
    for kind, given in zip(kinds.tolist(), arguments, strict=True):
        if kind in WARPS:
            image = warp(image, given, "bilinear" if kind == Kind.BILINEAR else "bicubic")
        elif kind != Kind.NONE:
            operation = PILLOW[Kind(kind)]
            image = np.array(operation(Image.fromarray(image), float(given[0])))
    return image


def resize(side: int, crop: np.ndarray, mode: str, flipped: bool) -> np.ndarray:
    """Returns a crop resized with antialiasing, in a third of PIL's time.

    side: width and height of the result. mode: name of the interpolation. flipped: whether to
    mirror the result horizontally.
    """
    image = torch.from_numpy(crop).permute(2, 0, 1)[None]
    result = F.interpolate(image, (side, side), mode=mode, antialias=True)[0].permute(1, 2, 0)
    return (result.flip(1) if flipped else result).contiguous().numpy()


def warp(image: np.ndarray, matrix: np.ndarray, mode: str) -> np.ndarray:
    """Returns the image after an affine map.

    matrix: [a, b, c, d, e, f] as in draws.Kind.BICUBIC. mode: name of the interpolation.

    A bicubic shear or shift along one axis is computed by shear_rows, in a quarter of PIL's time.
    Other maps are computed by PyTorch, in half of PIL's time. PyTorch's bicubic kernel is less
    sharp than PIL's, because its coefficient is -0.75, and PIL's is -1.
    """
    a, b, c, d, e, f = matrix.tolist()
    if mode == "bicubic" and (a, e) == (1, 1) and (d, f) == (0, 0):
        return shear_rows(image, b, c)
    if mode == "bicubic" and (a, e) == (1, 1) and (b, c) == (0, 0):
        return np.ascontiguousarray(shear_rows(image.transpose(1, 0, 2), d, f).transpose(1, 0, 2))
    side = len(image)
    middle = np.arange(side, dtype=np.float32) + np.float32(0.5)
    # (x, y) of the point in the image from which each pixel of the result is taken
    source = np.empty((side, side, 2), np.float32)
    np.add.outer(b * middle, a * middle + c, out=source[..., 0])
    np.add.outer(e * middle, d * middle + f, out=source[..., 1])
    beyond = (source < 0) | (source >= side)
    outside = beyond[..., 0] | beyond[..., 1]
    sampled = F.grid_sample(
        torch.from_numpy(image).permute(2, 0, 1)[None].float(),
        torch.from_numpy(source)[None] * (2 / side) - 1,
        mode=mode,
        padding_mode="border",
        align_corners=False,
    )[0]
    result = sampled.add_(0.5).clamp_(0, 255).numpy().astype(np.uint8)
    np.copyto(result, np.array(FILL, np.uint8)[:, None, None], where=outside)
    return torch.from_numpy(result).permute(1, 2, 0).contiguous().numpy()


def shear_rows(image: np.ndarray, slope: float, shift: float) -> np.ndarray:
    """Returns the image with row y moved to the left by slope * (y + 1/2) + shift pixels.

    Interpolates with PIL's bicubic kernel. Pixels from outside the image get the colour FILL.
    """
    side = len(image)
    start = slope * (np.arange(side) + 0.5) + shift
    whole = np.floor(start).astype(int)
    t = torch.from_numpy(start - whole).float()[:, None, None]
    weights = (-t + 2 * t**2 - t**3, 1 - 2 * t**2 + t**3, t + t**2 - t**3, t**3 - t**2)
    margin = int(np.abs(whole).max()) + 3
    rows = np.concatenate([image[:, :1]] * margin + [image] + [image[:, -1:]] * margin, 1)
    # each row has 3 more pixels than the result, because the kernel takes 4 pixels
    near = np.empty((side, side + 3, 3), np.uint8)
    for y, first in enumerate((whole + margin - 1).tolist()):
        near[y] = rows[y, first : first + side + 3]
    pixels = torch.from_numpy(near).float()
    mixed = pixels[:, :side] * weights[0]
    for k in (1, 2, 3):
        mixed.addcmul_(pixels[:, k : k + side], weights[k])
    # PIL computes in double precision and rounds down.
    # An fp32 value may be just below the whole number that it should be, so add a little first.
    result = mixed.add_(0.002).clamp_(0, 255).numpy().astype(np.uint8)
    for y, inside in enumerate(np.ceil(-start - 0.5).astype(int).tolist()):
        if inside > 0:
            result[y, :inside] = FILL
        elif inside < 0:
            result[y, inside:] = FILL
    return result
