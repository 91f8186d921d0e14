"""How a step runs: the schedule of its passes, compiled or eager, micro-batches, precision.

The exact step is one graph: forward, input gradient and penalty are traced together, and its
ordinary ``.backward()`` is the second differentiation. ``torch.compile(model)`` with the gradient
taken outside raises; the whole loss has to be inside.
"""

import contextlib
import dataclasses
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fastgn.attacks import Gradient, leaf_gradient
from fastgn.objectives import Loss, Objective, natural, on_subset, without_penalty
from fastgn.step.diagnosis import Diagnosis

SCHEDULES = ("exact", "exact-eager", "finite-difference", "central-difference", "lazy", "subset")
PRECISIONS = ("fp32", "tf32", "bf16", "bf16-pure")

COMPILER = {
    "trace_autograd_ops": True,  # torch.autograd.grad, instead of breaking the graph at it
    "optimize_ddp": False,  # it would cut the graph between a gradient and its input
    "recompile_limit": 64,  # of all losses of a process together: they share a function's code
}
"""torch._dynamo.config where a DoubleBackward runs."""


@torch.library.custom_op("fastgn::zero", mutates_args=())
def zero(token: Tensor, shape: Sequence[int]) -> Tensor:
    """One zero, expanded to `shape`, that requires grad because `token` does, and whose own
    gradient nobody computes."""
    return token.new_zeros(()).expand(shape)


@zero.register_fake
def _zero_fake(token: Tensor, shape: Sequence[int]) -> Tensor:
    return token.new_empty(()).expand(shape)


zero.register_autograd(lambda ctx, grad: (None, None))


def leaf(x: Tensor, token: Tensor) -> Tensor:
    """`x`, to be differentiated by: ``requires_grad_()`` cannot stand inside a compiled graph, and
    for a leaf made outside the backward computes and keeps a gradient. The sum fuses with what
    comes next."""
    return x + zero(token, x.shape)


class DoubleBackward(nn.Module):
    """See compile_double_backward. `module` is the wrapped one; its parameters are this one's.

    A copy, and what is read from a pickle, has weights and a compiled graph of its own.
    """

    def __init__(
        self,
        module: nn.Module,
        differentiate: Sequence[int | str] | None,
        budget: float,
        options: dict[str, Any],
    ):
        super().__init__()
        self.module = module
        self._differentiate = differentiate
        self._budget = budget
        self._options = options
        self._forget()

    def _forget(self) -> None:
        """Drops what belongs to this object alone."""
        self._compiled: Callable[..., Any] | None = None
        self._tokens: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_compiled": None, "_tokens": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def forward(self, *inputs: Any, **named: Any) -> Any:
        needed = self._needed(inputs, named)
        tokens = [
            self._token(x) if needs else None
            for x, needs in zip(tree_leaves((inputs, named)), needed, strict=True)
        ]
        if self._compiled is None:
            # not a submodule: its parameters would stand in the state dict a second time
            self._compiled = torch.compile(
                self._on_leaves, fullgraph=True, dynamic=False, **self._options
            )
        with (
            torch._dynamo.config.patch(COMPILER),
            torch._functorch.config.patch(
                activation_memory_budget=self._budget,
                # what B and B' share is otherwise kept as well as its own inputs: a fifteenth of
                # the bytes that gradnorm moves (benchmarks/NOTES.md)
                ban_recompute_used_far_apart=False,
            ),
        ):
            return self._compiled(tokens, inputs, named)

    def _needed(self, inputs: tuple, named: dict[str, Any]) -> list[bool]:
        """Returns for each leaf of the inputs, nested or not, whether it is differentiated by and
        does not require grad."""
        needed = []
        for key, value in itertools.chain(enumerate(inputs), named.items()):
            wanted = self._differentiate is None or key in self._differentiate
            needed += [
                wanted and isinstance(x, Tensor) and x.is_floating_point() and not x.requires_grad
                for x in tree_leaves(value)
            ]
        return needed

    def _on_leaves(self, tokens: list[Tensor | None], inputs: tuple, named: dict[str, Any]) -> Any:
        flat, structure = tree_flatten((inputs, named))
        leaves: list[Any] = []
        for index, (x, token) in enumerate(zip(flat, tokens, strict=True)):
            if token is None:
                leaves.append(x)
                continue
            before = [j for j in range(index) if flat[j] is x and tokens[j] is not None]
            # a tensor given twice is one variable
            leaves.append(leaves[before[0]] if before else leaf(x, token))
        inputs, named = tree_unflatten(leaves, structure)
        return self.module(*inputs, **named)

    def _token(self, x: Tensor) -> Tensor:
        key = x.device, x.dtype
        if key not in self._tokens:
            self._tokens[key] = torch.zeros((), device=x.device, dtype=x.dtype, requires_grad=True)
        return self._tokens[key]


