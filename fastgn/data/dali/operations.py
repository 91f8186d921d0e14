"""The pipeline that decodes and augments the images, built from DALI's operators."""

from functools import partial
from typing import Any

import numpy as np

from fastgn.data.dali import cpu
from fastgn.data.dali.draws import FILL, Kind, Recipe
from fastgn.data.dali.feeder import Source
from fastgn.errors import UserError

try:
    from nvidia.dali import fn, math, pipeline_def, types
    from nvidia.dali.pipeline import do_not_convert
except ImportError:
    raise UserError(
        "--loader dali: NVIDIA DALI is not installed: run pip install 'fastgn[dali]' for CUDA 13, "
        "or pip install 'fastgn[dali-cuda120]' for CUDA 12"
    ) from None


@pipeline_def(enable_conditionals=True)
def augmented(source: Source, recipe: Recipe, *, device: str, by_dali: bool) -> Any:
    """Defines DALI's pipeline, which returns batches of augmented images. An image is fp32 in 0..1,
    3 x S x S.

    source: gives DALI the encoded images. recipe: knows which operations may occur. device: DALI's
    name of the device that does the work, "cpu" or "gpu". by_dali: whether DALI's own operators
    resize and augment. Otherwise the functions of cpu.py do.
    """
    encoded, anchor, shape, bilinear, flipped, kinds, arguments = fn.external_source(
        source=source,
        num_outputs=7,
        batch=True,
        dtype=[types.UINT8, *[types.INT32] * 5, types.FLOAT],
        ndim=[1, 1, 1, 0, 0, 1, 2],
    )
    crop = fn.decoders.image_slice(
        encoded,
        start=anchor,
        shape=shape,
        axis_names="HW",
        adjust_orientation=False,  # PIL does not rotate images by their EXIF data either
        output_type=types.RGB,
        device="mixed" if device == "gpu" else "cpu",
    )
    if by_dali:
        image = apply_operations(recipe, crop, bilinear, flipped, kinds, arguments, device)
    else:
        image = fn.python_function(
            *(crop, bilinear, flipped, kinds, arguments),
            function=lambda *batch: list(map(partial(cpu.augment_crop, recipe.img_size), *batch)),
            batch_processing=True,
            output_layouts="HWC",
        )
    image = fn.crop_mirror_normalize(
        image, dtype=types.FLOAT, output_layout="CHW", mean=[0.0], std=[255.0]
    )
    return image


def apply_operations(
    recipe: Recipe, crop: Any, bilinear: Any, flipped: Any, kinds: Any, arguments: Any, device: str
) -> Any:
    """Resizes, flips and augments each crop with DALI's operators.

    cpu.augment_crop does the same with PyTorch and PIL, and describes the arguments. recipe: knows
    the size of the result, and which operations may occur.
    """
    side, possible = recipe.img_size, sorted(recipe.kinds)
    if bilinear == 1:
        image = fn.resize(crop, size=[side, side], interp_type=types.INTERP_LINEAR)
    else:
        image = fn.resize(crop, size=[side, side], interp_type=types.INTERP_CUBIC)
    image = fn.flip(image, horizontal=flipped)
    for layer in range(recipe.layers):
        image = operate(possible, kinds[layer], image, arguments[layer], side, device)
    return image


# The operations below work on images of uint8, S x S x 3.
# The pixels that an operation returns differ from PIL's by at most 1 of 255.
# Operations that interpolate (bicubic and bilinear) may differ more.
# The operations use bytes where possible, because DALI takes several times as long for floats.


def operate(
    possible: list[Kind], kind: Any, image: Any, arguments: Any, side: int, device: str
) -> Any:
    """Returns the image after one operation.

    kind: number of the operation, int32, one of `possible`. arguments: those of the operation, see
    Kind. side: width and height of the image. Nested conditions choose the operation, so that DALI
    runs each operation only on the images that need it.
    """
    if len(possible) == 1:
        return OPERATIONS[possible[0]](image, arguments, side, device)
    middle = len(possible) // 2
    if kind < int(possible[middle]):
        result = operate(possible[:middle], kind, image, arguments, side, device)
    else:
        result = operate(possible[middle:], kind, image, arguments, side, device)
    return result


