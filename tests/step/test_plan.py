"""Counts of a step against real runs and hand-computed cases, and what the planner picks."""

import dataclasses
import functools
import json
import os
import resource
import time
from functools import partial
from typing import Any

import pytest
import torch
from support import ROOT
from support.marks import first_is_quick
from support.networks import NoModules, classifier, objective, soft_targets, swin
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastgn.errors import UserError
from fastgn.objectives import Objective
from fastgn.step import plan as planner
from fastgn.step.cost import StepCost, count_cost
from fastgn.step.meter import Meter, autocast_as_on_cuda
from fastgn.step.options import StepOptions
from fastgn.step.passes import Passes
from fastgn.step.plan import BUDGETS, MARGIN, Rates
from fastgn.step.schedule import Schedule
from fastgn.step.step import Step


def cost_of(
    model: nn.Module,
    minimised: Objective,
    schedule: Schedule,
    precision: str = "fp32",
    batch_size: int = 64,
    device_type: str = "cuda",
) -> StepCost:
    """Returns the counted cost of a step on images of 16 px with 5 classes."""
    return count_cost(
        model,
        minimised,
        StepOptions(schedule, precision),
        batch_size=batch_size,
        img_size=16,
        num_classes=5,
        device_type=device_type,
    )


@functools.cache
def counted(name: str) -> StepCost:
    """Of `METHODS`, on up to 64 images, in fp32."""
    values, schedule = METHODS[name]
    return cost_of(classifier(swin), objective(**values), schedule)


def real_batch(images: int) -> tuple[Tensor, Tensor]:
    return torch.rand(images, 3, 16, 16), soft_targets(images, dtype=torch.float32)


# ---------------------------------------------------------------- the meter, against hand counts


def test_peaks_of_a_two_layer_network() -> None:
    """tanh(x w1) w2, summed: forward, the product and its tanh are alive together; backward, what
    tanh kept, its cotangent and the product's, beside the loss and its own cotangent."""
    batch, inputs, hidden, outputs = 1000, 3, 7, 2
    x = torch.rand(batch, inputs)
    w1 = torch.rand(inputs, hidden, requires_grad=True)
    w2 = torch.rand(hidden, outputs, requires_grad=True)
    w1.grad, w2.grad = torch.zeros_like(w1), torch.zeros_like(w2)
    with Meter() as meter:
        loss = (torch.tanh(x @ w1) @ w2).sum()
        assert meter.peak_bytes == 4 * 2 * batch * hidden
        assert meter.live_bytes == 4 * (batch * hidden + 1), "what tanh gave, and the loss"
        loss.backward()
        assert meter.peak_bytes == 4 * (3 * batch * hidden + 2)
        del loss
    assert meter.live_bytes == 0
    products = 2 * batch * hidden * (inputs + outputs)
    assert meter.flops == products + 2 * batch * hidden * (2 * outputs + inputs)


def test_views_and_in_place_operators_take_no_memory() -> None:
    before = torch.zeros(10)
    with Meter() as meter:
        base = torch.ones(10)
        view = base.view(5, 2)[1:].T
        base.add_(1)
        before.mul_(base)
        assert (meter.live_bytes, meter.peak_bytes, meter.operators) == (40, 40, 3)
        assert meter.traffic_bytes == 40 + 80 + 120, "written; read, written; read twice, written"
        wide = view[:1].expand(8, 4)
        assert meter.live_bytes == 40
        del base
        assert meter.live_bytes == 40, "the view holds the storage"
        meter.traffic_bytes = 0
        total = wide.neg()
        assert meter.traffic_bytes == 40 + 128, "an expanded tensor is read where it lies"
        del view, wide, total
        assert (meter.live_bytes, meter.peak_bytes) == (0, 168)


# --------------------------------------------------------------------------- steps, against real


