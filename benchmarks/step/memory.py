"""Measures the peak memory of an update at several batch sizes, or counts it per memory budget.

    python -m benchmarks.step.memory  # needs a GPU: Swin-B in bf16, batches of 16 to 128
    python -m benchmarks.step.memory --counted  # takes an hour on 2 cores, and no GPU
    python -m benchmarks.step.memory --counted --precision fp32 --model-kwargs 'depths=(2, 2, 2, 2)'

Without --counted, measures the most bytes that PyTorch's allocator has handed out at one time
during an update, beside the prediction of fastgn.step.plan. They include weights, gradients and
activations, but not the optimizer's state, the images and CUDA's context. A row of the results is
one kind of update with one batch size, measured in a process of its own. --workers rows are
measured at a time, because most of the time is compilation. A row that runs out of memory beside
others is measured again alone. The same command continues an interrupted one. Writes
benchmarks/results/memory_<model>_<device>.json after every row. On a CPU, only predicts, and writes
to runs/.

With --counted, counts what a compiled update keeps, moves and recomputes per image at each memory
budget, the share of activations that it keeps. The ratios to eager mode are the source of constants
in fastgn/step/plan.py. The tensors have no data, and the backend aot_eager_decomp_partition
generates no code: it only decides what the forward keeps for the backward. Generated code fuses
operators and frees temporaries sooner, so its peaks are lower than the counted ones. Adds its rows
to benchmarks/results/memory_budget.json.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.common import arguments
from benchmarks.common.arguments import device_name, positive_float, positive_int
from benchmarks.common.records import describe_error, earlier, hold, taken_over, write_record
from benchmarks.common.tables import Record, device, make_table, with_notes
from benchmarks.step.arms import Arm, random_batch
from fastgn.config.groups import ArchitectureConfig
from fastgn.errors import check
from fastgn.metrics import environment
from fastgn.models.create import check_name
from fastgn.models.network import Classifier, build_model, choose_kernels
from fastgn.step.cost import StepCost
from fastgn.step.meter import Meter, autocast_as_on_cuda, fake_copy
from fastgn.step.plan import BUDGETS, EAGER, compiled_relations
from fastgn.step.precision import PRECISIONS
from fastgn.step.schedule import Schedule

CLASSES = 1000
TOY = ("patch_size=4", "embed_dim=16", "depths=(1, 1)", "num_heads=(2, 4)", "window_size=4")
"""Arguments of the small network that --smoke uses, with images of 32 pixels."""
ARMS = (
    Arm("gradnorm", schedule=Schedule("exact-eager")),  # first, because it needs no compilation
    Arm("gradnorm", compile=True),
    Arm("natural", compile=True),
    Arm("gradnorm", compile=True, budget=0.5),
    Arm("gradnorm", compile=True, budget=0.7),
)


def build(args: argparse.Namespace, kernels: str = "auto") -> Classifier:
    """Returns the network with random weights on the CPU. kernels: value of --kernels."""
    toy: dict[str, Any] = {"model_kwargs": TOY, "img_size": 32} if args.smoke else {}
    config = ArchitectureConfig(model=args.model, model_kwargs=tuple(args.model_kwargs))
    config = dataclasses.replace(config, **toy)
    return build_model(config, CLASSES, choose_kernels(kernels, arguments.default_device()))[0]


# ---------------------------------------------------------------------------------------- measured


def predicted_bytes(cost: StepCost, arm: Arm, batch: int) -> int:
    """Returns the peak memory in bytes that fastgn.step.plan predicts for an update."""
    kept = (compiled_relations(cost) if arm.compile else EAGER).kept[arm.budget]
    fixed = cost.weight_bytes + cost.gradient_bytes + cost.fixed_bytes
    return int(fixed + batch * cost.image_bytes * kept)


def measure(args: argparse.Namespace, until: float, case: tuple[Arm, int]) -> dict | None:
    """Measures an arm with a batch size. This must run in a process of its own.

    until: latest time.time() at which a measurement may begin. Returns the results, or None if it
    is too late.
    """
    began = time.time()
    if began >= until:
        return None
    arm, batch = case
    row: dict[str, Any] = {
        **{"arm": arm.name, "method": arm.method, "schedule": arm.schedule.kind},
        **{"activation_memory_budget": arm.budget, "batch": batch, "peak_bytes": None},
        **{"out_of_memory": False, "failed": None},
    }
    try:
        if torch.cuda.is_available():
            row["peak_bytes"] = peak_bytes(args, arm, batch)
            row["out_of_memory"] = row["peak_bytes"] is None
    except Exception as error:  # the other rows are still measured
        row["failed"] = describe_error(error)
    return row | {"seconds": time.time() - began}


def peak_bytes(args: argparse.Namespace, arm: Arm, batch: int) -> int | None:
    """Returns the peak memory of the third update in bytes, or None if the batch does not fit."""
    cuda = torch.device("cuda")
    torch.manual_seed(0)
    model = build(args).to(cuda)
    step = arm.step(model, precision=args.precision)
    images, targets = random_batch(batch, model.img_size, CLASSES, cuda)
    ramp = torch.ones((), device=cuda)
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step([(images, targets)], ramp)
        if step.step.micro_batch not in (None, batch):
            return None  # out of memory, so the step has halved the batch
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - images.nbytes - targets.nbytes


def in_processes(work: Callable, values: Sequence, workers: int) -> Iterator:
    """Yields work(value) for each value, each computed in a process of its own.

    workers: number of processes at a time. If 0, everything runs in this process.
    """
    if not workers:
        yield from map(work, values)
        return
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    options: dict[str, Any] = {"mp_context": spawn, "max_tasks_per_child": 1}
    with concurrent.futures.ProcessPoolExecutor(workers, **options) as pool:
        yield from pool.map(work, values)


def measure_all(args: argparse.Namespace) -> int:
    """Makes the measurements that the JSON record lacks. Returns 1 if one failed, else 0."""
    until = time.time() + 60 * args.minutes
    output = arguments.gpu_output(args, f"memory_{args.model}")
    head = {"file": output.name, "device": device_name(), "model": args.model}
    head |= {"precision": args.precision, "smoke": args.smoke}
    rows = [row for row in taken_over(output, head).get("rows", []) if row["failed"] is None]
    known = {(row["arm"], row["batch"]) for row in rows}
    cases = [(arm, batch) for batch in args.batches for arm in ARMS]
    todo = [(arm, batch) for arm, batch in cases if (arm.name, batch) not in known]
    number = len(rows) + len(todo)
    model, most = build(args), max(args.batches)
    methods = ("natural", "gradnorm")
    costs = {m: Arm(m, args.precision).count(model, most, CLASSES) for m in methods}
    versions = environment()
    work = functools.partial(measure, args, until)
    for workers in dict.fromkeys((args.workers, min(args.workers, 1))):
        again = []
        for (arm, batch), row in zip(todo, in_processes(work, todo, workers), strict=True):
            if row and row["out_of_memory"] and workers > 1:
                again.append((arm, batch))
            elif row:
                row["predicted_bytes"] = predicted_bytes(costs[arm.method], arm, batch)
                rows.append(row)
                record = head | {"complete": len(rows) == number, "rows": rows} | versions
                write_record(output, record)
                print(f"{len(rows)} of {number}: {arm.name}, batch {batch}", flush=True)
        todo = again
    if rows:
        print(table(head | {"rows": rows} | versions))
    failed = sum(row["failed"] is not None for row in rows)
    print(f"{len(rows)} of {number} rows, {failed} failed -> {output}")
    return int(bool(failed))


# ----------------------------------------------------------------------------------------- counted


@contextlib.contextmanager
def noting(meter: Meter, saved: list[int]) -> Iterator[None]:
    """Appends the bytes that tensors take to `saved`, whenever a backward pass begins."""
    backward = torch.autograd.backward

    def noted(*args: Any, **kwargs: Any) -> None:
        saved.append(meter.live_bytes)
        backward(*args, **kwargs)

    with mock.patch.object(torch.autograd, "backward", noted):
        yield


def count(model: Classifier, arm: Arm, batch_size: int) -> dict[str, float]:
    """Returns operations, peak memory, memory traffic and saved bytes of an update, per image."""
    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        step = arm.step(fake_copy(model))
        batch = random_batch(batch_size, model.img_size, CLASSES)
        ramp = torch.empty(())
        step([batch], ramp)  # compiles
        saved: list[int] = []
        with Meter() as meter, noting(meter, saved):
            step([batch], ramp)
    names = ("flops", "peak_bytes", "traffic_bytes")
    row = {name: getattr(meter, name) for name in names} | {"saved_bytes": saved[-1]}
    return {k: v / batch_size for k, v in row.items()} | {"operators": meter.operators}


def count_all(args: argparse.Namespace) -> int:
    """Counts natural and gradnorm updates at each budget. Writes the JSON record after each."""
    output = args.output or arguments.RESULTS / "memory_budget.json"
    hold(output)
    model = build(args, "reference")
    rows = earlier(output).get("rows", [])
    size = {"model": args.model, "model_kwargs": args.model_kwargs, "swap": False}
    size["batch_size"] = max(args.batches)
    # this backend uses Inductor's partitioner, but generates no code
    backend = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    for method in ("natural", "gradnorm"):
        eager: dict[str, float] = {}
        for budget in (None, *BUDGETS):
            case = size | {"method": method, "precision": args.precision, "budget": budget}
            arm = Arm(method, args.precision, budget=budget or 1.0, compile=budget is not None)
            autocast = autocast_as_on_cuda if args.precision == "bf16" else contextlib.nullcontext
            with autocast(), mock.patch.object(torch, "compile", backend):
                counted = count(model, arm, size["batch_size"])
            eager = eager or counted
            ratios = {f"{k}_to_eager": counted[k] / eager[k] for k in counted}
            rows = [r for r in rows if any(r[k] != case[k] for k in case)]
            rows.append(case | counted | ratios)
            last = (method, budget) == ("gradnorm", BUDGETS[-1])
            record = {"file": output.name, "complete": last, "rows": rows, **environment()}
            write_record(output, record)
            print(f"{method}, budget {budget}", flush=True)
    print(f"{table(record)}\n-> {output}")
    return 0


# ------------------------------------------------------------------------------------------- table


def gib(value: int | None) -> str:
    """Returns a number of bytes in GiB as text, or "" if it is None."""
    return "" if value is None else f"{value / 2**30:.2f}"


def table(record: Record) -> str:
    """Returns this benchmark's Markdown table, made from its JSON record."""
    if "device" in record:
        columns = {
            "arm": lambda r: r["arm"],
            "batch": lambda r: str(r["batch"]),
            "predicted GiB": lambda r: gib(r["predicted_bytes"]),
            "measured GiB": lambda r: gib(r["peak_bytes"]),
            "failed": lambda r: r["failed"] or ("out of memory" if r["out_of_memory"] else ""),
        }
        what = f"{record['model']}, {record['precision']}, {device(record)}"
        return with_notes(make_table(record["rows"], columns), record, what)
    columns = {
        "network": lambda r: ", ".join((r["model"], *r["model_kwargs"])),
        "batch": lambda r: str(r["batch_size"]),
        "method": lambda r: r["method"],
        "precision": lambda r: r["precision"],
        "budget": lambda r: "eager" if r["budget"] is None else f"{r['budget']:g}",
        "kept MB an image": lambda r: f"{r['saved_bytes'] / 1e6:.0f}",
        "peak": lambda r: f"{r['peak_bytes_to_eager']:.2f}",
        "operations": lambda r: f"{r['flops_to_eager']:.2f}",
        "bytes moved": lambda r: f"{r['traffic_bytes_to_eager']:.2f}",
        "operators": lambda r: f"{r['operators_to_eager']:.2f}",
    }
    ratios = "PyTorch's operators; peak, operations, bytes and operators over those of eager"
    notes = (ratios, "counted on fake tensors")
    return with_notes(make_table(record["rows"], columns), record, *notes)


