"""timm's transform of training images."""

from typing import Any

from PIL import Image
from timm.data import auto_augment, create_transform

from fastgn.config.groups import AugmentationConfig
from fastgn.errors import UserError


def train_transform(cfg: AugmentationConfig, img_size: int, hflip: float) -> Any:
    """Returns timm's training transform: PIL image -> uint8, 3 x S x S.

    Raises UserError if timm does not know the policy of --aa.
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
        raise UserError(f"--aa {cfg.aa}: {error}; write rand-m9-mstd0.5-inc1") from None
    for step in transform.transforms:
        forgive_posterize(step)
    return transform


def forgive_posterize(step: Any) -> None:
    """Replaces timm's posterize in a step of its transform by the one here."""
    for op in operations(step):
        if op.aug_fn is auto_augment.posterize:
            op.aug_fn = posterize


def operations(step: Any) -> list[Any]:
    """Returns the operations of an augmentation policy. Other steps of a transform have none."""
    if isinstance(step, (auto_augment.RandAugment, auto_augment.AugMixAugment)):
        return list(step.ops)
    if isinstance(step, auto_augment.AutoAugment):
        return [op for part in step.policy for op in part]
    return []


def posterize(image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    """Returns what timm's posterize does, also if no bit is kept.

    With rand-m9-mstd0.5-inc1 the noise of the magnitude leaves no bit once in 600 images. PIL
    raises ValueError now; it used to return a black image, as here.
    """
    if bits_to_keep == 0:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **kwargs)
