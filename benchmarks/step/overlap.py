"""Predicted communication that an update with --grad-sync overlap has to wait for.

    python -m benchmarks.step.overlap                     # a Swin-B with one block per stage
    python -m benchmarks.step.overlap --depths 2 2 18 2   # Swin-B itself, which takes long

The compiled backward of gradnorm is scheduled on pretended GPUs (benchmarks/step/pretend.py): its
kernels, and the places at which Inductor begins each all-reduce and waits for it. Kernels then take
the time of the roofline, times a factor for what the roofline leaves out. All-reduces take the time
of `links_of`, one after the other, beside the kernels. What remains is exposed: the kernels wait.

Not modelled: the memory bandwidth and the processors that all-reduces take from kernels; launches;
ranks that come late. These are predictions, not measurements.

Writes benchmarks/results/overlap_swin_b.json.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch

from benchmarks.common import arguments
from benchmarks.common.arguments import positive_float, positive_int
from benchmarks.common.records import write_json
from benchmarks.common.tables import Record, make_table, with_notes
from benchmarks.step.predict import (
    Network,
    kernels_of,
    moved_bytes,
    node_flops,
    repetitions,
    run_updates,
)
from benchmarks.step.pretend import GPUS, Gpu
from fastgn.metrics import environment
from fastgn.objectives import ObjectiveConfig, build_objective
from fastgn.step.gradients import GRAD_DTYPES, OneRank
from fastgn.step.options import StepOptions
from fastgn.step.step import Step

GPUS_PER_NODE = 8


@dataclasses.dataclass(frozen=True)
class Event:
    """One step of the schedule of a backward."""

    kind: str
    """"kernel", or "all_reduce", which begins one."""
    seconds: float = 0
    """Time of a kernel by the roofline."""
    bytes: float = 0
    """Gradients of an all-reduce."""


@dataclasses.dataclass(frozen=True)
class Link:
    """Speed of an all-reduce among some GPUs."""

    bytes_per_s: float
    """Bytes per second and direction, through the slowest link of a ring."""
    latency_s: float
    """Seconds that an all-reduce of nothing takes."""

    def seconds(self, count: int, nbytes: float) -> float:
        """Returns the seconds of an all-reduce of so many bytes among `count` GPUs."""
        return self.latency_s + 2 * (count - 1) / count * nbytes / self.bytes_per_s


def link_of(count: int, node_links: int) -> Link:
    """Returns the link of so many H200: NVLink in a node, 400 Gbit/s cards between nodes.

    node_links: number of network cards that a node's GPUs share.
    """
    if count <= GPUS_PER_NODE:
        return Link(GPUS["h200"].link_bytes_per_s, 20e-6)
    return Link(node_links * 50e9, 60e-6)


class Pretended(OneRank):
    """Processes of which this one is the only real one."""

    def __init__(self, size: int):
        self.size = size


def schedule(network: Network, gpu: Gpu, grad_dtype: str, count: int) -> list[Event]:
    """Returns what the compiled backward does, in order, on one of `count` GPUs."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    events: list[Event] = []
    model = network.build("triton")
    options = StepOptions(precision="bf16", grad_sync="overlap", grad_dtype=grad_dtype)

    def make_step() -> Step:
        objective = build_objective(ObjectiveConfig(method="gradnorm"))
        return Step(model, objective, options, ranks=Pretended(count))

    def on_graph(lowering: Any) -> Callable[[], None]:
        if lowering.is_backward:
            events.extend(events_of(lowering, gpu))
        return lambda: None

    torch.distributed.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        with known_rates(gpu):
            run_updates(network, model, gpu, make_step, on_graph)
    finally:
        torch.distributed.destroy_process_group()
    return events


def known_rates(gpu: Gpu) -> ExitStack:
    """Returns a context in which Inductor knows the rates of a GPU that it would have to ask."""
    import torch._inductor.utils as inductor
    import torch.utils._runtime_estimation as estimation

    stack = ExitStack()
    for module in (inductor, estimation):
        for name, value in (
            ("get_gpu_dram_gbps", gpu.bytes_per_s / 1e9),
            ("get_device_tflops", gpu.flop_per_s["bf16"] / 1e12),
        ):
            if hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, lambda *_, v=value: v))
    return stack


