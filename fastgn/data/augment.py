"""Augments training batches on the device: shift, flip, erasing, mixing and label smoothing.

timm's RandomErasing and Mixup draw the random numbers, from generators that the caller seeds. The
code here then applies the draws to all images at once. timm itself erases one image after the
other, and its code for batches cannot be compiled.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup, cutmix_bbox_and_lam, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from fastgn.config.groups import AugmentationConfig
from fastgn.data.batch import Batch


class BatchDraws(NamedTuple):
    """Random choices for the augmentation of one batch, on the batch's device.

    A field that is None means that this kind of augmentation is left out.
    """

    boxes_B4: Tensor | None = None
    """Top, bottom, left and right of the box erased in each image, `(B, 4), int64`. Zeros mean no
    box."""
    fill: Tensor | None = None
    """Pixels in 0..1 that fill the erased boxes, fp32, in a shape that broadcasts to that of the
    images."""
    mix_5: Tensor | None = None
    """Five numbers, `(5,), fp32`. The first four are top, bottom, left and right of the box that
    cutmix copies from image B - 1 - i into image i. They are 0 for mixup. The last is the share of
    image i in the result."""


class BatchAugment:
    """Applies erasing, mixup or cutmix, and label smoothing to a batch.

    A call takes images in 0..1, which it may overwrite, and labels. It returns a `Batch`.
    """

    def __init__(
        self,
        cfg: AugmentationConfig,
        num_classes: int,
        mean: Tensor,
        std: Tensor,
        device: torch.device,
    ):
        """Sets up timm's random erasing and mixing.

        mean, std: the model's normalisation, `(1, 3, 1, 1)`. They are needed because timm's erasing
        draws noise for normalised images.
        """
        self.mean, self.std = mean.to(device), std.to(device)
        self.num_classes = num_classes
        self.smoothing = cfg.smoothing
        self.device = device
        self.remode = cfg.remode
        # timm only draws the boxes to erase, and draw_fill makes the pixels that fill them
        self.erase = RandomErasing(cfg.reprob, mode="const", device="cpu") if cfg.reprob else None
        self.mix = None
        if cfg.mixup or cfg.cutmix:
            self.mix = Mixup(cfg.mixup, cfg.cutmix, switch_prob=cfg.mixup_switch_prob)

    def __call__(self, images_BCHW: Tensor, labels_B: Tensor) -> Batch:
        num, _, height, width = images_BCHW.shape
        if self.device.type != "cpu":
            return self.apply(images_BCHW, labels_B, self.draw(num, height, width))
        # draw noise only for the boxes, because noise for whole images takes a CPU very long
        for image, (top, bottom, left, right) in enumerate(self.draw_boxes(num, height, width)):
            if bottom > top:
                hole = images_BCHW[image : image + 1, :, top:bottom, left:right]
                hole.copy_(self.draw_fill(*hole.shape))
        mix_5 = self.draw_mix(num, height, width)
        return self.apply(images_BCHW, labels_B, BatchDraws(mix_5=mix_5))

    def draw(self, num: int, height: int, width: int) -> BatchDraws:
        """Draws the random choices for the augmentation of `num` images of this size in pixels.

        The random numbers come from the generators of Python, NumPy and PyTorch.
        """
        boxes_B4 = fill = None
        if self.erase is not None:
            boxes_B4 = torch.tensor(self.draw_boxes(num, height, width))
            boxes_B4 = boxes_B4.to(self.device, non_blocking=True)
            fill = self.draw_fill(num, 3, height, width)
        return BatchDraws(boxes_B4, fill, self.draw_mix(num, height, width))

    def draw_boxes(self, num: int, height: int, width: int) -> list[list[int]]:
        """Returns top, bottom, left and right of the box to erase in each of `num` images. Zeros
        mean no box."""
        noted = BoxRecorder(num)
        if self.erase is not None:
            for noted.image in range(num):
                self.erase._erase(noted, 3, height, width, torch.float32)
        return noted.boxes

    def draw_fill(self, *shape: int) -> Tensor:
        """Returns pixels in 0..1 for the erased boxes, of a shape that broadcasts to `shape`."""
        if self.remode != "pixel":
            shape = (*shape[:2], 1, 1)
        draw = torch.zeros if self.remode == "const" else torch.randn
        # clamp, because timm's normal noise can leave 0..1, and attacks rely on images in 0..1
        return draw(shape, device=self.device).mul_(self.std).add_(self.mean).clamp_(0, 1)

    def draw_mix(self, num: int, height: int, width: int) -> Tensor | None:
        """Draws how mixup or cutmix mixes the images of a batch, and returns the five numbers of
        `BatchDraws.mix_5`. Returns None if both are turned off."""
        if self.mix is None:
            return None
        share, cuts = self.mix._params_per_batch()
        box = (0, 0, 0, 0)
        if cuts:
            box, share = cutmix_bbox_and_lam((num, 3, height, width), share)
        mix_5 = torch.tensor([*map(float, box), share], dtype=torch.float32)
        return mix_5.to(self.device, non_blocking=True)

    def apply(self, images_BCHW: Tensor, labels_B: Tensor, drawn: BatchDraws) -> Batch:
        """Returns the batch after erasing, mixing and label smoothing. drawn: the random choices.

        This method does not wait for the device, and torch.compile can put it into one graph.
        """
        height, width = images_BCHW.shape[-2:]
        share: Tensor | float = 1.0
        if drawn.boxes_B4 is not None and drawn.fill is not None:
            erased = make_box_mask(drawn.boxes_B4[:, :, None, None, None], height, width)
            images_BCHW = torch.where(erased, drawn.fill, images_BCHW)
        if drawn.mix_5 is not None:
            share = drawn.mix_5[4]
            box = drawn.mix_5[None, :4, None, None, None]
            # an empty box means mixup, or no mixing if the share is 1
            own = torch.where(box[:, 1] > 0, (~make_box_mask(box, height, width)).float(), share)
            images_BCHW = mix_images(images_BCHW, own)
        if drawn.mix_5 is not None or self.smoothing:
            targets = mixup_target(labels_B, self.num_classes, share, self.smoothing)
            return Batch(images_BCHW, targets)
        return Batch(images_BCHW, labels_B)


def mix_images(images_BCHW: Tensor, own: Tensor) -> Tensor:
    """Returns each image i of a batch mixed with image B - 1 - i.

    own: share of image i in the mixture, fp32, `(1, 1, 1, 1)` or `(1, 1, H, W)`. On a CPU the
    images are mixed in place, two at a time, because a pair fits into the caches.
    """
    if images_BCHW.device.type != "cpu" or torch.compiler.is_compiling():
        return images_BCHW.flip(0).lerp_(images_BCHW, own)
    other = 1 - own[0]
    for i in range(len(images_BCHW) // 2):
        one, another = images_BCHW[i], images_BCHW[-1 - i]
        before = one.clone()
        one.lerp_(another, other)
        another.lerp_(before, other)
    return images_BCHW


class BoxRecorder:
    """Stands in for an image that timm erases, and records the box to which timm assigns values."""

    def __init__(self, num: int):
        self.boxes = [[0, 0, 0, 0] for _ in range(num)]
        self.image = 0

    def __setitem__(self, where: tuple[slice, slice, slice], value: Tensor) -> None:
        _, rows, columns = where
        self.boxes[self.image] = [rows.start, rows.stop, columns.start, columns.stop]


def make_box_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """Returns a mask that is True inside the boxes, `(N, 1, height, width), bool`.

    boxes: top, bottom, left and right of each box in pixels, `(N, 4, 1, 1, 1)`.
    """
    top, bottom, left, right = boxes.unbind(1)
    rows = torch.arange(height, device=boxes.device)[:, None]
    columns = torch.arange(width, device=boxes.device)
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


def to_float(images_BCHW: Tensor, img_size: int) -> Tensor:
    """Returns uint8 images as fp32 in 0..1, resized to `img_size` if their sides differ from it.

    Resizing is bilinear and antialiased.
    """
    images_BCHW = images_BCHW.float().div_(255)
    if images_BCHW.shape[-1] != img_size or images_BCHW.shape[-2] != img_size:
        size = (img_size, img_size)
        images_BCHW = F.interpolate(images_BCHW, size, mode="bilinear", antialias=True)
    return images_BCHW.contiguous()


def shift(images_BCHW: Tensor, offsets_B2: Tensor, padding: int) -> Tensor:
    """Returns each image padded with zeros and then cropped to its old size at a place of its own.

    offsets_B2: first row and first column of each image's crop, from 0 to 2 * padding, `(B, 2),
    int64`.
    """
    _, _, height, width = images_BCHW.shape
    padded = F.pad(images_BCHW, (padding,) * 4)
    device = images_BCHW.device
    rows = offsets_B2[:, 0, None] + torch.arange(height, device=device)
    columns = offsets_B2[:, 1, None] + torch.arange(width, device=device)
    index = torch.arange(len(images_BCHW), device=device)[:, None, None]
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def flip(images_BCHW: Tensor, flipped_B: Tensor) -> Tensor:
    """Returns the images, mirrored horizontally where `flipped_B`, `(B,), bool`, is True."""
    return torch.where(flipped_B[:, None, None, None], images_BCHW.flip(3), images_BCHW)
