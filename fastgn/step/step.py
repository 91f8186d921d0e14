"""Computes the gradients of one update."""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from fastgn.attacks import Gradient
from fastgn.objectives import Loss, Objective, natural, on_subset, without_penalty
from fastgn.step.diagnosis import Diagnosis
from fastgn.step.double_backward import compile_double_backward
from fastgn.step.losses import AttackGradient, LossModule, LossModules
from fastgn.step.precision import PRECISIONS, autocast, in_precision, matmul_precision
from fastgn.step.retry import Randomness, out_of_memory
from fastgn.step.schedule import Schedule


class Step:
    """Accumulates the parameters' gradients of one update over its micro-batches.

    model: plain, on its device (`normalize` and `backbone`, see objectives.Objective). Not more
    than one forward or backward is run than the schedule needs; nothing here waits for the device,
    but for sync_micro_batches.
    precision: fp32; tf32; bf16, by autocast; bf16-pure, see InBfloat16.
    micro_batch: images that go through the network at a time, a divisor of every batch's; None:
    the batch. A torch.OutOfMemoryError halves it, and the update is made again from its beginning,
    with the same random numbers: nothing of it is lost. It raises where gradients from before the
    call would be; and of several processes, which halve together in their first updates at a size
    (two, and one of each of a schedule's losses), after those.
    cuda_graphs: replay each graph as one launch; compiled steps on CUDA alone.
    agree: (whether this process failed) -> whether any did, for several processes.
    Raises ValueError where the schedule does not fit the objective.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        schedule: Schedule = Schedule(),  # noqa: B008 - frozen
        compile: bool = True,
        precision: str = "fp32",
        activation_memory_budget: float = 1.0,
        micro_batch: int | None = None,
        cuda_graphs: bool = False,
        accumulation: str = "mean",
        train_in_eval_mode: bool = False,
        attack_weight_grads: bool = False,
        sync_micro_batches: bool = False,
        distributed: bool = False,
        agree: Callable[[bool], bool] | None = None,
    ):
        exact = schedule.kind in ("exact", "exact-eager")
        if not exact and not objective.needs_input_gradient:
            raise ValueError(f"schedule {schedule}: this objective has no penalty to schedule")
        if schedule.differences and not objective.differences:
            raise ValueError(f"schedule {schedule} takes the L1 norm of the loss's gradient alone")
        if not exact and objective.rest is not None:
            raise ValueError(f"schedule {schedule}: this objective takes turns already")
        if schedule.kind == "central-difference" and not objective.ce_weight:
            raise ValueError("central-difference finds its direction by the cross-entropy's sweep")
        if precision not in PRECISIONS:
            raise ValueError(f"precision {precision!r} should be one of {', '.join(PRECISIONS)}")
        self.model = model
        self.objective = objective
        self.schedule = schedule
        self._divisor = schedule.divisor
        self.accumulation = accumulation
        self.train_in_eval_mode = train_in_eval_mode
        self.precision = precision
        self.micro_batch = micro_batch
        self.attack_weight_grads = attack_weight_grads
        self.sync_micro_batches = sync_micro_batches
        self.distributed = distributed
        self.report: Callable[[str], object] = warnings.warn
        """Is told when the micro-batch was halved."""
        self._agree = agree
        self._proven = not distributed or agree is None or attack_weight_grads
        """Whether an update may begin its collectives without knowing that all can finish it."""
        self._whole: set[str] = set()
        """The losses of the updates that all processes have finished at this size."""
        self.device = next(model.parameters()).device
        self._weights = [p for p in model.parameters() if p.requires_grad]
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        self._statistics = [b for m in norms for b in m.buffers()]
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for buffer in self._statistics:
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
        self._kept_statistics = [(now, [b.clone() for b in now]) for now in by_dtype.values()]
        self._kept_grads: list[Tensor] = []

        self._compiled = compile and schedule.kind != "exact-eager"
        options: dict[str, Any] = {"activation_memory_budget": activation_memory_budget}
        if cuda_graphs and self._compiled and self.device.type == "cuda":
            # a graph's outputs live in its own memory until it runs again: gradients must not
            options["mode"] = "reduce-overhead"
            self._kept_grads = [torch.zeros_like(p) for p in self._weights]

        def compiled(module: nn.Module, differentiates: bool) -> nn.Module:
            if not self._compiled:
                return module
            positions = (0,) if differentiates else ()
            return compile_double_backward(module, differentiate=positions, **options)

        self._parts = self._objectives()
        self._attack = compiled(AttackGradient(model, precision), True)
        self._losses = LossModules(
            {
                name: compiled(LossModule(model, part, precision), part.needs_input_gradient)
                for name, part in self._parts.items()
            }
        )
        self._loss: nn.Module = self._losses
        if distributed:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self._loss = DistributedDataParallel(
                self._losses, device_ids=ids, gradient_as_bucket_view=True
            )

    def _objectives(self) -> dict[str, Objective]:
        """The losses that the schedule, or the objective, takes turns with."""
        objective, schedule = self.objective, self.schedule
        if schedule.differences:

            def at_point(model: Any, normalized: Tensor, targets: Tensor, ramp: Tensor) -> Loss:
                return natural(model.backbone, normalized, targets)

            return {"point": Objective(at_point, objective.perturb)}
        if schedule.kind == "lazy" and schedule.lazy_interval > 1:
            return {"penalty": objective, "plain": without_penalty(objective)}
        if schedule.kind == "subset":
            return {"penalty": on_subset(objective, schedule.subset_fraction)}
        if objective.rest is not None:
            return {"penalty": objective, "plain": objective.rest}
        return {"penalty": objective}

    def __call__(
        self,
        batches: Sequence[tuple[Tensor, Tensor]],
        ramp: Tensor,
        update: int = 0,
        attack_ramp: Tensor | None = None,
    ) -> Loss:
        """Adds to the parameters' .grad; returns the detached mean of the micro-batches' losses.

        batches: (images_BCHW in 0..1, targets) on the device, all of one size; ramp: scalar tensor
        there, in 0..1; update: its number, which a lazy schedule and turns go by; attack_ramp: the
        same for an attack's step, None means `ramp`.
        """
        attack_ramp = ramp if attack_ramp is None else attack_ramp
        attacks = any(part.perturb is not None for part in self._parts.values())
        if self.distributed and (attacks or not self._proven):
            for buffer in self._statistics:  # each rank's own until DDP's forward: not soon enough
                torch.distributed.broadcast(buffer, src=0)
        held = any(p.grad is not None for p in self._weights)
        while True:
            self._tried: set[str] = set()
            randomness = Randomness(self.device)
            for now, before in self._kept_statistics:
                torch._foreach_copy_(before, now)
            reason = None
            try:
                with matmul_precision(self.precision):
                    loss = self._update(batches, ramp, update, attack_ramp)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                reason = str(error)
            if self._agree is not None and not self._proven:
                if self._agree(reason is not None):
                    reason = reason or "another process ran out of memory"
                else:
                    self._join()
            elif reason is not None and self.distributed:  # the others wait in their collectives
                raise torch.OutOfMemoryError(reason)
            if reason is None:
                return loss
            if held:  # gradients of before the call, which are lost as well
                raise torch.OutOfMemoryError(reason)
            self._halve(len(batches[0][0]), reason)
            randomness.restore()
            for now, before in self._kept_statistics:
                torch._foreach_copy_(now, before)

    def _update(
        self,
        batches: Sequence[tuple[Tensor, Tensor]],
        ramp: Tensor,
        update: int,
        attack_ramp: Tensor,
    ) -> Loss:
        if self._kept_grads and not any(p.grad is not None for p in self._weights):
            torch._foreach_zero_(self._kept_grads)
            for parameter, grad in zip(self._weights, self._kept_grads, strict=True):
                parameter.grad = grad
        parts = [
            part
            for images_BCHW, targets in batches
            for part in zip(*(self._split(x) for x in (images_BCHW, targets)), strict=True)
        ]
        perturb = self._parts[self._turn(update)].perturb
        divisor = len(parts) if self.accumulation == "mean" else len(parts) // len(batches)
        sums: Tensor | None = None
        for index, (images_BCHW, targets) in enumerate(parts):
            if perturb is not None:
                images_BCHW = self._perturbed(perturb, images_BCHW, targets, attack_ramp)
            self.model.train(not self.train_in_eval_mode)
            last = index == len(parts) - 1
            run = self._difference if self.schedule.differences else self._double_backward
            loss = run(images_BCHW, targets, ramp, update, divisor, last)
            row = torch.stack([x.detach() for x in loss])
            sums = row if sums is None else sums + row
            if self.sync_micro_batches and self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        assert sums is not None, "a step needs at least one micro-batch"
        return Loss(*(sums / len(parts)).unbind())

    def diagnose(
        self,
        batches: Sequence[tuple[Tensor, Tensor]],
        ramp: Tensor,
        update: int,
        attack_ramp: Tensor,
    ) -> str | None:
        """Computes an update's losses and gradients once more, eagerly, and keeps none of them.

        Returns the layer in which a value or a derivative stops being finite, or None if all are.
        """
        part = self._parts[self._turn(update)]
        module = LossModule(self.model, part, self.precision)
        for whole in batches:
            for images_BCHW, targets in zip(*(self._split(x) for x in whole), strict=True):
                if part.perturb is not None:
                    images_BCHW = self._perturbed(part.perturb, images_BCHW, targets, attack_ramp)
                if self.schedule.differences:
                    images_BCHW = self.model.normalize(images_BCHW)  # type: ignore[operator]
                self.model.train(not self.train_in_eval_mode)
                inputs = images_BCHW.detach().requires_grad_(), targets, ramp
                found = Diagnosis().run(self.model, lambda: module(*inputs).total)  # noqa: B023
                if found is not None:
                    return found
        return None

    def _turn(self, update: int) -> str:
        """The name of the loss that an update has."""
        if self.schedule.differences:
            return "point"
        lazy = self.schedule.kind == "lazy" and update % self.schedule.lazy_interval != 0
        return "plain" if lazy or not self.objective.has_turn(update) else "penalty"

    def _split(self, batch: Tensor) -> Sequence[Tensor]:
        size = self.micro_batch or len(batch)
        if len(batch) % size:
            raise ValueError(f"{len(batch)} images do not divide by micro_batch={size}")
        if size % self._divisor:
            raise ValueError(
                f"schedule {self.schedule}: {size} images at a time are no multiple of "
                f"{self._divisor}"
            )
        return batch.split(size)

    def _double_backward(
        self,
        images_BCHW: Tensor,
        targets: Tensor,
        ramp: Tensor,
        update: int,
        divisor: int,
        last: bool,
    ) -> Loss:
        name = self._turn(update)
        if self.schedule.kind == "lazy":
            ramp = ramp * self.schedule.lazy_interval
        if self.objective.needs_input_gradient and not self._compiled:
            images_BCHW = images_BCHW.detach().requires_grad_()
        with self._sync(last):
            loss: Loss = self._forward(name, images_BCHW, targets, ramp)
            self._backward(loss.total / divisor)
        return loss

    def _difference(
        self,
        images_BCHW: Tensor,
        targets: Tensor,
        ramp: Tensor,
        update: int,
        divisor: int,
        last: bool,
    ) -> Loss:
        """The gradient of the differences. One sweep at the images gives the direction and the
        weights' gradients of the cross-entropy there, whatever its coefficient."""
        objective, h = self.objective, self.schedule.fd_step
        central = self.schedule.kind == "central-difference"
        weight = objective.penalty_weight * objective.penalty_scale * ramp / h
        with torch.no_grad():
            here_BCHW = self.model.normalize(images_BCHW).detach()  # type: ignore[operator]
        coefficient = objective.ce_weight - weight * (not central)
        randomness = Randomness(self.device)
        with self._sync(False):
            here = self._forward("point", here_BCHW.requires_grad_(), targets, ramp)
            self._backward(here.ce * coefficient / divisor, here_BCHW)
        assert here_BCHW.grad is not None
        ce = here.ce.detach().clone()  # a CUDA graph's output is overwritten when it runs again
        direction_BCHW = here_BCHW.grad.sign() * coefficient.sign()
        signs = (1, -1) if central else (1,)
        ces = [ce] if not central else []
        for index, sign in enumerate(signs):
            randomness.restore()  # the same dropout: it is the images alone that move
            with self._sync(last and index == len(signs) - 1):
                there_BCHW = here_BCHW.detach() + sign * h * direction_BCHW
                there = self._forward("point", there_BCHW, targets, ramp)
                self._backward(there.ce * (sign * weight / len(signs) / divisor))
            ces.append(there.ce.detach().clone())
        slope = (ces[0] - ces[1]) / (2 * h) if central else (ces[1] - ces[0]) / h
        penalty = objective.penalty_scale * slope
        total = objective.ce_weight * ce + objective.penalty_weight * ramp * penalty
        return Loss(total, ce, penalty, slope)

    def _forward(self, name: str, *inputs: Any) -> Loss:
        self._tried.add(name)
        if self._kept_grads:  # even where an earlier forward has found no memory for its backward
            torch.compiler.cudagraph_mark_step_begin()
        # an update that may be thrown away stays on its own rank
        return (self._loss if self._proven else self._losses)(name, *inputs)

    def _backward(self, total: Tensor, *images: Tensor) -> None:
        """Into the weights, and into no image that is not asked for."""
        torch.autograd.backward(total, inputs=[*self._weights, *images])

    def _join(self) -> None:
        """What DDP does in a backward, for an update made without it that all have finished."""
        # the first one is followed by the optimizer's allocating its state
        self._proven = self._whole == {*self._losses}
        self._whole |= self._tried
        for parameter in self._weights:
            if parameter.grad is not None:
                parameter.grad /= torch.distributed.get_world_size()
                torch.distributed.all_reduce(parameter.grad)

    def _halve(self, batch_size: int, reason: str) -> None:
        """Takes the largest divisor of the batch that is at most half the micro-batch, and drops
        what the failed update has left."""
        size = self.micro_batch or batch_size
        sizes = range(self._divisor, size // 2 + 1, self._divisor)
        fitting = [n for n in sizes if batch_size % n == 0]
        if not fitting:
            raise torch.OutOfMemoryError(reason)
        self.micro_batch = fitting[-1]
        for parameter in self._weights:
            parameter.grad = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._whole.clear()
        self.report(
            f"out of memory with {size} images at a time: going on with {self.micro_batch}, the "
            "same global batch"
        )

    def _perturbed(
        self, perturb: Callable[..., Tensor], images_BCHW: Tensor, targets: Tensor, ramp: Tensor
    ) -> Tensor:
        """The attack sees the network as a user would, in eval mode, and leaves BatchNorm alone."""
        self.model.eval()
        with autocast(self.device.type, self.precision):
            return perturb(
                in_precision(self.model, self.precision),
                images_BCHW,
                targets,
                ramp,
                gradient=self._attack_gradient,
            )

    def _sync(self, last: bool) -> contextlib.AbstractContextManager:
        """Gradients are all-reduced once an update: in its last backward."""
        if isinstance(self._loss, DistributedDataParallel) and not last:
            return self._loss.no_sync()
        return contextlib.nullcontext()

    def _attack_gradient(self, model: nn.Module, images_BCHW: Tensor, targets: Tensor) -> Gradient:
        if not self.attack_weight_grads:
            if not self._compiled:
                images_BCHW = images_BCHW.detach().requires_grad_()
            return self._attack(images_BCHW, targets)
        images_BCHW = images_BCHW.detach().requires_grad_()
        with autocast(self.device.type, self.precision):
            loss_B = F.cross_entropy(model(images_BCHW), targets, reduction="none")
        grad_BCHW, *wasted = torch.autograd.grad(
            loss_B.sum(), [images_BCHW, *self._weights], allow_unused=True
        )
        if self.distributed:
            for grad in wasted:
                if grad is not None:
                    torch.distributed.all_reduce(grad)
        return Gradient(loss_B.detach(), grad_BCHW)
