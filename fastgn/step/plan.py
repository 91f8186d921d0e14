"""Predicts time and memory of an update, and plans the update for ``--schedule auto``.

`choose_plan` chooses a micro-batch and an activation memory budget with which the update fits into
the memory of a device. Operations and memory are counted. Seconds are estimated from rates that are
measured on the device.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fastgn.errors import check
from fastgn.step.cost import StepCost
from fastgn.step.precision import matmul_precision, short_dtype

BUDGETS = (1.0, 0.7, 0.5, 0.3)
"""Activation memory budgets whose effect was measured. A budget is the share of the activations
that a compiled update saves for its backward, which recomputes the rest."""

MARGIN = 0.1
"""Share of the free memory that a plan leaves unused, because memory becomes fragmented and
libraries allocate workspaces."""


@dataclasses.dataclass(frozen=True)
class Relations:
    """Ratios of the cost of a compiled update to the cost of the same update without
    torch.compile."""

    kept: dict[float, float]
    """Share of the activations that is kept -> peak memory of the compiled update, divided by that
    of the eager update. Both are without weights and gradients."""
    recomputed: dict[float, float]
    """Share of the activations that is kept -> share of the operations that are done a second
    time."""
    traffic: float
    """Bytes that the compiled update reads and writes, divided by those of the eager update."""
    operators: float
    """Kernels that the compiled update launches, divided by those of the eager update."""


EAGER = Relations(kept={1.0: 1.0}, recomputed={1.0: 0.0}, traffic=1.0, operators=1.0)

KEPT: dict[tuple[bool, bool], dict[float, float]] = {
    (False, False): {1.0: 1.00, 0.7: 0.68, 0.5: 0.54, 0.3: 0.39},
    (False, True): {1.0: 0.87, 0.7: 0.58, 0.5: 0.46, 0.3: 0.41},
    (True, False): {1.0: 1.04, 0.7: 0.84, 0.5: 0.80},
    (True, True): {1.0: 1.08, 0.7: 1.15, 0.5: 1.13, 0.3: 1.11},
}
"""(whether the loss is differentiated twice, whether in 16 bits) -> activation memory budget -> the
peak memory of a compiled update, divided by that of the eager one. It was counted in bf16. Source:
benchmarks/results/memory_budget.json. The ratios are upper bounds because they were counted before
operators are fused.

A budget below 1 saves fewer activations between forward and backward. For a loss that is
differentiated twice, the peak falls less or not at all, because the backward recomputes those
activations and keeps them until it ends."""

RECOMPUTED = {1.0: 0.0, 0.7: 0.0, 0.5: 0.01, 0.3: 0.05}
"""Share of the activations that is kept -> share of the operations that are done again, at most.

Source: benchmarks/results/memory_budget.json.
"""

TRAFFIC = {(False, False): 0.90, (True, False): 0.57, (True, True): 0.90}
LAUNCHES = {(False, False): 0.89, (True, False): 0.43, (True, True): 1.09}
"""(whether the loss is differentiated twice, whether it runs ops of fastgn_kernels) -> ratio. The
ratio is the bytes (TRAFFIC) or launches (LAUNCHES) of a compiled update, divided by those of the
eager update. Source: updates of a Swin-T with 2 + 2 + 2 + 2 blocks in bf16. They were compiled for
an H200 (benchmarks/NOTES.md), and also counted by `Meter`:

| update | MB per image: compiled, counted | launches: compiled, counted |
| natural, batch 8 | 394, 436 | 437, 493 |
| gradnorm, batch 16 | 1,025, 1,786 | 1,077, 2,480 |
| gradnorm with kernels, batch 16 | 675, 752 | 837, 769 |
"""


class Rates(NamedTuple):
    """Speed of a device."""

    flops_per_s: float
    """Operations per second of a square matrix product."""
    bytes_per_s: float
    """Bytes per second that a copy reads and writes."""
    launch_s: float
    """Seconds per operator, for many tiny operators in a row."""


def measure_rates(device: torch.device, precision: str) -> Rates:
    """Measures the speed of a device at a precision, in about a tenth of a second."""
    on_cuda = device.type == "cuda"
    side, size = (4096, 2**28) if on_cuda else (256, 2**22)
    dtype = short_dtype(precision) or torch.float32
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target, tiny = torch.zeros_like(source), torch.zeros(1, device=device)

    def seconds(run: Callable[[], object], calls: int) -> float:
        """Times four rounds of `calls` calls each, and returns the seconds per call of `run` in the
        fastest round."""
        rounds = []
        for _ in range(4):  # the first round warms up
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
    """Returns the number of bytes that can be allocated on a device.

    On CUDA it includes the memory that PyTorch holds but does not use.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(x for x in lines if x.startswith("MemAvailable:")).split()[1])


@dataclasses.dataclass(frozen=True)
class Plan:
    """How an update is divided into micro-batches on each rank, and its predicted cost."""

    cost: StepCost
    micro_batch: int
    micro_batches: int
    activation_memory_budget: float
    compiled: bool
    peak_bytes: float
    """Predicted bytes of peak memory for weights, gradients, optimizer state and activations."""
    seconds: float
    """Predicted seconds per update, without loader, optimizer and communication."""

    def lines(self) -> list[str]:
        """Returns lines about the cost and the plan, which a run prints before its first update."""
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
            f"plan: micro-batches {how}; predicted peak {format_bytes(self.peak_bytes)}, "
            f"{self.seconds:.3g} s an update",
        ]

    def measured(self, peak_bytes: int | None, seconds: float) -> str:
        """Returns a line with the measured cost of an update beside the predicted cost.

        peak_bytes: measured peak memory, None if the device does not report it. seconds: measured
        time.
        """
        peak = ""
        if peak_bytes is not None:
            peak = f"peak {format_bytes(peak_bytes)} (predicted {format_bytes(self.peak_bytes)}), "
        return f"plan: measured {peak}{seconds:.3g} s an update (predicted {self.seconds:.3g})"


