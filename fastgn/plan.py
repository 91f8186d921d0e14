"""What a step will cost before it runs, and the planner behind ``--schedule auto``.

`step_cost` runs the real step, eagerly, on fake tensors: shapes and lifetimes without data, so that
Swin-B at any batch takes seconds and no memory. `plan` picks the micro-batch and the activation
memory budget that fit a device. Operations and memory are counts; seconds are estimates from
measured rates.
"""

import contextlib
import copy
import dataclasses
import itertools
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastgn.errors import check
from fastgn.objectives import Objective
from fastgn.step.precision import matmul_precision
from fastgn.step.schedule import Passes, Schedule, count_passes
from fastgn.step.step import Step

BUDGETS = (1.0, 0.7, 0.5, 0.3)
"""Activation memory budgets that were measured."""

MARGIN = 0.1
"""Share of the free memory that a plan leaves alone: fragments, workspaces of libraries."""


@dataclasses.dataclass(frozen=True)
class Relations:
    """A step as it runs against the eager one that `step_cost` counts."""

    kept: dict[float, float]
    """Activation memory budget -> peak of memory, weights and gradients aside."""
    recomputed: dict[float, float]
    """Activation memory budget -> operations done a second time, against all of the step's."""
    traffic: float
    """Bytes read and written."""
    operators: float
    """Kernels launched."""


EAGER = Relations(kept={1.0: 1.0}, recomputed={1.0: 0.0}, traffic=1.0, operators=1.0)

KEPT: dict[tuple[bool, bool], dict[float, float]] = {
    (False, False): {1.0: 1.00, 0.7: 0.68, 0.5: 0.54, 0.3: 0.39},
    (False, True): {1.0: 0.87, 0.7: 0.58, 0.5: 0.46, 0.3: 0.41},
    (True, False): {1.0: 1.04, 0.7: 0.84, 0.5: 0.80},
    (True, True): {1.0: 1.08, 0.7: 1.15, 0.5: 1.13, 0.3: 1.11},
}
"""(whether the step differentiates twice, whether in bf16) -> a compiled step's peak at each budget
against the eager one's. Source: benchmarks/results/memory_budget.json, counted before operators are
fused and so from above. A lower budget halves what gradnorm saves between its forward and its
backward; but what is recomputed for the tangent's sweep there waits for the last one, and the peak
hardly moves."""

RECOMPUTED = {1.0: 0.0, 0.7: 0.0, 0.5: 0.01, 0.3: 0.05}
"""Budget -> operations done a second time, against all, at most. Source: as above."""

TRAFFIC = {(False, False): 0.90, (True, False): 0.57, (True, True): 0.90}
LAUNCHES = {(False, False): 0.89, (True, False): 0.43, (True, True): 1.09}
"""(whether the step differentiates twice, whether fastgn_kernels' ops are in it) -> a compiled
step's bytes and kernels against the eager one's. Source: steps of a Swin-T of 2 + 2 + 2 + 2 blocks
in bf16, lowered for an H200 (natural: 394 MB an image and 437 kernels at batch 8; gradnorm: 1,025
and 1,077 at 16, with kernels 675 and 837; benchmarks/NOTES.md), against `Meter` on the same (436
and 493; 1,786 and 2,480; 752 and 769)."""

WINDOW_ATTENTION = {
    "fastgn::window_attention": (0, 2),
    "fastgn::window_attention_bwd": (1, 5),
    "fastgn::window_attention_bwd_bwd": (3, 12),
}
"""Op -> (which argument is qkv, how many products of N x D by D x N it takes): an op of its own is
opaque to PyTorch's formulas. The products are those of the bodies, what they recompute included."""

KERNELS = {*WINDOW_ATTENTION, "fastgn::layer_norm"}

CUDA_AUTOCAST_FLOAT32 = {
    **dict.fromkeys(("exp", "log", "pow.Tensor_Scalar", "reciprocal", "rsqrt", "softplus"), False),
    **dict.fromkeys(("layer_norm", "group_norm", "linalg_vector_norm"), False),
    **dict.fromkeys(("softmax.int", "log_softmax.int", "sum", "sum.dim_IntList"), True),
}
"""Operators that autocast takes to float32 on CUDA and not on the CPU, of those that classifiers
and their losses meet -> whether by a dtype argument. Source: aten/src/ATen/autocast_mode.h."""