METHODS: dict[str, tuple[dict[str, Any], Schedule]] = {
    "natural": ({"method": "natural"}, Schedule()),
    "gradnorm": ({}, Schedule()),
    "pgd_at": ({"method": "pgd_at", "attack_select": "best"}, Schedule()),
    "finite-difference": ({}, Schedule("finite-difference")),
    "central-difference": ({}, Schedule("central-difference")),
    "lazy": ({}, Schedule("lazy", lazy_interval=3)),
    "subset": ({}, Schedule("subset", subset_fraction=0.25)),
    "edge": ({"method": "edge"}, Schedule()),
    "pag": ({"method": "pag"}, Schedule()),
    "trades": ({"method": "trades"}, Schedule()),
    "gradnorm+fgsm": ({"method": "gradnorm+fgsm", "gn_share": 1 / 3}, Schedule()),
}


@pytest.mark.parametrize("name", first_is_quick(METHODS, quick=3))
def test_flops_are_those_of_real_updates(name: str) -> None:
    values, schedule = METHODS[name]
    model = classifier(swin)
    step = Step(model, objective(**values), StepOptions(schedule=schedule, compile=False))
    updates = 3 if name in ("lazy", "gradnorm+fgsm") else 1
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()
    with counter:
        for update in range(updates):
            step([real_batch(8)], torch.tensor(1.0), update)
    cost = counted(name)
    assert cost.flops * 8 * updates == pytest.approx(counter.get_total_flops(), rel=1e-12)
    assert cost.passes.units == pytest.approx(cost.flops / forward_flops(model), rel=0.15)
    assert cost.schedule == str(schedule)


def forward_flops(model: nn.Module) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(real_batch(1)[0])
    return counter.get_total_flops()


def allocated_peak(run: Any) -> int:
    """Of the CPU's allocator, as PyTorch's profiler records it."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("name", ["natural", "gradnorm", "pgd_at", "finite-difference", "subset"])
def test_memory_is_what_the_allocator_gives(name: str) -> None:
    values, schedule = METHODS[name]
    model = classifier(swin)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step = Step(model, objective(**values), StepOptions(schedule=schedule, compile=False))
    batch, ramp = real_batch(64), torch.tensor(1.0)
    real = allocated_peak(lambda: step([batch], ramp))
    assert counted(name).peak_bytes(64) == pytest.approx(real, rel=0.003)


@pytest.mark.parametrize("name", ["gradnorm", "subset"])
def test_memory_is_a_line_in_the_batch(name: str) -> None:
    """Exact where it was counted; between, where another moment may have the peak, never below."""
    values, schedule = METHODS[name]
    cost = cost_of(classifier(swin), objective(**values), schedule, batch_size=16).peak_bytes
    line = counted(name).peak_bytes
    assert cost(2) == pytest.approx(line(2), abs=8)
    assert cost(16) <= line(16) + 8
    assert line(16) == pytest.approx(cost(16), rel=0.03)


@pytest.mark.slow
def test_what_a_schedule_holds() -> None:
    """Finite differences need no second-order terms; lazy's peak is that of its update with the
    penalty."""
    held = {name: counted(name).peak_bytes(64) for name in METHODS}
    assert held["finite-difference"] < 0.6 * held["gradnorm"]
    assert held["lazy"] == pytest.approx(held["gradnorm"], abs=8), "the ramp times the interval"
    assert held["natural"] < held["subset"] < held["gradnorm"]
    double = {name for name in METHODS if counted(name).double_backward}
    assert double == {"gradnorm", "lazy", "subset", "edge", "pag", "gradnorm+fgsm"}
    assert held["gradnorm+fgsm"] == held["gradnorm"], "of the updates with the penalty"
    assert 1.5 * held["natural"] < held["trades"], "two forwards are swept back together"


def test_nothing_is_allocated_and_the_model_is_left_alone() -> None:
    """A million images would take hundreds of gigabytes."""
    model = classifier(swin)
    before = [p.clone() for p in model.parameters()]
    rng = torch.get_rng_state()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cost = cost_of(model, objective(), Schedule(), batch_size=2**20)
    assert cost.peak_bytes(2**20) > 2**37
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2**18, "256 MiB"
    assert torch.equal(torch.get_rng_state(), rng)
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert parameter.grad is None and torch.equal(parameter, value)


def test_weights_and_gradients_are_counted_apart() -> None:
    model = classifier(swin)
    weights = sum(p.nbytes for p in model.parameters())
    model.backbone.head.requires_grad_(False)
    head = sum(p.nbytes for p in model.backbone.head.parameters())
    cost = cost_of(model, objective(), Schedule())
    assert cost.gradient_bytes == weights - head
    assert cost.weight_bytes == weights + sum(b.nbytes for b in model.buffers())


# ----------------------------------------------------------------------------------- precisions


def test_the_cpus_autocast_as_on_cuda() -> None:
    """Each operator's dtype by the table of CUDA's autocast, and the CPU's own again afterwards."""
    x, w = torch.rand(4, 4, dtype=torch.bfloat16), torch.rand(4, 4)

    def dtypes() -> list[torch.dtype]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results = [
                *(nn.functional.layer_norm(x, (4,), w[0]), x.softmax(1), x.sum(), x.sum(1)),
                *(x.exp(), x.log_softmax(1), nn.functional.linear(w, w), x + x),
            ]
        return [r.dtype for r in results]

    own, wide = dtypes(), [torch.float32] * 6 + [torch.bfloat16] * 2
    with autocast_as_on_cuda():
        assert dtypes() == wide
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total = torch.ones(3, dtype=torch.int64).sum()
        assert total.dtype == torch.int64
    assert dtypes() == own != wide


