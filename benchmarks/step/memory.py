"""Peak memory of an update over the batch size, measured and as fastgn.step.plan predicts it.

Bytes that PyTorch's allocator has handed out at most during a step: weights, gradients and what
the step takes. The optimizer's state, the images and CUDA's context are not counted.

    python -m benchmarks.step.memory  # on a GPU: Swin-B in bf16, batches of 16 to 128

A row is one arm and batch, measured in a process of its own. --workers rows run at a time, because
most of the time is compilation. A row that runs out of memory beside others is measured again
alone. An interrupted call goes on with the rows that are missing.

Writes benchmarks/results/memory_<model>_<device>.json after every row. On a CPU, where no allocator
counts, writes predictions alone, to runs/.
"""

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.arguments import (
    device_name,
    exit_status,
    gpu_output,
    make_parser,
    positive_float,
    positive_int,
)  # fmt: skip
from benchmarks.common.records import earlier, write_record
from benchmarks.step.arms import Arm, random_batch
from fastgn.config.groups import ArchitectureConfig
from fastgn.errors import check
from fastgn.metrics import environment
from fastgn.models.create import check_name
from fastgn.models.network import Classifier, build_model, choose_kernels
from fastgn.step.cost import StepCost, count_cost
from fastgn.step.options import StepOptions
from fastgn.step.plan import EAGER, compiled_relations
from fastgn.step.precision import PRECISIONS
from fastgn.step.schedule import Schedule

CLASSES = 1000
TOY = (
    *("patch_size=4", "embed_dim=16", "depths=(1, 1)", "num_heads=(2, 4)"),
    "window_size=4",
)
"""Arguments of the small network that --smoke uses, with images of 32 pixels."""
ARMS = (
    Arm("gradnorm", schedule=Schedule("exact-eager")),  # first, because it needs no compilation
    Arm("gradnorm", compile=True),
    Arm("natural", compile=True),
    Arm("gradnorm", compile=True, budget=0.5),
    Arm("gradnorm", compile=True, budget=0.7),
)


@dataclasses.dataclass(frozen=True)
class Task:
    """One measurement: a kind of update, a batch size and a network."""

    arm: Arm
    batch: int
    model: str
    smoke: bool

    def network(self, device: torch.device) -> Classifier:
        """Returns the network with random weights."""
        toy = {"model_kwargs": TOY, "img_size": 32} if self.smoke else {}
        config = ArchitectureConfig(model=self.model, **toy)
        return build_model(config, CLASSES, choose_kernels("auto", device))[0]


Todo = tuple[Callable[[Task], Any], Task]
"""A function of this module and its argument, which are called in another process."""


