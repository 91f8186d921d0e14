"""Predicts kernel launches, bytes and speed of compiled updates on GPUs that need not be here.

The GPUs are an H200, an H100, an A100 and a V100. Nothing is measured.

    python -m benchmarks.step.predict  # Swin-B on every GPU; takes minutes per kind of update
    python -m benchmarks.step.predict --gpus h200 --methods gradnorm

fastgn.step.step.Step makes one update (or --lazy-interval updates if the schedule is lazy) on
tensors without data, which PyTorch believes to be on the GPU. Dynamo, AOTAutograd's partitioner and
Inductor do what they would do for that GPU, up to Inductor's scheduler, which decides what becomes
one kernel. No code is generated and no kernel runs.

Bytes are counted by Inductor: each kernel reads each input once and writes each output once. At the
roofline, a kernel takes bytes / bandwidth or operations / (matrix operations per second), whichever
is longer. An update takes the sum over its kernels.

Not modelled: what caches keep between kernels; overlap, gaps between launches, and kernels slower
than the roofline; what happens inside opaque operators (each counts as one kernel that reads its
inputs and writes its outputs); operators between the compiled graphs, such as the steps of an
attack; the optimizer, the loader and communication.

Writes benchmarks/results/predict_<model>.json. Keeps the rows there that are not predicted again,
if the network and the versions of torch, triton and timm are the same. With another size of network
or batch, writes to runs/.
Uses internals of PyTorch 2.11 to 2.15.
"""

import argparse
import dataclasses
import gc
import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from benchmarks.common import arguments
from benchmarks.common.arguments import finish, open_record, option, program
from benchmarks.common.records import read_json, taken_over, write_record
from benchmarks.common.tables import Column, Record, Row, make_table, with_notes
from benchmarks.step.arms import Arm, random_batch
from benchmarks.step.pretend import CUDA, GPUS, Gpu, pretend
from fastgn.config.groups import ArchitectureConfig
from fastgn.models.network import Classifier, build_model
from fastgn.step.double_backward import DoubleBackward
from fastgn.step.precision import PRECISIONS
from fastgn.step.schedule import SCHEDULES, Schedule
from fastgn.step.step import Step

METHODS = ("natural", "gradnorm", "pgd_at", "fgsm_rs")
KERNELS = ("triton", "reference")


@dataclasses.dataclass
class Cost:
    """Kernel launches, bytes and operations of a compiled update. Two costs can be added."""

    generated: float = 0
    """Number of kernels that Inductor generates."""
    extern: float = 0
    """Number of calls of library kernels, and of operators that Inductor cannot see into."""
    bytes: float = 0
    flops: float = 0
    seconds: float = 0
    """Seconds that the update takes if every kernel reaches the GPU's bandwidth or FLOP rate."""
    kept_bytes: float = 0
    """Bytes that a forward pass keeps for its backward pass."""

    def plus(self, other: "Cost", times: float = 1) -> "Cost":
        """Returns self + times * other."""
        return Cost(**{k: v + times * getattr(other, k) for k, v in vars(self).items()})


def node_flops(node: torch.fx.Node) -> int:
    """Returns the floating-point operations of the matrix products in one node of a graph."""
    formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if formula is None:
        return 0
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return formula(*args, **kwargs, out_val=node.meta["val"])


def graph_cost(lowering: Any, gpu: Gpu, precision: str) -> Cost:
    """Returns the cost of all kernels that Inductor makes of a graph, which is a GraphLowering."""
    cost = Cost(flops=sum(map(node_flops, lowering.module.graph.nodes)))
    for kernel, _, moved, seconds in kernels_of(lowering, gpu, precision):
        extern = type(kernel).__name__ == "ExternKernelSchedulerNode"
        cost.extern += extern
        cost.generated += not extern
        cost.bytes += moved
        cost.seconds += seconds
    if not lowering.is_backward:
        own = [x for x in lowering.graph_outputs if x.has_tensor_output()]
        own = {x.get_name(): x for x in own if x.get_name() not in lowering.graph_inputs}
        cost.kept_bytes = sum(nbytes(x) for x in own.values())
    return cost


def kernels_of(
    lowering: Any, gpu: Gpu, precision: str
) -> Iterator[tuple[Any, list[torch.fx.Node], int, float]]:
    """Yields (kernel, operators that it computes, bytes that it moves, seconds at the roofline).

    The kernels come in the order in which the graph runs them. lowering: Inductor's GraphLowering
    of the graph. precision: precision of the update.
    """
    from torch._inductor.ir import MultiOutput

    repeated, counted = repetitions(lowering), set[torch.fx.Node]()
    for kernel in lowering.scheduler.nodes:
        # a MultiOutput is one of several outputs of an operator, and launches no kernel itself
        is_nop = type(kernel).__name__ == "NopKernelSchedulerNode"
        if is_nop or isinstance(kernel.node, MultiOutput):
            continue
        inner = [n.node for n in kernel.get_nodes()]
        used = dict.fromkeys(o for n in inner for o in getattr(n, "origins", None) or ())
        origins = [o for o in used if o.op == "call_function"]
        names = kernel.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
        moved = sum(names.values()) - sum(repeated[name] for name in names)
        work = sum(node_flops(o) for o in origins if o not in counted)
        counted.update(origins)
        seconds = max(moved / gpu.bytes_per_s, work / gpu.flop_per_s[precision])
        yield kernel, origins, moved, seconds


