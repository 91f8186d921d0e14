"""What a batch costs by every method and schedule, in one run, beside arXiv 2409.20139's Table 3.

    python benchmarks/cost.py  # a GPU: Swin-B, 64 images of 224 pixels; a CPU: a small Swin
    python benchmarks/cost.py --precision fp32 tf32 bf16 bf16-pure --rounds 5 --start-times
    python benchmarks/cost.py --model swin_b --counts-only  # passes and operations, on any machine
    python benchmarks/cost.py --model resnet50 --methods natural gradnorm --schedules exact lazy

An arm is a method, a schedule and a precision. Its call is a whole update: fastgn.step.step.Step on
random images and soft targets, then fastgn.optim's AdamW at learning rate 0, so that all arms work
on the same weights; there is one model for all. Rounds are interleaved, spread is over them, and a
ratio is the mean of each round's own.

--kernels and --compile are for the arms of this package; the schedule exact-eager has the kernels
alone. Those named -paper are what the paper's code does by its description: PyTorch's operators in
eager mode, the network in eval mode, a synchronisation every micro-batch, and for PGD-3 weight
gradients in every attack step and a last forward on un-normalised images. gradnorm-paper is always
there in fp32, the paper's precision.

Operations are counted (FlopCounterMode) on the network of PyTorch's operators and tensors without
storage; what torch.compile recomputes is not in them. FLOP utilisation is against a square matrix
product at the same precision in the same run. Peak memory is what the arm would hold alone:
weights, optimizer, images, what it keeps between steps, and the most that a step allocates. A lazy
arm's figures are averages over its cycle.

Writes benchmarks/results/cost_<model>_<device>.json after every arm and round, and pictures into
runs/. A run without all the default arms, or under other conditions (CONDITIONS, fewer rounds),
leaves that file alone: unless --output is given it goes to runs/cost_<model>_<device>_partial.json.
Until the last round, the figures of a run go to <file>.incomplete if there is a complete file.
On a CPU counts are exact, times are ratios of one run, and seconds mean nothing.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import gc
import importlib.util
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeCopyMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common.arguments import RESULTS, ROOT
from benchmarks.common.energy import Meter, NoMeterError
from benchmarks.common.records import hold, write_record
from benchmarks.common.timing import Marks, Timing, interleaved, once, synchronize
from benchmarks.step.profiler import by_operator, launches, marked
from benchmarks.tables import cost_table
from fastgn.config.groups import ArchitectureConfig, OptimizerConfig
from fastgn.errors import UserError, check
from fastgn.metrics import environment
from fastgn.models.network import Classifier, build_model, choose_kernels, use_kernels
from fastgn.objectives import AttackOptions, Objective, ObjectiveConfig, build_objective
from fastgn.optim import build_optimizer
from fastgn.step.options import Quirks, StepOptions
from fastgn.step.passes import count_passes
from fastgn.step.precision import PRECISIONS, explain_unsupported, matmul_precision
from fastgn.step.retry import RetryingStep, out_of_memory
from fastgn.step.schedule import SCHEDULES, Schedule
from fastgn.step.step import Step

NO_MEANING = "NO GPU: counts are exact, times are ratios within this run, seconds mean nothing"

METHODS = ("natural", "gradnorm", "pgd_at", "gradnorm-paper", "pgd_at-paper", "fgsm_rs")
"""The most telling first: what --minutes have no room for is left out."""
PAPER_WAY = Quirks(train_in_eval_mode=True, sync_micro_batches=True, accumulation="sum")
SMALL_SWIN = (
    *("patch_size=4", "embed_dim=64", "depths=(2, 2)", "num_heads=(2, 4)"),
    "window_size=4",
)
"""Of the run without a GPU, at 32 pixels."""
CONDITIONS = ("model_kwargs", "img_size", "classes", "batch", "kernels", "cuda_graphs", "minutes")
"""Options whose default the kept results were measured with."""
LARGEST = 2**31
"""What no number of images, classes, rounds or seconds reaches."""
GEMM_SIDE = {"cuda": 8192, "cpu": 512}
PROFILE_S = 2.0
"""What profiling an arm takes beside its rounds, about."""

PAPER = {
    "natural": {"passes": 2, "seconds_a_batch": 0.749, "std": 0.002},
    "gradnorm": {"passes": 5, "seconds_a_batch": 1.848, "std": 0.011},
    "pgd_at": {"passes": 8, "seconds_a_batch": 2.943, "std": 0.001},
}
"""arXiv 2409.20139, Table 3: Swin-B, 224 pixels, fp32, 8 V100, the same batch, three runs."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """One arm."""

    method: str
    precision: str
    schedule: Schedule = Schedule()  # noqa: RUF009 - frozen
    budget: float = 1.0
    """Activation memory budget."""
    compile: bool = False

    @property
    def paper(self) -> bool:
        """Whether this is the paper's own way."""
        return self.method.endswith("-paper")

    @property
    def base(self) -> str:
        return self.method.removesuffix("-paper")

    @property
    def name(self) -> str:
        name = f"{self.method} {self.schedule}" if self.method == "gradnorm" else self.method
        return name if self.budget == 1 else f"{name}, budget {self.budget:g}"

    @property
    def key(self) -> str:
        return f"{self.name}, {self.precision}"

    @property
    def exact(self) -> bool:
        return self.schedule.is_exact

    @property
    def cycle(self) -> int:
        """Updates until its costs repeat."""
        return self.schedule.cycle

    def objective(self) -> Objective:
        select = "paper" if self.method == "pgd_at-paper" else "last"
        return build_objective(
            ObjectiveConfig(self.base, attack=AttackOptions(attack_select=select))
        )

    def step(self, model: Classifier, **options: Any) -> RetryingStep:
        quirks = Quirks()
        if self.paper:
            wasteful = self.base == "pgd_at"
            quirks = dataclasses.replace(PAPER_WAY, attack_weight_grads=wasteful)
        own = StepOptions(self.schedule, self.precision, self.compile, quirks=quirks)
        step = Step(model, self.objective(), dataclasses.replace(own, **options))
        return RetryingStep(step)


