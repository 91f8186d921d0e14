"""Measures the cost of one update, for every training method, schedule and precision.

The cost is time, memory, energy and kernel launches. The table shows it beside Table 3 of arXiv
2409.20139. An arm is a training method with a schedule (how its penalty is differentiated) and a
precision. Arms named -paper do what the paper's code does (benchmarks/step/arms.py says how).

    python benchmarks/cost.py  # Swin-B and 64 images of 224 pixels; without a GPU, a small Swin
    python benchmarks/cost.py --precision fp32 tf32 bf16 bf16-pure --rounds 5
    python benchmarks/cost.py --model swin_b --counts-only  # needs no GPU
    python benchmarks/cost.py --table3  # the paper's table, see benchmarks/step/table3.py

An update is fastgn.step.step.Step on random images and soft targets, followed by AdamW. Its
learning rate is 0, so that all arms work on the same weights. The time is measured in several
rounds. In a round, all arms are timed in turn. A ratio of two arms is computed within each round
and then averaged. A lazy arm computes the penalty only in every n-th update, so its results are
means over n updates.

The arms named -paper ignore --kernels and --compile. The schedule exact-eager uses --kernels, but
is never compiled. gradnorm-paper also runs in fp32, the precision of the paper.

Operations are counted with PyTorch's operators, without what torch.compile recomputes. FLOP
utilisation is relative to a square matrix product in the same precision and run. Peak memory is
what an arm would need alone: weights, optimizer, images, what it keeps between updates, and the
most that an update allocates. CUDA graphs hide it from the allocator, so it is not measured there.

Writes benchmarks/results/cost_<model>_<device>.json after every arm and round. If other options
than --model and --counts-only are changed, writes to runs/ instead. On a CPU, counts are exact and
ratios of times are valid within one run, but seconds mean nothing.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.common.arguments import DEVICE, MODERN, ON_GPU, open_record, option, program
from benchmarks.common.energy import energy_counter
from benchmarks.common.records import write_record
from benchmarks.common.tables import Column, Record, Row, device, make_table, with_notes
from benchmarks.common.timing import interleaved, once, paired_ratios, summary, synchronize
from benchmarks.step.arms import Arm, random_batch
from fastgn.config.groups import ArchitectureConfig, OptimizerConfig
from fastgn.errors import check, first_line
from fastgn.models.network import Classifier, build_model, choose_kernels, use_kernels
from fastgn.optim import build_optimizer
from fastgn.step.meter import Meter as OperationMeter
from fastgn.step.meter import fake_copy
from fastgn.step.passes import count_passes
from fastgn.step.precision import PRECISIONS, explain_unsupported, matmul_precision, short_dtype
from fastgn.step.retry import RetryingStep
from fastgn.step.schedule import SCHEDULES, Schedule
from fastgn.updating import take_step

SHORT = ["bf16" if MODERN else "fp16"] if ON_GPU else []
"""The precision of 16 bits that is measured by default. None without a GPU."""
NO_MEANING = "NO GPU: counts are exact, times are ratios within this run, seconds mean nothing"

METHODS = ("natural", "gradnorm", "pgd_at", "gradnorm-paper", "pgd_at-paper", "fgsm_rs")
"""Methods in the order of measurement. The last are left out if --minutes is too short."""
SMALL_SWIN = (
    *("patch_size=4", "embed_dim=64", "depths=(2, 2)", "num_heads=(2, 4)"),
    "window_size=4",
)
"""Arguments of the network small_swin, which is a swin_t for images of 32 pixels."""
GEMM_SIDE = {"cuda": 8192, "cpu": 512}
"""Rows and columns of the square matrices whose product shows the device's highest FLOP rate."""

PAPER = {
    "natural": {"passes": 2, "seconds_a_batch": 0.749, "std": 0.002},
    "gradnorm": {"passes": 5, "seconds_a_batch": 1.848, "std": 0.011},
    "pgd_at": {"passes": 8, "seconds_a_batch": 2.943, "std": 0.001},
}
"""Method -> its row of Table 3 in arXiv 2409.20139.

The paper trained Swin-B at 224 pixels in fp32 on 8 V100, with the same batch for all methods, three
times.
"""


