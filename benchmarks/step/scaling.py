"""Predicts images per second and days of training on several GPUs and nodes.

The predictions follow from the speed of one GPU, which a record of cost.py or predict.py gives.
Each GPU keeps its batch size, so the global batch grows with the number of GPUs.

    python -m benchmarks.step.scaling  # from the speed of an H200, measured with Swin-B
    python -m benchmarks.step.scaling --record benchmarks/results/predict_swin_b.json --card a100

An update takes the time to compute its micro-batches, and the time of the gradients' all-reduces
that do not overlap with compute. With --grad-sync flat nothing overlaps. With overlap, the
all-reduces begin during the backward, at the times that overlap.py has predicted for Swin-B. Other
networks use the same times. With several micro-batches nothing overlaps.

Not modelled:

- the loader, slow ranks, evaluation, checkpoints and restarts;
- clipping and the weights' average, and the optimizer in a speed that predict.py has predicted;
- network links that are shared or slow, and GPU time that all-reduces take from compute;
- that --grad-sync overlap runs without CUDA graphs by default;
- BatchNorm's buffers, and ways of all-reduce other than rings and trees;
- a speed that changes with the GPU's clock or with the batch size.

Writes benchmarks/results/scaling_<model>_<card>.json, or ..._predicted.json with the record of
predict.py. With --check, nothing is predicted. The program times updates of several processes on
this machine, and compares them with the sum of compute and all-reduces. It writes
benchmarks/results/scaling_check_<device>.json.
"""

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common.arguments import ON_GPU, RESULTS, finish, open_record, option, program
from benchmarks.common.ranks import call_in_ranks
from benchmarks.common.records import read_json, write_record
from benchmarks.common.tables import Column, Record, Row, make_table, with_notes
from benchmarks.common.timing import once, paired_ratios, summary
from benchmarks.step.arms import random_batch
from benchmarks.step.cost import SMALL_SWIN
from benchmarks.step.pretend import GPUS
from fastgn import distributed
from fastgn.config.groups import ArchitectureConfig
from fastgn.errors import check
from fastgn.models.network import build_model
from fastgn.objectives import ObjectiveConfig, build_objective
from fastgn.step.gradients import CHUNK_BYTES
from fastgn.step.options import StepOptions
from fastgn.step.retry import RetryingStep
from fastgn.step.step import Step

CHECKED = ArchitectureConfig(model="swin_t", img_size=32, model_kwargs=SMALL_SWIN)
"""Network of --check on a CPU."""
CHECKED_MODES = [
    ("flat", "fp32", True),
    ("overlap", "fp32", False),
    ("overlap", "fp32", True),
    ("overlap", "bf16", False),
    ("flat", "bf16", True),
]
"""Triples of --grad-sync, --grad-dtype and whether to use CUDA graphs, for --check on GPUs."""
WARM_UP = 4
"""Number of updates at the beginning of --check that are not counted, because they compile."""
IMAGENET_IMAGES = 1_281_167
RING_LATENCY_S, TREE_LATENCY_S = (3.4e-6, 14.0e-6), (4.0e-6, 14.0e-6)
"""Seconds per hop over NVLink and over the network, in NCCL's ring and in its tree."""
START_S = 8.4e-6
"""Seconds that NCCL takes to begin an all-reduce.

Source of START_S, RING_LATENCY_S and TREE_LATENCY_S: the tables from which NCCL chooses (protocol
"simple"), in torch/_inductor/comm_analysis.py."""
BACKWARD_SHARE = 2 / 3
"""Share of an update's compute that the compiled backward takes. The forward of gradnorm, with its
input gradient, takes the rest. Source: overlap_swin_b_2_2_18_2.json and predict_swin_b.json, 21.2
of 33.0 ms at the roofline of an H200."""
SCHEDULE = RESULTS / "overlap_swin_b_2_2_18_2.json"
"""JSON record of overlap.py, with the times at which each all-reduce of Swin-B can begin."""
MEASURED = RESULTS / "cost_swin_b_nvidia_h200_bf16.json"
"""JSON record of cost.py, with the speed of one GPU."""
EPOCHS = 100
"""Number of epochs on ImageNet-1k for which the days of training are predicted."""
MODES = [(sync, dtype) for sync in ("flat", "overlap") for dtype in ("fp32", "bf16")]
"""Pairs of --grad-sync and --grad-dtype."""


