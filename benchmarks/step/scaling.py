"""Predicts images per second and days of training on several GPUs and nodes.

The predictions follow from the speed of one GPU. Each GPU keeps its batch size, so the global batch
grows with the number of GPUs.

    python -m benchmarks.step.scaling --images-per-s 1200  # of one GPU, Swin-B
    python -m benchmarks.step.scaling --cost benchmarks/results/cost_swin_b_nvidia_h200.json
    python -m benchmarks.step.scaling --predict benchmarks/results/predict_swin_b.json --card a100

An update takes the compute of its micro-batches, and the part of the gradients' all-reduces that
does not overlap with compute. A ring of n GPUs sends 2 (n - 1) / n of the bytes over its slowest
link, and makes 2 (n - 1) hops per all-reduce. With --grad-sync flat nothing overlaps. With overlap,
`READY_SHARE` of the gradients are known when the last `TAIL_SHARE` of the backward begins. They are
summed during this time, and the others after it. An update of several micro-batches is flat.

Not modelled: the loader; stragglers; the optimizer, clipping and the average of the weights, unless
the rate includes them (--cost includes the optimizer, --predict nothing); evaluation, checkpoints
and restarts; links that are shared or below their peak; GPU time that collectives take from
compute, and CUDA graphs, which overlap rules out; BatchNorm's buffers; collectives other than a
ring; a rate that changes with clocks or batch.

Writes benchmarks/results/scaling_<model>_<card>.json, with --predict ..._predicted.json. The model
of a flat update was checked on two gloo processes of one CPU, when they still used
DistributedDataParallel (benchmarks/results/scaling_check_cpu.json).
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import arguments
from benchmarks.common.arguments import positive_float, positive_int
from benchmarks.common.records import fastest_gradnorm, write_json
from benchmarks.common.tables import Record, Row, make_table, plus_minus, with_notes
from benchmarks.step.pretend import GPUS
from fastgn.config.groups import ArchitectureConfig
from fastgn.metrics import environment
from fastgn.models.network import build_model
from fastgn.step.gradients import CHUNK_BYTES
from fastgn.step.overlap import BUCKET

IMAGENET_IMAGES = 1_281_167
INTRA_LATENCY_S, INTER_LATENCY_S = 3.4e-6, 14.0e-6
"""Seconds per hop of NCCL's ring (protocol "simple") over NVLink and over the network.

Source: the table from which NCCL chooses its algorithms, and torch/_inductor/comm_analysis.py."""
BACKWARD_SHARE = 2 / 3
"""Share of an update's compute that the compiled backward takes. The forward of gradnorm, with its
input gradient, takes the rest."""
TAIL_SHARE, READY_SHARE = 0.25, 0.86
"""Last part of the backward, and the share of Swin-B's gradients that are known when it begins."""
MODES = [(sync, dtype) for sync in ("flat", "overlap") for dtype in ("fp32", "bf16")]
"""Pairs of --grad-sync and --grad-dtype."""


@dataclasses.dataclass(frozen=True)
class Links:
    """Links between the GPUs of a node, and between nodes."""

    intra_bytes_per_s: float
    """Bytes per second of each GPU within its node, in one direction."""
    inter_bytes_per_s: float
    """Bytes per second of each network card between nodes, in one direction."""
    node_links: int = 1
    """Number of network cards in each node."""
    intra_latency_s: float = INTRA_LATENCY_S
    """Seconds per hop within a node."""
    inter_latency_s: float = INTER_LATENCY_S
    """Seconds per hop between nodes."""
    gpus_per_node: int = 8

    def nodes(self, gpus: int) -> int:
        """Returns the number of nodes that so many GPUs need."""
        return math.ceil(gpus / self.gpus_per_node)


def all_reduces(nbytes: float, sync: str, itemsize: int = 4) -> int:
    """Returns the number of all-reduces per update.

    nbytes: size of the gradients that travel. itemsize: bytes per gradient.
    """
    return math.ceil(nbytes / (CHUNK_BYTES if sync == "flat" else BUCKET * itemsize))


