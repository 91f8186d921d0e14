"""Builds timm's transform of training images, and replaces its operation posterize, which may
fail."""

from typing import Any

from PIL import Image
from timm.data import auto_augment, create_transform

from fastgn.config.groups import AugmentationConfig
from fastgn.errors import UserError


def build_train_transform(cfg: AugmentationConfig, img_size: int, hflip: float) -> Any:
    """Returns timm's training transform, which turns a PIL image into a tensor `(3, S, S), uint8`.

    hflip: probability of a horizontal flip. Raises UserError if timm does not know the policy of
    --aa.
    """
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
        raise UserError(
            f"--aa {cfg.aa}: {error}: write a policy such as rand-m9-mstd0.5-inc1"
        ) from None
    for step in transform.transforms:
        replace_posterize(step)
    return transform


def replace_posterize(step: Any) -> None:
    """Replaces timm's posterize, which may raise ValueError, by `posterize` in one step of a
    transform."""
    for op in list_operations(step):
        if op.aug_fn is auto_augment.posterize:
            op.aug_fn = posterize


def list_operations(step: Any) -> list[Any]:
    """Returns the operations of a step that is an augmentation policy. Returns an empty list for
    any other step."""
    if isinstance(step, (auto_augment.RandAugment, auto_augment.AugMixAugment)):
        return list(step.ops)
    if isinstance(step, auto_augment.AutoAugment):
        return [op for part in step.policy for op in part]
    return []


def posterize(image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    """Returns the image with `bits_to_keep` bits per channel, as timm does. 0 bits give a black
    image.

    With rand-m9-mstd0.5-inc1, the random strength gives 0 bits once in 600 images. Recent versions
    of PIL raise ValueError for 0 bits, and older versions returned a black image.
    """
    if bits_to_keep == 0:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **kwargs)
