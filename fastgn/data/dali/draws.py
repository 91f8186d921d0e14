"""Draws what timm's training transform would do to an image, without having the image.

timm's own objects draw the random numbers, in their usual order. So a seed gives the same augmented
image as in the PIL loader.
"""

import functools
import math
import random
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import ColorJitter, InterpolationMode, RandomHorizontalFlip

from fastgn.config.groups import AugmentationConfig
from fastgn.data.transform import build_train_transform, list_operations, posterize
from fastgn.errors import UserError

FILL = (124, 116, 104)
"""Colour that fills the area outside a rotated, sheared or shifted image. It is ImageNet's mean
colour, as in timm."""
ARGUMENTS = 6
"""Largest number of arguments that an operation on an image takes."""


class Kind(IntEnum):
    """An operation on an image, as PIL defines it. The text of an operation says which arguments
    the operation takes. Operations without a text take none, except the last three, which take the
    same argument as COLOR."""

    NONE = 0
    BICUBIC = 1
    """An affine map with bicubic interpolation and the six arguments a, b, c, d, e, f. The pixel at
    (x, y) comes from (a x + b y + c, d x + e y + f). Both points are measured in pixels from the
    image's corner. The pixel is FILL if the second point is outside the image."""
    BILINEAR = 2
    """An affine map with the same six arguments as BICUBIC, but with bilinear interpolation."""
    AUTO_CONTRAST = 3
    EQUALIZE = 4
    INVERT = 5
    POSTERIZE = 6
    """Keeps only some bits of every pixel value. Its one argument is the mask of these bits."""
    SOLARIZE = 7
    """Inverts all pixel values that are not below a threshold, which is its one argument."""
    SOLARIZE_ADD = 8
    """Adds a number, which is its one argument, to all pixel values below 128."""
    COLOR = 9
    """Blends the grey image with the image itself. Its one argument is a factor, which is 0 for the
    grey image and 1 for the image itself.

    CONTRAST, BRIGHTNESS and SHARPNESS also take a factor. With a factor of 0, CONTRAST gives the
    mean grey, BRIGHTNESS gives black, and SHARPNESS gives the blurred image."""
    CONTRAST = 10
    BRIGHTNESS = 11
    SHARPNESS = 12


WARPS = {Kind.BICUBIC, Kind.BILINEAR}


class Layer(NamedTuple):
    """An operation on an image, with its arguments."""

    kind: Kind
    arguments: tuple[float, ...] = ()


class Drawn(NamedTuple):
    """Random choices for the augmentation of one image. It is cropped, resized and perhaps flipped.
    Then each operation in `layers` is applied."""

    top: int
    left: int
    height: int
    width: int
    """Width of the crop, in pixels of the decoded image."""
    bilinear: bool
    """Whether the crop is resized bilinearly. Otherwise it is resized bicubically."""
    flipped: bool
    layers: tuple[Layer, ...]


class Recipe:
    """Draws how each training image is augmented, as timm's transform would.

    The random numbers come from the generators of Python, NumPy and PyTorch, which the caller
    seeds.
    """

    def __init__(self, cfg: AugmentationConfig, img_size: int, hflip: float):
        """Builds timm's transform. hflip: probability of a horizontal flip.

        Raises UserError if the policy of the transform has an operation that DALI lacks.
        """
        transform = build_train_transform(cfg, img_size, hflip)
        # leave out the last transform, which makes a tensor and draws no random numbers
        self.steps: Sequence[Any] = transform.transforms[:-1]
        self.img_size = img_size
        self.kinds = {Kind.NONE}
        """The operations that may be drawn."""
        self.layers = 0
        """Largest number of operations on an image."""
        self._drawn: list[Layer] = []
        for step in self.steps:
            if isinstance(step, (auto_augment.RandAugment, auto_augment.AutoAugment)):
                self._record(step, str(cfg.aa))
            elif isinstance(step, ColorJitter):
                self.kinds |= {Kind.BRIGHTNESS, Kind.CONTRAST, Kind.COLOR}
                self.layers += 3
            elif not isinstance(step, (RandomResizedCropAndInterpolation, RandomHorizontalFlip)):
                raise UserError(refusal(str(cfg.aa), type(step).__name__))

    def _record(self, policy: Any, name: str) -> None:
        """Makes an auto-augmentation policy of timm record its operations instead of applying them.

        name: name of the policy, for messages.
        """
        if isinstance(policy, auto_augment.RandAugment):
            self.layers += policy.num_layers
        else:
            self.layers += max(map(len, policy.policy))
        for op in list_operations(policy):
            if op.aug_fn not in TRANSLATIONS:
                raise UserError(refusal(name, op.name))
            kind, translate = TRANSLATIONS[op.aug_fn]
            self.kinds |= WARPS if kind in WARPS else {kind}
            op.aug_fn = functools.partial(note, self._drawn, kind, translate, self.img_size)

    def draw(self, width: int, height: int) -> Drawn:
        """Returns how to augment an image of this size in pixels."""
        self._drawn.clear()
        flipped, bilinear = False, False
        for step in self.steps:
            if isinstance(step, RandomResizedCropAndInterpolation):
                # an empty tensor can replace the image, because get_params looks only at the shape
                shape = torch.empty(()).expand(height, width)
                top, left, crop_height, crop_width = step.get_params(shape, step.scale, step.ratio)
                chosen = step.interpolation
                if isinstance(chosen, (tuple, list)):
                    chosen = random.choice(chosen)
                bilinear = chosen == InterpolationMode.BILINEAR
            elif isinstance(step, RandomHorizontalFlip):
                flipped = bool(torch.rand(1) < step.p)
            elif isinstance(step, ColorJitter):
                self._drawn += jitter(step)
            else:
                step(None)
        crop = (top, left, crop_height, crop_width)
        return Drawn(*crop, bilinear, flipped, tuple(self._drawn))


