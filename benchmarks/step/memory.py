"""Peak memory of a step over the batch size, and what fastgn.step.cost predicted.

    python -m benchmarks.step.memory  # a GPU: Swin-B in bf16, batches of 16 to 128

Arms: natural; gradnorm exact, compiled, at three activation memory budgets; gradnorm exact-eager.
A row is one arm and batch in a process of its own, --workers at a time, since most of it is
compiling; a row that runs out of memory while others run is measured again alone. Counted is the
most that the allocator had handed out during a step: weights, gradients (there throughout, as from
a second micro-batch on) and what the step takes; not the optimizer's state, the images, CUDA's
context or what the allocator keeps for later.

Writes benchmarks/results/memory_<model>_<device>.json after every row, and takes over the rows that
are there already. On a CPU, where no allocator counts, predictions alone and into runs/.
"""

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.arguments import RESULTS, ROOT, positive_float, positive_int
from benchmarks.common.records import earlier, hold, write_record
from fastgn.config.groups import ArchitectureConfig
from fastgn.errors import UserError, check
from fastgn.metrics import environment
from fastgn.models.create import check_name
from fastgn.models.network import Classifier, build_model, choose_kernels
from fastgn.objectives import ObjectiveConfig, build_objective
from fastgn.step.cost import StepCost, count_cost
from fastgn.step.options import StepOptions
from fastgn.step.plan import EAGER, compiled_relations
from fastgn.step.precision import PRECISIONS
from fastgn.step.retry import out_of_memory
from fastgn.step.schedule import Schedule
from fastgn.step.step import Step

CLASSES = 1000
TOY = (
    *("patch_size=4", "embed_dim=16", "depths=(1, 1)", "num_heads=(2, 4)"),
    "window_size=4",
)
"""Of --smoke, at 32 pixels."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is measured over the batch."""

    name: str
    method: str
    kind: str = "exact"
    budget: float = 1.0
    """Activation memory budget."""


ARMS = (
    Arm("gradnorm exact-eager", "gradnorm", "exact-eager"),  # nothing to compile: soon there
    Arm("gradnorm exact", "gradnorm"),
    Arm("natural", "natural"),
    Arm("gradnorm exact, budget 0.5", "gradnorm", budget=0.5),
    Arm("gradnorm exact, budget 0.7", "gradnorm", budget=0.7),
)


@dataclasses.dataclass(frozen=True)
class Task:
    """One row to be."""

    arm: Arm
    batch: int
    model: str
    precision: str
    smoke: bool

    def network(self, device: torch.device) -> Classifier:
        toy = {"model_kwargs": TOY, "img_size": 32} if self.smoke else {}
        config = ArchitectureConfig(model=self.model, **toy)
        return build_model(config, CLASSES, choose_kernels("auto", device))[0]


Todo = tuple[Callable[[Task], Any], Task]
"""A function of this module, and what to call it with in another process."""


