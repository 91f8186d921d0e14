"""Tests DALI for `--loader auto`. DALI is used if its first batch equals that of the PIL loader up
to rounding."""

import contextlib
import importlib.util
from collections.abc import Callable

import torch

from fastgn.data.batch import Batch, Loader
from fastgn.errors import first_line

MEAN_DIFFERENCE = 1.6 / 255
"""Largest accepted mean absolute difference between DALI's and PIL's version of one image.

It is above 1/255, because solarize, posterize and equalize can enlarge a difference of 1/255."""
MEDIAN_DIFFERENCE = 0.5 / 255
"""For each image of a batch, the trial computes the mean absolute difference between DALI's and
PIL's version. This is the largest accepted median of these differences."""


def wants_dali(device: torch.device) -> bool:
    """Returns whether DALI is worth a trial, which means that it is installed and the device is a
    GPU."""
    # find_spec raises this error if even the package nvidia is missing
    with contextlib.suppress(ModuleNotFoundError):
        return device.type == "cuda" and importlib.util.find_spec("nvidia.dali") is not None
    return False


def choose_dali_or_pil(
    make_dali: Callable[[], Loader],
    make_pil: Callable[[], Loader],
    agree: Callable[[bool], bool] = bool,
) -> tuple[Loader, str | None]:
    """Returns (DALI's loader, None) if the first batches of DALI's loader and the PIL loader agree.

    Otherwise returns (the PIL loader, the reason). agree: function that returns True on all ranks
    if it gets True on any rank. Raises UserError if the PIL loader raises it.
    """
    pil = make_pil()
    with contextlib.closing(pil.epoch(0)) as batches:  # type: ignore[type-var]
        expected = next(batches)
    dali, fault = try_dali(make_dali, expected)
    elsewhere = agree(fault is not None) and fault is None
    if dali is not None and fault is None and not elsewhere:
        dali.bad_images.clear()
        return dali, None
    with contextlib.suppress(Exception):
        getattr(dali, "close", bool)()
    pil.bad_images.clear()
    reason = "it failed on another rank" if elsewhere else fault
    return pil, f"--loader auto uses torch, because DALI did not pass its trial: {reason}"


def try_dali(make_dali: Callable[[], Loader], expected: Batch) -> tuple[Loader | None, str | None]:
    """Returns (DALI's loader, None) if its first batch equals `expected` up to rounding.

    Otherwise returns (DALI's loader, the reason), or (None, the reason) if the loader could not be
    made.
    """
    loader = None
    try:
        loader = make_dali()
        return loader, describe_difference(next(iter(loader.epoch(0))), expected)
    except Exception as error:  # DALI, the driver and the decoder may raise any error
        return loader, f"{type(error).__name__}: {first_line(error)}"


def describe_difference(found: Batch, expected: Batch) -> str | None:
    """Returns how a batch differs from the expected one, or None if only rounding differs."""
    for name, mine, theirs in zip(("images", "targets"), found, expected, strict=True):
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            return (
                f"its {name} are {mine.dtype} {tuple(mine.shape)}, not {theirs.dtype} "
                f"{tuple(theirs.shape)}"
            )
        if not bool(torch.isfinite(mine).all()):
            return f"its {name} are not finite"
    if not torch.allclose(found.targets.float(), expected.targets.float(), atol=1e-6):
        return "its targets differ"
    means_B = (found.images_BCHW - expected.images_BCHW).abs().mean((1, 2, 3))
    worst, middle = float(means_B.max()), float(means_B.median())
    if worst > MEAN_DIFFERENCE or middle > MEDIAN_DIFFERENCE:
        return (
            f"its images differ from PIL's by at most {worst * 255:.1f}/255 and in the median by "
            f"{middle * 255:.1f}/255, and {MEAN_DIFFERENCE * 255:.1f} and "
            f"{MEDIAN_DIFFERENCE * 255:.1f} are allowed"
        )
    return None