def choose_arms(args: argparse.Namespace) -> list[Arm]:
    """Returns the kinds of update that the options ask for, in the order of measurement."""
    kinds = list(args.schedules)
    if args.compile == "off" and "exact" in kinds:  # exact-eager would be the same
        kinds = [kind for kind in kinds if kind != "exact-eager"]
    arms = []
    for precision in args.precision:
        for method in args.methods or METHODS:
            for kind in kinds if method == "gradnorm" else ["exact"]:
                arm = Arm(method, precision, Schedule(kind))
                compiled = args.compile == "on" and kind != "exact-eager" and not arm.paper
                arms.append(dataclasses.replace(arm, compile=compiled))
    if "gradnorm-paper" in (args.methods or METHODS) and "fp32" not in args.precision:
        arms.append(Arm("gradnorm-paper", "fp32"))
    return sorted(arms, key=lambda a: (SCHEDULES.index(a.schedule.kind), METHODS.index(a.method)))


# ------------------------------------------------------------------------------------------ counts


def forward_flops(network: Classifier, batch: int) -> float:
    """Returns the floating-point operations of a forward pass, divided by the number of images.

    The operations are counted on tensors without data. batch: number of images.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), OperationMeter() as meter:
        fake_copy(network)(torch.empty(batch, 3, network.img_size, network.img_size))
    return meter.flops / batch


@functools.cache
def update_flops(
    network: Classifier, method: str, schedule: Schedule, batch: int, classes: int
) -> float:
    """Returns the floating-point operations per image of an eager update, without the optimizer."""
    return Arm(method, schedule=schedule).count(network, batch, classes).flops


# ------------------------------------------------------------------------------------ measurements


def launches(run: Callable[[], object], compiled: bool) -> tuple[str, int | None, float | None]:
    """Counts the kernels that a call launches, or on a CPU the operators that read or write memory.

    compiled: whether torch.compile has compiled the call. Returns what is counted, the number, and
    the seconds in which the GPU was at work. A value that cannot be measured is None, such as the
    number of operators in a compiled call.
    """
    if torch.cuda.is_available():
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run()
            synchronize()
        kernels = [e for e in profiler.events() if is_kernel(e)]
        busy_s = sum(e.time_range.elapsed_us() for e in kernels) / 1e6
        # if the profiler shows no kernel, the machine does not allow profiling
        return "kernels launched", len(kernels) or None, busy_s or None
    if compiled:
        return "operators without views", None, None
    with OperationMeter() as meter:
        run()
    return "operators without views", meter.operators, None


def is_kernel(event: Any) -> bool:
    """Returns whether an event of PyTorch's profiler is a kernel, not host code or a copy."""
    return (
        event.device_type == DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset"))
        and not getattr(event, "is_user_annotation", False)
    )


@dataclasses.dataclass
class Measurement:
    """Results of measuring one kind of update (an Arm)."""

    arm: Arm
    flops: float
    """Floating-point operations of an update, per image."""
    step: RetryingStep | None = None
    micro_batch: int | None = None
    """Number of images that pass through the network at a time. None means the whole batch."""
    why_not: str | None = None
    """Reason why the update could not be timed, or None."""
    notes: list[str] = dataclasses.field(default_factory=list)
    warm_s: float = math.nan
    """Seconds per update in one call after the warm-up, to plan the measurement."""
    peak_bytes: dict[str, int] | None = None
    """The entry "total" has the bytes of GPU memory that the update would need if it were alone."""
    launches: dict[str, Any] | None = None
    rounds: list[float] = dataclasses.field(default_factory=list)
    """Seconds per update, one entry for each repetition of the measurement."""
    joules: list[float] = dataclasses.field(default_factory=list)
    """Joules per update, one entry for each repetition of the measurement."""