@pytest.mark.slow
def test_precisions_change_memory_and_not_operations() -> None:
    build = partial(cost_of, classifier(swin), objective(), Schedule())
    fp32, tf32, bf16, pure = (build(precision=p) for p in ("fp32", "tf32", "bf16", "bf16-pure"))
    on_cpu = build(precision="bf16", device_type="cpu")
    assert tf32 == dataclasses.replace(fp32, precision="tf32")
    assert fp32.flops == bf16.flops == pure.flops
    assert pure.image_bytes < on_cpu.image_bytes < bf16.image_bytes < fp32.image_bytes
    assert pure.image_bytes == pytest.approx(fp32.image_bytes / 2, rel=0.1)


def test_fused_kernels_are_counted() -> None:
    """Window attention's products are no operator of PyTorch's; they hold less for the backward."""
    swap = pytest.importorskip("fastgn_kernels.swap").swap_modules
    model = classifier(swin)
    swap(model.backbone)
    plain, swapped = counted("gradnorm"), cost_of(model, objective(), Schedule())
    assert (plain.kernels, swapped.kernels) == (False, True)
    assert swapped.image_bytes < 0.7 * plain.image_bytes
    # forward 2, backward 4 and double backward 8 + 4 products become 2 + 5 + 12 + 5
    heads_dims, windows, tokens, blocks = 8, 4, 16, 2
    product = 2 * windows * tokens * tokens * heads_dims * blocks
    assert swapped.flops == plain.flops + (24 - 18) * product


def test_relations_have_a_source() -> None:
    """Each constant is the measured one, rounded; operations are those of the worst case."""
    rows = json.loads((ROOT / "benchmarks/results/memory_budget.json").read_text())["rows"]
    measured: dict[tuple[bool, bool], dict[float, float]] = {key: {} for key in planner.KEPT}
    recomputed = dict.fromkeys(BUDGETS, 0.0)
    for row in rows:
        if row["budget"] is None or row["swap"]:
            continue
        key = (row["method"] == "gradnorm", row["precision"] == "bf16")
        measured[key][row["budget"]] = round(row["peak_bytes_to_eager"], 2)
        again = round(row["flops_to_eager"] - 1, 2)
        recomputed[row["budget"]] = max(recomputed[row["budget"]], again)
    assert measured == planner.KEPT
    assert recomputed == planner.RECOMPUTED


