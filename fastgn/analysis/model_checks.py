"""Checks of a network's outputs and input gradients, which show whether it can be attacked at all.

`check_model` looks at one batch before an evaluation. It raises an error if the accuracies of the
evaluation would mean nothing. `report_on_model` makes the first checks of the sanity report, and
raises no error if a check fails.

Shapes: B images, C channels, H x W pixels, K classes.
"""

import dataclasses
import re
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastgn import attacks
from fastgn.errors import check

Verdict = Literal["pass", "warn", "fail"]

FEW_IMAGES = 100
"""Number of images below which the report of --sanity warns, because a single image then changes
the accuracy by more than one percentage point."""
VANISHED_L1 = 1e-12
"""L1 norm of an image's gradient below which the gradient counts as vanished."""
REPEATS = 5
"""Number of forward passes of the same images that the report of --sanity compares."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the report of --sanity, which checks whether a robust accuracy can be
    believed."""

    name: str
    verdict: Verdict
    detail: str
    """One line with the numbers, and the limits at which the verdict changes."""
    numbers: dict[str, Any]
    """The numbers in `detail`, ready for JSON.

    Shares and accuracies (accuracy_*, *_share) are in 0..1. eps is in the units in which pixel
    values are 0..1. Most other numbers count images or modules.
    """


def exceeds(images: int, total: int, points: float, at_least: int = 1) -> bool:
    """Returns whether a number of images is above the larger of two limits.

    points: the first limit, in per cent of `total`. at_least: the second limit, in images.
    """
    return images > max(points / 100 * total, at_least)


# -------------------------------------------------------------------------------- what is measured


def count_training_modules(model: nn.Module) -> int:
    """Returns the number of modules in training mode."""
    return sum(module.training for module in model.modules())


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Comparison of a network's outputs in several forward passes of the same B images."""

    first_BK: Tensor
    """Outputs of the first pass, float64."""
    not_finite: int
    """Number of outputs, over all passes, that are not finite."""
    are_probabilities: bool
    """Whether the outputs for each image are non-negative and sum to 1."""
    spread: float
    """Largest difference between an image's outputs in a later pass and in the first pass. It is
    the L2 norm of the difference, divided by the L2 norm of the first outputs. 0 if some outputs
    are not finite."""
    changed_classes: int
    """Number of images whose predicted class is not the same in all forward passes."""


@torch.no_grad()
def measure_outputs(model: nn.Module, images_BCHW: Tensor, passes: int) -> Outputs:
    """Runs `passes` forward passes of the same images, and compares their outputs."""
    outputs = torch.stack([model(images_BCHW).double() for _ in range(passes)])
    first = outputs[0]
    not_finite = int((~outputs.isfinite()).sum())
    # the tolerance is 1e-4, because in half precision the sum of a softmax is not exactly 1
    are_probabilities = bool((first >= 0).all() and ((first.sum(1) - 1).abs() < 1e-4).all())
    # Divide the differences by the norm of the outputs, to see which ones are only rounding errors.
    # Kernels that add with atomics change the last bits of their results in each pass.
    distances = (outputs - first).norm(dim=2) / first.norm(dim=1).clamp_min(1e-10)
    changed = int((outputs.argmax(2) != first.argmax(1)).any(0).sum())
    spread = float(distances.amax()) if not not_finite else 0.0
    return Outputs(first, not_finite, are_probabilities, spread, changed)


def measure_gradients(
    model: nn.Module, images_BCHW: Tensor, labels_B: Tensor, batch_size: int
) -> Tensor | None:
    """Returns for each image the L1 norm of the gradient of its cross-entropy with respect to it,
    float64.

    Returns None if autograd finds no dependence of the outputs on the images, for example because
    of a detach.
    """
    norms = []
    try:
        for images, labels in zip(
            images_BCHW.split(batch_size), labels_B.split(batch_size), strict=True
        ):
            grad_BCHW = attacks.input_gradient(model, images, labels).images_BCHW
            norms.append(grad_BCHW.double().abs().flatten(1).sum(1))
    except RuntimeError as error:
        if not re.search("does not require grad|not have been used in the graph", str(error)):
            raise
        return None
    return torch.cat(norms)


# ------------------------------------------------------------------------- before an evaluation