@do_not_convert
def none(image: Any, arguments: Any, side: int, device: str) -> Any:
    """Returns the image unchanged."""
    return image


def byte(value: int) -> Any:
    """Returns a number as a DALI constant of type uint8."""
    return types.Constant(value, dtype=types.UINT8)


def picture(values: np.ndarray, side: int, device: str) -> Any:
    """Returns a constant picture, uint8, S x S x 3, that DALI uses with every image of a batch."""
    shape = (side, side, 3)
    return types.Constant(np.broadcast_to(values, shape).astype(np.uint8), device=device)


def first(arguments: Any, device: str) -> Any:
    """Returns an operation's only argument, on the device of the images."""
    return arguments[0].gpu() if device == "gpu" else arguments[0]


def to_bytes(values: Any, shift: float = 0.0) -> Any:
    """Returns values + shift, rounded to uint8."""
    return fn.brightness_contrast(values, brightness_shift=shift / 255, dtype=types.UINT8)


FLOOR = -0.498
"""Number that is added before rounding to the nearest, in order to round down as PIL does.

It is not -0.5, because a rounding error may put a value slightly below the whole number that it
should be. That value would then be rounded to the next lower number.
"""


def blend(other: Any, image: Any, factor: Any) -> Any:
    """Returns image * factor + other * (1 - factor) as bytes, as PIL's Image.blend does."""
    return to_bytes(other * (1 - factor) + image * factor, FLOOR)


def grey(image: Any) -> Any:
    """Returns the image in grey, as PIL's mode L, S x S x 1."""
    return fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)


def extreme(reduction: Any, image: Any) -> Any:
    """Returns a statistic of each channel, such as the minimum, 1 x 1 x 3. reduction: one of
    fn.reductions."""
    return reduction(image, axes=[0, 1], keep_dims=True)


@do_not_convert
def bicubic(image: Any, arguments: Any, side: int, device: str) -> Any:
    """Returns the image after an affine map with bicubic interpolation (Kind.BICUBIC)."""
    return warp(image, arguments, side, device, types.INTERP_CUBIC)


@do_not_convert
def bilinear(image: Any, arguments: Any, side: int, device: str) -> Any:
    """Returns the image after an affine map with bilinear interpolation (Kind.BILINEAR)."""
    return warp(image, arguments, side, device, types.INTERP_LINEAR)


def warp(image: Any, arguments: Any, side: int, device: str, interpolation: Any) -> Any:
    """Returns the image after an affine map, with the colour FILL where there was no image.

    PIL gives this colour to each pixel whose nearest source pixel lies outside the image. Here a
    mask does the same.

    DALI's two bicubic kernels have the coefficients -0.75 and -0.5. They are less sharp than PIL's,
    which has the coefficient -1.

    arguments: the six arguments of Kind.BICUBIC. interpolation: DALI's constant for the kernel.
    """
    last = types.Constant(np.array([[0, 0, 1]], np.float32), device="cpu")
    matrix = fn.cat(fn.reshape(arguments, shape=[2, 3]), last, axis=0)
    warped = fn.experimental.warp_perspective(
        image, matrix=matrix, interp_type=interpolation, border_mode="replicate"
    )
    inside = fn.experimental.warp_perspective(
        picture(np.array(255), side, device),
        matrix=matrix,
        interp_type=types.INTERP_NN,
        border_mode="constant",
        fill_value=0.0,
    )
    fill = picture(np.array(FILL), side, device)
    return ((warped ^ fill) & inside) ^ fill


@do_not_convert
def auto_contrast(image: Any, arguments: Any, side: int, device: str) -> Any:
    """Returns the image with the contrast of each channel stretched, as ImageOps.autocontrast
    does."""
    low, high = (extreme(r, image) for r in (fn.reductions.min, fn.reductions.max))
    flat = fn.cast(low == high, dtype=types.UINT8)  # a channel with one value is not changed
    low = low * (byte(1) - flat)
    scale = 255.0 / (high - low + (byte(255) - high) * flat)
    return to_bytes((image - low) * scale, FLOOR)