def all_reduce_seconds(
    gpus: int, nbytes: float, links: Links, sync: str = "flat", itemsize: int = 4
) -> float:
    """Returns the seconds in which rings sum all gradients.

    nbytes: size of the gradients in bytes. itemsize: bytes per gradient. sync: "flat" or "overlap",
    which decides the number of all-reduces.
    """
    nodes = links.nodes(gpus)
    rate = links.intra_bytes_per_s
    if nodes > 1:
        rate = min(rate, links.node_links * links.inter_bytes_per_s)
    far = 2 * (nodes - 1)
    near = 2 * (gpus - 1) - far
    latency = near * links.intra_latency_s + far * links.inter_latency_s
    return 2 * (gpus - 1) / gpus * nbytes / rate + all_reduces(nbytes, sync, itemsize) * latency


def update_seconds(
    gpus: int,
    micro_batch_s: float,
    grad_accum_steps: int,
    nbytes: float,
    links: Links,
    sync: str = "flat",
    itemsize: int = 4,
) -> float:
    """Returns the seconds of an update. See all_reduce_seconds for the other arguments.

    micro_batch_s: seconds of the compute of a micro-batch.
    """
    if sync == "overlap" and grad_accum_steps == 1:
        seconds = all_reduce_seconds(gpus, nbytes, links, sync, itemsize)
        hidden = TAIL_SHARE * BACKWARD_SHARE * micro_batch_s
        exposed = max(0.0, READY_SHARE * seconds - hidden) + (1 - READY_SHARE) * seconds
    else:
        exposed = all_reduce_seconds(gpus, nbytes, links)
    return grad_accum_steps * micro_batch_s + exposed


def days(images_per_s: float, epochs: float) -> float:
    """Returns how many days it takes to train `epochs` epochs on ImageNet-1k."""
    return epochs * IMAGENET_IMAGES / images_per_s / 86400


