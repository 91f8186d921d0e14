"""Computes the gradients of one update."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastgn.attacks import Gradient
from fastgn.loss_scale import LossScale
from fastgn.objectives import Loss, Objective
from fastgn.step.diagnosis import Diagnosis
from fastgn.step.double_backward import compile_double_backward
from fastgn.step.gradients import (
    GRAD_DTYPES,
    GradientBuffer,
    OneRank,
    PreparedSum,
    Ranks,
    prepare_means,
    sum_prepared,
)
from fastgn.step.losses import AttackGradient, LossModule, name_of_turn, split_objective
from fastgn.step.options import StepOptions
from fastgn.step.overlap import (
    COMPILE_OPTIONS,
    CUDA_GRAPHS,
    Bucket,
    SummedInBackward,
    find_default_group,
    make_buckets,
    split_sums,
)
from fastgn.step.precision import autocast, in_precision, is_fp16, matmul_precision
from fastgn.step.random_state import RandomState
from fastgn.step.schedule import check_schedule

Batches = Sequence[tuple[Tensor, Tensor]]
"""Pairs of images (B, C, H, W) in 0..1 and targets, on the device. All have the same size B."""


class MicroBatch(NamedTuple):
    """Images that pass through the network at one time, and how their gradients are averaged."""

    images_BCHW: Tensor
    targets: Tensor
    divisor: int
    """The loss is divided by this number before its backward. 1 in fp16, see `factor`."""
    factor: Tensor | None
    """Scalar by which the weights' gradients are multiplied, or None for 1. In fp16, it undoes the
    scale of the loss. It also divides by the number of micro-batches, because a divided loss would
    underflow sooner."""


class PeerOutOfMemory(torch.OutOfMemoryError):
    """Raised in one process because another process has run out of memory in the same update."""

    def __init__(self) -> None:
        super().__init__("another process ran out of memory")


class Step:
    """Computes the gradients of one update, in one or more micro-batches.

    model: a classifier with `normalize` and `backbone` (see objectives.Objective), on its device.
    options: see StepOptions.
    ranks: the processes that compute an update together. If there are several, the gradients are
    this process's part of the mean until `sum_over_ranks` is called.

    Runs only the forwards and backwards that the schedule needs. Never waits for the device, except
    with Quirks.sync_micro_batches. If memory runs out, PyTorch's error is raised, which
    retry.RetryingStep handles. Raises ValueError if the schedule does not fit the objective.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        options: StepOptions = StepOptions(),  # noqa: B008 - frozen
        *,
        ranks: Ranks = OneRank(),  # noqa: B008 - without state
    ):
        check_schedule(options.schedule, objective)
        self.model = model
        self.objective = objective
        self.options = options
        self.ranks = ranks
        self.micro_batch = options.micro_batch
        """Number of images that pass through the network at a time. None means the whole batch."""
        self.divisor = options.schedule.divisor
        """The number that must divide the size of a micro-batch."""
        self.device = next(model.parameters()).device
        self.loss_scale = LossScale(self.device) if is_fp16(options.precision) else None
        """Scale of the losses in fp16, which Updater adapts after each update. None in other
        precisions."""
        self.weights = [p for p in model.parameters() if p.requires_grad]
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        self.statistics = [b for m in norms for b in m.buffers()]
        """The buffers of the BatchNorm layers."""
        cuda_graphs = options.cuda_graphs and options.is_compiled and self.device.type == "cuda"
        self._compile_mode = {"mode": "reduce-overhead"} if cuda_graphs else {}
        self.gradients = GradientBuffer(self.weights, GRAD_DTYPES[options.grad_dtype])
        self.is_committed = False
        """Whether the present update has begun a collective. In this case a process cannot repeat
        the update alone, because the other processes would not repeat the collective."""
        self.is_summed = False
        """Whether the backward of the present update also sums the gradients over the processes."""

        self.parts = split_objective(objective, options.schedule)
        self.attack = self._compile(AttackGradient(model, options.precision), True)
        self.losses: dict[str, nn.Module] = {}
        """Name of a loss, such as "penalty" -> module that computes this loss. The module is
        compiled if the options say so. See `split_objective` for the names."""
        self.overlapped: dict[str, nn.Module] = {}
        """Name of a loss, such as "penalty" -> module that computes this loss, and whose backward
        also sums the gradients over the processes. Empty unless there are several processes with
        --grad-sync overlap."""
        self._buckets: list[Bucket] = []
        overlaps = options.grad_sync == "overlap" and ranks.size > 1
        if overlaps and not options.schedule.differences:
            self._buckets = make_buckets(self.weights, GRAD_DTYPES[options.grad_dtype])
        for name, part in self.parts.items():
            module = LossModule(model, part, options.precision)
            self.losses[name] = self._compile(module, part.needs_input_gradient)
            if self._buckets:
                summed = SummedInBackward(module, self._buckets, find_default_group())
                chosen = COMPILE_OPTIONS | (CUDA_GRAPHS if cuda_graphs else {})
                self.overlapped[name] = self._compile(
                    summed, part.needs_input_gradient, options=chosen
                )

    def _compile(self, module: nn.Module, differentiates: bool, **options: Any) -> nn.Module:
        """Returns `module`, compiled if the step's options say so.

        differentiates: whether the module computes a gradient with respect to its first input.
        options: arguments of torch.compile. If none are given, the step's own arguments are used,
        which turn on CUDA graphs if they are wanted.
        """
        if not self.options.is_compiled:
            return module
        return compile_double_backward(
            module,
            differentiate=(0,) if differentiates else (),
            activation_memory_budget=self.options.activation_memory_budget,
            **(options or self._compile_mode),
        )

    def __call__(
        self,
        batches: Batches,
        ramp: Tensor,
        update: int = 0,
        attack_ramp: Tensor | None = None,
    ) -> Loss:
        """Adds the gradients of an update to the parameters' .grad.

        Returns the mean of the micro-batches' losses, detached.
        batches: images and targets. The losses of several batches are averaged (or summed, see
        Quirks.accumulation).
        ramp: scalar tensor in 0..1 on the device, the strength of the penalty.
        update: index of the update, from 0. If the updates minimise different losses in turn, the
        index decides which loss this update minimises.
        attack_ramp: scalar tensor in 0..1 on the device, which multiplies the step size of an
        attack. None means `ramp`.
        """
        with matmul_precision(self.options.precision):
            return self._accumulate(
                batches, ramp, update, ramp if attack_ramp is None else attack_ramp
            )

    def _accumulate(self, batches: Batches, ramp: Tensor, update: int, attack_ramp: Tensor) -> Loss:
        """Runs the forward and backward of each micro-batch of an update. Returns the mean of the
        losses. See __call__ for the arguments."""
        name, quirks = self.turn(update), self.options.quirks
        self.is_committed = self.is_summed = False
        pairs = self._split(batches)
        overlaps = bool(self.overlapped) and len(pairs) == 1 and not self.has_gradients()
        divisor = len(pairs) if quirks.accumulation == "mean" else len(pairs) // len(batches)
        divisor *= self.ranks.size
        factor = None
        if self.loss_scale is not None:
            divisor, factor = 1, 1 / (self.loss_scale.scale * divisor)
        sums: Tensor | None = None
        for images_BCHW, targets in pairs:
            images_BCHW = self._perturb(name, images_BCHW, targets, attack_ramp)
            self.model.train(not quirks.train_in_eval_mode)
            part = MicroBatch(images_BCHW, targets, divisor, factor)
            if self.options.communicates:
                self.confirm()
                self.is_committed = True
            if overlaps:
                loss = self._differentiate_and_sum(name, part, ramp)
            elif self.options.schedule.differences:
                loss = self._differentiate_difference(part, ramp)
            else:
                loss = self._differentiate_exactly(name, part, ramp)
            row = torch.stack([x.detach() for x in loss])
            sums = row if sums is None else sums + row
            if quirks.sync_micro_batches and self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        assert sums is not None, "a step needs at least one micro-batch"
        return Loss(*(sums / len(pairs)).unbind())

    def turn(self, update: int) -> str:
        """Returns the name of the loss that an update minimises, such as "penalty" or "plain".

        update: index of the update, from 0. Some objectives and schedules alternate between two
        losses.
        """
        return name_of_turn(self.objective, self.options.schedule, update)

    def has_gradients(self) -> bool:
        """Returns whether any parameter holds a gradient."""
        return any(p.grad is not None for p in self.weights)

    def prepare_sums(self) -> list[PreparedSum]:
        """Returns the sums that `sum_over_ranks` will compute. Allocates all memory for them."""
        sums = [] if self.is_summed else self.gradients.prepare_sums()
        if not (self.options.quirks.train_in_eval_mode or self.options.communicates):
            sums += prepare_means(self.statistics, self.ranks.size)
        return sums

    def sum_over_ranks(self, sums: Sequence[PreparedSum]) -> None:
        """Sums the gradients over the processes, and averages the statistics of BatchNorm.

        Each process has divided its loss, or in fp16 its gradients, by the number of processes. So
        the sum of the gradients is the gradient of the mean loss. Gradients that the backward has
        summed already are left as they are. Afterwards the gradients and statistics are the same in
        all processes.

        sums: what `prepare_sums` has returned. This method itself allocates no memory.
        """
        sum_prepared(sums)
        self.is_committed = self.is_summed = False

    def confirm(self) -> None:
        """Raises PeerOutOfMemory if a process has run out of memory in this update.

        Call this before each collective in the middle of an update. A process without memory would
        never begin that collective, and the other processes would wait for it.
        """
        if self.ranks.any(False):
            raise PeerOutOfMemory

    def diagnose(
        self, batches: Batches, ramp: Tensor, update: int, attack_ramp: Tensor
    ) -> str | None:
        """Finds the layer in which a value or a derivative of an update stops being finite.

        Computes the losses and gradients once more, without compiling, and discards them. Returns a
        text that names the layer, or None if everything is finite.
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
            found = Diagnosis().run(
                self.model,
                lambda: self._scaled(module(*inputs, **self._scale()).total),  # noqa: B023
            )
            # always check all batches, because other processes may wait for this one in a forward
            first = first or found
        return first

    def _split(self, batches: Batches) -> list[tuple[Tensor, Tensor]]:
        """Divides batches into micro-batches. Returns (images, targets) of each micro-batch.

        Raises ValueError if a batch cannot be divided into micro-batches of the right size.
        """
        pairs: list[tuple[Tensor, Tensor]] = []
        for images_BCHW, targets in batches:
            count = len(images_BCHW)
            size = self.micro_batch or count
            if count % size:
                raise ValueError(f"micro_batch={size} does not divide a batch of {count} images")
            if size % self.divisor:
                raise ValueError(
                    f"schedule {self.options.schedule} got {size} images at a time, but this must "
                    f"be a multiple of {self.divisor}"
                )
            pairs += zip(images_BCHW.split(size), targets.split(size), strict=True)
        return pairs

    # ------------------------------------------------------------------ forward and backward

    def _differentiate_exactly(self, name: str, part: MicroBatch, ramp: Tensor) -> Loss:
        """Runs the forward and backward of a loss that computes its own penalty.

        name: name of the loss. part: the micro-batch. ramp: strength of the penalty, in 0..1.
        """
        loss = self._forward(self.losses[name], *self._inputs(part, ramp), **self._scale())
        self._backward(part, loss.total / part.divisor)
        return loss

    def _differentiate_and_sum(self, name: str, part: MicroBatch, ramp: Tensor) -> Loss:
        """Runs the forward and backward of an update that has only one micro-batch. The backward
        also sums the gradients over the processes.

        name: name of the loss. part: the micro-batch. ramp: strength of the penalty, in 0..1.
        """
        slots = [bucket.slot for bucket in self._buckets]
        inputs = *self._inputs(part, ramp), *slots
        loss = self._forward(self.overlapped[name], *inputs, **self._scale())
        self.confirm()
        self.is_committed = self.is_summed = True
        total = self._scaled(loss.total / part.divisor)
        sums = torch.autograd.grad(total, slots, allow_unused=True)
        self.gradients.add(split_sums(sums, self._buckets, self.weights), part.factor)
        return loss

    def _scale(self) -> dict[str, Tensor]:
        """Returns {"loss_scale": tensor} for a loss that differentiates in fp16, otherwise {}."""
        return {} if self.loss_scale is None else {"loss_scale": self.loss_scale.scale}

    def _scaled(self, total: Tensor) -> Tensor:
        """Returns a loss, multiplied by the scale of the losses in fp16."""
        return total if self.loss_scale is None else self.loss_scale.multiply(total)

    def _inputs(self, part: MicroBatch, ramp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the arguments with which a loss is called: images, targets and ramp.

        If the loss needs the gradient of the images and is not compiled, the images require grad.
        ramp: strength of the penalty. With --schedule lazy it is multiplied by lazy_interval,
        because the updates in between have no penalty.
        """
        if self.options.schedule.kind == "lazy":
            ramp = ramp * self.options.schedule.lazy_interval
        images_BCHW = part.images_BCHW
        if self.objective.needs_input_gradient and not self.options.is_compiled:
            images_BCHW = images_BCHW.detach().requires_grad_()
        return images_BCHW, part.targets, ramp

    def _differentiate_difference(self, part: MicroBatch, ramp: Tensor) -> Loss:
        """Runs the forwards and backwards of a micro-batch whose penalty is a finite difference,
        and returns its loss.

        The first backward, at the images themselves, differentiates the cross-entropy times a
        coefficient. It gives a part of the weights' gradients, and the gradient of the images. The
        images are then shifted in the direction of this gradient's signs. A negative coefficient
        would reverse the direction, so the signs are multiplied by the coefficient's sign. Another
        backward at each set of shifted images gives the other part of the weights' gradients.

        part: the micro-batch. ramp: strength of the penalty, in 0..1.
        """
        objective, schedule = self.objective, self.options.schedule
        h, central = schedule.fd_step, schedule.kind == "central-difference"
        weight = objective.penalty_weight * objective.penalty_scale * ramp / h
        with torch.no_grad():
            here_BCHW = self.model.normalize(part.images_BCHW).detach()  # type: ignore[operator]
        coefficient = objective.ce_weight - weight * (not central)
        random_state = RandomState(self.device)
        here = self._forward(self.losses["point"], here_BCHW.requires_grad_(), part.targets, ramp)
        (grad_BCHW,) = self._backward(part, here.ce * coefficient / part.divisor, here_BCHW)
        assert grad_BCHW is not None
        ce = here.ce.detach().clone()  # copied, because a CUDA graph overwrites its output later
        direction_BCHW = grad_BCHW.sign() * coefficient.sign()
        signs = (1, -1) if central else (1,)
        ces = [ce] if not central else []
        for sign in signs:
            random_state.restore()  # draw the same dropout again, so that only the images differ
            point_BCHW = here_BCHW.detach() + sign * h * direction_BCHW
            there = self._forward(self.losses["point"], point_BCHW, part.targets, ramp)
            self._backward(part, there.ce * (sign * weight / len(signs) / part.divisor))
            ces.append(there.ce.detach().clone())
        slope = (ces[0] - ces[1]) / (2 * h) if central else (ces[1] - ces[0]) / h
        penalty = objective.penalty_scale * slope
        total = objective.ce_weight * ce + objective.penalty_weight * ramp * penalty
        return Loss(total, ce, penalty, slope)

    def _forward(self, module: nn.Module, *inputs: Any, **scale: Tensor) -> Loss:
        """Computes a loss with a module of `losses` or `overlapped`.

        scale: {"loss_scale": tensor} in fp16, otherwise empty.
        """
        # Mark a new step, because a forward may have run out of memory before its backward.
        # Otherwise CUDA graphs would still wait for the backward of the earlier forward.
        if self._compile_mode:
            torch.compiler.cudagraph_mark_step_begin()
        loss: Loss = module(*inputs, **scale)
        return loss

    def _backward(
        self, part: MicroBatch, total: Tensor, *images: Tensor
    ) -> Sequence[Tensor | None]:
        """Differentiates the loss of a micro-batch, scaled in fp16. Adds the gradients of the
        weights to their .grad, and returns the scaled gradients with respect to `images`."""
        inputs = [*self.weights, *images]
        grads = torch.autograd.grad(self._scaled(total), inputs, allow_unused=True)
        self.gradients.add(grads[: len(self.weights)], part.factor)
        return grads[len(self.weights) :]

    # ----------------------------------------------------------------------------- attack

    def _perturb(
        self, name: str, images_BCHW: Tensor, targets: Tensor, attack_ramp: Tensor
    ) -> Tensor:
        """Returns the images at which a loss is computed. If the method has an attack, the images
        are attacked.

        name: name of the loss. attack_ramp: factor of the attack's step size, in 0..1.

        During the attack the network is in eval mode, as in later use. In this way the attack also
        leaves the statistics of BatchNorm unchanged.
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
        """Returns the losses and input gradients that a step of an attack needs.

        With Quirks.attack_weight_grads, weight gradients are computed, summed and discarded too.
        """
        if not self.options.quirks.attack_weight_grads:
            if not self.options.is_compiled:
                images_BCHW = images_BCHW.detach().requires_grad_()
            return self.attack(images_BCHW, targets, **self._scale())
        images_BCHW = images_BCHW.detach().requires_grad_()
        with autocast(self.device.type, self.options.precision):
            loss_B = F.cross_entropy(model(images_BCHW), targets, reduction="none")
        scale = None if self.loss_scale is None else self.loss_scale.scale / len(images_BCHW)
        total = loss_B.sum() if scale is None else loss_B.sum() * scale
        grad_BCHW, *wasted = torch.autograd.grad(
            total, [images_BCHW, *self.weights], allow_unused=True
        )
        grad_BCHW = grad_BCHW if scale is None else grad_BCHW / scale
        if self.ranks.size > 1:
            self.confirm()
            for grad in wasted:
                if grad is not None:
                    torch.distributed.all_reduce(grad)
        return Gradient(loss_B.detach(), grad_BCHW)