def repetitions(lowering: Any) -> Counter[str]:
    """Returns the bytes that Inductor counts but memory does not hold: name of a buffer -> bytes.

    lowering: Inductor's GraphLowering of the graph.

    An expanded tensor repeats its elements, but memory holds each of them only once. Inductor
    nevertheless counts every repetition. It counts them twice if the tensor is one of several
    outputs of an operator, because the tensor and the operator then have a buffer each.
    """
    from torch._inductor.ir import MultiOutput

    found: Counter[str] = Counter()
    alive = {name for node in lowering.scheduler.nodes for name in node.get_buffer_names()}
    for name, buffer in {**lowering.graph_inputs, **lowering.name_to_buffer}.items():
        if not hasattr(buffer, "has_tensor_output") or not buffer.has_tensor_output():
            continue
        count = math.prod(int(side) for side in buffer.get_size())
        found[name] = count * buffer.get_dtype().itemsize - nbytes(buffer)
        if isinstance(buffer, MultiOutput) and name in alive:
            found[buffer.inputs[0].get_name()] += found[name]
    return found


def nbytes(value: Any) -> int:
    """Returns the bytes that a tensor of one of Inductor's graphs takes in memory."""
    size, stride = value.get_size(), value.get_stride()
    last = sum((int(a) - 1) * int(b) for a, b in zip(size, stride, strict=True))
    return (last + 1) * value.get_dtype().itemsize if all(size) else 0


def without_data(value: Any) -> Any:
    """Returns a tensor without data for a graph's output, or None if the output is no tensor."""
    if not value.has_tensor_output():
        return None
    size, stride = ([int(x) for x in xs] for xs in (value.get_size(), value.get_stride()))
    return torch.empty_strided(size, stride, dtype=value.get_dtype(), device=value.get_device())


# ------------------------------------------------------------------------------------- predictions


@dataclasses.dataclass(frozen=True)
class Network:
    """The network that is trained, and the batch size."""

    model: str
    img_size: int
    batch: int
    classes: int = 1000
    kwargs: tuple[str, ...] = ()
    """Arguments of the network, as NAME=VALUE, like those of --model-kwargs."""

    def build(self, kernels: str) -> Classifier:
        """Returns the network with random weights on the CPU. kernels: "triton" or "reference"."""
        cfg = ArchitectureConfig(model=self.model, img_size=self.img_size, model_kwargs=self.kwargs)
        return build_model(cfg, self.classes, kernels=kernels)[0]

    def with_depths(self, depths: Sequence[int]) -> "Network":
        """Returns the same Swin with other numbers of blocks."""
        kwargs = tuple(k for k in self.kwargs if not k.startswith("depths="))
        return dataclasses.replace(self, kwargs=(*kwargs, f"depths={tuple(depths)}"))


def predict(network: Network, arm: Arm, gpu: Gpu) -> Cost:
    """Returns an update's predicted cost, the mean over --lazy-interval updates if it is lazy."""
    total = Cost()

    def on_graph(lowering: Any) -> Callable[[], None]:
        cost = graph_cost(lowering, gpu, arm.precision)

        def on_run() -> None:
            nonlocal total
            kept = max(total.kept_bytes, cost.kept_bytes)
            total = dataclasses.replace(total.plus(cost), kept_bytes=kept)

        return on_run

    model = network.build(arm.kernels or "triton")
    cycle = arm.schedule.cycle
    run_updates(network, model, gpu, lambda: arm.step(model).step, on_graph, cycle)
    return dataclasses.replace(Cost().plus(total, 1 / cycle), kept_bytes=total.kept_bytes)