# ------------------------------------------------------------------------------------ command line


def run(args: argparse.Namespace) -> int:
    """Measures updates, or counts them if args.counted, and returns the exit status."""
    if args.smoke:
        args.model, args.precision, args.batches, args.workers = "swin_t", "fp32", [2, 4], 0
    check_name(ArchitectureConfig(model=args.model))
    check(args.workers >= 0, f"--workers {args.workers} must be at least 0")
    return count_all(args) if args.counted else measure_all(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit status.

    The status is 2 for a user's mistake, 1 if a measurement failed, and else 0.
    """
    workers = 5 if torch.cuda.is_available() else 0
    parser = arguments.make_parser(__doc__)
    add = parser.add_argument
    add("--counted", action="store_true", help="count at each memory budget, measure nothing")
    add("--model", default="swin_b")
    add("--model-kwargs", nargs="*", default=[], help="arguments such as 'depths=(2, 2)'")
    add("--precision", choices=PRECISIONS, default="bf16")
    add("--batches", nargs="+", type=positive_int, default=[64, 16, 32, 128], help="in this order")
    add("--workers", type=int, default=workers, help="processes at a time; 0 means this process")
    add("--minutes", type=positive_float, default=10, help="begin no row after so many minutes")
    add("--smoke", action="store_true", help="use toy sizes")
    args = parser.parse_args(argv)
    return arguments.exit_status("memory.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
