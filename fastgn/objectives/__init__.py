"""The objectives that an update can minimise: methods of --method, their options and losses.

Names are imported when they are first used, so that the command line can read the options without
importing torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgn.objectives.base import (
        Loss,
        Objective,
        Representatives,
        build_objective,
        cross_entropy,
        draw_classes,
        on_subset,
        without_penalty,
    )
    from fastgn.objectives.methods.edge import edge, edge_energy
    from fastgn.objectives.methods.fgsm_rs import fgsm_rs
    from fastgn.objectives.methods.gradnorm import gradnorm
    from fastgn.objectives.methods.n_fgsm import n_fgsm
    from fastgn.objectives.methods.natural import natural
    from fastgn.objectives.methods.pag import pag
    from fastgn.objectives.methods.pgd_at import pgd_at
    from fastgn.objectives.methods.trades import trades, trades_attack, trades_loss
    from fastgn.objectives.options import (
        METHODS,
        AttackOptions,
        EdgeOptions,
        GradnormFgsmOptions,
        GradnormOptions,
        NFgsmOptions,
        ObjectiveConfig,
        PagOptions,
        TradesOptions,
        piecewise_linear_warning,
    )

__all__ = [
    "METHODS",
    "AttackOptions",
    "EdgeOptions",
    "GradnormFgsmOptions",
    "GradnormOptions",
    "Loss",
    "NFgsmOptions",
    "Objective",
    "ObjectiveConfig",
    "PagOptions",
    "Representatives",
    "TradesOptions",
    "build_objective",
    "cross_entropy",
    "draw_classes",
    "edge",
    "edge_energy",
    "fgsm_rs",
    "gradnorm",
    "n_fgsm",
    "natural",
    "on_subset",
    "pag",
    "pgd_at",
    "piecewise_linear_warning",
    "trades",
    "trades_attack",
    "trades_loss",
    "without_penalty",
]

HOMES = {
    "base": "Loss Objective Representatives build_objective cross_entropy "
    "draw_classes on_subset without_penalty",
    "methods.edge": "edge edge_energy",
    "methods.fgsm_rs": "fgsm_rs",
    "methods.gradnorm": "gradnorm",
    "methods.n_fgsm": "n_fgsm",
    "methods.natural": "natural",
    "methods.pag": "pag",
    "methods.pgd_at": "pgd_at",
    "methods.trades": "trades trades_attack trades_loss",
    "options": "METHODS AttackOptions EdgeOptions GradnormFgsmOptions GradnormOptions "
    "NFgsmOptions ObjectiveConfig PagOptions TradesOptions piecewise_linear_warning",
}
"""Module of this package -> the public names that the module defines, separated by spaces."""


def __getattr__(name: str) -> Any:
    """Imports a public name of this package when it is first used (PEP 562).

    Raises AttributeError if the name is not public.
    """
    for module, names in HOMES.items():
        if name in names.split():
            return getattr(importlib.import_module(f"fastgn.objectives.{module}"), name)
    raise AttributeError(f"module 'fastgn.objectives' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