def run_updates(
    network: Network,
    model: Classifier,
    gpu: Gpu,
    make_step: Callable[[], Step],
    on_graph: Callable[[Any], Callable[[], object]],
    updates: int = 1,
) -> None:
    """Runs updates on a pretended GPU, on tensors without data.

    make_step: makes the Step after `model` has moved to that GPU. on_graph: takes Inductor's
    GraphLowering of each compiled graph. It returns a function that is called whenever the graph
    runs. updates: number of updates.
    """

    def make_runner(lowering: Any) -> Callable[[list[Tensor]], list[Any]]:
        on_run = on_graph(lowering)
        outputs = list(lowering.graph_outputs)
        with mode:
            empty = [without_data(x) for x in outputs]

        def run(arguments: list[Tensor]) -> list[Any]:
            on_run()
            arguments.clear()
            return list(empty)

        return run

    torch._dynamo.reset()
    with pretend(gpu, make_runner) as mode:
        with mode:
            model.to_empty(device=CUDA)
            step = make_step()
            batch = random_batch(network.batch, network.img_size, network.classes, CUDA)
            ramp = torch.ones((), device=CUDA)
            for module in (*step.losses.values(), *step.overlapped.values(), step.attack):
                if isinstance(module, DoubleBackward):
                    module.token_like(batch[0])
        for update in range(updates):
            step([batch], ramp, update)
    torch._dynamo.reset()
    gc.collect()


def shallower(depths: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...], float] | None:
    """Finds two shallower Swins, few and more, from which a deep Swin's cost can be computed.

    Returns (depths of few, depths of more, n), so that cost = few + n * (more - few). In the stage
    with most blocks, few has 2 blocks and more has 4. All pairs of blocks in a stage cost the same.
    Returns None if the Swin has at most 4 blocks there, or an odd number. depths: its blocks per
    stage.
    """
    deepest = max(depths)
    if deepest <= 4 or deepest % 2:
        return None
    stage = list(depths).index(deepest)
    few, more = ((*depths[:stage], n, *depths[stage + 1 :]) for n in (2, 4))
    return few, more, (deepest - 2) / 2


def predict_deep(network: Network, arm: Arm, gpu: Gpu) -> tuple[Cost, list | None]:
    """Returns the predicted cost of an update, for a deep Swin computed from two shallower ones.

    The second result holds the depths of the two, or None if `network` was predicted itself.
    """
    backbone = network.build("reference").backbone
    swin = type(backbone).__name__ == "SwinTransformer"
    parts = shallower([len(stage.blocks) for stage in backbone.layers]) if swin else None
    if parts is None:
        return predict(network, arm, gpu), None
    few, more, times = parts
    low, high = (predict(network.with_depths(d), arm, gpu) for d in (few, more))
    return low.plus(high.plus(low, -1), times), [few, more]


# ------------------------------------------------------------------------------------------ record


def row_of(network: Network, arm: Arm, gpu: str, cost: Cost, source: list | None) -> dict[str, Any]:
    """Returns a prediction as a dict for the JSON record. source: as `predict_deep` returns it."""
    batch = network.batch
    return {
        "prediction": True,
        "gpu": gpu,
        "arm": arm.name,
        "method": arm.method,
        "schedule": str(arm.schedule),
        "precision": arm.precision,
        "kernels": arm.kernels,
        "launches": {"generated": cost.generated, "extern": cost.extern},
        "bytes_an_image": cost.bytes / batch,
        "flops_an_image": cost.flops / batch,
        "kept_bytes_an_image": cost.kept_bytes / batch,
        "roofline_ms": 1e3 * cost.seconds,
        "images_per_s": batch / cost.seconds,
        "extrapolated_from_depths": source,
    }


def table(record: Record, measured: Sequence[Record] | None = None) -> str:
    """Returns a Markdown table of the predictions, and of what cost.py measured on such GPUs.

    measured: JSON records of cost.py. If None, those in benchmarks/results.
    """
    if measured is None:
        measured = [read_json(path) for path in sorted(arguments.RESULTS.glob("cost_*.json"))]
        # if a GPU was measured twice, shows the run with CUDA graphs, which training uses
        measured = sorted(measured, key=lambda record: record["cuda_graphs"])
    same = ("model", "img_size", "batch", "kernels")
    found = {
        (r["device"], *(r[k] for k in same), row["arm"], row["precision"]): row
        for r in measured
        for row in r["rows"]
        if row["compiled"]
    }
    rows: list[Row] = []
    least: dict[tuple[str, str], float] = {}
    for row in record["rows"]:  # natural training with whichever kernels move fewer bytes
        if row["method"] == "natural":
            moved, same_as = row["bytes_an_image"], (row["gpu"], row["precision"])
            least[same_as] = min(moved, least.get(same_as, moved))
    for row in record["rows"]:
        card = record["gpus"][row["gpu"]]["name"]
        network = (record["model"], record["img_size"], record["batch"])
        key = (card, *network, row["kernels"], row["arm"], row["precision"])
        natural = least.get((row["gpu"], row["precision"]))
        ratio = row["bytes_an_image"] / natural if natural else None
        rows.append(row | {"card": card, "measured": found.get(key, {}), "over_natural": ratio})

    columns: dict[str, Column] = {
        **{name: name for name in ("card", "arm", "precision", "kernels")},
        "launches": lambda r: f"{sum(r['launches'].values()):.0f}",
        "measured launches": "measured/launches/count:.0f",
        "MB an image": lambda r: f"{r['bytes_an_image'] / 1e6:.0f}",
        "over natural": "over_natural:.2f",
        "GFLOP an image": lambda r: f"{r['flops_an_image'] / 1e9:.1f}",
        "kept MB an image": lambda r: f"{r['kept_bytes_an_image'] / 1e6:.0f}",
        "images/s at the roofline": "images_per_s:.0f",
        "measured images/s": "measured/images_per_s:.0f",
    }
    notes = [
        "Predictions but for the columns named measured",
        f"{record['model']}, {record['img_size']} px, batch {record['batch']}",
        "over natural: bytes over those of natural with whichever kernels move fewer",
        "an operator of fastgn_kernels counts as one launch",
        *(f"{gpu['name']}: {gpu['source']}" for gpu in record["gpus"].values()),
    ]
    if any(row["extrapolated_from_depths"] for row in record["rows"]):
        notes.append("deep networks extrapolated from shallow ones, see the record")
    return with_notes(make_table(rows, columns), record, *notes)