def specs(args: argparse.Namespace) -> list[Spec]:
    """Every arm that was asked for, the most telling first."""
    values = ("fd_step", "lazy_interval", "subset_fraction")
    schedules = [Schedule(k, **{v: getattr(args, v) for v in values}) for k in args.schedules]
    if args.compile == "off" and "exact" in args.schedules:  # it is the eager one
        schedules = [s for s in schedules if s.kind != "exact-eager"]
    found = []
    for precision in args.precision:
        for method in args.methods:
            for schedule in schedules if method == "gradnorm" else [Schedule()]:
                compiled = args.compile == "on" and schedule.kind != "exact-eager"
                spec = Spec(method, precision, schedule)
                spec = dataclasses.replace(spec, compile=compiled and not spec.paper)
                found.append(spec)
                if spec.compile and spec.name == "gradnorm exact":
                    budgets = (b for b in args.budgets if b < 1)
                    found += [dataclasses.replace(spec, budget=b) for b in budgets]
    if "gradnorm-paper" in args.methods and "fp32" not in args.precision:
        found.append(Spec("gradnorm-paper", "fp32"))
    return sorted(
        found,
        key=lambda s: (SCHEDULES.index(s.schedule.kind), s.budget < 1, METHODS.index(s.method)),
    )


# ------------------------------------------------------------------------------------------ counts


class NoModules(contextlib.nullcontext):
    """FlopCounterMode's own tracker of modules hangs hooks on their inputs, and autograd.grad
    refuses those on a leaf."""

    parents = {"Global"}


class Counter:
    """Operations of steps, by image, on tensors without storage.

    network: on the CPU, of PyTorch's own operators. classes: of the targets.
    """

    def __init__(self, network: Classifier, batch: int, classes: int):
        self.batch = batch
        self.mode = FakeTensorMode()
        with FakeCopyMode(self.mode):
            self.network = copy.deepcopy(network)
        with self.mode, torch.no_grad():
            self.images = torch.rand(batch, 3, network.img_size, network.img_size)
            self.targets = torch.rand(batch, classes)
            self.forward = self.count(lambda: self.network(self.images))
        self.known: dict[tuple[str, Schedule], float] = {}

    def count(self, run: Callable[[], object]) -> float:
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = NoModules()
        with self.mode, counter:
            run()
        return counter.get_total_flops() / self.batch

    def update(self, spec: Spec) -> float:
        """Of an update by `spec`, the optimizer's aside."""
        same = (spec.method, spec.schedule)
        if same not in self.known:
            with self.mode:
                step = spec.step(self.network, compile=False, precision="fp32")
                ramp = torch.ones(())

                def cycle() -> None:
                    for update in range(spec.cycle):
                        step([(self.images, self.targets)], ramp, update)
                        self.network.zero_grad()

                self.known[same] = self.count(cycle) / spec.cycle
        return self.known[same]


