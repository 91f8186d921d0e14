"""Predicts how long an update with --grad-sync overlap waits for the all-reduces of its gradients.

    python -m benchmarks.step.overlap                     # a Swin-B with one block per stage
    python -m benchmarks.step.overlap --depths 2 2 18 2   # Swin-B itself, which takes long

The backward of gradnorm is compiled for a GPU that this machine need not have
(benchmarks/step/pretend.py). That gives the order in which kernels and all-reduces begin. From the
order, the times are computed. A kernel takes the time of the roofline model, multiplied by a factor
for what the model leaves out. All-reduces run one after the other, at the same time as the kernels.
scaling.py computes how long each takes. The time between the end of the backward and the end of the
last all-reduce is called exposed, because the optimizer waits for it.

Not modelled: the memory bandwidth and the processors that all-reduces take from kernels; the time
to launch kernels; ranks that come late. These are predictions, not measurements.

Writes benchmarks/results/overlap_swin_b_<depths>.json.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common.arguments import finish, open_record, option, program
from benchmarks.common.tables import Column, Record, make_table, with_notes
from benchmarks.step.predict import Network, kernels_of, run_updates
from benchmarks.step.pretend import GPUS, Gpu
from benchmarks.step.scaling import Links, Sum, exposed_seconds
from fastgn.objectives import ObjectiveConfig, build_objective
from fastgn.step.gradients import GRAD_DTYPES, OneRank
from fastgn.step.options import StepOptions
from fastgn.step.step import Step

GPU = GPUS["h200"]
LINKS = Links(GPU.link_bytes_per_s, inter_bytes_per_s=50e9)
"""NVLink, and one network card of 400 Gbit/s per node."""
BATCH = 64
"""Number of images per GPU."""
GPU_COUNTS = (8, 64)
FACTORS = (1.0, 1.76)
"""Times of a kernel, relative to the roofline. 1.76 was measured for a whole update."""


class Pretended(OneRank):
    """Makes a Step run as one of two processes, although the second one does not exist."""

    size = 2


def schedule(
    network: Network, gpu: Gpu, grad_dtype: str, cuda_graphs: bool = False
) -> tuple[float, list[Sum]]:
    """Returns the seconds of all kernels of a compiled backward, and its all-reduces in order.

    The seconds are those of the roofline model. Inductor chooses the same order for any number of
    GPUs. grad_dtype, cuda_graphs: as in StepOptions.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    found: list[tuple[float, list[Sum]]] = []
    model = network.build("triton")
    options = StepOptions(
        precision="bf16", grad_sync="overlap", grad_dtype=grad_dtype, cuda_graphs=cuda_graphs
    )

    def make_step() -> Step:
        objective = build_objective(ObjectiveConfig(method="gradnorm"))
        return Step(model, objective, options, ranks=Pretended())

    def on_graph(lowering: Any) -> Callable[[], None]:
        if lowering.is_backward:
            found.append(schedule_of(lowering, gpu))
        return lambda: None

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        run_updates(network, model, gpu, make_step, on_graph)
    finally:
        torch.distributed.destroy_process_group()
    (only,) = found
    return only


def schedule_of(lowering: Any, gpu: Gpu) -> tuple[float, list[Sum]]:
    """Returns the seconds of a graph's kernels by the roofline, and its all-reduces in order.

    lowering: Inductor's GraphLowering of the graph, whose scheduler gives the order.
    """
    seconds, sums = 0.0, []
    for kernel, origins, _, kernel_s in kernels_of(lowering, gpu, "bf16"):
        if "all_reduce" in str(getattr(kernel.node, "op_overload", None)):
            (summed,) = (o.args[0].meta["val"] for o in origins if "all_reduce" in str(o.target))
            sums.append((seconds, int(summed.numel() * summed.element_size())))
        else:
            seconds += kernel_s
    return seconds, [Sum(begin / seconds, nbytes) for begin, nbytes in sums]


def table(record: Record) -> str:
    """Returns the Markdown table of predicted times, made from this benchmark's JSON record."""
    columns: dict[str, Column] = {
        "GPUs": "gpus",
        "gradients": "grad_dtype",
        "kernels : roofline": "factor:g",
        "all-reduces": lambda r: str(len(r["sums"])),
        "backward, ms": lambda r: f"{1e3 * r['kernels_s']:.1f}",
        "communication, ms": lambda r: f"{1e3 * r['all_reduce_s']:.2f}",
        "exposed, ms": lambda r: f"{1e3 * r['exposed_s']:.2f}",
        "exposed": lambda r: f"{100 * r['exposed_s'] / r['all_reduce_s']:.0f} %",
    }
    depths = ", ".join(map(str, record["depths"]))
    note = f"Prediction; Swin-B with depths {depths}, batch {record['batch']}, gradnorm in bf16"
    return with_notes(make_table(record["rows"], columns), record, note)


@program(option("--depths", nargs=4, default=[1, 1, 1, 1], help="blocks per stage"))
def main(args: argparse.Namespace) -> int:
    """Predicts the times for each kind of gradients and GPUs, and writes the JSON record."""
    name = "_".join(map(str, args.depths))
    output, record = open_record(args, f"overlap_swin_b_{name}.json", free=("depths",))
    network = Network("swin_b", 224, BATCH).with_depths(args.depths)
    rows = []
    for grad_dtype in GRAD_DTYPES:
        roofline_s, sums = schedule(network, GPU, grad_dtype)
        for count, factor in itertools.product(GPU_COUNTS, FACTORS):
            times = {
                "kernels_s": factor * roofline_s,
                "all_reduce_s": sum(LINKS.all_reduce_seconds(count, n) for _, n in sums),
                "exposed_s": exposed_seconds(count, factor * roofline_s, sums, LINKS),
            }
            row = {"gpus": count, "grad_dtype": grad_dtype, "factor": factor}
            rows.append(row | times | {"sums": sums})
    record |= {"depths": list(args.depths), "batch": BATCH, "node_links": LINKS.node_links}
    record |= {"script": "benchmarks/step/overlap.py", "prediction": True, "gpu": GPU.name}
    return finish(output, record | {"rows": rows}, table)


if __name__ == "__main__":
    sys.exit(main())
