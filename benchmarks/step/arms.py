"""Defines arms, the ways to compute an update that the benchmarks compare.

Arms whose names end in -paper compute an update as the code of arXiv 2409.20139 does. They use
PyTorch's operators in eager mode, keep the network in eval mode, and wait for the device after
every micro-batch. For PGD-3, they also compute weight gradients in every attack step, and make one
more forward pass at the end of the attack.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fastgn.models.network import Classifier
from fastgn.objectives import AttackOptions, Objective, ObjectiveConfig, build_objective
from fastgn.step.cost import StepCost, count_cost
from fastgn.step.options import Quirks, StepOptions
from fastgn.step.retry import RetryingStep
from fastgn.step.schedule import Schedule
from fastgn.step.step import Step

PAPER_WAY = Quirks(train_in_eval_mode=True, sync_micro_batches=True, accumulation="sum")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to compute an update."""

    method: str
    precision: str = "fp32"
    schedule: Schedule = Schedule()  # noqa: RUF009 - frozen
    budget: float = 1.0
    """Share of the activations that a compiled update keeps in memory for the backward. The
    backward computes the others again."""
    compile: bool = False
    kernels: str | None = None
    """Value of --kernels: "triton" or "reference". If None, the benchmark chooses."""

    @property
    def paper(self) -> bool:
        """Whether the update is computed as in the code of arXiv 2409.20139."""
        return self.method.endswith("-paper")

    @property
    def base(self) -> str:
        """Name of the method without the ending -paper."""
        return self.method.removesuffix("-paper")

    @property
    def name(self) -> str:
        """Name of the method, with the schedule if it is gradnorm, such as "gradnorm exact"."""
        return f"{self.method} {self.schedule}" if self.method == "gradnorm" else self.method

    @property
    def key(self) -> str:
        """Name of this kind of update with its precision, such as "gradnorm exact, bf16"."""
        return f"{self.name}, {self.precision}"

    def objective(self) -> Objective:
        """Returns the objective (loss and attack) of the update's training method."""
        select = "paper" if self.method == "pgd_at-paper" else "last"
        attack = AttackOptions(attack_select=select)
        return build_objective(ObjectiveConfig(self.base, attack=attack))

    def options(self, **options: Any) -> StepOptions:
        """Returns the StepOptions of this update. options: fields of StepOptions to change."""
        quirks = Quirks()
        if self.paper:
            quirks = dataclasses.replace(PAPER_WAY, attack_weight_grads=self.base == "pgd_at")
        own = StepOptions(self.schedule, self.precision, self.compile, self.budget, quirks=quirks)
        return dataclasses.replace(own, **options)

    def step(self, model: Classifier, **options: Any) -> RetryingStep:
        """Returns the function for an update's gradients. options: fields of StepOptions to set."""
        return RetryingStep(Step(model, self.objective(), self.options(**options)))

    def count(self, model: Classifier, batch: int, classes: int) -> StepCost:
        """Counts the cost of this update without compilation, on tensors without data."""
        size = {"batch_size": batch, "img_size": model.img_size, "num_classes": classes}
        return count_cost(model, self.objective(), self.options(), **size)


def random_batch(
    batch: int, side: int, classes: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Returns random images (B, 3, H, W) in 0..1 and soft targets (B, classes), like mixup's.

    batch: number of images. side: height and width in pixels.
    """
    images_BCHW = torch.rand(batch, 3, side, side, device=device)
    return images_BCHW, torch.rand(batch, classes, device=device).softmax(1)
