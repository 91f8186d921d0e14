"""Computes the gradients of one update."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from fastgn.attacks import Gradient
from fastgn.objectives import Loss, Objective
from fastgn.step.diagnosis import Diagnosis
from fastgn.step.double_backward import compile_double_backward
from fastgn.step.losses import (
    AttackGradient,
    LossModule,
    LossModules,
    name_of_turn,
    split_objective,
)
from fastgn.step.options import StepOptions
from fastgn.step.precision import autocast, in_precision, matmul_precision
from fastgn.step.random_state import RandomState
from fastgn.step.schedule import check_schedule

Batches = Sequence[tuple[Tensor, Tensor]]
"""Pairs of images (B, C, H, W) in 0..1 and targets, on the device, all of one size."""


class MicroBatch(NamedTuple):
    """Images that pass through the network at one time, and the weight of their loss in the
    update."""

    images_BCHW: Tensor
    targets: Tensor
    divisor: int
    """The loss is divided by this number before its backward."""
    reduces: bool
    """Whether DistributedDataParallel averages the gradients over processes in its backward."""


class Step:
    """Computes the gradients of one update, in one or more micro-batches.

    model: a classifier with `normalize` and `backbone` (see objectives.Objective), on its device.
    options: see StepOptions.
    distributed: whether torch.distributed averages the gradients over several processes.

    Runs no more forwards and backwards than the schedule needs, and never waits for the device
    except for the quirk sync_micro_batches. Running out of memory raises; see retry.RetryingStep.
    Raises ValueError if the schedule does not fit the objective.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        options: StepOptions = StepOptions(),  # noqa: B008 - frozen
        *,
        distributed: bool = False,
    ):
        check_schedule(options.schedule, objective)
        self.model = model
        self.objective = objective
        self.options = options
        self.micro_batch = options.micro_batch
        """Number of images that pass through the network at a time. None means the batch."""
        self.divisor = options.schedule.divisor
        """The number that must divide the size of a micro-batch."""
        self.device = next(model.parameters()).device
        self.weights = [p for p in model.parameters() if p.requires_grad]
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        self.statistics = [b for m in norms for b in m.buffers()]
        """The buffers of the BatchNorm layers."""
        cuda_graphs = options.cuda_graphs and options.is_compiled and self.device.type == "cuda"
        self._compile_mode = {"mode": "reduce-overhead"} if cuda_graphs else {}
        # the outputs of a CUDA graph are overwritten when it runs again: gradients must not be
        self._graph_grads = [torch.zeros_like(p) for p in self.weights] if cuda_graphs else []

        self.parts = split_objective(objective, options.schedule)
        self.attack = self._compile(AttackGradient(model, options.precision), True)
        self.losses = LossModules(
            {
                name: self._compile(
                    LossModule(model, part, options.precision), part.needs_input_gradient
                )
                for name, part in self.parts.items()
            }
        )
        self.parallel: DistributedDataParallel | None = None
        if distributed:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(
                self.losses, device_ids=ids, gradient_as_bucket_view=True
            )

    def _compile(self, module: nn.Module, differentiates: bool) -> nn.Module:
        """Returns `module`, compiled if the options say so.

        differentiates: whether the module computes a gradient with respect to its first input.
        """
        if not self.options.is_compiled:
            return module
        return compile_double_backward(
            module,
            differentiate=(0,) if differentiates else (),
            activation_memory_budget=self.options.activation_memory_budget,
            **self._compile_mode,
        )

    def __call__(
        self,
        batches: Batches,
        ramp: Tensor,
        update: int = 0,
        attack_ramp: Tensor | None = None,
        *,
        all_reduce: bool = True,
    ) -> Loss:
        """Adds the gradients of an update to the parameters' .grad.

        Returns the mean of the micro-batches' losses, detached.
        batches: their losses are averaged (or summed, see Quirks.accumulation).
        ramp: scalar tensor in 0..1 on the device, the strength of the penalty.
        update: number of the update, which decides about the turns of several losses.
        attack_ramp: like ramp, for the step of an attack. None means `ramp`.
        all_reduce: whether the gradients are averaged over the processes. If False, the caller
        must call `average_gradients` afterwards.
        """
        if self.parallel is not None and (self._attacks() or not all_reduce):
            # DistributedDataParallel makes buffers equal in its forward, which is too late here
            for buffer in self.statistics:
                torch.distributed.broadcast(buffer, src=0)
        with matmul_precision(self.options.precision):
            return self._accumulate(
                batches, ramp, update, ramp if attack_ramp is None else attack_ramp, all_reduce
            )

    def _attacks(self) -> bool:
        """Returns whether an update may attack its images."""
        return any(part.perturb is not None for part in self.parts.values())

    def _accumulate(
        self, batches: Batches, ramp: Tensor, update: int, attack_ramp: Tensor, all_reduce: bool
    ) -> Loss:
        """Runs the forward and backward of each micro-batch. Returns the mean of their losses."""
        if self._graph_grads and not self.has_gradients():
            torch._foreach_zero_(self._graph_grads)
            for parameter, grad in zip(self.weights, self._graph_grads, strict=True):
                parameter.grad = grad
        name, quirks = self.turn(update), self.options.quirks
        pairs = self._split(batches)
        divisor = len(pairs) if quirks.accumulation == "mean" else len(pairs) // len(batches)
        sums: Tensor | None = None
        for index, (images_BCHW, targets) in enumerate(pairs):
            images_BCHW = self._perturb(name, images_BCHW, targets, attack_ramp)
            self.model.train(not quirks.train_in_eval_mode)
            reduces = all_reduce and index == len(pairs) - 1
            part = MicroBatch(images_BCHW, targets, divisor, reduces)
            module = self.parallel if all_reduce and self.parallel is not None else self.losses
            if self.options.schedule.differences:
                loss = self._differentiate_difference(module, part, ramp)
            else:
                loss = self._differentiate_exactly(module, name, part, ramp)
            row = torch.stack([x.detach() for x in loss])
            sums = row if sums is None else sums + row
            if quirks.sync_micro_batches and self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        assert sums is not None, "a step needs at least one micro-batch"
        return Loss(*(sums / len(pairs)).unbind())

    def turn(self, update: int) -> str:
        """Returns the name of the loss that an update minimises, such as "penalty" or "plain"."""
        return name_of_turn(self.objective, self.options.schedule, update)

    def has_gradients(self) -> bool:
        """Returns whether any parameter holds a gradient."""
        return any(p.grad is not None for p in self.weights)

    def average_gradients(self) -> None:
        """Averages the gradients over the processes, for an update without all_reduce."""
        for parameter in self.weights:
            if parameter.grad is not None:
                parameter.grad /= torch.distributed.get_world_size()
                torch.distributed.all_reduce(parameter.grad)

    def diagnose(
        self, batches: Batches, ramp: Tensor, update: int, attack_ramp: Tensor
    ) -> str | None:
        """Computes the losses and gradients of an update once more, without compiling, and keeps
        none.

        Returns the layer in which a value or a derivative stops being finite, or None if all are
        finite.
        """
        name = self.turn(update)
        module = LossModule(self.model, self.parts[name], self.options.precision)
        first = None
        for images_BCHW, targets in self._split(batches):
            images_BCHW = self._perturb(name, images_BCHW, targets, attack_ramp)
            if self.options.schedule.differences:
                images_BCHW = self.model.normalize(images_BCHW)  # type: ignore[operator]
            self.model.train(not self.options.quirks.train_in_eval_mode)
            inputs = images_BCHW.detach().requires_grad_(), targets, ramp
            found = Diagnosis().run(self.model, lambda: module(*inputs).total)  # noqa: B023
            first = first or found  # on to the next one, in which other processes may wait
        return first

    def _split(self, batches: Batches) -> list[tuple[Tensor, Tensor]]:
        """Returns images and targets of each micro-batch.

        Raises ValueError if the size of a batch or micro-batch does not divide.
        """
        pairs: list[tuple[Tensor, Tensor]] = []
        for images_BCHW, targets in batches:
            count = len(images_BCHW)
            size = self.micro_batch or count
            if count % size:
                raise ValueError(f"{count} images do not divide by micro_batch={size}")
            if size % self.divisor:
                raise ValueError(
                    f"schedule {self.options.schedule}: {size} images at a time are no multiple "
                    f"of {self.divisor}"
                )
            pairs += zip(images_BCHW.split(size), targets.split(size), strict=True)
        return pairs

    # ------------------------------------------------------------------ forward and backward

    def _differentiate_exactly(
        self, module: nn.Module, name: str, part: MicroBatch, ramp: Tensor
    ) -> Loss:
        """Runs the forward and backward of a loss that computes its own penalty."""
        if self.options.schedule.kind == "lazy":
            ramp = ramp * self.options.schedule.lazy_interval
        images_BCHW = part.images_BCHW
        if self.objective.needs_input_gradient and not self.options.is_compiled:
            images_BCHW = images_BCHW.detach().requires_grad_()
        with self._reduction(part.reduces):
            loss = self._forward(module, name, images_BCHW, part.targets, ramp)
            self._backward(loss.total / part.divisor)
        return loss

    def _differentiate_difference(self, module: nn.Module, part: MicroBatch, ramp: Tensor) -> Loss:
        """Runs the forwards and backwards of a finite difference, and returns its loss.

        One backward at the images gives both the direction of the difference and the weights'
        gradients of the cross-entropy there, whatever its coefficient.
        """
        objective, schedule = self.objective, self.options.schedule
        h, central = schedule.fd_step, schedule.kind == "central-difference"
        weight = objective.penalty_weight * objective.penalty_scale * ramp / h
        with torch.no_grad():
            here_BCHW = self.model.normalize(part.images_BCHW).detach()  # type: ignore[operator]
        coefficient = objective.ce_weight - weight * (not central)
        random_state = RandomState(self.device)
        with self._reduction(False):
            here = self._forward(module, "point", here_BCHW.requires_grad_(), part.targets, ramp)
            self._backward(here.ce * coefficient / part.divisor, here_BCHW)
        assert here_BCHW.grad is not None
        ce = here.ce.detach().clone()  # a CUDA graph overwrites its output when it runs again
        direction_BCHW = here_BCHW.grad.sign() * coefficient.sign()
        signs = (1, -1) if central else (1,)
        ces = [ce] if not central else []
        for index, sign in enumerate(signs):
            random_state.restore()  # the same dropout: only the images may differ between points
            with self._reduction(part.reduces and index == len(signs) - 1):
                point_BCHW = here_BCHW.detach() + sign * h * direction_BCHW
                there = self._forward(module, "point", point_BCHW, part.targets, ramp)
                self._backward(there.ce * (sign * weight / len(signs) / part.divisor))
            ces.append(there.ce.detach().clone())
        slope = (ces[0] - ces[1]) / (2 * h) if central else (ces[1] - ces[0]) / h
        penalty = objective.penalty_scale * slope
        total = objective.ce_weight * ce + objective.penalty_weight * ramp * penalty
        return Loss(total, ce, penalty, slope)

    def _forward(self, module: nn.Module, name: str, *inputs: Any) -> Loss:
        """Computes the loss with this name."""
        if self._graph_grads:  # also if an earlier forward found no memory for its backward
            torch.compiler.cudagraph_mark_step_begin()
        loss: Loss = module(name, *inputs)
        return loss

    def _backward(self, total: Tensor, *images: Tensor) -> None:
        """Adds to the gradients of the weights and of the given images, but of no others."""
        torch.autograd.backward(total, inputs=[*self.weights, *images])

    def _reduction(self, reduces: bool) -> contextlib.AbstractContextManager:
        """Returns a context in which DistributedDataParallel averages gradients if `reduces` is
        True."""
        if self.parallel is not None and not reduces:
            return self.parallel.no_sync()
        return contextlib.nullcontext()

    # ----------------------------------------------------------------------------- attack

    def _perturb(
        self, name: str, images_BCHW: Tensor, targets: Tensor, attack_ramp: Tensor
    ) -> Tensor:
        """Returns the images at which the loss with this name is computed, attacked if the method
        does so.

        The attack runs in eval mode, so that it sees the network as a user does and does not change
        the statistics of BatchNorm.
        """
        perturb: Callable[..., Tensor] | None = self.parts[name].perturb
        if perturb is None:
            return images_BCHW
        self.model.eval()
        with autocast(self.device.type, self.options.precision):
            network = in_precision(self.model, self.options.precision)
            return perturb(
                network, images_BCHW, targets, attack_ramp, gradient=self.attack_gradient
            )

    def attack_gradient(self, model: nn.Module, images_BCHW: Tensor, targets: Tensor) -> Gradient:
        """Returns the losses and input gradients that a step of an attack needs."""
        if not self.options.quirks.attack_weight_grads:
            if not self.options.is_compiled:
                images_BCHW = images_BCHW.detach().requires_grad_()
            return self.attack(images_BCHW, targets)
        images_BCHW = images_BCHW.detach().requires_grad_()
        with autocast(self.device.type, self.options.precision):
            loss_B = F.cross_entropy(model(images_BCHW), targets, reduction="none")
        grad_BCHW, *wasted = torch.autograd.grad(
            loss_B.sum(), [images_BCHW, *self.weights], allow_unused=True
        )
        if self.parallel is not None:
            for grad in wasted:
                if grad is not None:
                    torch.distributed.all_reduce(grad)
        return Gradient(loss_B.detach(), grad_BCHW)