@do_not_convert
def equalize(image: Any, arguments: Any, side: int, device: str) -> Any:
    """Returns the image with the histogram of each channel equalised, as ImageOps.equalize does.

    For each value v, PIL counts the pixels below v, and DALI the pixels up to and including v.
    Therefore DALI equalises the negative of the image here. There it counts, for the value 255 - v,
    the pixels that are at least v in the image. The other pixels are those that PIL counts.

    PIL then divides each count by a step, which is a 255th of all pixels but the brightest, rounded
    down to a whole number. DALI does not round, so the values are scaled at the end.
    """
    shares = byte(255) - fn.equalize(byte(255) - image)
    brightest = fn.cast(image == extreme(fn.reductions.max, image), dtype=types.UINT8)
    others = side * side - fn.cast(extreme(fn.reductions.sum, brightest), dtype=types.FLOAT)
    step = math.floor(others / 255.0)
    # ImageOps.equalize leaves a channel unchanged if its step is 0, because it has too few pixels
    few = fn.cast(step == 0.0, dtype=types.UINT8)
    table = to_bytes(shares * (others / 255.0 / (step + few)))
    return table * (byte(1) - few) + image * few


@do_not_convert
def invert(image: Any, arguments: Any, side: int, device: str) -> Any:
    """Returns the negative image."""
    return byte(255) - image


@do_not_convert
def posterize(image: Any, arguments: Any, side: int, device: str) -> Any:
    """Returns the image with only those bits of each pixel value that the mask in `arguments`
    keeps."""
    return image & fn.cast(first(arguments, device), dtype=types.UINT8)


@do_not_convert
def solarize(image: Any, arguments: Any, side: int, device: str) -> Any:
    """Returns the image, in which all pixel values that are not below a threshold are inverted. The
    threshold is the only argument."""
    return image ^ ((image >= fn.cast(first(arguments, device), dtype=types.INT32)) * byte(255))


@do_not_convert
def solarize_add(image: Any, arguments: Any, side: int, device: str) -> Any:
    """Returns the image with a number added to all pixel values below 128. The number is the only
    argument, and at most 128."""
    return image + (image < byte(128)) * fn.cast(first(arguments, device), dtype=types.UINT8)


@do_not_convert
def color(image: Any, arguments: Any, side: int, device: str) -> Any:
    """Returns the image with its colour changed by a factor, as ImageEnhance.Color does."""
    return blend(grey(image), image, first(arguments, device))


@do_not_convert
def contrast(image: Any, arguments: Any, side: int, device: str) -> Any:
    """Returns the image with its contrast changed by a factor, as ImageEnhance.Contrast does."""
    mean = extreme(fn.reductions.mean, grey(image))
    return blend(math.floor(mean + 0.5), image, first(arguments, device))


@do_not_convert
def brightness(image: Any, arguments: Any, side: int, device: str) -> Any:
    """Returns the image with its brightness changed by a factor, as ImageEnhance.Brightness
    does."""
    return fn.brightness_contrast(image, brightness=arguments[0], brightness_shift=FLOOR / 255)


@do_not_convert
def sharpness(image: Any, arguments: Any, side: int, device: str) -> Any:
    """Returns the image with its sharpness changed by a factor, as ImageEnhance.Sharpness does.

    The outermost pixels do not change, because PIL does not blur them.
    """
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
    blurred = fn.filter(image, types.Constant(kernel, device=device))
    inner = np.zeros((side, side, 1))
    inner[1:-1, 1:-1] = 255
    sharpened = blend(blurred, image, first(arguments, device))
    return ((sharpened ^ image) & picture(inner, side, device)) ^ image


OPERATIONS = {
    Kind.NONE: none,
    Kind.BICUBIC: bicubic,
    Kind.BILINEAR: bilinear,
    Kind.AUTO_CONTRAST: auto_contrast,
    Kind.EQUALIZE: equalize,
    Kind.INVERT: invert,
    Kind.POSTERIZE: posterize,
    Kind.SOLARIZE: solarize,
    Kind.SOLARIZE_ADD: solarize_add,
    Kind.COLOR: color,
    Kind.CONTRAST: contrast,
    Kind.BRIGHTNESS: brightness,
    Kind.SHARPNESS: sharpness,
}
"""Kind of operation -> function that applies the operation."""