class UpdateBench:
    """Measures several kinds of update (Arm) with one model and one batch.

    network: a network with PyTorch's own operators. kernels: "triton" replaces them by Triton
    kernels, "reference" keeps them. step_options: fields of StepOptions. Both have no effect on
    methods whose name ends in -paper, such as pgd_at-paper.
    """

    def __init__(
        self, network: Classifier, classes: int, batch: int, kernels: str, **step_options: Any
    ):
        self.step_options = step_options
        self.device = next(network.parameters()).device
        self.plain = self.network = network
        if kernels == "triton":
            kept = {id(t): t for t in (*network.parameters(), *network.buffers())}
            self.network = copy.deepcopy(network, kept)  # a copy that shares the weights
            use_kernels(self.network.backbone)
        self.optimizer = build_optimizer(OptimizerConfig(), network, peak=0.0)
        torch.manual_seed(0)
        self.images, self.targets = random_batch(batch, network.img_size, classes, self.device)
        self.ramp = torch.ones((), device=self.device)
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.apply_gradients()  # makes the optimizer's state

    def apply_gradients(self, step: RetryingStep | None = None) -> None:
        take_step(self.optimizer, step and step.step.loss_scale)
        self.optimizer.zero_grad()

    def update(self, step: RetryingStep, index: int = 0) -> None:
        """Makes the update with index `index`, without clipping and the weights' average."""
        step([(self.images, self.targets)], self.ramp, index)
        self.apply_gradients(step)

    def cycle(self, found: Measurement) -> None:
        """Makes one update, or n updates if only every n-th one computes the penalty.

        found: measurement of this kind of update, which also holds the function for it.
        """
        assert found.step is not None
        for index in range(found.arm.schedule.cycle):
            self.update(found.step, index)

    def step(self, arm: Arm) -> RetryingStep:
        """Returns the function that computes the gradients of an update."""
        network = self.plain if arm.paper else self.network
        return arm.step(network, **({} if arm.paper else self.step_options))

    @contextlib.contextmanager
    def attempt(self, found: Measurement, what: str) -> Iterator[None]:
        """Catches an error of the with block, so that other kinds of update are still measured.

        found: measurement in which the error's text is stored. what: name of the code in the with
        block, which begins the text.
        """
        try:
            yield
            return
        except Exception as error:
            found.why_not = f"{what}: {type(error).__name__}: {first_line(error)}"
        self.optimizer.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()

    def prepare(self, found: Measurement) -> None:
        """Builds and warms up a kind of update. Stores its memory and launches in `found`."""
        arm = found.arm
        found.why_not = explain_unsupported(arm.precision, self.device)
        if found.why_not:
            return
        gc.collect()
        held = torch.cuda.memory_allocated() if self.device.type == "cuda" else 0
        with self.attempt(found, "first step"):
            found.step = self.step(arm)
            found.step.report = found.notes.append
            # compiled updates run 3 times, because CUDA graphs are captured after some calls
            for _ in range(3 if arm.compile else 2):
                self.cycle(found)
            found.warm_s = once(lambda: self.cycle(found)) / arm.schedule.cycle
            if self.device.type == "cuda" and not (arm.compile and self.step_options):
                found.peak_bytes = {"total": self.peak_bytes(found, held)}
            with contextlib.suppress(RuntimeError):  # not every machine allows profiling
                what, *seen = launches(lambda: self.cycle(found), arm.compile)
                count, busy_s = (x and x / arm.schedule.cycle for x in seen)
                found.launches = {"what": what, "count": count, "busy_s": busy_s}

    def peak_bytes(self, found: Measurement, held: int) -> int:
        """Returns the bytes of memory that one kind of update would need if it were alone.

        found: measurement of this kind. held: bytes of all tensors on the GPU before the update was
        built.
        """
        torch.cuda.reset_peak_memory_stats(self.device)
        self.cycle(found)
        synchronize()
        own = torch.cuda.max_memory_allocated(self.device) - held
        states = [t for state in self.optimizer.state.values() for t in state.values()]
        tensors = [*self.plain.parameters(), *self.plain.buffers(), self.images, self.targets]
        return own + sum(t.nbytes for t in tensors + states if isinstance(t, Tensor))

    def time(
        self,
        measured: Sequence[Measurement],
        seconds: float,
        joules: Callable[[], float] | None = None,
    ) -> None:
        """Measures each kind of update for some time, and adds the results to `measured`.

        Kinds that have failed before are skipped. seconds: about how long to time each kind.
        joules: returns the joules that the GPU has taken so far. If None, energy is not measured.
        """
        live = {found.arm.key: found for found in measured if found.why_not is None}
        taken: dict[str, float] = {}

        def run(found: Measurement) -> None:
            if found.why_not is None:
                with self.attempt(found, "timed step"):
                    self.cycle(found)

        @contextlib.contextmanager
        def metered(key: str) -> Iterator[None]:
            before = joules() if joules else 0.0
            yield
            taken[key] = joules() - before if joules else 0.0

        cycles = {
            key: math.ceil(seconds / (m.arm.schedule.cycle * m.warm_s)) for key, m in live.items()
        }
        arms = {key: functools.partial(run, found) for key, found in live.items()}
        timings = interleaved(arms, rounds=1, calls=cycles, warmup=1, during=metered)
        for key, found in live.items():
            if found.why_not is None:
                found.rounds.append(timings[key][0] / found.arm.schedule.cycle)
                found.micro_batch = found.step and found.step.step.micro_batch
                if joules:
                    found.joules.append(taken[key] / (cycles[key] * found.arm.schedule.cycle))


