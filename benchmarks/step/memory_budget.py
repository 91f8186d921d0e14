"""Memory and operations of a compiled update at each activation memory budget, against eager.

What an update keeps, moves and recomputes per image. These counts are the source of the constants
in fastgn/step/plan.py.

    python -m benchmarks.step.memory_budget  # Swin-B, an hour on 2 cores; no GPU, no data
    python -m benchmarks.step.memory_budget --model-kwargs 'depths=(2, 2, 2, 2)' --precisions fp32

Counts on fake tensors, with the backend aot_eager_decomp_partition: the compiler's partitioner
decides what the forward keeps for the backward, and no code is generated. Generated code fuses
operators and frees temporaries sooner, so the peaks are upper bounds.

Adds its rows to benchmarks/results/memory_budget.json.
"""

import contextlib
import importlib
import itertools
import json
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.common.arguments import RESULTS, make_parser
from benchmarks.common.records import earlier, hold, write_record
from benchmarks.common.tables import Record, make_table, with_notes
from benchmarks.step.arms import Arm
from fastgn.config.groups import ArchitectureConfig
from fastgn.metrics import environment
from fastgn.models.network import Classifier, build_model
from fastgn.step.meter import Meter, autocast_as_on_cuda, fake_copy
from fastgn.step.plan import BUDGETS

PRECISIONS = ("fp32", "bf16", "bf16-pure")


@contextlib.contextmanager
def noting(meter: Meter, saved: list[int]) -> Iterator[None]:
    """Appends to `saved` the bytes that tensors take when the last backward of an update begins.

    meter: counts these bytes.
    """
    backward = torch.autograd.backward

    def noted(*args: Any, **kwargs: Any) -> None:
        saved.append(meter.live_bytes)
        backward(*args, **kwargs)

    with mock.patch.object(torch.autograd, "backward", noted):
        yield


def count(
    model: Classifier, method: str, precision: str, batch_size: int, budget: float | None
) -> dict[str, float]:
    """Returns operations, peak memory, memory traffic and saved bytes of an update, per image.

    budget: activation memory budget of torch.compile. None means not to compile.
    """
    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        arm = Arm(method, precision, budget=budget or 1.0, compile=budget is not None)
        step = arm.step(fake_copy(model))
        side = model.img_size
        batch = torch.empty(batch_size, 3, side, side), torch.empty(batch_size, 1000)
        ramp = torch.empty(())
        step([batch], ramp)  # compiles
        saved: list[int] = []
        with Meter() as meter, noting(meter, saved):
            step([batch], ramp)
    names = ("flops", "peak_bytes", "traffic_bytes")
    row = {name: getattr(meter, name) for name in names} | {"saved_bytes": saved[-1]}
    return {k: v / batch_size for k, v in row.items()} | {"operators": meter.operators}


def table(record: Record) -> str:
    """Returns this benchmark's Markdown table, made from its JSON record.

    It gives the costs of an update at each activation memory budget, relative to an update that is
    not compiled.
    """
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
    shown = [r for r in record["rows"] if not r["swap"]]
    ratios = "PyTorch's operators; peak, operations, bytes and operators over those of eager"
    return with_notes(make_table(shown, columns), record, ratios, "counted on fake tensors")


def main() -> int:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", default="swin_b")
    add("--model-kwargs", nargs="*", default=[], help="arguments such as 'depths=(2, 2)'")
    add("--swap", action="store_true", help="use the modules of fastgn_kernels, as on CUDA")
    add("--batch-size", type=int, default=128)
    add("--methods", nargs="*", default=["natural", "gradnorm"])
    add("--precisions", nargs="*", default=list(PRECISIONS), choices=PRECISIONS)
    parser.set_defaults(output=RESULTS / "memory_budget.json")
    args = parser.parse_args()

    hold(args.output)
    # the partitioner's choice is Inductor's, but no code is generated
    torch.compile = partial(torch.compile, backend="aot_eager_decomp_partition")
    cfg = ArchitectureConfig(model=args.model, model_kwargs=tuple(args.model_kwargs))
    model, _ = build_model(cfg, 1000, "triton" if args.swap else "reference")
    for name in ("layer_norm", "window_attention"):  # stay ops in a compiled step, as on CUDA
        module = importlib.import_module(f"fastgn_kernels.{name}")
        mock.patch.object(module, "is_compiling", lambda: False).start()  # raises if it is renamed
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
