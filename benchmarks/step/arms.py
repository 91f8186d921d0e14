"""An arm: one way to compute an update, as benchmarks of the step compare them.

Names that end in -paper do what the paper's code does by its description: PyTorch's operators in
eager mode, the network in eval mode, and a synchronisation in every micro-batch. For PGD-3 the
paper also computes weight gradients in every attack step, and a last forward.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fastgn.models.network import Classifier
from fastgn.objectives import AttackOptions, Objective, ObjectiveConfig, build_objective
from fastgn.step.options import Quirks, StepOptions
from fastgn.step.retry import RetryingStep
from fastgn.step.schedule import Schedule
from fastgn.step.step import Step

PAPER_WAY = Quirks(train_in_eval_mode=True, sync_micro_batches=True, accumulation="sum")


@dataclasses.dataclass(frozen=True)
class Arm:
    """A method, a schedule and a precision."""

    method: str
    precision: str = "fp32"
    schedule: Schedule = Schedule()  # noqa: RUF009 - frozen
    budget: float = 1.0
    """Activation memory budget of torch.compile: below 1, it recomputes to save memory."""
    compile: bool = False
    kernels: str | None = None
    """"triton" or "reference", see models.build_model. None if the benchmark decides."""

    @property
    def paper(self) -> bool:
        """Whether this is the paper's own way."""
        return self.method.endswith("-paper")

    @property
    def base(self) -> str:
        """The method without -paper."""
        return self.method.removesuffix("-paper")

    @property
    def name(self) -> str:
        """Name without the precision."""
        name = f"{self.method} {self.schedule}" if self.method == "gradnorm" else self.method
        return name if self.budget == 1 else f"{name}, budget {self.budget:g}"

    @property
    def key(self) -> str:
        """Name with the precision."""
        return f"{self.name}, {self.precision}"

    @property
    def exact(self) -> bool:
        """Whether the derivative is exact in every update."""
        return self.schedule.is_exact

    @property
    def cycle(self) -> int:
        """Number of updates after which the costs repeat."""
        return self.schedule.cycle

    def objective(self) -> Objective:
        """Returns what the arm minimises."""
        select = "paper" if self.method == "pgd_at-paper" else "last"
        attack = AttackOptions(attack_select=select)
        return build_objective(ObjectiveConfig(self.base, attack=attack))

    def step(self, model: Classifier, **options: Any) -> RetryingStep:
        """Returns the arm's step. `options` replace the StepOptions that follow from the arm."""
        quirks = Quirks()
        if self.paper:
            quirks = dataclasses.replace(PAPER_WAY, attack_weight_grads=self.base == "pgd_at")
        own = StepOptions(self.schedule, self.precision, self.compile, self.budget, quirks=quirks)
        return RetryingStep(Step(model, self.objective(), dataclasses.replace(own, **options)))


def random_batch(
    batch: int, side: int, classes: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Returns random images (B, 3, H, W) in 0..1 and soft targets (B, classes), as of mixup."""
    images_BCHW = torch.rand(batch, 3, side, side, device=device)
    return images_BCHW, torch.rand(batch, classes, device=device).softmax(1)