# ----------------------------------------------------------------------------------- the planner


GIB = 2**30

SYNTHETIC = StepCost(
    schedule="exact",
    precision="bf16",
    passes=Passes(5, 6),
    flops=1e9,
    traffic_bytes=1e6,
    fixed_traffic_bytes=0,
    operators=100,
    fixed_bytes=1 * GIB,
    image_bytes=1 * GIB,
    weight_bytes=1 * GIB,
    gradient_bytes=1 * GIB,
    kernels=False,
    double_backward=True,
)
RATES = Rates(flops_per_s=1e12, bytes_per_s=1e9, launch_s=1e-6)


def planned(
    free_gib: float, cost: StepCost = SYNTHETIC, rates: Rates = RATES, **values: Any
) -> planner.Plan:
    options: dict[str, Any] = {"compiled": False, "batch_size": 12, "state_bytes": 2 * GIB}
    free = int(free_gib * GIB / (1 - MARGIN)) + 1
    options |= {"free_bytes": free, "held_bytes": 3 * GIB} | values
    return planner.choose_plan(cost, rates, **options)


def test_a_batch_that_fits_goes_whole() -> None:
    """Beside the batch: 2 GiB of state, 1 of gradients, 1 for any micro-batch; 3 are held."""
    plan = planned(12 + 4)
    assert (plan.micro_batch, plan.micro_batches, plan.activation_memory_budget) == (12, 1, 1.0)
    assert plan.peak_bytes == (12 + 4 + 3) * GIB
    image = 1e9 / 1e12 + 1e6 / 1e9
    assert plan.seconds == pytest.approx(100e-6 + 12 * image)


@pytest.mark.parametrize(
    ("free_gib", "micro_batch"), [(15.99, 6), (10, 6), (9.99, 4), (7.5, 3), (6, 2), (5, 1)]
)
def test_a_batch_that_does_not_fit_is_divided(free_gib: float, micro_batch: int) -> None:
    plan = planned(free_gib)
    assert (plan.micro_batch, plan.micro_batches) == (micro_batch, 12 // micro_batch)
    assert plan.seconds > planned(100).seconds


def test_only_divisors_of_the_batch() -> None:
    assert planned(4 + 8, batch_size=13).micro_batch == 1
    assert planned(4 + 8, batch_size=14).micro_batch == 7


RELATIONS = planner.Relations(
    kept={1.0: 1.0, 0.7: 0.7, 0.5: 0.5, 0.3: 0.3},
    recomputed={1.0: 0.0, 0.7: 0.0, 0.5: 0.1, 0.3: 0.2},
    traffic=0.5,
    operators=0.4,
)


@pytest.fixture
def relations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "compiled_relations", lambda cost: RELATIONS)


def compiled(free_gib: float, launch_s: float, **values: Any) -> tuple[int, float]:
    plan = planned(free_gib, compiled=True, rates=RATES._replace(launch_s=launch_s), **values)
    assert plan.compiled
    return plan.micro_batch, plan.activation_memory_budget


def test_the_budget_is_lowered_where_that_is_cheaper_than_more_launches(relations: None) -> None:
    """12 images need 12 GiB and 4; at 0.7 they need 8.4, at 0.5 6, and a tenth of 12 ms more."""
    assert compiled(16, launch_s=1e-6) == (12, 1.0)
    assert compiled(12.5, launch_s=1e-6) == (12, 0.7), "recomputes nothing: any launch costs more"
    assert compiled(10, launch_s=1e-3) == (12, 0.5), "40 ms for another micro-batch"
    assert compiled(10, launch_s=1e-9) == (6, 1.0), "nothing for another one"
    assert compiled(7.6, launch_s=1e-3) == (12, 0.3)


