"""What a compiled step keeps, moves and recomputes at each activation memory budget, against eager.

    python -m benchmarks.step.memory_budget  # Swin-B, an hour on 2 cores; no GPU, no data
    python -m benchmarks.step.memory_budget --model-kwargs 'depths=(2, 2, 2, 2)' --precisions fp32

Counted on fake tensors below the compiler's partitioner (backend aot_eager_decomp_partition), which
decides what the forward keeps for the backward; code generation, which fuses operators and so frees
temporaries sooner, comes after it: peaks are upper bounds. Adds its rows to
benchmarks/results/memory_budget.json, the source of the constants in fastgn/step/plan.py.
"""

import argparse
import contextlib
import importlib
import itertools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.common.arguments import RESULTS
from benchmarks.common.records import earlier, hold, write_record
from fastgn.config.groups import ArchitectureConfig
from fastgn.metrics import environment
from fastgn.models.network import Classifier, build_model
from fastgn.objectives import ObjectiveConfig, build_objective
from fastgn.step.meter import Meter, autocast_as_on_cuda, fake_copy
from fastgn.step.options import StepOptions
from fastgn.step.plan import BUDGETS
from fastgn.step.step import Step

PRECISIONS = ("fp32", "bf16", "bf16-pure")


@contextlib.contextmanager
def noting(meter: Meter, saved: list[int]) -> Iterator[None]:
    """Appends what is live where the last backward begins."""
    backward = torch.autograd.backward

    def noted(*args: Any, **kwargs: Any) -> None:
        saved.append(meter.live_bytes)
        backward(*args, **kwargs)

    torch.autograd.backward = noted
    try:
        yield
    finally:
        torch.autograd.backward = backward


def count(
    model: Classifier, method: str, precision: str, batch_size: int, budget: float | None
) -> dict[str, float]:
    """An image's share; budget: None for eager."""
    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        step = Step(
            fake_copy(model),
            build_objective(ObjectiveConfig(method=method)),
            StepOptions(
                compile=budget is not None,
                precision=precision,
                activation_memory_budget=budget or 1.0,
            ),
        )
        side = model.img_size
        images, targets = torch.empty(batch_size, 3, side, side), torch.empty(batch_size, 1000)
        ramp = torch.empty(())
        step([(images, targets)], ramp)  # compiles
        saved: list[int] = []
        with Meter() as meter, noting(meter, saved):
            step([(images, targets)], ramp)
    row = {
        "flops": meter.flops,
        "saved_bytes": saved[-1],
        "peak_bytes": meter.peak_bytes,
        "traffic_bytes": meter.traffic_bytes,
    }
    return {k: v / batch_size for k, v in row.items()} | {"operators": meter.operators}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="swin_b")
    parser.add_argument("--model-kwargs", nargs="*", default=[], help="such as 'depths=(2, 2)'")
    parser.add_argument("--swap", action="store_true", help="fastgn_kernels' modules, as on CUDA")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--methods", nargs="+", default=["natural", "gradnorm"])
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--output", type=Path, default=RESULTS / "memory_budget.json")
    args = parser.parse_args()
    hold(args.output)

    # the partitioner's choice is Inductor's, its code is not generated
    torch.compile = partial(torch.compile, backend="aot_eager_decomp_partition")
    cfg = ArchitectureConfig(model=args.model, model_kwargs=tuple(args.model_kwargs))
    model, _ = build_model(cfg, 1000, "triton" if args.swap else "reference")
    for name in ("layer_norm", "window_attention"):  # stay ops in a compiled step, as on CUDA
        module = importlib.import_module(f"fastgn_kernels.{name}")
        module.is_compiling = lambda: False  # type: ignore[attr-defined]
    where = {k: getattr(args, k) for k in ("model", "model_kwargs", "swap", "batch_size")}
    rows = earlier(args.output).get("rows", [])
    cases = list(itertools.product(args.precisions, args.methods))
    for precision, method in cases:
        eager: dict[str, float] = {}
        for budget in (None, *BUDGETS):
            case = where | {"method": method, "precision": precision, "budget": budget}
            with autocast_as_on_cuda() if precision == "bf16" else contextlib.nullcontext():
                counted = count(model, method, precision, args.batch_size, budget)
            eager = eager or counted
            ratios = {f"{k}_to_eager": counted[k] / eager[k] for k in counted}
            rows = [r for r in rows if any(r[k] != case[k] for k in case)]
            rows.append(case | counted | ratios)
            print(json.dumps(rows[-1]), flush=True)
            last = (precision, method, budget) == (*cases[-1], BUDGETS[-1])
            write_record(args.output, {"complete": last, "rows": rows, **environment()})


if __name__ == "__main__":
    main()
