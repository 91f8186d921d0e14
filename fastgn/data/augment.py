"""What happens to a training batch on the device: shift, flip, erasing, mixing, smoothing.

timm does the erasing and the mixing (its RandomErasing and Mixup); the caller seeds the generators.
"""

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from fastgn.config import AugmentationConfig
from fastgn.data.batch import Batch


class BatchAugment:
    """(images in 0..1, which it may write to, labels) -> Batch: erasing, mixup or cutmix,
    smoothing."""

    def __init__(
        self,
        cfg: AugmentationConfig,
        num_classes: int,
        mean: Tensor,
        std: Tensor,
        device: torch.device,
    ):
        """mean, std: the model's normalisation, 1 x 3 x 1 x 1, in whose units timm's erasing
        works."""
        self.mean, self.std = mean.to(device), std.to(device)
        self.num_classes = num_classes
        self.smoothing = cfg.smoothing
        self.erase = (
            RandomErasing(cfg.reprob, mode=cfg.remode, device=str(device)) if cfg.reprob else None
        )
        self.mix = None
        if cfg.mixup or cfg.cutmix:
            self.mix = Mixup(
                mixup_alpha=cfg.mixup,
                cutmix_alpha=cfg.cutmix,
                switch_prob=cfg.mixup_switch_prob,
                label_smoothing=cfg.smoothing,
                num_classes=num_classes,
            )

    def __call__(self, images_BCHW: Tensor, labels_B: Tensor) -> Batch:
        if self.erase is not None:
            # in place, for fresh memory costs a CPU as much as the arithmetic
            normalised = self.erase(images_BCHW.sub_(self.mean).div_(self.std))
            # timm's noise is normal and may leave 0..1, which attacks and the contract count on
            images_BCHW = normalised.mul_(self.std).add_(self.mean).clamp_(0, 1)
        if self.mix is not None:
            return Batch(*self.mix(images_BCHW, labels_B))
        if self.smoothing:
            return Batch(images_BCHW, mixup_target(labels_B, self.num_classes, 1.0, self.smoothing))
        return Batch(images_BCHW, labels_B)


def to_float(images_BCHW: Tensor, img_size: int) -> Tensor:
    """uint8 -> fp32 in 0..1, resized (bilinear, antialiased) where the side differs."""
    images_BCHW = images_BCHW.float().div_(255)
    if images_BCHW.shape[-1] != img_size or images_BCHW.shape[-2] != img_size:
        size = (img_size, img_size)
        images_BCHW = F.interpolate(images_BCHW, size, mode="bilinear", antialias=True)
    return images_BCHW.contiguous()


def shift(images_BCHW: Tensor, offsets_B2: Tensor, padding: int) -> Tensor:
    """Each image padded with zeros and cropped at its own offset (int64, 0..2 padding, row and
    column)."""
    _, _, height, width = images_BCHW.shape
    padded = F.pad(images_BCHW, (padding,) * 4)
    device = images_BCHW.device
    rows = offsets_B2[:, 0, None] + torch.arange(height, device=device)
    columns = offsets_B2[:, 1, None] + torch.arange(width, device=device)
    index = torch.arange(len(images_BCHW), device=device)[:, None, None]
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def flip(images_BCHW: Tensor, flipped_B: Tensor) -> Tensor:
    """Mirrors the images that flipped_B (bool) names."""
    return torch.where(flipped_B[:, None, None, None], images_BCHW.flip(3), images_BCHW)
