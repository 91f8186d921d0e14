"""The planner behind ``--schedule auto``.

`plan` picks the micro-batch and the activation memory budget that fit a device. Operations and
memory are counts; seconds are estimates from measured rates.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from fastgn.errors import check
from fastgn.step.cost import StepCost
from fastgn.step.precision import matmul_precision

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
