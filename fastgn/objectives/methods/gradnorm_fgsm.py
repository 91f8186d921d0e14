"""gradnorm on a share of the updates, fgsm_rs on the others."""

import dataclasses
from typing import TYPE_CHECKING

from fastgn.objectives.base import Objective, Representatives, without_penalty
from fastgn.objectives.methods.adversarial import build_fgsm_rs
from fastgn.objectives.methods.gradnorm import build_gradnorm

if TYPE_CHECKING:
    from fastgn.config.groups import ObjectiveConfig


def build_gradnorm_fgsm(cfg: "ObjectiveConfig", _: Representatives | None) -> Objective:
    penalised = build_gradnorm(cfg, None)
    if cfg.gn_share == 1:
        return penalised
    # its rows have no penalty, and not one of 0
    attacked = without_penalty(build_fgsm_rs(cfg, None))
    return dataclasses.replace(penalised, rest=attacked, share=cfg.gn_share)