def gemm_rates(
    precisions: Sequence[str], device: torch.device, rounds: int
) -> dict[str, dict[str, float]]:
    """Measures a square matrix product in several precisions.

    Returns precision -> {"side": rows of the matrices, "flops_per_s": median of the floating-point
    operations per second}. Precisions that the device does not support are left out. rounds: number
    of measurements in each precision.
    """
    side = GEMM_SIDE[device.type]

    def product(precision: str) -> Callable[[], None]:
        dtype = short_dtype(precision) or torch.float32
        a, b, out = torch.randn(3, side, side, device=device, dtype=dtype)

        def run() -> None:
            with matmul_precision(precision):
                torch.mm(a, b, out=out)

        return run

    products = {p: product(p) for p in precisions if explain_unsupported(p, device) is None}
    timings = interleaved(products, rounds=rounds, calls=10)
    return {
        precision: {"side": side, "flops_per_s": 2 * side**3 / statistics.median(seconds)}
        for precision, seconds in timings.items()
    }


# ------------------------------------------------------------------------------------------ record


def paper_column(arm: Arm) -> dict[str, Any] | None:
    """Returns what Table 3 of arXiv 2409.20139 says of a kind of update, or None if it lacks it.

    The result also has the ratios of its time to the times of natural training and PGD-3.
    """
    row = PAPER.get(arm.base)
    if row is None or not arm.schedule.is_exact:
        return None
    others = ("natural", "pgd_at")
    ratios = {name: row["seconds_a_batch"] / PAPER[name]["seconds_a_batch"] for name in others}
    return row | {"time_over": ratios}


def row_of(
    found: Measurement, measured: Mapping[str, Measurement], record: Record
) -> dict[str, Any]:
    """Returns the results of one kind of update as a dict for the JSON record.

    found: these results. measured: Arm.key -> results of each kind of update, for ratios of times.
    record: the rest of the JSON record.
    """
    arm, batch, meaningful = found.arm, record["batch"], record["meaningful_times"]
    passes = count_passes(arm.objective(), arm.schedule, arm.method == "pgd_at-paper")
    row: dict[str, Any] = {
        "arm": arm.name,
        "method": arm.method,
        "schedule": str(arm.schedule) if arm.base == "gradnorm" else None,
        "precision": arm.precision,
        "compiled": arm.compile,
        "passes": passes.paper,
        "flops_an_image": found.flops,
        "forwards_by_count": found.flops / record["forward_flops_an_image"],
        "forwards_by_schedule": passes.units,
        "paper": paper_column(arm),
        "failed": found.why_not,
        "notes": found.notes,
    }
    if found.why_not or not found.rounds:
        return row
    images_per_s = batch / statistics.fmean(found.rounds)

    def timed(method: str, precision: str = arm.precision) -> list[Measurement]:
        other = measured.get(f"{method}, {precision}")
        return [other] if other is not None and not other.why_not and other.rounds else []

    rivals = [(n, other) for n in ("natural", "pgd_at", "pgd_at-paper") for other in timed(n)]
    prefix = "" if meaningful else "meaningless_"
    rate = record["gemm"].get(arm.precision, {}).get("flops_per_s")
    row |= {
        "micro_batch": found.micro_batch or batch,
        f"{prefix}seconds_a_batch": summary(found.rounds) | {"rounds": found.rounds},
        "images_per_s": images_per_s if meaningful else None,
        "time_over": {n: summary(paired_ratios(found.rounds, m.rounds)) for n, m in rivals},
        "flop_utilisation": found.flops * images_per_s / rate if rate else None,
        "peak_bytes": found.peak_bytes,
        "joules_an_image": summary([j / batch for j in found.joules]) if found.joules else None,
        "launches": found.launches,
    }
    if arm.base == "gradnorm":
        paper = [*timed("gradnorm-paper", "fp32"), *timed("gradnorm-paper")]
        row["times_as_fast_as"] = {
            other.arm.key: summary(paired_ratios(other.rounds, found.rounds))
            for other in [*paper, *timed("gradnorm exact-eager")]
        }
    return row


