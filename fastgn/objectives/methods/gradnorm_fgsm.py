"""The method gradnorm+fgsm, which uses gradnorm in some updates and fgsm_rs in the others."""

import dataclasses

from fastgn.objectives.base import Objective, without_penalty
from fastgn.objectives.methods import fgsm_rs, gradnorm
from fastgn.objectives.options import AttackOptions, GradnormFgsmOptions, GradnormOptions


def build(
    options: GradnormFgsmOptions, penalty: GradnormOptions, attack: AttackOptions
) -> Objective:
    """Returns the method gradnorm+fgsm as an Objective.

    Only a share of the updates has the penalty of gradnorm. The others train on images that FGSM
    has attacked. options: the share of the updates with the penalty. penalty: options of gradnorm.
    attack: options of FGSM.
    """
    penalised = gradnorm.build(penalty, attack)
    if options.gn_share == 1:
        return penalised
    # use without_penalty, so that these updates log NaN, as 0 would look like a measured penalty
    attacked = without_penalty(fgsm_rs.build(attack))
    return dataclasses.replace(penalised, rest=attacked, share=options.gn_share)
