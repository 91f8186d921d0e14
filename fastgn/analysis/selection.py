"""Chooses the data set and the validation images of an evaluation, and names the images."""

import copy
import dataclasses
import os
from pathlib import Path

import torch

from fastgn import data
from fastgn.config import Config
from fastgn.config.groups import DatasetConfig
from fastgn.config.programs import EvaluateConfig
from fastgn.data.datasets import Arrays, Encoded, check_classes, load_validation
from fastgn.data.lists import read_lines
from fastgn.data.subset import Subset, choose_batch_size
from fastgn.errors import UserError, check, find_duplicate
from fastgn.trained import Trained


def choose_dataset(training: Config, cfg: EvaluateConfig) -> DatasetConfig:
    """Returns a training run's options for the data set, overridden by those on the evaluation's
    command line."""
    given = {k: getattr(cfg, k) for k in ("data", "data_dir", "val_split")}
    return dataclasses.replace(
        training.dataset, **{k: v for k, v in given.items() if v is not None}
    )


def locate_images(source: DatasetConfig) -> tuple[str, str | None, str | None]:
    """Returns where the validation images are: the kind of data set, the real path of its folder or
    file, and the name of the split.

    The result is the same for two configurations that name the same images in different ways. The
    split is None except for image folders, because no other kind of data set has a choice.
    """
    path = os.path.realpath(source.data_dir) if source.data_dir is not None else None
    return source.kind, path, source.val_split if source.kind == "imagefolder" else None


def describe_images(source: DatasetConfig) -> str:
    """Returns the flags that name the validation images, for messages."""
    text = f"--data {source.kind}"
    text += f" --data-dir {source.data_dir}" if source.data_dir is not None else ""
    return text + (f" --val-split {source.val_split}" if source.kind == "imagefolder" else "")


def select_images(
    trained: Trained, cfg: EvaluateConfig, device: torch.device, ranks: int = 1
) -> Subset:
    """Returns the validation images for a network.

    ranks: number of processes that share the images. Raises UserError if the classes of the images
    are not those of the network.
    """
    split, classes = load_validation(choose_dataset(trained.cfg, cfg))
    check_classes(trained.classes, classes, trained.name)
    subset = Subset(
        split,
        cfg.num_images,
        img_size=trained.model.img_size,
        crop_pct=trained.model.crop_pct,
        batch_size=cfg.batch_size or 1,
        workers=cfg.workers,
        worker_timeout=cfg.worker_timeout,
        device=device,
        chosen=find_listed_images(cfg.image_list, split) if cfg.image_list else None,
    )
    if cfg.batch_size is None:
        subset.batch_size = choose_batch_size(subset.size, ranks, subset.img_size, device)
    return subset


def find_listed_images(name: str, split: Arrays | Encoded) -> list[int]:
    """Returns the indices of the images that --image-list names, in the order of the list.

    Raises UserError if a line names no image or several, or if an image is named twice.
    """
    if name == "robustbench-imagenet":
        numbers = (Path(data.__file__).parent / "robustbench_imagenet.txt").read_text().split()
        lines = [f"ILSVRC2012_val_{int(n):08d}.JPEG" for n in numbers]
    else:
        lines = [line.strip() for line in read_lines(Path(name), f"--image-list {name}")]
        lines = [line for line in lines if line]
    by_path_end = index_path_ends(split)
    chosen = []
    for line in lines:
        found = by_path_end.get(line, [])
        if not found and line.isdecimal() and int(line) < len(split):
            found = [int(line)]
        check(
            bool(found),
            f"--image-list {name}: no validation image is called {line}: write its index, or the "
            "end of its path",
        )
        check(
            len(found) == 1,
            f"--image-list {name}: {len(found)} validation images are called {line}: write more "
            "of the path",
        )
        chosen += found
    check(bool(chosen), f"--image-list {name} is empty: write one image per line")
    twice = find_duplicate(chosen)
    if twice is not None:
        line = lines[chosen.index(twice)]
        raise UserError(
            f"--image-list {name} names the image {line} twice: remove one of the lines"
        )
    return chosen


def index_path_ends(split: Arrays | Encoded) -> dict[str, list[int]]:
    """Returns a dict from each possible end of a path to the indices of the images whose path ends
    like this.

    An end consists of whole parts of the path, such as c/d.png and d.png for /b/c/d.png. Images in
    arrays have no path.
    """
    indices: dict[str, list[int]] = {}
    if not isinstance(split, Arrays):
        for index in range(len(split)):
            parts = split.name(index).split("/")
            for start in range(len(parts)):
                indices.setdefault("/".join(parts[start:]), []).append(index)
    return indices


def take_evenly_spaced(subset: Subset, count: int) -> Subset:
    """Returns a subset with at most `count` of the images, evenly spaced.

    The first images would be of one class, because the images of a folder are sorted by class.
    """
    fewer = copy.copy(subset)
    total = len(subset.indices)
    count = min(count, total)
    fewer.indices = [subset.indices[i * total // count] for i in range(count)]
    return fewer


def name_images(subset: Subset) -> list[str] | list[int]:
    """Returns the last two parts of each image's path, or its index if the images are an array."""
    if isinstance(subset.split, Arrays):
        return list(subset.indices)
    return ["/".join(subset.split.name(i).split("/")[-2:]) for i in subset.indices]