def events_of(lowering: Any, gpu: Gpu) -> list[Event]:
    """Returns the events of a graph, in the order of Inductor's scheduler."""
    flops = {n: count for n in lowering.module.graph.nodes if (count := node_flops(n))}
    repeated = repetitions(lowering)
    events = []
    for kernel, origins in kernels_of(lowering):
        op = str(getattr(kernel.node, "op_overload", None) or "")
        if "all_reduce" in op:
            events.append(Event("all_reduce", bytes=reduced_bytes(origins)))
        else:
            moved = moved_bytes(kernel, repeated)
            work = sum(flops.pop(o, 0) for o in origins)
            times = moved / gpu.bytes_per_s, work / gpu.flop_per_s["bf16"]
            events.append(Event("kernel", seconds=max(times)))
    return events


def reduced_bytes(origins: Sequence[torch.fx.Node]) -> int:
    """Returns the bytes of the tensors that an all-reduce sums."""
    node = next(o for o in origins if "all_reduce" in str(o.target))
    values = torch.fx.map_arg(node.args[0], lambda n: n.meta["val"])
    tensors = values if isinstance(values, (list, tuple)) else [values]
    return sum(x.numel() * x.element_size() for x in tensors)


def exposed_seconds(
    events: Sequence[Event], count: int, link: Link, factor: float
) -> tuple[float, float]:
    """Returns the seconds of all all-reduces, and those for which the kernels wait.

    factor: time of a kernel, relative to the roofline.
    """
    now = free = total = 0.0
    for event in events:
        if event.kind == "kernel":
            now += factor * event.seconds
        else:
            seconds = link.seconds(count, event.bytes)
            free = max(free, now) + seconds
            total += seconds
    return total, max(0.0, free - now)


def table(record: Record) -> str:
    """Returns the Markdown table of the predictions in the record."""
    columns = {
        "GPUs": lambda r: str(r["gpus"]),
        "gradients": lambda r: r["grad_dtype"],
        "kernels : roofline": lambda r: f"{r['factor']:g}",
        "all-reduces": lambda r: str(r["all_reduces"]),
        "backward, ms": lambda r: f"{1e3 * r['kernels_s']:.1f}",
        "communication, ms": lambda r: f"{1e3 * r['all_reduce_s']:.2f}",
        "exposed, ms": lambda r: f"{1e3 * r['exposed_s']:.2f}",
        "exposed": lambda r: f"{100 * r['exposed_s'] / r['all_reduce_s']:.0f} %",
    }
    depths = ", ".join(map(str, record["depths"]))
    note = f"Prediction; Swin-B with depths {depths}, batch {record['batch']}, gradnorm in bf16"
    return with_notes(make_table(record["rows"], columns), record, note)


def run(args: argparse.Namespace) -> int:
    """Makes the predictions, and writes the JSON record."""
    gpu = GPUS["h200"]
    network = Network("swin_b", 224, args.batch).with_depths(args.depths)
    rows = []
    for grad_dtype in args.grad_dtypes:
        for count in args.gpus:
            events = schedule(network, gpu, grad_dtype, count)
            link = link_of(count, args.node_links)
            for factor in args.factors:
                all_reduce_s, exposed_s = exposed_seconds(events, count, link, factor)
                rows.append(
                    {
                        "gpus": count,
                        "grad_dtype": grad_dtype,
                        "factor": factor,
                        "all_reduces": sum(e.kind == "all_reduce" for e in events),
                        "bytes": sum(e.bytes for e in events),
                        "kernels_s": factor * sum(e.seconds for e in events),
                        "all_reduce_s": all_reduce_s,
                        "exposed_s": exposed_s,
                    }
                )
    name = "_".join(map(str, args.depths))
    output = args.output or arguments.RESULTS / f"overlap_swin_b_{name}.json"
    record = {
        "file": output.name,
        "script": "benchmarks/step/overlap.py",
        "prediction": True,
        "gpu": gpu.name,
        "depths": list(args.depths),
        "batch": args.batch,
        "node_links": args.node_links,
        "rows": rows,
        **environment(),
    }
    write_json(output, record)
    print(f"{table(record)}\n-> {output}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit status: 2 for a user's mistake, else 0."""
    parser = arguments.make_parser(__doc__)
    add = parser.add_argument
    add("--depths", type=positive_int, nargs=4, default=[1, 1, 1, 1], help="blocks per stage")
    add("--batch", type=positive_int, default=64, help="images per GPU")
    add("--gpus", type=positive_int, nargs="+", default=[8, 64])
    add("--grad-dtypes", nargs="+", choices=GRAD_DTYPES, default=[*GRAD_DTYPES])
    add("--node-links", type=positive_int, default=1, help="network cards per node")
    factors = "time of a kernel, relative to the roofline; 2.1 was measured"
    add("--factors", type=positive_float, nargs="+", default=[1.0, 2.1], help=factors)
    args = parser.parse_args(argv)
    return arguments.exit_status("overlap.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