def gradient_bytes_of(network: Row) -> int:
    """Returns the bytes of all gradients of a network: 4 per weight.

    In every precision the gradients of float32 weights are float32.
    """
    options = {"model": network["model"], "img_size": network["img_size"]}
    config = ArchitectureConfig(model_kwargs=tuple(network["model_kwargs"]), **options)
    model, _ = build_model(config, network["classes"])
    return 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def predict(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the predictions for all numbers of GPUs, for the JSON record."""
    rate, batch, steps = args.images_per_s, args.batch, args.grad_accum_steps
    card, source = args.card or "h200", "given on the command line"
    network = vars(args) | {"classes": 1000}
    if args.cost or args.predict:
        path, option = (args.cost, "--cost") if args.cost else (args.predict, "--predict")
        record, row = fastest_gradnorm(path, option, card if args.predict else None)
        rate, batch = row["images_per_s"], batch or record["batch"]
        network = record | record.get("architecture", {})
        how = "from a prediction"
        if args.cost:
            how = f"measured on {record['device']}"
            device = record["device"].lower()
            card = args.card or next((c for c in GPUS if c in device), card)
        source = f"{how}: {row['arm']}, {row['precision']}, {path.name}"
    batch = batch or 64
    nbytes = gradient_bytes_of(network)
    intra = args.intra_node * 1e9 if args.intra_node else GPUS[card].link_bytes_per_s
    inter = args.inter_node * 1e9 / 8
    links = Links(intra, inter, args.node_links, gpus_per_node=args.gpus_per_node)
    rows = []
    for gpus in args.gpus:
        for sync, dtype in MODES if gpus > 1 else MODES[:1]:
            itemsize = 2 if dtype == "bf16" else 4
            sent = nbytes * itemsize // 4, links, sync, itemsize
            update_s = update_seconds(gpus, batch / rate, steps, *sent)
            images_per_s = gpus * batch * steps / update_s
            rows.append(
                {
                    "gpus": gpus,
                    "nodes": links.nodes(gpus),
                    "global_batch": gpus * batch * steps,
                    "grad_sync": sync,
                    "grad_dtype": dtype,
                    "update_s": update_s,
                    "all_reduce_s": all_reduce_seconds(gpus, *sent),
                    "images_per_s": images_per_s,
                    "efficiency": images_per_s / (gpus * rate),
                    "days": days(images_per_s, args.epochs),
                }
            )
    return {
        "prediction": True,
        "meaning": "prediction: no run of several GPUs was measured",
        "source": source,
        "card": card,
        "model": network["model"],
        "img_size": network["img_size"],
        "images_per_s_of_one_gpu": rate,
        "batch": batch,
        "grad_accum_steps": steps,
        "gradient_bytes": nbytes,
        "epochs": args.epochs,
        "links": dataclasses.asdict(links),
        "rows": rows,
    }


def table(record: Record) -> str:
    """Returns the Markdown table of predictions, or of their check on a CPU, from the record."""
    if not record.get("prediction"):
        columns = {
            "micro-batches": lambda r: str(r["grad_accum_steps"]),
            "model": lambda r: r["model"],
            "predicted : measured, two processes on a CPU": lambda r: (
                f"{plus_minus(r['predicted_over_measured'], '.2f')} "
                f"(n = {r['predicted_over_measured']['n']})"
            ),
        }
        notes = (record["meaning"], "eager gradnorm")
        return with_notes(make_table(record["rows"], columns), record, *notes)
    by_gpus: dict[int, dict[tuple[str, str], Row]] = {}
    for row in record["rows"]:
        by_gpus.setdefault(row["gpus"], {})[row["grad_sync"], row["grad_dtype"]] = row

    def efficiency(modes: dict[tuple[str, str], Row], mode: tuple[str, str]) -> str:
        row = modes.get(mode)
        return "" if row is None else f"{100 * row['efficiency']:.0f} %, {row['days']:.2f} days"

    columns = {
        "GPUs": lambda modes: str(modes["flat", "fp32"]["gpus"]),
        "nodes": lambda modes: str(modes["flat", "fp32"]["nodes"]),
        "global batch": lambda modes: str(modes["flat", "fp32"]["global_batch"]),
        **{
            f"{mode[0]}, {mode[1]}": lambda modes, mode=mode: efficiency(modes, mode)
            for mode in MODES
        },
    }
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


def run(args: argparse.Namespace) -> int:
    """Makes the predictions, and writes the JSON record."""
    record = predict(args)
    name = f"scaling_{record['model']}_{record['card']}{'_predicted' * bool(args.predict)}.json"
    output = args.output or arguments.RESULTS / name
    head = {"script": "benchmarks/step/scaling.py", "file": output.name}
    record = head | record | environment()
    write_json(output, record)
    print(f"{table(record)}\n-> {output}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit status: 2 for a user's mistake, else 0."""
    parser = arguments.make_parser(__doc__)
    speed = parser.add_mutually_exclusive_group(required=True)
    add = speed.add_argument
    add("--images-per-s", type=positive_float, help="images per second of one GPU")
    add("--cost", type=Path, help="record of cost.py: the speed of exact gradnorm")
    add("--predict", type=Path, help="record of predict.py, in the same way")
    add = parser.add_argument
    add("--card", choices=GPUS, help="default: the card of --cost, or h200")
    add("--model", default="swin_b", help="if neither --cost nor --predict names it")
    add("--model-kwargs", nargs="*", default=[], help="arguments such as 'depths=(2, 2)'")
    add("--img-size", type=int, help="height and width of the images in pixels")
    batch = "images per GPU and micro-batch; default: the record's, or 64"
    add("--batch", type=positive_int, help=batch)
    add("--grad-accum-steps", type=positive_int, default=1, help="micro-batches per update")
    add("--gpus", type=positive_int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    add("--gpus-per-node", type=positive_int, default=8)
    intra = "GB/s of each GPU in one direction; default: NVLink"
    add("--intra-node", type=positive_float, help=intra)
    add("--inter-node", type=positive_float, default=400.0, help="Gbit/s of each network card")
    add("--node-links", type=positive_int, default=1, help="network cards per node")
    add("--epochs", type=positive_float, default=100.0)
    args = parser.parse_args(argv)
    return arguments.exit_status("scaling.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