@dataclasses.dataclass(frozen=True)
class Links:
    """Links between the GPUs of a node, and between nodes."""

    intra_bytes_per_s: float
    """Bytes per second that a GPU sends to others in its node, in one direction."""
    inter_bytes_per_s: float
    """Bytes per second of each network card between nodes, in one direction."""
    node_links: int = 1
    """Number of network cards in each node."""
    gpus_per_node: int = 8

    def nodes(self, gpus: int) -> int:
        """Returns the number of nodes that `gpus` GPUs need."""
        return math.ceil(gpus / self.gpus_per_node)

    def all_reduce_seconds(self, gpus: int, nbytes: float) -> float:
        """Returns the seconds of one all-reduce, by a ring or by a tree, whichever is faster.

        A ring of n GPUs makes 2 (n - 1) hops. Within a node, a tree makes as many hops as a ring,
        but between n nodes only 2 log2(n). Both send 2 (n - 1) / n of the bytes over the slowest
        link. nbytes: size of the gradients in bytes.
        """
        if gpus == 1:
            return 0.0
        nodes = self.nodes(gpus)
        rate = self.intra_bytes_per_s
        if nodes > 1:
            rate = min(rate, self.node_links * self.inter_bytes_per_s)
        far = 2 * (nodes - 1)
        ring = 2 * (gpus - 1) - far, far
        tree = 2 * (min(gpus, self.gpus_per_node) - 1), 2 * math.ceil(math.log2(nodes))
        latency = START_S + min(
            near * near_s + far * far_s
            for (near, far), (near_s, far_s) in ((ring, RING_LATENCY_S), (tree, TREE_LATENCY_S))
        )
        return latency + 2 * (gpus - 1) / gpus * nbytes / rate


class Sum(NamedTuple):
    """An all-reduce that sums some of an update's gradients over the ranks."""

    begin: float
    """Time at which the gradients are ready, from 0 (begin of the backward) to 1 (its end)."""
    nbytes: float
    """Size of the gradients in bytes."""


def exposed_seconds(gpus: int, backward_s: float, sums: Sequence[Sum], links: Links) -> float:
    """Returns the seconds between the end of a backward and the end of its last all-reduce.

    All-reduces run one after the other, at the same time as the kernels of the backward.
    backward_s: seconds of these kernels. sums: the all-reduces. links: links between the GPUs.
    """
    end = 0.0
    for begin, nbytes in sums:
        end = max(end, begin * backward_s) + links.all_reduce_seconds(gpus, nbytes)
    return max(0.0, end - backward_s)


def flat_sums(nbytes: float) -> list[Sum]:
    """Returns the all-reduces of --grad-sync flat. They all begin when the backward has ended.

    nbytes: size of the gradients in bytes.
    """
    whole, rest = divmod(nbytes, CHUNK_BYTES)
    return [Sum(1.0, CHUNK_BYTES)] * int(whole) + [Sum(1.0, rest)] * (rest > 0)


def overlapped_sums(record: Record, nbytes: float) -> list[Sum]:
    """Returns the all-reduces of --grad-sync overlap, with the times in a record of overlap.py.

    The times are those for gradients in fp32, which are nearly the same in bf16. nbytes: size of
    all gradients in bytes, to which the sizes in the JSON record are scaled.
    """
    sums = [Sum(*s) for s in record["rows"][0]["sums"]]
    total = sum(s.nbytes for s in sums)
    return [Sum(s.begin, s.nbytes / total * nbytes) for s in sums]


def update_seconds(
    gpus: int, micro_batch_s: float, grad_accum_steps: int, sums: Sequence[Sum], links: Links
) -> float:
    """Returns the seconds of an update.

    micro_batch_s: seconds of the compute of a micro-batch. grad_accum_steps: number of
    micro-batches. sums: the all-reduces.
    """
    exposed = exposed_seconds(gpus, BACKWARD_SHARE * micro_batch_s, sums, links)
    return grad_accum_steps * micro_batch_s + exposed


def gradient_bytes_of(network: Row) -> int:
    """Returns the bytes of all gradients of a network: 4 per weight.

    The weights are float32, and so are their gradients in every precision.
    """
    options = {"model": network["model"], "img_size": network["img_size"]}
    config = ArchitectureConfig(model_kwargs=tuple(network["model_kwargs"]), **options)
    model, _ = build_model(config, network["classes"])
    return 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def fastest_row(record: Record, path: Path, card: str) -> Row:
    """Returns the fastest result for exact gradnorm in a JSON record of cost.py or predict.py.

    path: path of the record, for messages. card: key of GPUS. Only its results count in a record of
    predict.py. Raises UserError if no result counts, or if the times are those of a CPU.
    """
    check("rows" in record, f"--record {path} is not a JSON record of cost.py or predict.py")
    predicted = record.get("prediction")
    wrong = f"--record {path}: its times were measured without a GPU: give a record of a GPU"
    check(bool(predicted or record["meaningful_times"]), wrong)
    rows = [row for row in record["rows"] if row["images_per_s"]]
    rows = [r for r in rows if (r["method"], r["schedule"]) == ("gradnorm", "exact")]
    rows = [row for row in rows if not predicted or row["gpu"] == card]
    where = f" on --card {card}" if predicted else ""
    check(bool(rows), f"--record {path} has no images_per_s of exact gradnorm{where}")
    return max(rows, key=lambda row: row["images_per_s"])


