"""How a step runs: compiled or eager double backprop, accumulation, precision.

The exact step is one graph: forward, input gradient and penalty are traced together, and its
ordinary ``.backward()`` is the second differentiation. ``torch.compile(model)`` with the gradient
taken outside raises; the whole loss has to be inside.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastgn.attacks import Gradient, leaf_gradient
from fastgn.objectives import Loss, Objective

TRACE_FLAG = "trace_autograd_ops"
"""torch._dynamo.config: traces torch.autograd.grad instead of breaking the graph at it."""


class DoubleBackward(nn.Module):
    """See compile_double_backward. `module` is the wrapped one; its parameters are this one's."""

    _compiled: Callable[..., Any]

    def __init__(
        self, module: nn.Module, differentiate: Sequence[int] | None, budget: float, options: dict
    ):
        super().__init__()
        self.module = module
        self.differentiate = differentiate
        self._budget = budget
        # not a submodule: its parameters would stand in the state dict a second time
        compiled = torch.compile(module, fullgraph=True, dynamic=False, **options)
        self.__dict__["_compiled"] = compiled

    def forward(self, *inputs: Any) -> Any:
        inputs = tuple(
            # dynamo refuses requires_grad_() inside the graph, so the leaves are made out here
            x.detach().requires_grad_() if self._needs_leaf(i, x) else x
            for i, x in enumerate(inputs)
        )
        with (
            # optimize_ddp would cut the graph at DDP's buckets, between a gradient and its input
            torch._dynamo.config.patch({TRACE_FLAG: True, "optimize_ddp": False}),
            torch._functorch.config.patch(activation_memory_budget=self._budget),
        ):
            return self._compiled(*inputs)

    def _needs_leaf(self, index: int, value: Any) -> bool:
        wanted = self.differentiate is None or index in self.differentiate
        return (
            wanted
            and isinstance(value, Tensor)
            and value.is_floating_point()
            and not value.requires_grad
        )


def compile_double_backward(
    module: nn.Module,
    *,
    differentiate: Sequence[int] | None = None,
    activation_memory_budget: float = 1.0,
    **options: Any,
) -> nn.Module:
    """Compiles a loss that itself differentiates: gradient penalties, physics-informed residuals,
    forces.

    module: its forward(*tensors) returns the loss (a tensor, or a tuple with it), calling
    ``torch.autograd.grad(..., create_graph=True)`` on the way. The result is called in the same way
    and trained with an ordinary ``.backward()``; wrap it in DistributedDataParallel, not the other
    way round.
    differentiate: positions of the inputs that `module` differentiates with respect to; None means
    every floating-point input. Those that do not require grad are replaced by leaves that do, and
    the backward computes their gradient too: name no more than are needed.
    activation_memory_budget: share of the saved activations to keep, the rest is recomputed.
    options: passed on to torch.compile.

    The graph is compiled at the first call, for these shapes: give every batch the same. A graph
    break raises, for a broken graph could train on a wrong gradient.
    """
    return DoubleBackward(module, differentiate, activation_memory_budget, options)


class LossModule(nn.Module):
    """forward(images, targets, ramp) -> Loss: the whole loss in one module, so that it compiles as
    one graph and DistributedDataParallel sees an ordinary backward."""

    def __init__(self, model: nn.Module, objective: Objective, precision: str):
        super().__init__()
        self.model = model
        self.objective = objective
        self.precision = precision

    def forward(self, images_BCHW: Tensor, targets: Tensor, ramp: Tensor) -> Loss:
        with autocast(images_BCHW.device.type, self.precision):
            return self.objective.loss(self.model, images_BCHW, targets, ramp)


def autocast(device_type: str, precision: str) -> contextlib.AbstractContextManager:
    """bf16 autocast, or nothing for fp32."""
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=precision == "bf16")


class AttackGradient(nn.Module):
    """forward(images, targets) -> Gradient: what an attack step needs, as one graph of its own."""

    def __init__(self, model: nn.Module, precision: str):
        super().__init__()
        self.model = model
        self.precision = precision

    def forward(self, images_BCHW: Tensor, targets: Tensor) -> Gradient:
        with autocast(images_BCHW.device.type, self.precision):
            return leaf_gradient(self.model, images_BCHW, targets)