def compile_double_backward(
    module: nn.Module,
    *,
    differentiate: Sequence[int | str] | None = None,
    activation_memory_budget: float = 1.0,
    **options: Any,
) -> nn.Module:
    """Compiles a loss that itself differentiates: gradient penalties, physics-informed residuals,
    forces.

    module: its forward returns the loss (a tensor, or a tuple with it), calling
    ``torch.autograd.grad(..., create_graph=True)`` on the way. Its inputs are tensors, or lists,
    tuples and dictionaries of them, by position or by keyword. The result is called in the same way
    and trained with an ordinary ``.backward()``; wrap it in DistributedDataParallel, not the other
    way round. A copy.deepcopy of it, such as AveragedModel's, has weights of its own.
    differentiate: positions and keywords of the inputs that `module` differentiates with respect
    to; None means every floating-point tensor in the inputs. Those that do not require grad are
    replaced by copies that do, whose own gradient the backward does not compute; where one does,
    its .grad is filled as usual.
    activation_memory_budget: share of the saved activations to keep, the rest is recomputed.
    options: passed on to torch.compile.

    The graph is compiled at the first call, for these shapes: give every batch the same. A graph
    break raises, for a broken graph could train on a wrong gradient.
    """
    return DoubleBackward(module, differentiate, activation_memory_budget, options)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which passes a step makes for its penalty."""

    kind: str = "exact"
    """exact: double backprop, one compiled graph; exact-eager: the same by PyTorch's eager engine.
    finite-difference: (CE(x + h d) - CE(x)) / h with d the signs of the input gradient (Finlay &
    Oberman 2019), which needs no double backprop; central-difference: (CE(x + h d) - CE(x - h d)) /
    2h; BatchNorm in train mode sees all these points. lazy: every lazy_interval-th update has the
    penalty, that many times as strong (Karras et al. 2020) unless the gradient is clipped. subset:
    the first subset_fraction of the images, of each micro-batch where there are several."""
    fd_step: float = 1e-2
    """h, in normalised units."""
    lazy_interval: int = 4
    subset_fraction: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"schedule {self.kind!r} should be one of {', '.join(SCHEDULES)}")

    @property
    def divisor(self) -> int:
        """What a number of images has to be a multiple of: of 4 for a subset of 0.75 or 0.25."""
        share = self.subset_fraction if self.kind == "subset" else 1.0
        least = max(1, int(0.999 / share))  # of fewer the share is none: a tiny one takes no search
        return next(n for n in itertools.count(least) if round(share * n) and is_whole(share * n))

    @property
    def differences(self) -> bool:
        return self.kind in ("finite-difference", "central-difference")

    def __str__(self) -> str:
        values = {"lazy": self.lazy_interval, "subset": self.subset_fraction}
        value = self.fd_step if self.differences else values.get(self.kind)
        return self.kind if value is None else f"{self.kind} {value:g}"


def is_whole(x: float) -> bool:
    """To the digits that a fraction is written with: 3 times 0.3333 is."""
    return abs(x - round(x)) < 1e-3


class Passes(NamedTuple):
    """What one update costs, on average over updates."""

    paper: float
    """Forward and backward sweeps, as arXiv 2409.20139 counts them: natural 2, gradnorm 5, PGD-3
    8."""
    units: float
    """Operations in forwards: a forward is 1, the gradient of the images 1, of the weights 1, a
    double backward 4. natural 3, gradnorm 6, PGD-3 9."""


def count_passes(
    objective: Objective, schedule: Schedule, attack_weight_grads: bool = False
) -> Passes:
    """The passes of a step of `objective` by `schedule`.

    attack_weight_grads: see config.ObjectiveConfig.
    """
    if objective.rest is not None:
        alone = dataclasses.replace(objective, rest=None)
        turns = (objective.share, alone), (1 - objective.share, objective.rest)
        counts = [(s, count_passes(o, schedule, attack_weight_grads)) for s, o in turns]
        return Passes(*(sum(s * passes[i] for s, passes in counts) for i in (0, 1)))
    plain, exact = (2.0 * objective.forwards, 3.0 * objective.forwards), (5.0, 6.0)
    share = 1.0 if objective.needs_input_gradient else 0.0
    if schedule.kind == "lazy":
        share /= schedule.lazy_interval
    elif schedule.kind == "subset":
        share *= schedule.subset_fraction
    paper, units = (p + share * (e - p) for p, e in zip(plain, exact, strict=True))
    if schedule.differences:
        points = 3 if schedule.kind == "central-difference" else 2
        paper, units = points * plain[0], points * plain[1]
    steps, forwards = objective.attack_steps, objective.attack_forwards
    paper += 2 * steps + forwards
    units += (3 if attack_weight_grads else 2) * steps + forwards
    return Passes(paper, units)


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
            network = in_precision(self.model, self.precision)
            return self.objective.loss(network, images_BCHW, targets, ramp)


class LossModules(nn.ModuleDict):
    """forward(name, images, targets, ramp) -> Loss of that name: what DistributedDataParallel
    wraps, once, however many losses a schedule takes turns with."""

    def forward(self, name: str, images_BCHW: Tensor, targets: Tensor, ramp: Tensor) -> Loss:
        return self[name](images_BCHW, targets, ramp)


class AttackGradient(nn.Module):
    """forward(images, targets) -> Gradient: what an attack step needs, as one graph of its own."""

    def __init__(self, model: nn.Module, precision: str):
        super().__init__()
        self.model = model
        self.precision = precision

    def forward(self, images_BCHW: Tensor, targets: Tensor) -> Gradient:
        with autocast(images_BCHW.device.type, self.precision):
            network = in_precision(self.model, self.precision)
            return leaf_gradient(network, images_BCHW, targets)


def autocast(device_type: str, precision: str) -> contextlib.AbstractContextManager:
    """bf16 autocast for "bf16", else nothing."""
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=precision == "bf16")


def in_precision(model: Any, precision: str) -> Any:
    """`model`, with a bf16 copy of its weights for "bf16-pure"."""
    return InBfloat16(model) if precision == "bf16-pure" else model


class InBfloat16:
    """A classifier's (`normalize`, `backbone`) network in bf16 throughout, its gradients in fp32.

    Weights and buffers are cast where a forward begins, so that what the optimizer moves stays
    fp32; BatchNorm keeps its own in fp32 (what a forward writes into other buffers is lost). Images
    and logits are fp32. LayerNorm's statistics, softmax and sums are PyTorch's (or
    fastgn_kernels') fp32 inside the operators.
    """

    def __init__(self, model: Any):
        self.model = model

    def weights(self) -> dict[str, Tensor]:
        model = self.model
        norms = [m for m in model.backbone.modules() if isinstance(m, _BatchNorm)]
        kept = {id(t) for m in norms for t in (*m.parameters(), *m.buffers())}
        named = (*model.backbone.named_parameters(), *model.backbone.named_buffers())
        return {
            name: t.to(torch.bfloat16)
            for name, t in named
            if t.is_floating_point() and id(t) not in kept
        }

    def normalize(self, images_BCHW: Tensor) -> Tensor:
        return self.model.normalize(images_BCHW)

    def backbone(self, images_BCHW: Tensor) -> Tensor:
        images = images_BCHW.to(torch.bfloat16)
        return functional_call(self.model.backbone, self.weights(), (images,)).float()

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        return self.backbone(self.normalize(images_BCHW))


def unsupported(precision: str, device: torch.device) -> str | None:
    """Why `device` cannot compute in `precision`, or None."""
    if precision == "tf32" and device.type != "cuda":
        return f"tf32 exists on CUDA alone, not on {device.type}"
    if precision != "fp32" and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            name = torch.cuda.get_device_name(device)
            return f"{precision} needs compute capability 8.0, and {name} has {major}.{minor}"
    return None


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """TF32 products and convolutions for "tf32", for all else those of full fp32: by default
    PyTorch multiplies in fp32 and convolves in TF32."""
    tf32 = precision == "tf32"
    before: tuple[Any, Any]
    try:
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # PyTorch's newer settings are in use, which do not mix with these
        settings: tuple[Any, Any]
        settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
        before = settings[0].fp32_precision, settings[1].fp32_precision
        for setting in settings:
            setting.fp32_precision = "tf32" if tf32 else "ieee"
        try:
            yield
        finally:
            for setting, value in zip(settings, before, strict=True):
                setting.fp32_precision = value
        return
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


class Randomness:
    """The state of a device's generator and the CPU's: so that a pass can be run as it was."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


def out_of_memory(error: BaseException) -> bool:
    """Whether the device had no room: PyTorch's allocator says so in a class of its own, what
    allocates beside it (cuBLAS' handles, Triton's modules, NCCL) in other words."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    signs = ("out of memory", "STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")
    on_a_cpu = "can't allocate memory"
    return isinstance(error, RuntimeError) and any(s in str(error) for s in (*signs, on_a_cpu))


def missing_derivative(error: BaseException) -> str | None:
    """Returns the operator that an update could not be differentiated twice because of, if any."""
    missing = re.search(r"derivative for (?:aten::)?(\w+) is not implemented", str(error))
    return missing[1].removesuffix("_backward") if missing else None


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


def compilations() -> str:
    """How many graphs this process has compiled, forward and backward, and found in the cache; and
    how many calls could not be CUDA graphs."""
    counters = torch._dynamo.utils.counters["inductor"]
    made, found = (counters[f"fxgraph_cache_{what}"] for what in ("miss", "hit"))
    skipped = f", {counters['cudagraph_skips']} no CUDA graphs" * bool(counters["cudagraph_skips"])
    return f"{made} graphs compiled, {found} found compiled{skipped}"


def graph_count() -> int:
    """Graphs that torch.compile has made in this process: more than a step needs means
    recompilation."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