def predict(args: argparse.Namespace) -> dict[str, Any]:
    """Predicts speed and days of training for each number in --gpus, for the JSON record."""
    record, card, steps = read_json(args.record), args.card, args.grad_accum_steps
    row = fastest_row(record, args.record, card)
    how = "from a prediction"
    if not record.get("prediction"):
        how = f"measured on {record['device']}"
        card = next((c for c in GPUS if c in record["device"].lower()), card)
    rate, batch = row["images_per_s"], record["batch"]
    network = record | record.get("architecture", {})
    nbytes = gradient_bytes_of(network)
    inter = args.inter_node * 1e9 / 8
    links = Links(GPUS[card].link_bytes_per_s, inter, args.node_links, args.gpus_per_node)
    schedule = read_json(SCHEDULE)
    rows = []
    for gpus in args.gpus:
        for sync, dtype in MODES if gpus > 1 else MODES[:1]:
            sent = nbytes // 2 if dtype == "bf16" else nbytes
            overlaps = sync == "overlap" and steps == 1
            sums = overlapped_sums(schedule, sent) if overlaps else flat_sums(sent)
            update_s = update_seconds(gpus, batch / rate, steps, sums, links)
            images_per_s = gpus * batch * steps / update_s
            entry = {"gpus": gpus, "nodes": links.nodes(gpus), "global_batch": gpus * batch * steps}
            entry |= {"grad_sync": sync, "grad_dtype": dtype, "update_s": update_s}
            entry["all_reduce_s"] = sum(links.all_reduce_seconds(gpus, s.nbytes) for s in sums)
            entry |= {"images_per_s": images_per_s, "efficiency": images_per_s / (gpus * rate)}
            rows.append(entry | {"days": EPOCHS * IMAGENET_IMAGES / images_per_s / 86400})
    return {
        "prediction": True,
        "meaning": "prediction: no run of several GPUs was measured",
        "source": f"{how}: {row['arm']}, {row['precision']}, {args.record.name}",
        **{"card": card, "model": network["model"], "img_size": network["img_size"]},
        **{"images_per_s_of_one_gpu": rate, "batch": batch, "grad_accum_steps": steps},
        **{"gradient_bytes": nbytes, "epochs": EPOCHS},
        **{"links": dataclasses.asdict(links), "rows": rows},
    }