def format_bytes(bytes_: float) -> str:
    """Returns a number of bytes as a text in GiB, or in MiB if it is below 1 GiB."""
    return f"{bytes_ / 2**30:.2f} GiB" if bytes_ >= 2**30 else f"{bytes_ / 2**20:.3g} MiB"


def compiled_relations(cost: StepCost) -> Relations:
    """Returns the ratios between a compiled update and an eager one, such as that of their peak
    memory.

    cost: the counted cost of the eager update.
    """
    double = cost.double_backward
    # no ratio was measured for a single backward with fastgn_kernels, so take a double backward's
    kind = (double or cost.kernels, cost.kernels)
    kept = KEPT[double, short_dtype(cost.precision) is not None]
    return Relations(kept, RECOMPUTED, TRAFFIC[kind], LAUNCHES[kind])


def choose_plan(
    cost: StepCost,
    rates: Rates,
    *,
    batch_size: int,
    free_bytes: int,
    state_bytes: int,
    held_bytes: int,
    compiled: bool,
    copied_bytes: int = 0,
    fewest: int = 1,
    fixed: tuple[int, float] | None = None,
    short_precision: str | None = "bf16",
    can_compile: bool = True,
) -> Plan:
    """Chooses the micro-batch and activation memory budget with the fastest update that fits.

    If several updates are equally fast, the one with the fewest micro-batches is chosen, and among
    these the one with the highest budget. An activation memory budget is the share of the
    activations that an update saves for its backward.
    batch_size: number of images per rank and update, which the micro-batch must divide.
    free_bytes: free memory when the weights are allocated, see `free_memory`.
    state_bytes: memory that will be allocated for anything but gradients and activations, such as
    the optimizer's state. AdamW's state takes twice as many bytes as the weights in fp32.
    held_bytes: memory that is allocated already.
    copied_bytes: memory that the optimizer's step needs while there are no activations.
    fewest: smallest micro-batch that the network can be trained on.
    fixed: (micro-batch, budget). If this is given, nothing is chosen. The cost of an update with
    this micro-batch is predicted even if it does not fit, for the nearest budget that was measured.
    short_precision: a --precision in 16 bits that the device supports, for the error message.
    can_compile: whether the device supports --compile on, for the error message.
    Raises UserError if nothing fits into the free memory.
    """
    ratios = compiled_relations(cost) if compiled else EAGER
    usable = free_bytes * (1 - MARGIN)

    def candidate(micro_batch: int, budget: float) -> Plan:
        count = batch_size // micro_batch
        floor = cost.operators * ratios.operators * rates.launch_s
        floor += cost.fixed_traffic_bytes / rates.bytes_per_s
        image = cost.flops * (1 + ratios.recomputed[budget]) / rates.flops_per_s
        image += cost.traffic_bytes * ratios.traffic / rates.bytes_per_s
        activations = cost.fixed_bytes + micro_batch * cost.image_bytes * ratios.kept[budget]
        own_bytes = state_bytes + cost.gradient_bytes + max(activations, copied_bytes)
        return Plan(
            cost=cost,
            micro_batch=micro_batch,
            micro_batches=count,
            activation_memory_budget=budget,
            compiled=compiled,
            peak_bytes=held_bytes + own_bytes,
            seconds=count * (floor + micro_batch * image),
        )

    if fixed is not None:
        budget = min(ratios.kept, key=lambda known: abs(known - fixed[1]))
        return candidate(fixed[0], budget)
    divisors = [n for n in range(fewest, batch_size + 1) if batch_size % n == 0]
    plans = [candidate(n, budget) for n in divisors for budget in ratios.kept]
    fitting = [p for p in plans if p.peak_bytes - held_bytes <= usable]
    least = min(p.peak_bytes for p in plans) - held_bytes
    tries = ["a smaller --img-size or --model"]
    if cost.precision in ("fp32", "tf32") and short_precision is not None:
        tries.append(f"--precision {short_precision}")
    if can_compile and not compiled:
        tries.append("--compile on")
    check(bool(fitting), describe_shortage(divisors[0], least, free_bytes, tries))
    # Sums of seconds have rounding errors, so compare only the first 10 digits of each plan's time.
    # Plans whose times agree in the first 10 digits count as equally fast.
    return min(
        fitting,
        key=lambda p: (float(f"{p.seconds:.9e}"), p.micro_batches, -p.activation_memory_budget),
    )


def describe_shortage(images: int, least: float, free_bytes: int, tries: Sequence[str]) -> str:
    """Returns the error message for a device with too little memory.

    images: the smallest micro-batch. least: number of bytes that the smallest plan needs. tries:
    what to try.
    """
    return (
        f"--schedule auto: {'one image' if images == 1 else f'{images} images'} at a time "
        f"need{'s' * (images == 1)} {format_bytes(least)} of device memory, but "
        f"only {format_bytes(free_bytes)} are free, and {MARGIN:.0%} of them stay in reserve: try "
        f"{', '.join(tries)}, or end other programs on the device"
    )
