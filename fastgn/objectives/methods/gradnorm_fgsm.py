"""gradnorm on a share of the updates, fgsm_rs on the others."""

import dataclasses

from fastgn.objectives.base import Objective, without_penalty
from fastgn.objectives.methods import fgsm_rs, gradnorm
from fastgn.objectives.options import AttackOptions, GradnormFgsmOptions, GradnormOptions


def build(
    options: GradnormFgsmOptions, penalty: GradnormOptions, attack: AttackOptions
) -> Objective:
    """Returns the method gradnorm+fgsm as an Objective: a share of the updates has the penalty.

    The other updates train on images that FGSM has attacked.
    """
    penalised = gradnorm.build(penalty, attack)
    if options.gn_share == 1:
        return penalised
    # log rows of the other updates have no penalty, which is not the same as a penalty of 0
    attacked = without_penalty(fgsm_rs.build(attack))
    return dataclasses.replace(penalised, rest=attacked, share=options.gn_share)