# ------------------------------------------------------------------------------------------- table


PAPER_IN_FP32 = "gradnorm-paper, fp32"


def busy_share(row: Row) -> str:
    """Returns as text the share of an update's time in which the GPU is at work, or ""."""
    busy_s, seconds = (row.get("launches") or {}).get("busy_s"), row.get("seconds_a_batch")
    return f"{100 * busy_s / seconds['mean']:.0f} %" if seconds and busy_s else ""


COLUMNS: dict[str, Column] = {
    "arm": lambda r: r["arm"] + (", compiled" if r["compiled"] else ""),
    "precision": "precision",
    "passes": "passes:g",
    "GFLOP an image": lambda r: f"{r['flops_an_image'] / 1e9:.3g}",
    "in forwards": "forwards_by_count:.2f",
    "s a batch": "seconds_a_batch:.4f",
    "images/s": "images_per_s:.0f",
    "time over natural": "time_over/natural:.2f",
    "over PGD-3": "time_over/pgd_at:.2f",
    "over the paper's PGD-3": "time_over/pgd_at-paper:.2f",
    "speed over the paper's way, fp32": f"times_as_fast_as/{PAPER_IN_FP32}:.2f",
    "FLOP utilisation": lambda r: (
        f"{100 * r['flop_utilisation']:.0f} %" if r.get("flop_utilisation") else ""
    ),
    "peak GiB": lambda r: f"{r['peak_bytes']['total'] / 2**30:.1f}" if r.get("peak_bytes") else "",
    "J an image": "joules_an_image:.3f",
    "launches": "launches/count:.0f",
    "GPU busy": busy_share,
    "paper: passes": "paper/passes",
    "paper: s per 512 images": "paper/seconds_a_batch:.3f",
    "paper: over natural": "paper/time_over/natural:.2f",
    "paper: over PGD-3": "paper/time_over/pgd_at:.2f",
}
"""Heading of each column of the table -> function that makes its cell from one update's results."""


def table(record: Record) -> str:
    """Returns this benchmark's Markdown table of all kinds of update, made from its JSON record."""
    failed = [row for row in record["not_timed"] if row["failed"]]
    rows = record["rows"] + [row for row in record["not_timed"] if row not in failed]
    columns = dict(COLUMNS)
    notes = [f"{record['model']}, {record['img_size']} px, batch {record['batch']}"]
    if len({row["precision"] for row in rows}) == 1:
        del columns["precision"]
        notes[0] += f", {rows[0]['precision']}"
    if record["rows"]:
        rounds = record.get("runs") or f"{record['rounds']} interleaved rounds"
        notes.append(f"{device(record)}, mean ± deviation over {rounds}")
        if record["meaningful_times"]:
            graphs = "CUDA graphs" if record["cuda_graphs"] else "no CUDA graphs"
            notes.append(f"{graphs} in the compiled arms")
        launched = {row["launches"]["what"] for row in rows if row.get("launches")}
        notes += [f"launches: {what}" for what in sorted(launched)]
        if not record["meaningful_times"]:
            notes.append("on a CPU, ratios mean something within this run alone")
    else:
        notes.append("counted, nothing timed")
    notes.append(
        "paper: arXiv 2409.20139, Table 3, Swin-B at 224 px in fp32, 64 images on each of 8 V100"
    )
    notes += [f"{r['arm']}, {r['precision']}: {n}" for r in rows for n in r.get("notes", ())]
    notes += [f"failed: {row['arm']}, {row['precision']}: {row['failed']}" for row in failed]
    return with_notes(make_table(rows, columns), record, *notes)


