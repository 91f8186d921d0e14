"""Computes images that represent the classes for --method pag.

That method trains the input gradients to point towards these images.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgn.config import Config
from fastgn.data.datasets import Arrays, Dataset
from fastgn.data.subset import Subset
from fastgn.errors import check
from fastgn.seeding import Stream, make_generator

LARGEST_BYTES = 2**31
"""Largest number of bytes of images that --pag-representative nearest-neighbour may keep on the
device."""


def compute_representatives(
    cfg: Config,
    dataset: Dataset,
    *,
    img_size: int,
    crop_pct: float,
    batch_size: int,
    device: torch.device,
) -> tuple[Tensor, Tensor | None]:
    """Returns (images, labels) that represent the classes. Both are on the device, and are the same
    on every rank.

    images: fp32 in 0..1, not augmented. They are `(K, 3, H, W)`, one image per class, and the
    labels are None. With --pag-representative nearest-neighbour, they are all N training images,
    and the labels are `(N,), int64`. crop_pct: share of the resized image's side that the centre
    crop keeps.

    Raises UserError if a class has no image, or if nearest-neighbour would keep too many images on
    the device.
    """
    kind, split, classes = cfg.objective.pag.pag_representative, dataset.train, len(dataset.classes)
    draw = make_generator(Stream.REPRESENTATIVES, cfg.run.seed)
    by_class = [(split.labels_N == index).nonzero()[:, 0] for index in range(classes)]
    for name, members in zip(dataset.classes, by_class, strict=True):
        check(len(members) > 0, f"--method pag: class {name} has no training image: add one")
    small = isinstance(split, Arrays)
    if kind == "nearest-neighbour":
        size = len(split) * 3 * img_size**2 * 4
        check(
            small and size <= LARGEST_BYTES,
            f"--pag-representative nearest-neighbour keeps all {len(split)} training images on the "
            f"device, {size / 2**30:.3g} GiB at {img_size} px: it is only for cifar10 and digits, "
            f"up to {LARGEST_BYTES / 2**30:g} GiB: use class-mean or random-image",
        )
    elif kind == "random-image" or not small:
        most = 1 if kind == "random-image" else cfg.objective.pag.pag_images
        by_class = [m[torch.randperm(len(m), generator=draw)[:most]] for m in by_class]
    source = Subset(
        split,
        None,
        img_size=img_size,
        crop_pct=crop_pct,
        batch_size=batch_size,
        workers=cfg.dataset.workers,
        worker_timeout=cfg.dataset.worker_timeout,
        device=device,
        skip=cfg.dataset.on_bad_image == "skip",
        chosen=torch.cat(by_class).tolist(),
    )
    if kind == "nearest-neighbour":
        images, labels = zip(*source, strict=True)
        return torch.cat(images), torch.cat(labels)
    sums = torch.zeros(classes, 3, img_size, img_size, device=device)
    counts = torch.zeros(classes, device=device)
    for images_BCHW, labels_B in source:
        # sum by a matrix product, because on a GPU index_add_ sums in another order each time
        members_KB = F.one_hot(labels_B, classes).T.float()
        sums += (members_KB @ images_BCHW.flatten(1)).view_as(sums)
        counts += members_KB.sum(1)
    return sums / counts[:, None, None, None].clamp_min(1), None
