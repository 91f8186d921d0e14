"""The methods by name, and what builds each."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from fastgn.objectives.base import Objective, Representatives
from fastgn.objectives.methods.adversarial import build_fgsm_rs, build_pgd_at
from fastgn.objectives.methods.edge import build_edge
from fastgn.objectives.methods.gradnorm import build_gradnorm
from fastgn.objectives.methods.gradnorm_fgsm import build_gradnorm_fgsm
from fastgn.objectives.methods.natural import build_natural
from fastgn.objectives.methods.pag import build_pag
from fastgn.objectives.methods.trades import build_trades

if TYPE_CHECKING:
    from fastgn.config.groups import ObjectiveConfig


Builder = Callable[["ObjectiveConfig", Representatives | None], Objective]


METHODS: dict[str, Builder] = {
    "natural": build_natural,
    "gradnorm": build_gradnorm,
    "pgd_at": build_pgd_at,
    "fgsm_rs": build_fgsm_rs,
    "trades": build_trades,
    "edge": build_edge,
    "pag": build_pag,
    "gradnorm+fgsm": build_gradnorm_fgsm,
}
"""--method's choices: name -> what builds it."""


def build_objective(
    cfg: "ObjectiveConfig", representatives: Representatives | None = None
) -> Objective:
    """The configured method on a model with `normalize` and `backbone`. representatives: pag's,
    which its loss cannot do without."""
    return METHODS[cfg.method](cfg, representatives)


def piecewise_linear_warning(cfg: "ObjectiveConfig", counts: dict[str, int]) -> str | None:
    """The line to warn with when a method that differentiates twice meets activations without a
    second derivative, else None.

    counts: {class name: how many} of the model's piecewise-linear activations.
    """
    if not build_objective(cfg).needs_input_gradient or not counts:
        return None
    found = ", ".join(f"{n} {name}" for name, n in counts.items())
    return (
        f"{cfg.method} gets almost no signal through piecewise-linear activations ({found}): their "
        "second derivative is 0. Replace them with --activation gelu (or silu)."
    )
