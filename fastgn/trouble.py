"""Recognises ways in which a training goes wrong, and says what to do."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastgn.errors import UserError
from fastgn.metrics import read_rows

SATURATED = 1e-3
"""If the penalty falls below this share of its largest value, the network may have become too sure
of the training images."""
FALLEN = 0.02
"""Smallest fall of the accuracy under PGD-10 that is more than the noise of an evaluation."""
COLLAPSED = 0.5
"""If the accuracy under PGD-10, divided by that under FGSM, is below this number, training has
collapsed."""
GAP = 0.1
"""Smallest difference between the accuracies under FGSM and PGD-10 that may count as a collapse. If
the difference is smaller, their ratio may be due to chance."""


def find_saturation(rows: Sequence[Mapping[str, float]]) -> str | None:
    """Returns a warning if the penalty of gradnorm has vanished while robustness falls.

    The cross-entropy of a network that is sure of all training images vanishes, and so does the
    cross-entropy's gradient. The penalty is then small although the network is not smooth.

    rows: rows of metrics.csv from the first update on, with the keys of metrics.COLUMNS.
    """
    penalties = [row["penalty"] for row in rows if "penalty" in row]
    robust = [row["pgd10_accuracy"] for row in rows if "pgd10_accuracy" in row]
    if not penalties or not robust or penalties[-1] >= SATURATED * max(penalties):
        return None
    if robust[-1] > max(robust) - FALLEN:
        return None
    return (
        f"warning: the penalty has fallen from {max(penalties):.2g} to {penalties[-1]:.2g}, but "
        f"the accuracy under PGD-10 from {max(robust):.1%} to {robust[-1]:.1%}: the network is "
        "so sure of the training images that their gradients vanish. Start again with "
        "--smoothing 0.1 or --mixup 0.8, or with fewer --epochs"
    )


def find_collapse(fgsm: float, robust: float) -> str | None:
    """Returns a warning if training with single-step attacks has collapsed.

    The network then withstands FGSM, but not PGD (catastrophic overfitting, Wong et al. 2020).

    fgsm, robust: accuracies under FGSM and PGD-10 at the same radius, in 0..1.
    """
    if robust >= COLLAPSED * fgsm or fgsm - robust < GAP:
        return None
    return (
        f"warning: training with a single attack step has collapsed: the accuracy is {fgsm:.1%} "
        f"under FGSM, but {robust:.1%} under PGD-10. Start again with --method n_fgsm, pgd_at or "
        "gradnorm, or with a smaller --attack-eps"
    )


class Watch:
    """Finds trouble in a training. It returns each kind of warning only once."""

    def __init__(self) -> None:
        self.found: set[str] = set()
        """Kinds of trouble that have been found."""

    def find(self, metrics: Path | None, robust: float, fgsm: float | None = None) -> list[str]:
        """Returns warnings of trouble that has not been found before.

        metrics: the run's metrics.csv if the method penalises the norm of the loss's gradient, else
        None. robust, fgsm: accuracies under PGD-10 and FGSM, in 0..1. fgsm is None unless the
        method trains with single-step attacks.
        """
        lines = {"collapse": None if fgsm is None else find_collapse(fgsm, robust)}
        if metrics is not None:
            with contextlib.suppress(UserError):  # the file may be lost
                lines["saturation"] = find_saturation(read_rows(metrics))
        new = {kind: line for kind, line in lines.items() if line and kind not in self.found}
        self.found |= new.keys()
        return list(new.values())


def describe_not_finite(what: str, checkpoint: str, precision: str, penalised: bool) -> str:
    """Returns the message about a value that is not finite.

    what: text that names the value. checkpoint: clause that says where the last checkpoint is.
    precision: value of --precision. penalised: whether the method has a penalty.
    """
    tries = ["a lower --lr", "--clip-grad 1.0"]
    if precision != "fp32":
        tries.append("--precision fp32")
    if penalised:
        tries.append("a longer --ramp-epochs")
    return f"{what} is not finite ({checkpoint}): try {', '.join(tries)}"


def describe_bad_gradient(update: str, cause: str, precision: str, differences: bool) -> str:
    """Returns the message about a gradient that is not finite before any weight has changed.

    update: text that names the update. cause: text that names the layer at fault. precision: value
    of --precision. differences: whether a finite difference can replace the penalty.
    """
    tries = ["another --model or --initial-checkpoint"]
    if differences:
        tries.insert(0, "--schedule finite-difference")
    if precision != "fp32":
        tries.insert(0, "--precision fp32")
    return f"the gradient of {update} is not finite ({cause}): try {' or '.join(tries)}"