class Meter(TorchDispatchMode):
    """Counts what runs inside it, below autograd: each operator once, forward or backward.

    A storage is live from the operator that returns it to its release, whoever holds it, autograd
    included; those made before, such as weights and their gradients, are not counted. What an
    operator takes for itself and gives back is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        """Of matrix products and convolutions; a multiplication and an addition are two."""
        self.traffic_bytes = 0
        """Read and written if every operator reads its inputs from memory and writes its outputs
        there."""
        self.operators = 0
        """Those that read or write; views do not."""
        self.live_bytes = 0
        self.peak_bytes = 0
        self.kernels = False
        """Whether window attention or LayerNorm ran as an op of fastgn_kernels."""
        self._sizes: dict[int, int] = {}

    @classmethod
    def is_infra_mode(cls) -> bool:
        """A compiled step stays compiled inside: torch.compile gives way to other modes."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs, outputs = (
            [x for x in tree_leaves(values) if isinstance(x, Tensor)]
            for values in ((args, kwargs), result)
        )
        known = {_storage(x)._cdata for x in inputs}
        new = [x for x in outputs if _storage(x)._cdata not in known]
        for x in new:
            self._watch(_storage(x))
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        if new or func._schema.is_mutable:
            self.operators += 1
            self.traffic_bytes += sum(
                # an expanded tensor reads what it expands
                min(x.numel() * x.element_size(), _storage(x).nbytes())
                for x in inputs + outputs
            )
        self.flops += _flops(func, args, kwargs, result)
        self.kernels |= func._schema.name in KERNELS
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._sizes:  # an operator may return one twice
            self._sizes[key] = size
            self.live_bytes += size
            # the storage keeps its Python object as long as anything, C++ included, holds it
            weakref.finalize(storage, self._release, key).atexit = False

    def _release(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)


def _storage(x: Tensor) -> torch.UntypedStorage:
    return x.untyped_storage()


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    formula = flop_registry.get(func._overloadpacket)
    if formula is not None:
        return int(formula(*args, **kwargs, out_val=result))
    if func._schema.name in WINDOW_ATTENTION:
        position, products = WINDOW_ATTENTION[func._schema.name]
        qkv = args[position]
        return 2 * products * (qkv.numel() // 3) * qkv.shape[3]
    return 0


@contextlib.contextmanager
def autocast_as_on_cuda() -> Iterator[None]:
    """Makes the CPU's autocast keep in float32 what CUDA's does, and so what they save for the
    backward. Fake tensors on a CUDA device would need one: autograd asks its driver."""
    unset = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def kernel(op: Any, by_dtype: bool) -> Callable[..., Any]:
        def wide(x: Any) -> Any:
            low = isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16)
            return x.float() if low else x

        def run(*args: Any, **kwargs: Any) -> Any:
            if by_dtype and kwargs.get("dtype") is None and args[0].is_floating_point():
                kwargs["dtype"] = torch.promote_types(args[0].dtype, torch.float32)
            elif not by_dtype:
                args = tuple(wide(x) for x in args)
            with torch._C._ExcludeDispatchKeyGuard(unset):
                return op(*args, **kwargs)

        return run

    with torch.library._scoped_library("aten", "IMPL") as library:
        for name, by_dtype in CUDA_AUTOCAST_FLOAT32.items():
            packet, _, overload = name.partition(".")
            op = getattr(getattr(torch.ops.aten, packet), overload or "default")
            library.impl(name, kernel(op, by_dtype), "AutocastCPU")
        yield


def fake_copy(model: nn.Module) -> nn.Module:
    """A deep copy on the CPU, its tensors fake ones of the FakeTensorMode in force, its gradients
    there."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, tensor.requires_grad)
        memo[id(tensor)] = fake
    copied = copy.deepcopy(model, memo)
    for parameter in copied.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    return copied


@dataclasses.dataclass(frozen=True)
class StepCost:
    """An eager step, counted."""

    schedule: str
    precision: str
    passes: Passes
    flops: float
    """An image, on average over updates."""
    traffic_bytes: float
    """An image: read and written by operators that are not fused, on average over updates."""
    fixed_traffic_bytes: float
    """A micro-batch: the weights'."""
    operators: float
    """A micro-batch, on average over updates."""
    fixed_bytes: float
    """Memory at the peak beside weights and gradients, whatever the micro-batch: fixed_bytes +
    images * image_bytes."""
    image_bytes: float
    weight_bytes: int
    """Buffers included."""
    gradient_bytes: int
    kernels: bool
    """Whether LayerNorm or window attention run as ops of fastgn_kernels."""
    double_backward: bool
    """Whether the loss differentiates with respect to the images and is differentiated."""

    def peak_bytes(self, images: int) -> float:
        """Beside weights and gradients, eager."""
        return self.fixed_bytes + images * self.image_bytes