def count(task: Task) -> StepCost:
    """Returns what a method's step costs up to the batch of the task. Takes seconds for Swin-B."""
    model = task.network(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return count_cost(
        model,
        build_objective(ObjectiveConfig(method=task.arm.method)),
        StepOptions(precision=task.precision),
        batch_size=task.batch,
        img_size=model.img_size,
        num_classes=CLASSES,
    )


def predicted_bytes(cost: StepCost, row: dict[str, Any]) -> int:
    """Returns the peak memory that fastgn.step.plan.choose_plan predicts."""
    kept = (EAGER if row["schedule"] == "exact-eager" else compiled_relations(cost)).kept
    images = row["batch"] * cost.image_bytes * kept[row["activation_memory_budget"]]
    return int(cost.weight_bytes + cost.gradient_bytes + cost.fixed_bytes + images)


def measure(task: Task) -> dict[str, Any]:
    """The row of a task. Runs in a process of its own."""
    row: dict[str, Any] = {
        "arm": task.arm.name,
        "method": task.arm.method,
        "schedule": task.arm.kind,
        "activation_memory_budget": task.arm.budget,
        "batch": task.batch,
        "peak_bytes": None,
        "predicted_bytes": None,
        "out_of_memory": False,
        "failed": None,
    }
    began = time.perf_counter()
    try:
        if torch.cuda.is_available():
            row["peak_bytes"] = peak_bytes(task)
            row["out_of_memory"] = row["peak_bytes"] is None
    except Exception as error:  # a row's own affair
        row["failed"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    return row | {"seconds": time.perf_counter() - began}


def peak_bytes(task: Task) -> int | None:
    """Of the third step; None where the batch does not fit."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    model = task.network(device).to(device)
    step = Step(
        model,
        build_objective(ObjectiveConfig(method=task.arm.method)),
        StepOptions(
            schedule=Schedule(task.arm.kind),
            compile=task.arm.kind != "exact-eager",
            precision=task.precision,
            activation_memory_budget=task.arm.budget,
        ),
    )
    images = torch.rand(task.batch, 3, model.img_size, model.img_size, device=device)
    targets = torch.rand(task.batch, CLASSES, device=device).softmax(1)
    ramp = torch.ones((), device=device)
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        try:
            step([(images, targets)], ramp)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return None
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - images.nbytes - targets.nbytes


def key(row: dict[str, Any]) -> tuple[str, int]:
    return row["arm"], row["batch"]


def main() -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="swin_b")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument(
        "--batches",
        nargs="+",
        type=positive_int,
        default=[64, 16, 32, 128],
        help="the most telling first",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=5 if cuda else 0, help="0: this process")
    parser.add_argument(
        "--minutes", type=positive_float, default=10, help="no row begins after these"
    )
    parser.add_argument("--smoke", action="store_true", help="toy sizes")
    parser.add_argument("--output", type=Path, help="JSON")
    args = parser.parse_args()
    if args.smoke:
        args.model, args.precision, args.batches, args.workers = "swin_t", "fp32", [2, 4], 0

    try:
        check_name(ArchitectureConfig(model=args.model))
        check(args.workers >= 0, f"--workers {args.workers} must be at least 0")
    except UserError as error:
        print(f"memory.py: error: {error}", file=sys.stderr)
        return 2
    began = time.perf_counter()
    name = torch.cuda.get_device_name() if cuda else "cpu"
    slug = re.sub(r"\W+", "_", name.lower())
    results = RESULTS if cuda else ROOT / "runs"
    output = args.output or results / f"memory_{args.model}_{slug}.json"
    hold(output)
    head = {"device": name, "model": args.model, "precision": args.precision, "smoke": args.smoke}
    rows = taken_over(output, head)
    have = {key(row) for row in rows}
    tasks = [
        Task(arm, batch, args.model, args.precision, args.smoke)
        for batch in args.batches
        for arm in ARMS
        if (arm.name, batch) not in have
    ]
    record = environment()

    costs: dict[str, StepCost] = {}

    def save() -> None:
        for row in rows:
            if row["method"] in costs:
                row["predicted_bytes"] = predicted_bytes(costs[row["method"]], row)
        complete = len(rows) == len(have) + len(tasks)
        write_record(output, head | {"complete": complete, "rows": rows} | record)

    def take(task: Task, result: dict[str, Any] | StepCost) -> None:
        if isinstance(result, StepCost):
            costs[task.arm.method] = result
        else:
            rows.append(result)
        save()
        if not isinstance(result, StepCost):
            print(line_of(result), flush=True)

    save()
    largest = max(args.batches)
    todo: list[Todo] = [
        (count, Task(arm, largest, args.model, args.precision, args.smoke))
        for arm in {arm.method: arm for arm in ARMS}.values()
    ]
    todo += [(measure, task) for task in tasks]
    until = began + 60 * args.minutes
    if args.workers:
        again = in_processes(todo, args.workers, until, take)
        in_processes(again, 1, until, take)
    else:
        for function, task in todo:
            take(task, function(task))
    failed = sum(row["failed"] is not None for row in rows)
    known = [row for row in rows if row["peak_bytes"] and row["predicted_bytes"]]
    off = [row["peak_bytes"] / row["predicted_bytes"] for row in known]
    span = f"measured / predicted {min(off):.2f} to {max(off):.2f}" if off else "none measured"
    print(f"{len(rows)} of {len(have) + len(tasks)} rows, {failed} failed, {span} -> {output}")
    return int(bool(failed))


def in_processes(
    todo: Sequence[Todo], workers: int, until: float, take: Callable[[Task, Any], None]
) -> list[Todo]:
    """Each in a process of its own, several at a time, until a time of the clock; returns those
    that ran out of memory beside others."""
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
    """The rows of an interrupted run that asked for the same."""
    record = earlier(output)
    if any(record.get(name) != value for name, value in head.items()):
        return []
    return [row for row in record["rows"] if row["failed"] is None]


def line_of(row: dict[str, Any]) -> str:
    gib = {
        name: f"{row[name] / 2**30:6.2f} GiB" if row.get(name) else "     -    "
        for name in ("peak_bytes", "predicted_bytes")
    }
    note = row["failed"] or ("out of memory" if row["out_of_memory"] else "")
    return (
        f"{row['arm']:28} batch {row['batch']:4} measured {gib['peak_bytes']} "
        f"predicted {gib['predicted_bytes']} {note}"
    )


if __name__ == "__main__":
    sys.exit(main())