# ------------------------------------------------------------------------------------ command line


def choose_arms(args: argparse.Namespace, gpu: Gpu) -> list[Arm]:
    """Returns the kinds of update that the options ask for, in precisions that the GPU supports."""
    arms = []
    for wanted, kernel, method in itertools.product(args.precision, args.kernels, args.methods):
        for kind in args.schedules if method == "gradnorm" else ["exact"]:
            precision = gpu.precision(wanted)
            arms.append(Arm(method, precision, Schedule(kind), compile=True, kernels=kernel))
    return list(dict.fromkeys(arms))


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Returns the values that identify a prediction: GPU, kind of update, precision and kernels."""
    return tuple(row[k] for k in ("gpu", "arm", "precision", "kernels"))


@program(
    option("--model", default="swin_b"),
    option("--model-kwargs", nargs="*", default=[], metavar="KEY=VALUE", help="of the model"),
    option("--img-size", default=224, help="height and width in pixels"),
    option("--classes", default=1000, help="number of classes"),
    option("--batch-size", default=64, help="number of images per update"),
    option("--gpus", nargs="+", default=list(GPUS), choices=GPUS, help="cards to predict"),
    option(
        "--precision", nargs="+", default=["bf16", "bf16-pure"], choices=PRECISIONS,
        help="precisions of the step; fp32 replaces what a card does not support",
    ),
    option("--methods", nargs="+", default=list(METHODS), choices=METHODS),
    option(
        "--schedules", nargs="+", default=["exact", "finite-difference", "lazy", "subset"],
        choices=[s for s in SCHEDULES if s != "exact-eager"], help="schedules of gradnorm",
    ),
    option("--kernels", nargs="+", default=list(KERNELS), choices=KERNELS),
)  # fmt: skip
def main(args: argparse.Namespace) -> int:
    """Predicts the cost of each kind of update. Writes the JSON record after each prediction."""
    choices = ("model", "gpus", "precision", "methods", "schedules", "kernels")
    output, head = open_record(args, f"predict_{args.model}.json", choices)
    size = (args.model, args.img_size, args.batch_size, args.classes)
    network = Network(*size, tuple(args.model_kwargs))
    size_of = {"model": args.model, "model_kwargs": list(network.kwargs), "batch": args.batch_size}
    size_of |= {"img_size": args.img_size, "classes": args.classes}
    before = taken_over(output, size_of)
    now, then = head["versions"], before.get("versions", {})
    same = all(then.get(name) == now[name] for name in ("torch", "triton", "timm"))
    rows = before["rows"] if same else []
    head |= size_of | {"script": "benchmarks/step/predict.py", "prediction": True}
    wanted = [(name, arm) for name in args.gpus for arm in choose_arms(args, GPUS[name])]
    for name, arm in wanted:
        began = time.perf_counter()
        cost, source = predict_deep(network, arm, GPUS[name])
        row = row_of(network, arm, name, cost, source) | {"commit": head["commit"]}
        rows = [r for r in rows if key_of(r) != key_of(row)] + [row]
        rows.sort(key=lambda r: (list(GPUS).index(r["gpu"]), METHODS.index(r["method"])))
        cards = {r["gpu"]: dataclasses.asdict(GPUS[r["gpu"]]) for r in rows}
        record = head | {"gpus": cards, "rows": rows}
        write_record(output, record | {"complete": False})
        seconds = time.perf_counter() - began
        print(f"prediction, {', '.join(key_of(row))}: {seconds:.0f} s to lower", flush=True)
    return finish(output, record, table)


if __name__ == "__main__":
    sys.exit(main())