def step_cost(
    model: nn.Module,
    objective: Objective,
    schedule: Schedule,
    *,
    batch_size: int,
    img_size: int,
    num_classes: int,
    precision: str,
    attack_weight_grads: bool = False,
    device_type: str = "cuda",
) -> StepCost:
    """Counts a step on up to batch_size images, run eagerly on fake tensors: seconds, no memory.

    device_type: whose autocast it is to be. Gradients are taken to be there throughout, as from a
    second micro-batch on. Memory is the line through a few images and batch_size: the peak of a
    step is the largest of several lines, so between the two the line lies on it or above. Of
    updates that take turns it is the largest one's.
    """
    step = schedule.divisor
    few = -(-2 // step) * step
    sizes = (few, max(batch_size // step * step, 2 * few))
    # an update without the penalty costs the same whichever it is
    updates = {0: 1.0}
    if schedule.kind == "lazy" and schedule.lazy_interval > 1:
        updates = {0: 1 / schedule.lazy_interval, 1: 1 - 1 / schedule.lazy_interval}
    if objective.rest is not None:
        other = next(u for u in itertools.count(1) if not objective.has_turn(u))
        updates = {0: objective.share, other: 1 - objective.share}
    cuda_autocast = device_type == "cuda" and precision == "bf16"

    def count(images: int, update: int) -> Meter:
        with FakeTensorMode(allow_non_fake_inputs=True):
            copied = fake_copy(model)
            pixels = torch.empty(images, 3, img_size, img_size)
            targets = torch.empty(images, num_classes)
            ramp = torch.empty(())
            with Meter() as meter:
                step = Step(
                    copied,
                    objective,
                    schedule=schedule,
                    compile=False,
                    precision=precision,
                    attack_weight_grads=attack_weight_grads,
                )
                step([(pixels, targets)], ramp, update)
        return meter

    with autocast_as_on_cuda() if cuda_autocast else contextlib.nullcontext():
        meters = {update: [count(size, update) for size in sizes] for update in updates}

    def mean(name: str, index: int) -> float:
        return sum(share * getattr(meters[u][index], name) for u, share in updates.items())

    def line(few: float, many: float) -> tuple[float, float]:
        slope = (many - few) / (sizes[1] - sizes[0])
        return max(few - sizes[0] * slope, 0.0), slope

    fixed_traffic, traffic = line(mean("traffic_bytes", 0), mean("traffic_bytes", 1))
    fixed, image = line(*(max(m[i].peak_bytes for m in meters.values()) for i in (0, 1)))
    return StepCost(
        schedule=str(schedule),
        precision=precision,
        passes=count_passes(objective, schedule, attack_weight_grads),
        flops=mean("flops", 1) / sizes[1],
        traffic_bytes=traffic,
        fixed_traffic_bytes=fixed_traffic,
        operators=mean("operators", 1),
        fixed_bytes=fixed,
        image_bytes=image,
        weight_bytes=sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        gradient_bytes=sum(p.nbytes for p in model.parameters() if p.requires_grad),
        kernels=any(meter.kernels for pair in meters.values() for meter in pair),
        double_backward=objective.needs_input_gradient and not schedule.differences,
    )


class Rates(NamedTuple):
    """What a device reaches."""

    flops_per_s: float
    """In a square matrix product."""
    bytes_per_s: float
    """Read and written by a copy."""
    launch_s: float
    """Between two of many tiny operators."""


def device_rates(device: torch.device, precision: str) -> Rates:
    """Measures the three within a tenth of a second of work, at a run's precision."""
    on_cuda = device.type == "cuda"
    side, size = (4096, 2**28) if on_cuda else (256, 2**22)
    dtype = torch.bfloat16 if precision in ("bf16", "bf16-pure") else torch.float32
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target, tiny = torch.zeros_like(source), torch.zeros(1, device=device)

    def seconds(run: Callable[[], object], calls: int) -> float:
        rounds = []
        for _ in range(4):  # the first one warms up
            start = time.perf_counter()
            for _ in range(calls):
                run()
            if on_cuda:
                torch.cuda.synchronize(device)
            rounds.append((time.perf_counter() - start) / calls)
        return min(rounds[1:])

    with torch.no_grad(), matmul_precision(precision):
        return Rates(
            flops_per_s=2 * side**3 / seconds(lambda: matrix @ matrix, 4 if on_cuda else 1),
            bytes_per_s=2 * size / seconds(lambda: target.copy_(source), 4),
            launch_s=seconds(lambda: tiny.neg_(), 200),
        )


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated: on CUDA the device's free ones and what PyTorch holds unused."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(x for x in lines if x.startswith("MemAvailable:")).split()[1])


@dataclasses.dataclass(frozen=True)
class Plan:
    """How an update runs on each rank, and what it is predicted to take."""

    cost: StepCost
    micro_batch: int
    micro_batches: int
    activation_memory_budget: float
    compiled: bool
    peak_bytes: float
    """Everything on the device: weights, gradients, state, activations."""
    seconds: float
    """An update's gradients: without loader, optimizer and communication."""

    def lines(self) -> list[str]:
        """What a run prints before it begins."""
        cost, images = self.cost, self.micro_batch * self.micro_batches
        how = f"{self.micro_batches} x {self.micro_batch}"
        if self.compiled:
            how += f", activation memory budget {self.activation_memory_budget:g}"
        else:
            how += ", eager"
        return [
            f"schedule {cost.schedule}, {cost.precision}: {cost.passes.paper:g} passes, "
            f"{cost.flops / 1e9:.4g} GFLOP an image, {cost.flops * images / 1e12:.4g} TFLOP an "
            f"update of {images} images",
            f"plan: micro-batches {how}; predicted peak {memory(self.peak_bytes)}, "
            f"{self.seconds:.3g} s an update",
        ]

    def measured(self, peak_bytes: int | None, seconds: float) -> str:
        """The measured beside the predicted; no peak where the device does not tell."""
        peak = ""
        if peak_bytes is not None:
            peak = f"peak {memory(peak_bytes)} (predicted {memory(self.peak_bytes)}), "
        return f"plan: measured {peak}{seconds:.3g} s an update (predicted {self.seconds:.3g})"


def memory(bytes_: float) -> str:
    """In GiB, or MiB where that says more."""
    return f"{bytes_ / 2**30:.2f} GiB" if bytes_ >= 2**30 else f"{bytes_ / 2**20:.3g} MiB"


def relations(cost: StepCost) -> Relations:
    """Of a compiled step to the eager one."""
    double = cost.double_backward
    # what a single backward gains is not known with kernels: as much as a double one
    kind = (double or cost.kernels, cost.kernels)
    kept = KEPT[double, cost.precision in ("bf16", "bf16-pure")]
    return Relations(kept, RECOMPUTED, TRAFFIC[kind], LAUNCHES[kind])


def plan(
    cost: StepCost,
    rates: Rates,
    *,
    batch_size: int,
    free_bytes: int,
    state_bytes: int,
    held_bytes: int,
    compiled: bool,
    fixed: tuple[int, float] | None = None,
) -> Plan:
    """Picks micro-batch and activation memory budget: of those that fit, the shortest update; of
    equals, the fewest micro-batches, then the highest budget. With both `fixed`, says what they
    cost (at the nearest budget known), whether they fit or not.

    batch_size: images a rank takes at once, which micro-batches divide. free_bytes: see
    free_memory, the weights already allocated. state_bytes: what is still to be allocated beside
    gradients and activations: the optimizer's, AdamW's twice the weights in fp32. held_bytes:
    allocated already.
    Raises UserError where nothing fits.
    """
    model = relations(cost) if compiled else EAGER
    usable = free_bytes * (1 - MARGIN)

    def candidate(micro_batch: int, budget: float) -> Plan:
        count = batch_size // micro_batch
        floor = cost.operators * model.operators * rates.launch_s
        floor += cost.fixed_traffic_bytes / rates.bytes_per_s
        image = cost.flops * (1 + model.recomputed[budget]) / rates.flops_per_s
        image += cost.traffic_bytes * model.traffic / rates.bytes_per_s
        activations = cost.fixed_bytes + micro_batch * cost.image_bytes * model.kept[budget]
        return Plan(
            cost=cost,
            micro_batch=micro_batch,
            micro_batches=count,
            activation_memory_budget=budget,
            compiled=compiled,
            peak_bytes=held_bytes + state_bytes + cost.gradient_bytes + activations,
            seconds=count * (floor + micro_batch * image),
        )

    if fixed is not None:
        budget = min(model.kept, key=lambda known: abs(known - fixed[1]))
        return candidate(fixed[0], budget)
    divisors = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
    plans = [candidate(n, budget) for n in divisors for budget in model.kept]
    fitting = [p for p in plans if p.peak_bytes - held_bytes <= usable]
    least = min(p.peak_bytes for p in plans) - held_bytes
    check(bool(fitting), too_little(cost, least, free_bytes, compiled))
    # a plan's sum is not exact: what differs in the 10th digit alone is equal
    return min(
        fitting,
        key=lambda p: (float(f"{p.seconds:.9e}"), p.micro_batches, -p.activation_memory_budget),
    )


def too_little(cost: StepCost, least: float, free_bytes: int, compiled: bool) -> str:
    """The line to say so with."""
    tries = ["a smaller --img-size or --model"]
    if cost.precision in ("fp32", "tf32"):
        tries.append("--precision bf16")
    if not compiled:
        tries.append("--compile on")
    return (
        f"--schedule auto: one image at a time needs {memory(least)} of device memory, and "
        f"of {memory(free_bytes)} free {MARGIN:.0%} stay in reserve; try "
        f"{', '.join(tries)}, or free what else is on the device"
    )