def time_rank(
    world: distributed.World, args: argparse.Namespace, mode: Sequence[Any]
) -> dict[str, list[float]]:
    """Times updates as one of several processes of --check, and returns the seconds of each update.

    On a GPU, the compiled update of Swin-B is timed. On a CPU, the eager update of a small Swin is.

    args: options of the command line. mode: as in CHECKED_MODES.
    """
    grad_sync, grad_dtype, cuda_graphs = mode
    architecture = CHECKED
    options = StepOptions(grad_sync=grad_sync, grad_dtype=grad_dtype, compile=ON_GPU)
    if ON_GPU:
        architecture = ArchitectureConfig(model="swin_b")
        fast = {"precision": "bf16", "cuda_graphs": cuda_graphs}
        options = dataclasses.replace(options, **fast)
    model, _ = build_model(architecture, 1000)
    model.to(world.device)
    objective = build_objective(ObjectiveConfig(method="gradnorm"))
    update = RetryingStep(Step(model, objective, options, ranks=world))
    one = update.step
    images = [random_batch(args.batch, model.img_size, 1000, world.device)]
    ramp = torch.ones((), device=world.device)
    work: dict[str, Callable[[], object]] = {"update": lambda: update(images, ramp)}
    if grad_sync == "flat":
        work["compute"] = lambda: one(images, ramp)
        work["sums"] = lambda: world.size > 1 and one.sum_over_ranks(one.prepare_sums())
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(args.rounds + WARM_UP):
        for name, run in work.items():
            if name != "sums":
                one.gradients.clear()
            world.barrier()
            seconds[name].append(once(run))
    return {name: times[WARM_UP:] for name, times in seconds.items()}


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Times updates of several processes on this machine, and yields rows for the JSON record.

    For --grad-sync flat, a row also compares the time of an update with the sum of two times: its
    compute alone and its all-reduces alone.
    """
    cards = torch.cuda.device_count()
    most = max(args.processes)
    few = f"--processes {most}: this machine has {cards} GPUs, so use at most {cards}"
    check(cards == 0 or most <= cards, few)
    for processes in args.processes:
        for mode in CHECKED_MODES if cards and processes > 1 else CHECKED_MODES[:1]:
            ranks = call_in_ranks(time_rank, processes, args, mode)
            # the slowest process counts, because the all-reduces cannot begin before it is ready
            slowest = {
                name: [max(times) for times in zip(*(rank[name] for rank in ranks), strict=True)]
                for name in ranks[0]
            }
            row: Row = {"processes": processes, "grad_sync": mode[0], "grad_dtype": mode[1]}
            row["cuda_graphs"] = bool(cards) and mode[2]
            row["update_ms"] = summary([1e3 * seconds for seconds in slowest["update"]])
            if "sums" in slowest:
                parts = zip(slowest["compute"], slowest["sums"], strict=True)
                ratios = paired_ratios([a + b for a, b in parts], slowest["update"])
                row["predicted_over_measured"] = summary(ratios)
                shares = paired_ratios(slowest["sums"], slowest["update"])
                row["sums_over_update"] = summary(shares)
            yield row


def table(record: Record) -> str:
    """Returns the Markdown table of predicted speeds, or of times if --check made the record."""
    if not record.get("prediction"):
        columns: dict[str, Column] = {
            "processes": "processes",
            "mode": lambda r: f"{r['grad_sync']}, {r['grad_dtype']}",
            "CUDA graphs": lambda r: "on" if r.get("cuda_graphs") else "off",
            "(compute + sums) : update": "predicted_over_measured:.3f",
            "sums : update": "sums_over_update:.3f",
            "rounds": "update_ms/n",
        }
        if record["device"] == "cpu":
            where = f"gloo on {record['cores']} cores for all processes: only ratios count"
        else:
            where = record["device"]
            columns["ms per update"] = "update_ms:.1f"
        note = f"{record['model']}, {record['batch']} images a process"
        return with_notes(make_table(record["rows"], columns), record, note, where)
    by_gpus: dict[int, Record] = {}
    for row in record["rows"]:
        mode = f"{row['grad_sync']}, {row['grad_dtype']}"
        cell = f"{100 * row['efficiency']:.0f} %, {row['days']:.2f} days"
        by_gpus.setdefault(row["gpus"], dict(row))[mode] = cell
    columns = {"GPUs": "gpus", "nodes": "nodes", "global batch": "global_batch"}
    columns |= {", ".join(mode): ", ".join(mode) for mode in MODES}
    links = record["links"]
    return with_notes(
        make_table(list(by_gpus.values()), columns),
        record,
        f"Prediction; one {record['card'].upper()}'s speed {record['source']}",
        f"{record['model']}, {record['batch']} x {record['grad_accum_steps']} images a GPU, "
        f"{record['epochs']:g} epochs of ImageNet-1k",
        f"{record['gradient_bytes'] / 1e6:.0f} MB of gradients over "
        f"{links['intra_bytes_per_s'] / 1e9:g} GB/s in a node and "
        f"{links['node_links']} x {links['inter_bytes_per_s'] / 1e9:g} between nodes",
    )


PROCESSES = [n for n in (1, 2, 4, 8) if n <= (torch.cuda.device_count() or 4)]


@program(
    option("--record", type=Path, default=MEASURED, help="record of cost.py or of predict.py"),
    option("--card", choices=GPUS, default="h200", help="card in the record of predict.py"),
    option("--grad-accum-steps", default=1, help="micro-batches per update"),
    option("--gpus", nargs="+", default=[1, 2, 4, 8, 16, 32, 64]),
    option("--gpus-per-node", default=8),
    option("--inter-node", default=400.0, help="Gbit/s of each network card"),
    option("--node-links", default=1, help="network cards per node"),
    option("--check", action="store_true", help="measure processes of this machine"),
    option(
        "--processes", nargs="+", default=PROCESSES,
        help="numbers of processes for --check; default: 1, 2 and 4, or up to all GPUs",
    ),
    option("--batch", default=64 if ON_GPU else 4, help="images per process of --check"),
    option("--rounds", default=20, help="rounds of --check"),
)  # fmt: skip
def main(args: argparse.Namespace) -> int:
    """Predicts speeds, or with --check times updates, and writes the JSON record."""
    if not args.check:
        record = predict(args)
        kind = "_predicted" * record["source"].startswith("from a prediction")
        name = f"scaling_{record['model']}_{record['card']}{kind}.json"
        output, head = open_record(args, name, args.defaults)
        return finish(output, head | record, table)
    output, record = open_record(args, "scaling_check_{device}.json", args.defaults)
    record["model"] = "swin_b" if ON_GPU else "a small Swin, eager"
    record |= {"prediction": False, "batch": args.batch, "cores": os.cpu_count(), "rows": []}
    for row in measure(args):
        record["rows"].append(row)
        write_record(output, record | {"complete": False})
    return finish(output, record, table)


if __name__ == "__main__":
    sys.exit(main())