def summary_table(counted: Record, graphs: Record, eager: Record) -> str:
    """Returns README's Markdown table of six kinds of update of Swin-B.

    counted: JSON record of a call with --counts-only. graphs, eager: JSON records of measurements
    with and without CUDA graphs.
    """
    counts = {row["arm"]: row for row in counted["not_timed"]}
    shown = (
        ("natural training", "natural", "bf16, compiled"),
        ("FGSM from a random start", "fgsm_rs", ""),
        ("**gradient norm, fastgn**", "gradnorm exact", "bf16, compiled"),
        ("gradient norm, as the paper runs it", "gradnorm-paper", "fp32, eager"),
        ("PGD-3, without needless work", "pgd_at", ""),
        ("PGD-3, as the paper runs it", "pgd_at-paper", "bf16, eager"),
    )
    timed: dict[tuple[str, str], Row] = {}
    for record in (eager, graphs):
        for row in record["rows"]:
            ran = f"{row['precision']}, {'compiled' if row['compiled'] else 'eager'}"
            replayed = row["compiled"] and record["cuda_graphs"]
            timed[row["arm"], ran] = row | {"ran": ran + ", CUDA graphs" * replayed}
    rows = [
        {"title": title, "count": counts[arm], "ran": ran, "row": timed.get((arm, ran))}
        | ({"paper": counts[arm]} if arm == "natural" or arm.endswith("-paper") else {})
        for title, arm, ran in shown
    ]
    columns: dict[str, Column] = {
        "one update of": "title",
        "forwards": "count/forwards_by_count:.1f",
        "GFLOP per image": lambda r: f"{r['count']['flops_an_image'] / 1e9:.0f}",
        "measured in": lambda r: r["row"]["ran"] if r["row"] else "not measured",
        "images/s": "row/images_per_s:.0f",
        "J per image": "row/joules_an_image/mean:.2f",
        "paper: s per 512 images": "paper/paper/seconds_a_batch:.3f",
    }
    files = ", ".join(f"`{r['file']}`" for r in (counted, graphs, eager))
    return (
        f"{make_table(rows, columns)}\n\nSwin-B at {graphs['img_size']} px. Operations are "
        f"counted; 1 forward is a forward pass. Speed and energy: one {graphs['device']}, batch "
        f"{graphs['batch']}, mean of {graphs['rounds']} rounds. Paper: Table 3, fp32, 64 images on "
        f"each of 8 V100 ({files} in `benchmarks/results/`)."
    )


# ------------------------------------------------------------------------------------ command line


def build_network(args: argparse.Namespace) -> tuple[Record, Classifier]:
    """Builds the network on the CPU. Returns entries for the JSON record, and the network."""
    torch.manual_seed(0)
    small = args.model == "small_swin"
    cfg = ArchitectureConfig(
        model="swin_t" if small else args.model,
        model_kwargs=tuple(args.model_kwargs or (SMALL_SWIN if small else ())),
        img_size=args.img_size or (32 if small else None),
    )
    classes = args.classes or (10 if small else 1000)
    network, _ = build_model(cfg, classes)
    return {
        "model": args.model,
        "architecture": {"model": cfg.model, "model_kwargs": list(cfg.model_kwargs)},
        "img_size": network.img_size,
        "classes": classes,
        **{key: getattr(args, key) for key in ("batch", "rounds", "round_seconds")},
        "kernels": choose_kernels(args.kernels, DEVICE),
        "cuda_graphs": args.cuda_graphs,
        "gemm": {},
    }, network