def test_equal_times_take_fewest_micro_batches_then_the_highest_budget(relations: None) -> None:
    assert compiled(100, launch_s=0.0) == (12, 1.0)
    assert compiled(12.5, launch_s=0.0) == (12, 0.7), "12 at 0.7 and 6 at 1 take as long"


def test_eager_has_no_budget(relations: None) -> None:
    assert planned(12.5).activation_memory_budget == 1.0
    assert planned(12.5).micro_batch == 6


def test_compiled_seconds(relations: None) -> None:
    plan = planned(7.6, compiled=True, rates=RATES._replace(launch_s=1e-3))
    image = 1.2 * 1e9 / 1e12 + 0.5 * 1e6 / 1e9
    assert plan.seconds == pytest.approx(0.4 * 100e-3 + 12 * image)


def test_the_optimizers_copies_need_memory_when_there_are_no_activations(relations: None) -> None:
    peaks = [planned(100, copied_bytes=n * GIB).peak_bytes for n in (0, 12, 20)]
    assert peaks[0] == peaks[1] < peaks[2]


def test_what_cannot_fit_says_so_in_one_line() -> None:
    with pytest.raises(UserError) as error:
        planned(4.9, dataclasses.replace(SYNTHETIC, precision="fp32"))
    line = str(error.value)
    assert "\n" not in line
    assert "5.00 GiB" in line and "5.44 GiB are free" in line and "10%" in line
    assert "--precision bf16" in line and "--compile on" in line
    for short in ("fp16", None):
        with pytest.raises(UserError) as error:
            cost = dataclasses.replace(SYNTHETIC, precision="fp32")
            planned(4.9, cost, short_precision=short, can_compile=False)
        assert ("--precision fp16" in str(error.value)) is (short == "fp16")
        assert "bf16" not in str(error.value) and "--compile" not in str(error.value)
    with pytest.raises(UserError) as error:
        planned(1, compiled=True)
    assert "--precision" not in str(error.value) and "--compile" not in str(error.value)


def test_what_a_plan_prints() -> None:
    plan = planned(10)
    first, second = plan.lines()
    assert first == (
        "schedule exact, bf16: 5 passes, 1 GFLOP an image, 0.012 TFLOP an update of 12 images"
    )
    assert second == (
        "plan: micro-batches 2 x 6, eager; predicted peak 13.00 GiB, 0.0242 s an update"
    )
    assert plan.measured(13 * GIB // 2, 0.05) == (
        "plan: measured peak 6.50 GiB (predicted 13.00 GiB), 0.05 s an update (predicted 0.0242)"
    )
    assert plan.measured(None, 0.05) == "plan: measured 0.05 s an update (predicted 0.0242)"
    assert "activation memory budget" in planned(100, compiled=True).lines()[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rates_of_this_device(precision: str) -> None:
    start = time.process_time()  # not the wall's: other programs may hold the machine up
    rates = planner.measure_rates(torch.device("cpu"), precision)
    assert time.process_time() - start < 5, "tenths of a second on an idle machine"
    assert 1e7 < rates.flops_per_s < 1e15
    assert 1e7 < rates.bytes_per_s < 1e13
    assert 1e-7 < rates.launch_s < 1e-2


def test_free_memory_of_the_machine() -> None:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert whole / 2**10 < planner.free_memory(torch.device("cpu")) < whole


def test_what_is_fixed_is_priced_and_not_judged() -> None:
    """A run without --schedule auto says what its own batch and budget cost, even if too much."""
    free = planned(100, compiled=True)
    mine = planned(1, compiled=True, fixed=(12, free.activation_memory_budget))
    assert mine == free
    half = planned(1, compiled=True, fixed=(6, 0.95))
    assert half.peak_bytes < free.peak_bytes
    assert (half.micro_batches, half.activation_memory_budget) == (2, 1.0)