def check_model(model: nn.Module, images_BCHW: Tensor, labels_B: Tensor) -> list[str]:
    """Returns a line for each reason to doubt the accuracies of a model, judged by one batch.

    Raises UserError if the accuracies would mean nothing, because the model is in training mode or
    returns probabilities instead of logits. Other reasons are logits that differ between two
    forward passes, and logits or gradients that are not finite.
    """
    check(not count_training_modules(model), "the model is in training mode: call eval() first")
    outputs = measure_outputs(model, images_BCHW, passes=2)
    check(
        not outputs.not_finite,
        "the model's logits are not finite on images without an attack: "
        "check its weights and precision",
    )
    check(
        not outputs.are_probabilities,
        "the model returns probabilities: their softmax hides gradients from attacks, so remove "
        "the model's last softmax",
    )
    check(
        outputs.spread <= 1e-3,
        "the model returns different logits each time for the same images: remove its randomness, "
        "because an image that is right in one pass may be wrong in the next",
    )
    norms_B = measure_gradients(model, images_BCHW, labels_B, len(images_BCHW))
    check(
        norms_B is not None,
        "the model's outputs are cut off from the images: remove detach() and no_grad() from it",
    )
    assert norms_B is not None
    check(
        bool(norms_B.isfinite().all()),
        "the model's gradients are not finite on images without an attack: "
        "check its weights and precision",
    )
    doubts = []
    if not bool(norms_B.any()):
        doubts.append(
            "the gradients of all images are 0, so attacks that need gradients mean nothing"
        )
    images, classes = outputs.first_BK.shape
    accuracy = float((outputs.first_BK.argmax(1) == labels_B).float().mean())
    chance = 1 / classes + 2 * (1 / classes * (1 - 1 / classes) / images) ** 0.5
    if images >= 32 and accuracy < chance:
        doubts.append(
            f"only {accuracy:.1%} of the first {images} clean images are classified correctly, "
            "hardly more than by chance: check that --mean, --std and the order of the classes "
            "are those of the model's training"
        )
    return doubts


# -------------------------------------------------------------------------- in the sanity report


def report_on_model(
    model: nn.Module,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    correct_B: Tensor,
    classes: int,
    training_modules: int,
    batch_size: int,
) -> list[Check]:
    """Returns the checks of the report of --sanity that need no attack.

    correct_B: whether each image is classified correctly. training_modules: the number of modules
    that were in training mode before the report.
    """
    return [
        report_mode(training_modules),
        *report_outputs(measure_outputs(model, images_BCHW[:batch_size], REPEATS)),
        report_clean_accuracy(correct_B, classes),
        report_gradients(measure_gradients(model, images_BCHW, labels_B, batch_size)),
    ]


def report_mode(training_modules: int) -> Check:
    """Checks that a network was in evaluation mode before the report. training_modules: number of
    modules that were in training mode."""
    return Check(
        "evaluation mode",
        "fail" if training_modules else "pass",
        f"{training_modules} modules were in training mode (dropout, batch statistics). "
        "Fail above 0.",
        {"training_modules": training_modules},
    )


def report_outputs(outputs: Outputs) -> list[Check]:
    """Checks that a network's outputs are logits, and are the same in every forward pass."""
    first, broken = outputs.first_BK, outputs.not_finite
    probabilities = " Every row is non-negative and sums to 1, so they are probabilities."
    logits = Check(
        "outputs are logits",
        "fail" if outputs.are_probabilities or broken else "pass",
        f"The outputs range from {float(first.min()):.3g} to {float(first.max()):.3g}, and "
        f"{broken} are not finite.{probabilities if outputs.are_probabilities else ''} Fail if "
        "they are probabilities or if any is not finite.",
        {"probabilities": outputs.are_probabilities, "not_finite": broken},
    )
    same = Check(
        "deterministic",
        "fail" if outputs.spread > 1e-4 or outputs.changed_classes else "pass",
        f"{REPEATS} forward passes differ by {outputs.spread:.2g} of the logits' norm, and "
        f"{outputs.changed_classes} of {len(first)} images change class. Fail above 1e-4 or "
        "above 0 images.",
        {"relative_spread": outputs.spread, "changed_classes": outputs.changed_classes},
    )
    return [logits, same]


def report_clean_accuracy(correct_B: Tensor, classes: int) -> Check:
    """Checks that a network does better than chance without an attack.

    correct_B: whether each image is classified correctly. classes: number of classes.
    """
    images, correct = len(correct_B), int(correct_B.sum())
    by_chance = correct * classes <= images
    return Check(
        "clean accuracy",
        "fail" if by_chance else "warn" if images < FEW_IMAGES else "pass",
        f"{correct / images:.1%} ({correct} of {images} images). Fail at or below chance "
        f"(1/{classes}). Warn with fewer than {FEW_IMAGES} images, because one image is then "
        "more than a point.",
        {"accuracy_clean": correct / images, "images": images, "classes": classes},
    )


def report_gradients(norms_B: Tensor | None) -> Check:
    """Checks that the gradients with respect to the images have not vanished.

    norms_B: L1 norm of the gradient for each image. None means that the outputs do not depend on
    the images.
    """
    name = "gradients reach the images"
    if norms_B is None:
        return Check(
            name,
            "fail",
            "The outputs are cut off from the images (detach, no_grad), so no attack was run.",
            {"vanished_share": None},
        )
    # written with `~` so that a norm that is NaN counts as vanished
    vanished, images = int((~(norms_B >= VANISHED_L1)).sum()), len(norms_B)
    verdict: Verdict = "fail" if exceeds(vanished, images, 1) else "warn" if vanished else "pass"
    return Check(
        name,
        verdict,
        f"{vanished} of {images} images ({vanished / images:.1%}) have a cross-entropy gradient "
        f"with an L1 norm below {VANISHED_L1:g}; the median norm is {float(norms_B.median()):.3g}. "
        "Warn above 0. Fail above max(1 %, 1 image).",
        {"vanished_share": vanished / images, "images": images},
    )