class Step:
    """Accumulates the parameters' gradients of one update over its micro-batches.

    model: plain, on its device (`normalize` and `backbone`, see objectives.Objective). Not more
    than one forward or backward is run than the method needs; nothing here waits for the device,
    but for sync_micro_batches.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        compile: bool = True,
        precision: str = "fp32",
        activation_memory_budget: float = 1.0,
        accumulation: str = "mean",
        train_in_eval_mode: bool = False,
        attack_weight_grads: bool = False,
        sync_micro_batches: bool = False,
        distributed: bool = False,
    ):
        self.model = model
        self.objective = objective
        self.accumulation = accumulation
        self.train_in_eval_mode = train_in_eval_mode
        self.precision = precision
        self.attack_weight_grads = attack_weight_grads
        self.sync_micro_batches = sync_micro_batches
        self.distributed = distributed
        device = next(model.parameters()).device
        self.device = device

        loss: nn.Module = LossModule(model, objective, precision)
        attack: nn.Module = AttackGradient(model, precision)
        if compile:
            differentiate = (0,) if objective.needs_input_gradient else ()
            loss = compile_double_backward(
                loss, differentiate=differentiate, activation_memory_budget=activation_memory_budget
            )
            attack = compile_double_backward(attack, differentiate=(0,))
        self._attack = attack
        if distributed:
            ids = [device.index] if device.type == "cuda" else None
            loss = DistributedDataParallel(loss, device_ids=ids, gradient_as_bucket_view=True)
        self._loss = loss
        self._statistics: list[Tensor] = []
        """BatchNorm's, each rank's own until DDP's forward: and an attack comes before that."""
        if distributed and objective.perturb is not None:
            norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
            self._statistics = [b for m in norms for b in m.buffers()]

    def __call__(self, batches: Sequence[tuple[Tensor, Tensor]], ramp: Tensor) -> Loss:
        """Adds to the parameters' .grad; returns the detached mean of the micro-batches' losses.

        batches: (images_BCHW in 0..1, targets) on the device; ramp: scalar tensor there, in 0..1.
        """
        divisor = len(batches) if self.accumulation == "mean" else 1
        sums: Tensor | None = None
        for index, (images_BCHW, targets) in enumerate(batches):
            if self.objective.perturb is not None:
                images_BCHW = self._perturbed(images_BCHW, targets, ramp)
            self.model.train(not self.train_in_eval_mode)
            with self._no_sync(last=index == len(batches) - 1):
                if self.objective.needs_input_gradient:
                    images_BCHW = images_BCHW.detach().requires_grad_()
                loss = self._loss(images_BCHW, targets, ramp)
                (loss.total / divisor).backward()
            row = torch.stack([x.detach() for x in loss])
            sums = row if sums is None else sums + row
            if self.sync_micro_batches and self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        assert sums is not None, "a step needs at least one micro-batch"
        return Loss(*(sums / len(batches)).unbind())

    def _perturbed(self, images_BCHW: Tensor, targets: Tensor, ramp: Tensor) -> Tensor:
        """The attack sees the network as a user would, in eval mode, and leaves BatchNorm alone."""
        assert self.objective.perturb is not None
        self.model.eval()
        for buffer in self._statistics:
            torch.distributed.broadcast(buffer, src=0)
        with autocast(self.device.type, self.precision):
            return self.objective.perturb(
                self.model, images_BCHW, targets, ramp, gradient=self._attack_gradient
            )

    def _no_sync(self, last: bool) -> contextlib.AbstractContextManager:
        """Gradients are all-reduced once an update: in its last backward."""
        if isinstance(self._loss, DistributedDataParallel) and not last:
            return self._loss.no_sync()
        return contextlib.nullcontext()

    def _attack_gradient(self, model: nn.Module, images_BCHW: Tensor, targets: Tensor) -> Gradient:
        images_BCHW = images_BCHW.detach().requires_grad_()
        if not self.attack_weight_grads:
            return self._attack(images_BCHW, targets)
        with autocast(self.device.type, self.precision):
            loss_B = F.cross_entropy(model(images_BCHW), targets, reduction="none")
        weights = [p for p in model.parameters() if p.requires_grad]
        grad_BCHW, *wasted = torch.autograd.grad(
            loss_B.sum(), [images_BCHW, *weights], allow_unused=True
        )
        if self.distributed:
            for grad in wasted:
                if grad is not None:
                    torch.distributed.all_reduce(grad)
        return Gradient(loss_B.detach(), grad_BCHW)


def graph_count() -> int:
    """Graphs that torch.compile has made in this process: more than a step needs means
    recompilation."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