# -------------------------------------------------------------------------------------------- arms


def first_line(error: BaseException) -> str:
    line = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


@dataclasses.dataclass
class Arm:
    """A spec, and what was measured of it."""

    spec: Spec
    flops: float
    """Of one image."""
    step: RetryingStep | None = None
    why_not: str | None = None
    """Why it was not measured."""
    notes: list[str] = dataclasses.field(default_factory=list)
    first_s: float = math.nan
    """Of the first update, compilation included."""
    warm_s: float = math.nan
    peak_bytes: dict[str, int] | None = None
    launches: dict[str, Any] | None = None
    rounds: list[float] = dataclasses.field(default_factory=list)
    """Seconds an update."""
    joules: list[float] = dataclasses.field(default_factory=list)
    """An update, by round."""
    passes: dict[str, float] = dataclasses.field(default_factory=dict)
    """Name -> seconds an update, see step_profile.marked."""
    operators: dict[str, Any] = dataclasses.field(default_factory=dict)


class Bench:
    """The model that all arms share, and the measuring of them.

    network: of PyTorch's own operators; kernels: see models.kernels_for, for the arms that are not
    the paper's; step_options: the same.
    """

    def __init__(
        self, network: Classifier, classes: int, batch: int, kernels: str, **step_options: Any
    ):
        self.step_options = step_options
        self.device = next(network.parameters()).device
        self.plain = self.network = network
        if kernels == "triton":
            kept = {id(t): t for t in (*network.parameters(), *network.buffers())}
            self.network = copy.deepcopy(network, kept)  # the modules, not the weights
            use_kernels(self.network.backbone)
        self.optimizer = build_optimizer(OptimizerConfig(), network, peak=0.0)
        torch.manual_seed(0)
        shape = (batch, 3, network.img_size, network.img_size)
        self.images = torch.rand(shape, device=self.device)
        self.targets = torch.rand(batch, classes, device=self.device).softmax(1)
        self.ramp = torch.ones((), device=self.device)
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.apply_gradients()  # makes the optimizer's state

    def apply_gradients(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def update(self, step: RetryingStep, index: int = 0) -> None:
        """What is timed: fastgn.train's update, clipping and averaging aside."""
        step([(self.images, self.targets)], self.ramp, index)
        self.apply_gradients()

    def cycle(self, arm: Arm) -> None:
        assert arm.step is not None
        for index in range(arm.spec.cycle):
            self.update(arm.step, index)

    def step(self, spec: Spec) -> RetryingStep:
        network = self.plain if spec.paper else self.network
        options = {} if spec.paper else self.step_options
        return spec.step(network, activation_memory_budget=spec.budget, **options)

    @contextlib.contextmanager
    def attempt(self, arm: Arm, what: str, *, needed: bool = True) -> Iterator[None]:
        """What fails in here is the arm's own affair: its end, or where not `needed` a note."""
        try:
            yield
            return
        except Exception as error:
            line = f"{what}: {first_line(error)}"
        arm.notes += [] if needed else [line]
        arm.why_not = line if needed else arm.why_not
        self.optimizer.zero_grad()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def prepare(self, arm: Arm) -> None:
        """Builds an arm, warms it up and takes what needs no clock."""
        arm.why_not = explain_unsupported(arm.spec.precision, self.device)
        if arm.why_not:
            return
        held = self.allocated()
        with self.attempt(arm, "first step"):
            arm.step = self.step(arm.spec)
            arm.step.report = arm.notes.append
            arm.first_s = once(lambda: self.update(arm.step))
            for _ in range(2 if arm.spec.compile else 1):  # CUDA graphs are captured on the way
                self.cycle(arm)
            arm.warm_s = once(lambda: self.cycle(arm)) / arm.spec.cycle
            # a CUDA graph's own pool does not show in the allocator's figures
            if self.device.type == "cuda" and not (arm.spec.compile and self.step_options):
                arm.peak_bytes = self.peak_bytes(arm, self.allocated() - held)
        if arm.why_not is None:
            with self.attempt(arm, "launches", needed=False):
                found = launches(lambda: self.cycle(arm), arm.spec.compile)
                count, busy_s = (
                    None if x is None else x / arm.spec.cycle for x in (found.count, found.busy_s)
                )
                arm.launches = {"what": found.what, "count": count, "busy_s": busy_s}

    def allocated(self) -> int:
        if self.device.type != "cuda":
            return 0
        gc.collect()
        return torch.cuda.memory_allocated(self.device)

    def peak_bytes(self, arm: Arm, own: int) -> dict[str, int]:
        """own: what the arm holds between its steps."""
        before = self.allocated()
        torch.cuda.reset_peak_memory_stats(self.device)
        self.cycle(arm)
        synchronize()
        step = torch.cuda.max_memory_allocated(self.device) - before
        states = [t for state in self.optimizer.state.values() for t in state.values()]
        tensors = [*self.plain.parameters(), *self.plain.buffers(), self.images, self.targets]
        shared = sum(t.nbytes for t in tensors + states if isinstance(t, Tensor))
        return {"shared": shared, "own": own, "step": step, "total": shared + own + step}

    def time(self, arms: Sequence[Arm], seconds: float, meter: Meter | None) -> None:
        """One round of those that have not failed. seconds: what it should take an arm."""
        live = {arm.spec.key: arm for arm in arms if arm.why_not is None}
        readings: dict[str, Any] = {}

        def run(arm: Arm) -> None:
            if arm.why_not is None:
                with self.attempt(arm, "timed step"):
                    self.cycle(arm)

        @contextlib.contextmanager
        def metered(key: str) -> Iterator[None]:
            with meter.measuring() if meter else contextlib.nullcontext() as readings[key]:
                yield

        calls = {
            key: max(1, math.ceil(seconds / (arm.spec.cycle * arm.warm_s)))
            for key, arm in live.items()
        }
        timings = interleaved(
            {key: functools.partial(run, arm) for key, arm in live.items()},
            rounds=1,
            calls=calls,
            warmup=1,
            during=metered,
        )
        for key, arm in live.items():
            if arm.why_not is None:
                arm.rounds.append(timings[key].mean / arm.spec.cycle)
                if meter and not math.isnan(readings[key].joules):
                    arm.joules.append(readings[key].joules / (calls[key] * arm.spec.cycle))

    def profile(self, arm: Arm) -> None:
        """Where the time goes, of the arms whose updates are all alike."""
        if not arm.spec.exact:
            return
        with self.attempt(arm, "passes", needed=False):
            arm.passes = self.passes(arm)
        if arm.spec.base == "gradnorm":
            with self.attempt(arm, "operators", needed=False):
                arm.operators = by_operator(lambda: self.cycle(arm))

    def passes(self, arm: Arm, updates: int = 3) -> dict[str, float]:
        assert arm.step is not None
        total: dict[str, float] = {}
        backbone = None if arm.spec.compile else arm.step.step.model.backbone
        for _ in range(updates):
            marks = Marks()
            with marked(marks, backbone, arm.step.step.objective):
                arm.step([(self.images, self.targets)], self.ramp)
                self.apply_gradients()
                marks("optimizer")
            for name, seconds in marks.seconds().items():
                total[name] = total.get(name, 0.0) + seconds / updates
        return total


def gemm_rates(
    precisions: Sequence[str], device: torch.device, rounds: int
) -> dict[str, dict[str, float]]:
    """Precision -> what a square matrix product reaches."""
    side = GEMM_SIDE[device.type]

    def product(precision: str) -> Callable[[], None]:
        dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float32
        a, b, out = torch.randn(3, side, side, device=device, dtype=dtype)

        def run() -> None:
            with matmul_precision(precision):
                torch.mm(a, b, out=out)

        return run

    products = {p: product(p) for p in precisions if explain_unsupported(p, device) is None}
    timings = interleaved(products, rounds=rounds, calls=10)
    return {
        precision: {"side": side, "flops_per_s": 2 * side**3 / timing.median}
        for precision, timing in timings.items()
    }


# ------------------------------------------------------------------------------------------ record


def spread(values: Sequence[float]) -> dict[str, Any]:
    timing = Timing(tuple(values))
    return {"mean": timing.mean, "std": timing.std, "rounds": list(values)}


def over(values: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Each round's own ratio."""
    ratios = Timing(tuple(a / b for a, b in zip(values, others, strict=True)))
    return {"mean": ratios.mean, "std": ratios.std}


def timed(name: str, meaningful: bool) -> str:
    """The key of seconds."""
    return name if meaningful else f"meaningless_{name}"


def paper_column(spec: Spec) -> dict[str, Any] | None:
    """What the paper measured of what this arm does."""
    row = PAPER.get(spec.base)
    if row is None or not spec.exact or spec.budget < 1:
        return None
    others = ("natural", "pgd_at")
    ratios = {name: row["seconds_a_batch"] / PAPER[name]["seconds_a_batch"] for name in others}
    return row | {"time_over": ratios}


def row_of(
    arm: Arm,
    arms: Mapping[str, Arm],
    *,
    forward: float,
    batch: int,
    gemm: Mapping[str, Mapping[str, float]],
    meaningful: bool,
) -> dict[str, Any]:
    """An arm's line of the record. arms: all of them, by key; forward: operations of an image's."""
    spec = arm.spec
    passes = count_passes(spec.objective(), spec.schedule, spec.method == "pgd_at-paper")
    row: dict[str, Any] = {
        "arm": spec.name,
        "method": spec.method,
        "schedule": str(spec.schedule) if spec.base == "gradnorm" else None,
        "precision": spec.precision,
        "compiled": spec.compile,
        "passes": passes.paper,
        "flops_an_image": arm.flops,
        "forwards_by_count": arm.flops / forward,
        "forwards_by_schedule": passes.units,
        "paper": paper_column(spec),
        "failed": arm.why_not,
        "notes": arm.notes,
    }
    if arm.why_not or not arm.rounds:
        return row
    assert arm.step is not None
    mean = statistics.fmean(arm.rounds)

    def measured(method: str, precision: str = spec.precision) -> Arm | None:
        other = arms.get(f"{method}, {precision}")
        return other if other is not None and not other.why_not and other.rounds else None

    rivals = {
        "natural": measured("natural"),
        "pgd_at": measured("pgd_at"),
        "pgd_at-paper": measured("pgd_at-paper"),
    }
    row |= {
        "micro_batch": arm.step.step.micro_batch or batch,
        timed("first_step_s", meaningful): arm.first_s,
        timed("seconds_a_batch", meaningful): spread(arm.rounds),
        "images_per_s": batch / mean if meaningful else None,
        "time_over": {n: over(arm.rounds, other.rounds) for n, other in rivals.items() if other},
        "flop_utilisation": arm.flops * batch / mean / gemm[spec.precision]["flops_per_s"],
        "peak_bytes": arm.peak_bytes,
        "joules_an_image": spread([j / batch for j in arm.joules]) if arm.joules else None,
        "launches": arm.launches,
    }
    if spec.base == "gradnorm":
        slower = (
            measured("gradnorm-paper", "fp32"),
            measured("gradnorm-paper"),
            measured("gradnorm exact-eager"),
        )
        row["times_as_fast_as"] = {
            other.spec.key: over(other.rounds, arm.rounds) for other in slower if other
        }
    whole = sum(arm.passes.values())
    row["time_of_passes"] = {
        name: {"share": seconds / whole, timed("s", meaningful): seconds}
        for name, seconds in arm.passes.items()
    }
    return row | arm.operators


def beside_prediction(record: dict[str, Any], results: Path = RESULTS) -> None:
    """Adds the bytes that predict.py foretold on this very card: of a compiled arm as Inductor
    fuses it, of gradnorm in eager mode as operators move them one by one."""
    path = results / f"predict_{record['model']}.json"
    predicted = json.loads(path.read_text()) if path.is_file() else {"gpus": {}, "rows": []}
    cards = [k for k, card in predicted["gpus"].items() if card["name"] == record["device"]]
    asked = {"model_kwargs": record["architecture"]["model_kwargs"]}
    asked |= {key: record[key] for key in ("img_size", "batch")}
    if not cards or any(predicted[key] != value for key, value in asked.items()):
        return
    record["bytes_per_s"] = predicted["gpus"][cards[0]]["bytes_per_s"]
    known = {
        (row["arm"], row["precision"]): row["bytes_an_image"]
        for row in predicted["rows"]
        if row["gpu"] == cards[0] and row["kernels"] == record["kernels"]
    }
    eager = {
        row["precision"]: row["eager"]["bytes_an_image"]
        for row in predicted["rows"]
        if row["arm"] == "gradnorm exact"
    }
    for row in record["rows"]:
        if row["compiled"]:
            row["predicted_bytes_an_image"] = known.get((row["arm"], row["precision"]))
        elif row["arm"] == "gradnorm-paper":  # of PyTorch's operators, as are the predictions
            row["predicted_bytes_an_image"] = eager.get(row["precision"])


def targets(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What Swin-B at 224 pixels on one H200 is to reach by the exact compiled schedule in bf16."""
    by_key = {(row["arm"], row["precision"]): row for row in rows}
    row = by_key.get(("gradnorm exact", "bf16"))
    if row is None or not row["compiled"]:
        return []
    faster, slower = row["times_as_fast_as"], row["time_over"]
    wanted = [
        ("images a second", row["images_per_s"], "at_least", 1200),
        ("images a second, then", row["images_per_s"], "at_least", 2000),
        ("time over natural", slower.get("natural"), "at_most", 2.2),
        ("time over fair PGD-3", slower.get("pgd_at"), "at_most", 0.68),
        ("speed over the paper's way, fp32", faster.get("gradnorm-paper, fp32"), "at_least", 8),
        ("speed over the paper's way, bf16", faster.get("gradnorm-paper, bf16"), "at_least", 2),
    ]
    natural = by_key.get(("natural", "bf16"))
    peaks = [
        r["peak_bytes"]["total"]
        for r in rows
        if r["arm"].startswith("gradnorm exact")
        and (r["precision"], r["compiled"]) == ("bf16", True)
        and r["peak_bytes"]
        and r["images_per_s"] >= 0.95 * row["images_per_s"]
    ]
    if natural and natural["peak_bytes"] and peaks:
        memory = min(peaks) / natural["peak_bytes"]["total"]
        what = "peak memory over natural, of the budgets that cost less than 5 % of the speed"
        wanted.append((what, memory, "at_most", 1.5))
    out = []
    for name, found, bound, limit in wanted:
        if found is not None:
            value = found["mean"] if isinstance(found, Mapping) else found
            met = value >= limit if bound == "at_least" else value <= limit
            out.append({"target": name, "value": value, bound: limit, "met": met})
    return out


# -------------------------------------------------------------------------------------------- main


def start_times(arms: Sequence[Arm], argv: Sequence[str], meaningful: bool) -> list[dict[str, Any]]:
    """First updates of the compiled natural and exact gradnorm arms, each in a process of its own:
    with an empty disk cache, then with the one that this left."""
    out = []
    for spec in (arm.spec for arm in arms if arm.why_not is None):
        if not spec.compile or spec.name not in ("natural", "gradnorm exact"):
            continue
        alone = ("--methods", spec.method, "--schedules", "exact", "--precision", spec.precision)
        command = [sys.executable, "-m", "benchmarks.step.cost", *argv, *alone, "--first-step"]
        row: dict[str, Any] = {"arm": spec.name, "precision": spec.precision, "failed": None}
        with tempfile.TemporaryDirectory() as cache:
            env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
            for name in ("cold", "warm"):
                done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
                if done.returncode:
                    row["failed"] = (done.stderr.strip() or "no message").splitlines()[-1]
                    break
                row[timed(f"{name}_s", meaningful)] = json.loads(done.stdout.splitlines()[-1])
        out.append(row)
        print(f"start: {row}", flush=True)
    return out


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, what depends on the machine filled in. Raises UserError."""
    gpu = torch.cuda.is_available()
    modern = gpu and torch.cuda.get_device_capability() >= (8, 0)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="any of fastgn's; default: swin_b, without a GPU a small Swin")
    add("--model-kwargs", nargs="+", default=[], metavar="KEY=VALUE")
    add("--img-size", type=int, help="pixels a side")
    add("--classes", type=int, help="default: 1000, of the small Swin 10")
    add("--batch", type=int, default=64 if gpu else 8, help="images")
    add("--methods", nargs="+", choices=METHODS, default=METHODS)
    add("--schedules", nargs="+", choices=SCHEDULES, default=SCHEDULES, help="of gradnorm")
    default = ["fp32", "bf16"] if modern else ["fp32"]
    add("--precision", nargs="+", choices=PRECISIONS, default=default)
    add("--fd-step", type=float, default=Schedule.fd_step)
    add("--lazy-interval", type=int, default=Schedule.lazy_interval)
    add("--subset-fraction", type=float, default=Schedule.subset_fraction)
    add("--budgets", nargs="+", type=float, default=(), help="activation memory, more exact arms")
    add("--kernels", choices=("auto", "triton", "reference"), default="auto")
    add("--compile", choices=("on", "off"), default="on" if gpu else "off")
    add(
        "--cuda-graphs",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="of the compiled arms; default: as fastgn.train, on CUDA",
    )
    add("--rounds", type=int, default=3)
    add("--round-seconds", type=float, default=1.0 if gpu else 0.3, help="of an arm in a round")
    add("--minutes", type=float, default=math.inf, help="arms are left out that would exceed these")
    add("--counts-only", action="store_true", help="passes and operations, nothing is timed")
    add("--start-times", action="store_true", help="first steps, disk cache empty and full")
    add("--first-step", action="store_true", help=argparse.SUPPRESS)
    add("--output", type=Path, help="JSON")
    add("--plot", type=Path, help="PNG; the second picture is named <this>_roofline")
    add("--markdown", action="store_true", help="print the README's table")
    args = parser.parse_args(argv)
    small = args.model is None and not gpu
    args.name = "small_swin" if small else args.model or "swin_b"
    args.model = "swin_t" if small else args.name
    if small:
        args.model_kwargs = args.model_kwargs or list(SMALL_SWIN)
        args.img_size = args.img_size or 32
    args.classes = args.classes or (10 if small else 1000)
    for name in (
        "batch",
        "classes",
        "rounds",
        "lazy_interval",
        "fd_step",
        "round_seconds",
        "minutes",
    ):
        value = getattr(args, name)
        flag = f"--{name.replace('_', '-')} {value}"
        check(value > 0, f"{flag} must be positive")
        check(value < LARGEST or name == "minutes", f"{flag} must be below {LARGEST}")
    for value in (args.subset_fraction, *args.budgets):
        check(0 < value <= 1, f"--subset-fraction and --budgets lie in (0, 1], {value} does not")
    return args


def unlike_kept(args: argparse.Namespace) -> list[str]:
    """In what a run differs from that of its --model alone, which benchmarks/results keeps: more
    arms and more rounds do not count."""
    kept = parse([] if args.name == "small_swin" else ["--model", args.name])
    found = [name for name in CONDITIONS if getattr(args, name) != getattr(kept, name)]
    found += [n for n in ("rounds", "round_seconds") if getattr(args, n) < getattr(kept, n)]
    out = [f"--{name.replace('_', '-')}" for name in found]
    # a schedule also holds the values that only others use
    there = {(spec.key, spec.compile) for spec in specs(args)}
    missing = [s.key for s in specs(kept) if (s.key, s.compile) not in there]
    return out + ([f"no {missing[0]}"] if missing else [])


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Measures what was asked for."""
    began, longest = time.perf_counter(), 0.0
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    card = torch.cuda.get_device_name() if gpu else "cpu"
    slug = "counts" if args.counts_only else re.sub(r"\W+", "_", card.lower())
    wanted = specs(args)
    if not args.counts_only:
        reasons = dict.fromkeys(explain_unsupported(spec.precision, device) for spec in wanted)
        why = "; ".join(filter(None, reasons))
        check(None in reasons, f"--precision leaves no arm to measure: {why}")
    stem = f"cost_{args.name}_{slug}"
    unlike = [] if args.output else unlike_kept(args)
    default = ROOT / "runs" / f"{stem}_partial.json" if unlike else RESULTS / f"{stem}.json"
    output = args.output or default
    hold(output)
    picture = args.plot or ROOT / "runs" / f"{output.stem}.png"
    # of one function: each arm compiles it for its own loss
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000

    torch.manual_seed(0)
    kwargs = {"model_kwargs": tuple(args.model_kwargs), "img_size": args.img_size}
    network, _ = build_model(ArchitectureConfig(model=args.model, **kwargs), args.classes)
    kernels = choose_kernels(args.kernels, device)
    graphs = {"cuda_graphs": True} if args.cuda_graphs else {}
    if args.first_step:
        bench = Bench(network.to(device), args.classes, args.batch, kernels, **graphs)
        step = bench.step(wanted[0])
        print(once(lambda: bench.update(step)))
        return int(step.step.micro_batch is not None)  # halved: not the step that was asked for
    if unlike:
        why = ", ".join(unlike)
        print(f"not the run that benchmarks/results keeps ({why}): written to {output}")
    counter = Counter(network, args.batch, args.classes)
    bench, meter, energy = None, None, "not measured"
    gemm: dict[str, dict[str, float]] = {}
    if not args.counts_only:
        print(card if gpu else NO_MEANING, flush=True)
        gemm = gemm_rates(list(dict.fromkeys(s.precision for s in wanted)), device, args.rounds)
        bench = Bench(network.to(device), args.classes, args.batch, kernels, **graphs)
        try:
            meter = Meter()
            energy = meter.source
        except NoMeterError as error:
            energy = f"not measured: {error}"
    arms: dict[str, Arm] = {}
    skipped: list[str] = []
    record: dict[str, Any] = {
        "script": "benchmarks/step/cost.py",
        "file": output.name,
        "device": card,
        "meaningful_times": gpu,
        "meaning": "measured" if gpu else NO_MEANING,
        "model": args.name,
        "architecture": {"model": args.model, "model_kwargs": args.model_kwargs},
        "img_size": network.img_size,
        "classes": args.classes,
        "batch": args.batch,
        "rounds": args.rounds,
        "round_seconds": args.round_seconds,
        "kernels": kernels,
        "cuda_graphs": args.cuda_graphs,
        "energy": energy,
        "gemm": gemm,
        "forward_flops_an_image": counter.forward,
        **environment(),
    }

    def save(complete: bool = False) -> None:
        sizes = {"forward": counter.forward, "batch": args.batch}
        rows = [row_of(a, arms, **sizes, gemm=gemm, meaningful=gpu) for a in arms.values()]
        record["complete"] = complete
        record["skipped"] = skipped
        record["rows"] = [row for row in rows if "time_over" in row]
        record["not_timed"] = [row for row in rows if "time_over" not in row]
        beside_prediction(record)
        if gpu and args.name == "swin_b" and network.img_size == 224:
            record["targets"] = targets(record["rows"])
        write_record(output, record)

    for spec in wanted:
        start = time.perf_counter()
        rest = (args.rounds * args.round_seconds + PROFILE_S) * (len(arms) + 1)
        rest += longest if spec.compile else 0
        if start - began + rest > 60 * args.minutes:
            skipped.append(f"{spec.key}: --minutes {args.minutes:g} had no room for it")
            continue
        arm = arms[spec.key] = Arm(spec, counter.update(spec))
        if bench:
            bench.prepare(arm)
        longest = max(longest, time.perf_counter() - start)
        ratio = f"{arm.flops / counter.forward:6.3f} forwards"
        print(f"{spec.key:42} {arm.flops / 1e9:9.3f} GFLOP an image, {ratio}", flush=True)
        save()
    if bench:
        for _ in range(args.rounds):
            bench.time(list(arms.values()), args.round_seconds, meter)
            save()
        for arm in arms.values():
            if arm.why_not is None:
                bench.profile(arm)
                save()
    if args.start_times:
        record["start_times"] = start_times(list(arms.values()), argv, gpu)
    save(complete=True)

    if importlib.util.find_spec("matplotlib") is None:
        print("skipped: the pictures: matplotlib is not installed")
    else:
        from benchmarks.step.cost_figures import draw

        for path in draw(record, picture):
            print(f"picture: {path}")
    if args.markdown:
        print(cost_table(record))
    failed = [f"{arm.spec.key}: {arm.why_not}" for arm in arms.values() if arm.why_not]
    for line in [f"FAILED: {line}" for line in failed] + [f"skipped: {line}" for line in skipped]:
        print(line)
    print(f"{len(record['rows'])} arms timed, {len(failed)} failed -> {output}")
    return int(len(failed) == len(arms))


def main(argv: Sequence[str] | None = None) -> int:
    """Its exit status: 2 for a mistake of the user's, 1 where no arm could be measured."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return run(parse(argv), argv)
    except UserError as error:
        line = str(error)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        line = "out of memory before the first arm: lower --batch or --img-size"
    print(f"cost.py: error: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