@program(
    option(
        "--model", default="swin_b" if ON_GPU else "small_swin", help="any model of fastgn.train"
    ),
    option("--model-kwargs", nargs="+", default=[], metavar="KEY=VALUE", help="of the model"),
    option("--img-size", positive=int, help="height and width of the images in pixels"),
    option("--classes", positive=int, help="default: 1000, or 10 for small_swin"),
    option("--batch", default=64 if ON_GPU else 8, help="images per update"),
    option("--methods", nargs="+", choices=METHODS, help="default: all"),
    option("--schedules", nargs="+", choices=SCHEDULES, default=SCHEDULES, help="for gradnorm"),
    option("--precision", nargs="+", choices=PRECISIONS, default=["fp32", *SHORT]),
    option("--kernels", choices=("auto", "triton", "reference"), default="auto"),
    option("--compile", choices=("on", "off"), default="on" if ON_GPU else "off"),
    option(
        "--cuda-graphs", action=argparse.BooleanOptionalAction, default=ON_GPU,
        help="replay compiled arms as CUDA graphs; default: on CUDA, as fastgn.train does",
    ),
    option("--rounds", default=3),
    option(
        "--round-seconds", default=1.0 if ON_GPU else 0.3,
        help="about how long an arm is timed in a round",
    ),
    option("--minutes", positive=float, help="leave out arms that would take longer"),
    option("--table3", action="store_true", help="the paper's Table 3, in separate runs"),
    option("--counts-only", action="store_true", help="count passes and operations, time nothing"),
)  # fmt: skip
def main(args: argparse.Namespace) -> int:
    """Measures the kinds of update that the options ask for. Returns 1 if all failed, else 0."""
    if args.table3:
        from benchmarks.step import table3

        return table3.run(args)
    began, longest = time.perf_counter(), 0.0
    arms = choose_arms(args)
    if not args.counts_only:
        reasons = dict.fromkeys(explain_unsupported(arm.precision, DEVICE) for arm in arms)
        why = "; ".join(filter(None, reasons))
        check(None in reasons, f"--precision leaves nothing to measure: {why}")
    file = f"cost_{args.model}_{'counts' if args.counts_only else '{device}'}.json"
    output, head = open_record(args, file, ("model", "counts_only"))
    # a high limit, because the same function is compiled again for each kind of update
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000

    record, network = build_network(args)
    record |= head | {
        "script": "benchmarks/step/cost.py",
        "meaning": "measured" if ON_GPU else NO_MEANING,
        "energy": "not measured",
        "forward_flops_an_image": forward_flops(network, args.batch),
    }
    bench, joules = None, None
    if not args.counts_only:
        print(record["device"] if ON_GPU else NO_MEANING, flush=True)
        precisions = list(dict.fromkeys(arm.precision for arm in arms))
        record["gemm"] = gemm_rates(precisions, DEVICE, args.rounds)
        graphs = {"cuda_graphs": True} if args.cuda_graphs else {}
        network = network.to(DEVICE)
        bench = UpdateBench(network, record["classes"], args.batch, record["kernels"], **graphs)
        joules, record["energy"] = energy_counter()
    measured: dict[str, Measurement] = {}
    skipped: list[str] = []

    def save(complete: bool = False) -> None:
        rows = [row_of(found, measured, record) for found in measured.values()]
        record["complete"] = complete
        record["skipped"] = skipped
        record["rows"] = [row for row in rows if "time_over" in row]
        record["not_timed"] = [row for row in rows if "time_over" not in row]
        write_record(output, record)

    for arm in arms:
        start = time.perf_counter()
        rest = (args.rounds + 1) * args.round_seconds * (len(measured) + 1)
        rest += longest if arm.compile else 0
        if args.minutes and start - began + rest > 60 * args.minutes:
            skipped.append(f"{arm.key}: --minutes {args.minutes:g} had no room for it")
            continue
        flops = update_flops(network, arm.method, arm.schedule, args.batch, record["classes"])
        found = measured[arm.key] = Measurement(arm, flops)
        if bench:
            bench.prepare(found)
        longest = max(longest, time.perf_counter() - start)
        print(f"{arm.key}: prepared", flush=True)
        save()
    if bench:
        for _ in range(args.rounds):
            bench.time(list(measured.values()), args.round_seconds, joules)
            save()
    save(complete=True)
    failed = [f"{m.arm.key}: {m.why_not}" for m in measured.values() if m.why_not]
    print(table(record))
    for line in skipped:
        print(f"skipped: {line}")
    print(f"{len(record['rows'])} arms timed, {len(failed)} failed -> {output}")
    return int(len(failed) == len(measured))


if __name__ == "__main__":
    sys.exit(main())
