"""What timm's training transform does to an image, drawn without the image: for loaders that do it
by other means.

The draws are timm's own, made by its objects in their order, so that one seed gives the picture
that the PIL loader makes.
"""

import functools
import math
import random
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import ColorJitter, InterpolationMode, RandomHorizontalFlip

from fastgn.config.groups import AugmentationConfig
from fastgn.errors import UserError

FILL = (124, 116, 104)
"""Colour beyond the edges of a rotated, sheared or shifted image: timm's, ImageNet's mean."""
ARGUMENTS = 6
"""The most that a layer takes."""


class Kind(IntEnum):
    """What a layer does, as PIL does it. Its arguments stand in brackets."""

    NONE = 0
    BICUBIC = 1
    """[a, b, c, d, e, f]: what is at (x, y) comes from (a x + b y + c, d x + e y + f), in pixels
    from the image's corner; FILL where that lies outside."""
    BILINEAR = 2
    """The same, interpolated so."""
    AUTO_CONTRAST = 3
    EQUALIZE = 4
    INVERT = 5
    POSTERIZE = 6
    """[the bits that stay, as a mask]"""
    SOLARIZE = 7
    """[the least value that is inverted]"""
    SOLARIZE_ADD = 8
    """[what is added below 128]"""
    COLOR = 9
    """[factor]: 0 is the grey image, 1 the image itself, as in the next three with the mean grey,
    black, and the blurred image."""
    CONTRAST = 10
    BRIGHTNESS = 11
    SHARPNESS = 12


WARPS = {Kind.BICUBIC, Kind.BILINEAR}


class Layer(NamedTuple):
    """One operation."""

    kind: Kind
    arguments: tuple[float, ...] = ()


class Drawn(NamedTuple):
    """All that is done to one image, in this order."""

    top: int
    left: int
    height: int
    width: int
    """The crop, in the decoded image's pixels."""
    bilinear: bool
    """How the crop is resized; bicubic otherwise."""
    flipped: bool
    layers: tuple[Layer, ...]


def train_transform(cfg: AugmentationConfig, img_size: int, hflip: float) -> Any:
    """timm's, PIL image -> uint8 3 x S x S. Raises UserError on a policy that it does not know."""
    try:
        transform = create_transform(
            img_size,
            is_training=True,
            scale=cfg.scale,
            hflip=hflip,
            color_jitter=cfg.color_jitter,
            auto_augment=cfg.aa,
            interpolation=cfg.train_interpolation,
            normalize=False,
        )
    except (AssertionError, ValueError) as error:
        raise UserError(f"--aa {cfg.aa}: {error}; write rand-m9-mstd0.5-inc1") from None
    for step in transform.transforms:
        forgive_posterize(step)
    return transform


def forgive_posterize(step: Any) -> None:
    """Puts `posterize` into a step of timm's transform that has timm's."""
    for op in operations(step):
        if op.aug_fn is auto_augment.posterize:
            op.aug_fn = posterize


def operations(step: Any) -> list[Any]:
    """Of one of timm's policies; none of another step."""
    if isinstance(step, (auto_augment.RandAugment, auto_augment.AugMixAugment)):
        return list(step.ops)
    if isinstance(step, auto_augment.AutoAugment):
        return [op for part in step.policy for op in part]
    return []


def posterize(image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    """timm's. Where the magnitude's noise reaches its bound no bit is kept, once in 600 images of
    rand-m9-mstd0.5-inc1: black, as PIL made of it before it raised ValueError."""
    if bits_to_keep == 0:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **kwargs)


class Recipe:
    """Draws what is done to an image, from Python's, NumPy's and torch's generators as the caller
    has seeded them."""

    def __init__(self, cfg: AugmentationConfig, img_size: int, hflip: float):
        """Raises UserError on an operation that Kind does not have."""
        transform = train_transform(cfg, img_size, hflip)
        # the last one makes a tensor and draws nothing
        self.steps: Sequence[Any] = transform.transforms[:-1]
        self.img_size = img_size
        self.kinds = {Kind.NONE}
        """What may be drawn."""
        self.layers = 0
        """Of an image, at most; those not drawn are left out."""
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
        """Lets timm's policy draw as ever, and write down what it would have done."""
        if isinstance(policy, auto_augment.RandAugment):
            self.layers += policy.num_layers
        else:
            self.layers += max(map(len, policy.policy))
        for op in operations(policy):
            if op.aug_fn not in TRANSLATIONS:
                raise UserError(refusal(name, op.name))
            kind, translate = TRANSLATIONS[op.aug_fn]
            self.kinds |= WARPS if kind in WARPS else {kind}
            op.aug_fn = functools.partial(note, self._drawn, kind, translate, self.img_size)

    def draw(self, width: int, height: int) -> Drawn:
        """For an image of this size in pixels."""
        self._drawn.clear()
        flipped, bilinear = False, False
        for step in self.steps:
            if isinstance(step, RandomResizedCropAndInterpolation):
                shape = torch.empty(()).expand(height, width)  # all that get_params looks at
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
    return f"--aa {policy}: the DALI loader has no {what}: add --loader torch"


def jitter(step: ColorJitter) -> list[Layer]:
    """torchvision's draw; timm never asks it for a change of hue."""
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
    """Stands in for timm's function of an image: takes the same arguments and draws what it
    would."""
    if kind in WARPS:
        bilinear = auto_augment._interpolation(kwargs) == Image.Resampling.BILINEAR
        kind = Kind.BILINEAR if bilinear else Kind.BICUBIC
    arguments = translate(side, *args)
    if arguments is not None:
        drawn.append(Layer(kind, arguments))


def rotation(side: int, degrees: float) -> tuple[float, ...] | None:
    """PIL's Image.rotate about the middle."""
    if degrees % 360 == 0:
        return None
    angle, middle = -math.radians(degrees % 360), side / 2
    cosine, sine = math.cos(angle), math.sin(angle)
    return (
        *(cosine, sine, middle - cosine * middle - sine * middle),
        *(-sine, cosine, middle + sine * middle - cosine * middle),
    )


def posterized(side: int, bits: int) -> tuple[float, ...] | None:
    return (256 - 2 ** (8 - bits),) if bits < 8 else None


def as_given(side: int, *args: float) -> tuple[float, ...]:
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
"""timm's function of an image -> what it is here, and (side in pixels, timm's arguments) -> the
layer's; None does nothing. What is not here is refused."""
