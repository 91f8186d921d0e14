"""Makes the sanity report, which shows whether a robust accuracy can be believed.

The checks are those of Carlini et al. 2019 (arXiv 1902.06705), "On evaluating adversarial
robustness". The checks are needed because training with a penalty on the gradient's norm lowers the
very gradient that attacks on the cross-entropy follow. A model that merely hides its gradient must
not be taken for a robust one. No check proves robustness, but a failed check shows that the
measured robust accuracy cannot be believed.

Shapes: B images, C channels, H x W pixels, K classes. Images lie in 0..1, eps is in the same units.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fastgn import attacks
from fastgn.analysis import attack_checks
from fastgn.analysis.model_checks import Check, count_training_modules, report_on_model
from fastgn.analysis.target import Target
from fastgn.errors import check

Compute = Callable[[], list[Check]]
Keep = Callable[[str, Compute], list[Check]]
STAGES = (
    *("model", "radii", "iterations", "restarts", "single step"),
    *("noise", "black box", "margin", "APGD", "precision"),
)
"""Names of the parts of the report, in order. Each part has one check or several."""


def make_sanity_report(
    model: nn.Module,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    eps: float,
    seed: int,
    batch_size: int,
    norm: attacks.Norm = "Linf",
    square_images: int = 64,
    apgd_images: int = 32,
    keep: Keep | None = None,
) -> list[Check]:
    """Returns the checks of Carlini et al. 2019 (arXiv 1902.06705, section 5).

    Most checks compare the accuracies under two attacks. A difference of at most max(1 percentage
    point, 1 image) is accepted, and some checks only warn up to max(5 points, 2 images).

    A random start of PGD depends only on the seed, the image's index and the number of the restart.
    So batch_size changes the result only by rounding and by AutoAttack's own draws. Images that are
    misclassified without an attack are not attacked, and count as misclassified under every attack.

    model: returns fp32 logits (B, K). It is attacked in evaluation mode. Afterwards, modules that
        were in training mode are in training mode again.
    images_BCHW: fp32 in 0..1, on the model's device.
    labels_B: int64, on the model's device.
    square_images: number of the correctly classified images that Square attacks, with 5000 queries
        per image (Andriushchenko et al. 2020). 0 leaves Square out, and the report says so.
    apgd_images: the same for APGD, with 5 restarts of 100 steps on the losses DLR and cross-entropy
        (Croce & Hein 2020).
    keep: function that gets the name of a part of the report (one of STAGES) and a function that
        computes this part's checks. `keep` returns the checks, which may come from an earlier
        evaluation. If `keep` is None, all checks are computed.

    Raises UserError if there are no images, if the lengths differ, if pixels lie outside 0..1, or
    if eps or batch_size is not above 0.
    """
    check_inputs(images_BCHW, labels_B, eps, batch_size)
    training_modules = count_training_modules(model)
    keep = keep or (lambda _, compute: compute())
    with evaluation_mode(model):
        correct_B, classes = classify(model, images_BCHW, labels_B, batch_size)
        checks = keep(
            "model",
            lambda: report_on_model(
                model,
                images_BCHW,
                labels_B,
                correct_B=correct_B,
                classes=classes,
                training_modules=training_modules,
                batch_size=batch_size,
            ),
        )
        if not correct_B.any() or checks[-1].numbers["vanished_share"] is None:
            # Stop here if no image is classified correctly, because there is nothing to attack.
            # Also stop if the outputs do not depend on the images, because attacks need gradients.
            return checks
        target = Target(
            model,
            images_BCHW[correct_B],
            labels_B[correct_B],
            correct_B.nonzero().flatten().tolist(),
            images=len(correct_B),
            classes=classes,
            eps=eps,
            seed=seed,
            batch_size=batch_size,
            norm=norm,
        )
        for name, compute in list_attack_stages(target, square_images, apgd_images).items():
            checks += keep(name, compute)
    return checks


def check_inputs(images_BCHW: Tensor, labels_B: Tensor, eps: float, batch_size: int) -> None:
    """Raises UserError if these inputs of a sanity report are not valid."""
    check(len(images_BCHW) > 0, "no images to check: give at least one, better 1000")
    check(
        len(images_BCHW) == len(labels_B),
        f"{len(images_BCHW)} images but {len(labels_B)} labels: give one label per image",
    )
    check(
        bool((images_BCHW >= 0).all() and (images_BCHW <= 1).all()),
        "pixels lie outside 0..1: leave the normalisation to the model",
    )
    check(eps > 0, f"eps is {eps}: give a radius above 0, in 0..1 pixel units")
    check(batch_size > 0, f"batch_size is {batch_size}: give 1 or more")


def list_attack_stages(target: Target, square_images: int, apgd_images: int) -> dict[str, Compute]:
    """Returns a dict from the name of each part of the report that needs attacks to a function that
    computes the part's checks. square_images, apgd_images: see `make_sanity_report`."""
    stages: dict[str, Compute] = {
        "radii": lambda: [attack_checks.check_larger_eps(target)],
        "iterations": lambda: [attack_checks.check_more_steps(target)],
        "restarts": lambda: [attack_checks.check_more_restarts(target)],
        "single step": lambda: [attack_checks.check_single_step(target)],
        "noise": lambda: [attack_checks.check_noise(target)],
        "black box": lambda: [attack_checks.check_black_box(target, square_images)],
        "margin": lambda: [attack_checks.check_margin(target)],
        "APGD": lambda: attack_checks.check_apgd(target, apgd_images),
        "precision": lambda: [attack_checks.check_precision(target)],
    }
    assert STAGES == ("model", *stages)
    return stages


def classify(
    model: nn.Module, images_BCHW: Tensor, labels_B: Tensor, batch_size: int
) -> tuple[Tensor, int]:
    """Returns whether each image is classified correctly, bool (B,), and the number of classes."""
    with torch.no_grad():
        logits_BK = torch.cat([model(images) for images in images_BCHW.split(batch_size)])
    return logits_BK.argmax(1) == labels_B, logits_BK.shape[1]


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode during the with block. Afterwards each module has its
    earlier mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def format_checks(checks: Sequence[Check], title: str) -> str:
    """Returns the report as plain text, with a title, the number of checks with each verdict, and a
    line per check."""
    count = {v: sum(c.verdict == v for c in checks) for v in ("fail", "warn", "pass")}
    width = max((len(c.name) for c in checks), default=0)
    return "\n".join(
        [
            title,
            ", ".join(f"{number} {verdict}" for verdict, number in count.items())
            + "; checks after Carlini et al. 2019 (arXiv 1902.06705)",
            "",
            *(f"{c.verdict.upper()}  {c.name:<{width}}  {c.detail}" for c in checks),
            "",
        ]
    )
