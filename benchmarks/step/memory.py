"""Counts what a compiled update keeps, moves and recomputes per image at each memory budget.

    python -m benchmarks.step.memory  # Swin-B in bf16: takes an hour on 2 cores, and no GPU
    python -m benchmarks.step.memory --precision fp32 --model-kwargs 'depths=(2, 2, 2, 2)'

A memory budget is the share of activations that a compiled update keeps. The ratios to eager mode
are the source of constants in fastgn/step/plan.py. The tensors have no data, and the backend
aot_eager_decomp_partition generates no code: it only decides what the forward keeps for the
backward. Generated code fuses operators and frees temporaries sooner, so its peaks are lower than
the counted ones.

Adds its rows to benchmarks/results/memory_budget.json.
"""

import contextlib
import functools
import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.common.arguments import finish, open_record, option, program
from benchmarks.common.records import earlier, write_record
from benchmarks.common.tables import Column, Record, make_table, with_notes
from benchmarks.step.arms import Arm, random_batch
from fastgn.config.groups import ArchitectureConfig
from fastgn.models.network import Classifier, build_model
from fastgn.step.meter import Meter, autocast_as_on_cuda, fake_copy
from fastgn.step.plan import BUDGETS
from fastgn.step.precision import AUTOCAST, PRECISIONS

CLASSES = 1000


@contextlib.contextmanager
def noting(meter: Meter, saved: list[int]) -> Iterator[None]:
    """Whenever a backward pass begins, appends a number to `saved`: the bytes of all tensors then.

    meter: the active Meter, which counts these bytes.
    """
    backward = torch.autograd.backward

    def noted(*args: Any, **kwargs: Any) -> None:
        saved.append(meter.live_bytes)
        backward(*args, **kwargs)

    with mock.patch.object(torch.autograd, "backward", noted):
        yield


def count(model: Classifier, arm: Arm, batch_size: int) -> dict[str, float]:
    """Counts the operators, operations and memory of an update, which may be compiled.

    Keys: flops, peak_bytes, traffic_bytes and saved_bytes (kept for the backward), each per image,
    and operators, the number of operators in the update.
    """
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


def table(record: Record) -> str:
    """Returns this benchmark's Markdown table, made from its JSON record."""
    columns: dict[str, Column] = {
        "network": lambda r: ", ".join((r["model"], *r["model_kwargs"])),
        "batch": "batch_size",
        "method": "method",
        "precision": "precision",
        "budget": lambda r: "eager" if r["budget"] is None else f"{r['budget']:g}",
        "kept MB an image": lambda r: f"{r['saved_bytes'] / 1e6:.0f}",
        "peak": "peak_bytes_to_eager:.2f",
        "operations": "flops_to_eager:.2f",
        "bytes moved": "traffic_bytes_to_eager:.2f",
        "operators": "operators_to_eager:.2f",
    }
    ratios = "PyTorch's operators; peak, operations, bytes and operators over those of eager"
    notes = (ratios, "counted on fake tensors")
    return with_notes(make_table(record["rows"], columns), record, *notes)


@program(
    option("--model", default="swin_b"),
    option("--model-kwargs", nargs="*", default=[], help="arguments such as 'depths=(2, 2)'"),
    option("--precision", choices=PRECISIONS, default="bf16"),
    option("--batch-size", default=128, help="number of images per update"),
)
def main(args: Namespace) -> int:
    """Counts the costs of natural and gradnorm updates at each memory budget.

    Writes the JSON record after each budget.
    """
    free = ("model", "model_kwargs", "precision", "batch_size")
    output, head = open_record(args, "memory_budget.json", free)
    config = ArchitectureConfig(model=args.model, model_kwargs=tuple(args.model_kwargs))
    model, _ = build_model(config, CLASSES, "reference")
    rows = earlier(output).get("rows", [])
    size = {"model": args.model, "model_kwargs": args.model_kwargs, "swap": False}
    size["batch_size"] = args.batch_size
    # this backend uses Inductor's partitioner, but generates no code
    backend = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    autocast = autocast_as_on_cuda if args.precision in AUTOCAST else contextlib.nullcontext
    for method in ("natural", "gradnorm"):
        eager: dict[str, float] = {}
        for budget in (None, *BUDGETS):
            case = size | {"method": method, "precision": args.precision, "budget": budget}
            arm = Arm(method, args.precision, budget=budget or 1.0, compile=budget is not None)
            with autocast(), mock.patch.object(torch, "compile", backend):
                counted = count(model, arm, args.batch_size)
            eager = eager or counted
            ratios = {f"{k}_to_eager": counted[k] / eager[k] for k in counted}
            rows = [r for r in rows if any(r[k] != case[k] for k in case)]
            rows.append(case | counted | ratios)
            write_record(output, head | {"complete": False, "rows": rows})
            print(f"{method}, budget {budget}", flush=True)
    return finish(output, head | {"rows": rows}, table)


if __name__ == "__main__":
    sys.exit(main())