def refusal(policy: str, what: str) -> str:
    """Returns the message about an operation that the DALI loader lacks.

    policy: value of --aa. what: name of the operation.
    """
    return f"--aa {policy}: the DALI loader has no {what}: add --loader torch"


def jitter(step: ColorJitter) -> list[Layer]:
    """Returns the operations that torchvision's ColorJitter draws.

    No operation changes the hue, because timm never asks ColorJitter to change it.
    """
    order, *factors = step.get_params(step.brightness, step.contrast, step.saturation, step.hue)
    kinds = (Kind.BRIGHTNESS, Kind.CONTRAST, Kind.COLOR)
    chosen = [i for i in order.tolist() if i < 3 and factors[i] is not None]
    return [Layer(kinds[i], (float(factors[i]),)) for i in chosen]


def note(
    drawn: list[Layer],
    kind: Kind,
    translate: Callable[..., tuple[float, ...] | None],
    side: int,
    image: None,
    *args: float,
    **kwargs: Any,
) -> None:
    """Appends an operation to `drawn`, in place of timm's function that would apply it to an image.

    image, args and kwargs are the arguments of timm's function. kind: the same operation for DALI.
    translate: function that turns `side` and `args` into the arguments of `kind`. side: width and
    height of the image.
    """
    if kind in WARPS:
        bilinear = auto_augment._interpolation(kwargs) == Image.Resampling.BILINEAR
        kind = Kind.BILINEAR if bilinear else Kind.BICUBIC
    arguments = translate(side, *args)
    if arguments is not None:
        drawn.append(Layer(kind, arguments))


def rotation(side: int, degrees: float) -> tuple[float, ...] | None:
    """Returns the six arguments of Kind.BICUBIC for a rotation about the middle of an image, as
    PIL's Image.rotate does it. Returns None for a rotation by 0 degrees. side: width and height of
    the image."""
    if degrees % 360 == 0:
        return None
    angle, middle = -math.radians(degrees % 360), side / 2
    cosine, sine = math.cos(angle), math.sin(angle)
    return (
        *(cosine, sine, middle - cosine * middle - sine * middle),
        *(-sine, cosine, middle + sine * middle - cosine * middle),
    )


def posterized(side: int, bits: int) -> tuple[float, ...] | None:
    """Returns the one argument of Kind.POSTERIZE in a tuple, or None if all 8 bits are kept.

    The argument is the mask of the bits that are kept in every pixel value. side: not used, because
    the mask does not depend on the image's size.
    """
    return (256 - 2 ** (8 - bits),) if bits < 8 else None


def as_given(side: int, *args: float) -> tuple[float, ...]:
    """Returns the arguments of timm's function unchanged. side: not used."""
    return args


TRANSLATIONS: dict[Any, tuple[Kind, Callable[..., tuple[float, ...] | None]]] = {
    auto_augment.rotate: (Kind.BICUBIC, rotation),
    auto_augment.shear_x: (Kind.BICUBIC, lambda side, factor: (1, factor, 0, 0, 1, 0)),
    auto_augment.shear_y: (Kind.BICUBIC, lambda side, factor: (1, 0, 0, factor, 1, 0)),
    auto_augment.translate_x_rel: (
        Kind.BICUBIC,
        lambda side, share: (1, 0, share * side, 0, 1, 0),
    ),
    auto_augment.translate_y_rel: (
        Kind.BICUBIC,
        lambda side, share: (1, 0, 0, 0, 1, share * side),
    ),
    auto_augment.auto_contrast: (Kind.AUTO_CONTRAST, as_given),
    auto_augment.equalize: (Kind.EQUALIZE, as_given),
    auto_augment.invert: (Kind.INVERT, as_given),
    posterize: (Kind.POSTERIZE, posterized),
    auto_augment.solarize: (Kind.SOLARIZE, as_given),
    auto_augment.solarize_add: (Kind.SOLARIZE_ADD, as_given),
    auto_augment.color: (Kind.COLOR, as_given),
    auto_augment.desaturate: (
        Kind.COLOR,
        lambda side, factor: (min(1.0, max(0.0, 1.0 - factor)),),
    ),
    auto_augment.contrast: (Kind.CONTRAST, as_given),
    auto_augment.brightness: (Kind.BRIGHTNESS, as_given),
    auto_augment.sharpness: (Kind.SHARPNESS, as_given),
}
"""timm's function for an operation of a policy -> the Kind that does the same with DALI, and a
function. The function takes (side in pixels, timm's arguments) and returns the arguments of that
Kind, or None if the image would not change. Policies with other operations are refused."""