def count(task: Task) -> StepCost:
    """Returns the operations and bytes per image that fastgn.step.cost counts for an update.

    This takes seconds for Swin-B.
    """
    model = task.network(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    size = {"batch_size": task.batch, "img_size": model.img_size, "num_classes": CLASSES}
    objective = task.arm.objective()
    return count_cost(model, objective, StepOptions(precision=task.arm.precision), **size)


def predicted_bytes(cost: StepCost, row: dict[str, Any]) -> int:
    """Returns the peak memory in bytes that fastgn.step.plan predicts for an update.

    row: results of that update in the JSON record.
    """
    kept = (EAGER if row["schedule"] == "exact-eager" else compiled_relations(cost)).kept
    images = row["batch"] * cost.image_bytes * kept[row["activation_memory_budget"]]
    return int(cost.weight_bytes + cost.gradient_bytes + cost.fixed_bytes + images)


def measure(task: Task) -> dict[str, Any]:
    """Measures one update and returns the results as a dict. It must run in a process of its
    own."""
    arm = task.arm
    row: dict[str, Any] = {
        **{"arm": arm.name, "method": arm.method, "schedule": arm.schedule.kind},
        **{"activation_memory_budget": arm.budget, "batch": task.batch, "peak_bytes": None},
        **{"predicted_bytes": None, "out_of_memory": False, "failed": None},
    }
    began = time.perf_counter()
    try:
        if torch.cuda.is_available():
            row["peak_bytes"] = peak_bytes(task)
            row["out_of_memory"] = row["peak_bytes"] is None
    except Exception as error:  # the other rows go on
        row["failed"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    return row | {"seconds": time.perf_counter() - began}


def peak_bytes(task: Task) -> int | None:
    """Returns the peak memory of the third update in bytes, or None if the batch does not fit."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    model = task.network(device).to(device)
    step = task.arm.step(model)
    images, targets = random_batch(task.batch, model.img_size, CLASSES, device)
    ramp = torch.ones((), device=device)
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step([(images, targets)], ramp)
        if step.step.micro_batch not in (None, task.batch):
            return None  # the step has halved it
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - images.nbytes - targets.nbytes


def run_in_processes(
    todo: Sequence[Todo], workers: int, until: float, take: Callable[[Task, Any], None]
) -> list[Todo]:
    """Calls each function in a process of its own, and calls `take` with each result.

    workers: number of processes at a time. until: time after which no call begins, as
    time.perf_counter() gives. Returns the calls that ran out of memory while other processes ran.
    The caller can repeat these alone.
    """
    again: list[Todo] = []
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=spawn, max_tasks_per_child=1
    ) as pool:
        futures = {}
        for function, task in todo:
            if time.perf_counter() < until:
                futures[pool.submit(function, task)] = function, task
        for future in concurrent.futures.as_completed(futures):
            function, task = futures[future]
            if time.perf_counter() >= until:
                for waiting in futures:
                    waiting.cancel()
            if future.cancelled():
                continue
            if (error := future.exception()) is not None:  # a process that died
                print(f"FAILED: {task.arm.name}, batch {task.batch}: {error}", flush=True)
            elif workers > 1 and function is measure and future.result()["out_of_memory"]:
                again.append((function, task))
            else:
                take(task, future.result())
    return again


def taken_over(output: Path, head: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the results of an interrupted run of the same benchmark with the same options.

    output: JSON record. head: the options and versions that must be the same.
    """
    record = earlier(output)
    if any(record.get(name) != value for name, value in head.items()):
        return []
    return [row for row in record["rows"] if row["failed"] is None]


def line_of(row: dict[str, Any]) -> str:
    """Returns the results of one measurement as a line for the terminal."""
    gib = [
        f"{row[name] / 2**30:6.2f} GiB" if row.get(name) else "     -    "
        for name in ("peak_bytes", "predicted_bytes")
    ]
    note = row["failed"] or ("out of memory" if row["out_of_memory"] else "")
    name = f"{row['arm']:28} batch {row['batch']:4}"
    return f"{name} measured {gib[0]} predicted {gib[1]} {note}"


def run(args: argparse.Namespace) -> int:
    """Makes the measurements that are missing in the JSON record. Returns 1 if one failed, else
    0."""
    if args.smoke:
        args.model, args.precision, args.batches, args.workers = "swin_t", "fp32", [2, 4], 0
    check_name(ArchitectureConfig(model=args.model))
    check(args.workers >= 0, f"--workers {args.workers} must be at least 0")
    until = time.perf_counter() + 60 * args.minutes
    output = gpu_output(args, f"memory_{args.model}")
    head = {"device": device_name(), "model": args.model, "precision": args.precision}
    head["smoke"] = args.smoke
    rows = taken_over(output, head)
    have = {(row["arm"], row["batch"]) for row in rows}
    arms = [dataclasses.replace(arm, precision=args.precision) for arm in ARMS]
    tasks = [
        Task(arm, batch, args.model, args.smoke)
        for batch in args.batches
        for arm in arms
        if (arm.name, batch) not in have
    ]
    known = environment()
    costs: dict[str, StepCost] = {}

    def save() -> None:
        for row in rows:
            if row["method"] in costs:
                row["predicted_bytes"] = predicted_bytes(costs[row["method"]], row)
        complete = len(rows) == len(have) + len(tasks)
        write_record(output, head | {"complete": complete, "rows": rows} | known)

    def take(task: Task, result: dict[str, Any] | StepCost) -> None:
        if isinstance(result, StepCost):
            costs[task.arm.method] = result
            save()
        else:
            rows.append(result)
            save()
            print(line_of(result), flush=True)

    save()
    methods = {arm.method: Task(arm, max(args.batches), args.model, args.smoke) for arm in arms}
    todo: list[Todo] = [(count, task) for task in methods.values()]
    todo += [(measure, task) for task in tasks]
    if args.workers:
        again = run_in_processes(todo, args.workers, until, take)
        run_in_processes(again, 1, until, take)
    else:
        for function, task in todo:
            take(task, function(task))
    failed = sum(row["failed"] is not None for row in rows)
    off = [
        r["peak_bytes"] / r["predicted_bytes"]
        for r in rows
        if r["peak_bytes"] and r["predicted_bytes"]
    ]
    span = f"measured / predicted {min(off):.2f} to {max(off):.2f}" if off else "none measured"
    print(f"{len(rows)} of {len(have) + len(tasks)} rows, {failed} failed, {span} -> {output}")
    return int(bool(failed))


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, runs the benchmark, and returns the exit status.

    The status is 2 for a user's mistake, 1 if a measurement failed, and else 0.
    """
    workers = 5 if torch.cuda.is_available() else 0
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", default="swin_b")
    add("--precision", choices=PRECISIONS, default="bf16")
    add("--batches", nargs="+", type=positive_int, default=[64, 16, 32, 128], help="in this order")
    add("--workers", type=int, default=workers, help="processes at a time; 0 means this process")
    add("--minutes", type=positive_float, default=10, help="begin no row after so many minutes")
    add("--smoke", action="store_true", help="use toy sizes")
    args = parser.parse_args(argv)
    return exit_status("memory.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
