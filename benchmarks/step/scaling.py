"""Images a second and days of a run on N GPUs and nodes: predictions, from one GPU's step.

    python -m benchmarks.step.scaling --images-per-s 1200  # of one GPU, Swin-B
    python -m benchmarks.step.scaling --cost benchmarks/results/cost_swin_b_nvidia_h200.json
    python -m benchmarks.step.scaling --predict benchmarks/results/predict_swin_b.json --card a100
    python -m benchmarks.step.scaling --check  # the model against two processes on this machine

Each GPU keeps its batch, so the global batch grows with the GPUs. An update takes the compute of
its micro-batches and what overlap leaves of one all-reduce of the gradients, by a ring:
2 (n - 1) / n of the bytes over its slowest link, and 2 (n - 1) hops of latency for each of
DistributedDataParallel's buckets. The compiled step has no overlap: its backward is one operation,
which hands over every gradient at its end.

Not modelled: the loader; stragglers and the variance between nodes; the optimizer, clipping and the
average of the weights (EMA), where the rate given does not include them (--cost includes the
optimizer, --predict none); evaluation, checkpoints and restarts; links shared or below their peak;
what DistributedDataParallel copies, and the GPU's time that collectives take from compute; the
reductions of attacks that compute weight gradients, and of BatchNorm's buffers; collectives other
than a ring (trees and switches that add would be faster); a rate that changes with clocks or batch.

Writes benchmarks/results/scaling_<model>_<card>.json, or scaling_check_cpu.json. For the check, the
links are measured on the gradients' own size between the same two processes: it tests that compute
and all-reduce add up in the real step, eager, on cores that reduce as well as compute; not how a
ring grows with n. Beside the prediction stands one that knows how long the faster process waits
for the slower: the step alone with an all-reduce of one number at its end.
"""

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.arguments import RESULTS
from benchmarks.common.timing import interleaved
from fastgn.config.groups import ArchitectureConfig
from fastgn.errors import UserError, check
from fastgn.files import write_json
from fastgn.metrics import environment
from fastgn.models.network import build_model
from fastgn.objectives import ObjectiveConfig, build_objective
from fastgn.step.options import StepOptions
from fastgn.step.schedule import Schedule
from fastgn.step.step import Step

IMAGENET_IMAGES = 1_281_167

NVLINK_GB_PER_S = {"h200": 450.0, "a100": 300.0, "v100": 150.0}
"""In one direction: half of the 900, 600 and 300 GB/s in NVIDIA's data sheets of the SXM cards."""

INTRA_LATENCY_S, INTER_LATENCY_S = 3.4e-6, 14.0e-6
"""A hop of NCCL's ring (protocol "simple") over NVLink and over the network, by the table from
which it chooses its algorithms; torch/_inductor/comm_analysis.py has it, too."""

BUCKETS_BYTES = 1 << 20, 25 << 20
"""DistributedDataParallel's first bucket, and each other one."""

OVERLAP = {"compiled": 0.0, "gradnorm": 1 / 3, "natural": 2 / 3}
"""Share of a micro-batch's compute in which gradients become ready and can be reduced beside it.
A compiled backward gives all at its end: on a CPU the first came with 0.005 of the step to go, by
the median of 9. Eager (0.26 and 0.55 to go there): in forwards, gradnorm takes 6, of which only the
last backward's 2 (for the layers' inputs and for the weights) come with finished gradients: the
second-order terms are added in it. natural takes 3, its backward 2 of them."""

CHECK_SWIN = ("patch_size=4", "embed_dim=192", "depths=(1, 1)", "num_heads=(6, 12)")
CHECK_SWIN += ("window_size=2",)


# ------------------------------------------------------------------------------------- the formula


@dataclasses.dataclass(frozen=True)
class Links:
    """Between GPUs of a node, and between nodes: bytes a second of each GPU in one direction, and
    seconds a hop."""

    intra_bytes_per_s: float
    inter_bytes_per_s: float
    intra_latency_s: float = INTRA_LATENCY_S
    inter_latency_s: float = INTER_LATENCY_S
    gpus_per_node: int = 8

    def nodes(self, gpus: int) -> int:
        return math.ceil(gpus / self.gpus_per_node)


def buckets(gradient_bytes: float) -> int:
    """How many all-reduces DistributedDataParallel makes of an update."""
    first, other = BUCKETS_BYTES
    return 1 + math.ceil(max(0.0, gradient_bytes - first) / other)


def all_reduce_seconds(gpus: int, gradient_bytes: float, links: Links) -> float:
    nodes = links.nodes(gpus)
    rate = links.intra_bytes_per_s
    if nodes > 1:
        rate = min(rate, links.inter_bytes_per_s)
    far = 2 * (nodes - 1)
    near = 2 * (gpus - 1) - far
    latency = near * links.intra_latency_s + far * links.inter_latency_s
    return 2 * (gpus - 1) / gpus * gradient_bytes / rate + buckets(gradient_bytes) * latency


def update_seconds(
    gpus: int,
    micro_batch_s: float,
    grad_accum_steps: int,
    gradient_bytes: float,
    links: Links,
    overlap: float,
) -> float:
    """overlap: see OVERLAP; the last micro-batch's alone, as the others are not reduced."""
    exposed = all_reduce_seconds(gpus, gradient_bytes, links) - overlap * micro_batch_s
    return grad_accum_steps * micro_batch_s + max(0.0, exposed)


def days(images_per_s: float, epochs: float) -> float:
    return epochs * IMAGENET_IMAGES / images_per_s / 86400


# ---------------------------------------------------------------------------------- the prediction


def fastest(path: Path, option: str, card: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A record of cost.py or predict.py, and its fastest row of exact gradnorm. Raises UserError
    where it has none or its times mean nothing."""
    try:
        record = json.loads(path.read_text())
        rows = [
            row
            for row in record["rows"]
            if (row["method"], row["schedule"]) == ("gradnorm", "exact") and row["images_per_s"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{option} {path} is no such record: {error!r}") from None
    if option == "--cost":
        check(
            bool(record.get("meaningful_times")),
            f"--cost {path}: its times mean nothing (no GPU): give one of a GPU or --images-per-s",
        )
    else:
        rows = [row for row in rows if row.get("gpu") == card]
    wanted = "exact gradnorm" if option == "--cost" else f"exact gradnorm on --card {card}"
    check(bool(rows), f"{option} {path} has no images_per_s of {wanted}")
    return record, max(rows, key=lambda row: row["images_per_s"])


def gradient_bytes_of(
    model: str, model_kwargs: Sequence[str], img_size: int | None, classes: int
) -> int:
    """4 a weight in every precision, as the weights that the optimizer moves are fp32."""
    cfg = ArchitectureConfig(model=model, model_kwargs=tuple(model_kwargs), img_size=img_size)
    network, _ = build_model(cfg, classes)
    return 4 * sum(p.numel() for p in network.parameters() if p.requires_grad)


def predict(args: argparse.Namespace) -> dict[str, Any]:
    """The record, without versions."""
    rate, source, batch = args.images_per_s, "given on the command line", args.batch
    model, kwargs, img_size, classes = args.model, args.model_kwargs, args.img_size, 1000
    card = args.card or "h200"
    path, option = (args.cost, "--cost") if args.cost else (args.predict, "--predict")
    if path:
        record, row = fastest(path, option, card)
        rate, batch = row["images_per_s"], batch or record["batch"]
        known = record.get("architecture", record)
        model, kwargs = known["model"], known["model_kwargs"]
        img_size, classes = record["img_size"], record["classes"]
        how = "from a prediction"
        if args.cost:
            how = f"measured on {record['device']}"
            device = record["device"].lower()
            card = args.card or next((c for c in NVLINK_GB_PER_S if c in device), card)
        source = f"{how}: {row['arm']}, {row['precision']}, {path.name}"
    nbytes = gradient_bytes_of(model, kwargs, img_size, classes)
    intra = NVLINK_GB_PER_S[card] if args.intra_node is None else args.intra_node
    links = Links(intra * 1e9, args.inter_node * 1e9 / 8, gpus_per_node=args.gpus_per_node)
    batch = batch or 64
    rows = []
    for gpus in args.gpus:
        update_s = update_seconds(
            gpus, batch / rate, args.grad_accum_steps, nbytes, links, args.overlap
        )
        global_batch = gpus * batch * args.grad_accum_steps
        images_per_s = global_batch / update_s
        rows.append(
            {
                "gpus": gpus,
                "nodes": links.nodes(gpus),
                "global_batch": global_batch,
                "update_s": update_s,
                "all_reduce_s": all_reduce_seconds(gpus, nbytes, links),
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
        "model": model,
        "img_size": img_size,
        "images_per_s_of_one_gpu": rate,
        "batch": batch,
        "grad_accum_steps": args.grad_accum_steps,
        "gradient_bytes": nbytes,
        "buckets": buckets(nbytes),
        "overlap": args.overlap,
        "epochs": args.epochs,
        "links": dataclasses.asdict(links),
        "rows": rows,
    }


# --------------------------------------------------------------------------------------- the check


def measure(rank: int, folder: str, rounds: int, calls: int, batch: int) -> None:
    """What each of two processes does. Rank 0 leaves folder/measured.json: name -> seconds a call
    in each round, the mean over the ranks, and the gradients' bytes."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    cfg = ArchitectureConfig(model="swin_t", model_kwargs=CHECK_SWIN, img_size=16)
    objective = build_objective(ObjectiveConfig(method="gradnorm"))
    images, targets = torch.rand(batch, 3, 16, 16), torch.rand(batch, 10).softmax(1)
    ramp = torch.ones(())

    def updates(distributed: bool) -> Any:
        model, _ = build_model(cfg, 10)
        eager = Schedule("exact-eager")
        step = Step(model, objective, StepOptions(schedule=eager), distributed=distributed)

        def update(grad_accum_steps: int) -> None:
            step([(images, targets)] * grad_accum_steps, ramp)
            model.zero_grad()

        return update, 4 * sum(p.numel() for p in model.parameters())

    alone, nbytes = updates(False)
    together, _ = updates(True)
    gradients, one = torch.ones(nbytes // 4), torch.ones(1)
    arms = {
        "alone": lambda: alone(1),
        "alone, in step": lambda: (alone(1), torch.distributed.all_reduce(one)),
        "latency": lambda: torch.distributed.all_reduce(one),
        "all_reduce": lambda: torch.distributed.all_reduce(gradients),
        "together": lambda: together(1),
        "together, 2 micro-batches": lambda: together(2),
    }

    class Together:  # so that each has the other core's work beside it from its first call on
        def __enter__(self) -> None:
            torch.distributed.barrier()

        def __exit__(self, *_: object) -> None:
            pass

    short = {"latency", "all_reduce"}
    often = {name: calls * (4 if name in short else 1) for name in arms}
    timings = interleaved(arms, rounds=rounds, calls=often, during=lambda name: Together())
    names = list(timings)
    seconds = torch.tensor([timings[n].rounds for n in names], dtype=torch.float64)
    torch.distributed.all_reduce(seconds)
    if rank == 0:
        means = dict(zip(names, (seconds / 2).tolist(), strict=True))
        write_json(Path(folder) / "measured.json", {"gradient_bytes": nbytes, "seconds": means})
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def two_processes(rounds: int, calls: int, batch: int, limit_s: float = 300) -> dict[str, Any]:
    """`measure` on ranks 0 and 1; raises RuntimeError where one fails."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=measure, args=(r, folder, rounds, calls, batch))
            for r in range(2)
        ]
        try:
            for process in ranks:
                process.start()
            for process in ranks:
                process.join(limit_s)
        finally:
            for process in ranks:
                process.kill()
        codes = [process.exitcode for process in ranks]
        if codes != [0, 0]:
            raise RuntimeError(f"the check's processes ended with {codes}")
        return json.loads((Path(folder) / "measured.json").read_text())


def spread(values: Sequence[float]) -> dict[str, float]:
    """values: one a round, at least two."""
    return {
        "median": statistics.median(values),
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values),
        "n": len(values),
    }


def compare(measured: dict[str, Any]) -> dict[str, Any]:
    """The ratios of predicted to measured seconds, taken within a round: what else the machine
    does changes between them. measured: of `measure`."""
    nbytes, seconds = measured["gradient_bytes"], measured["seconds"]
    ratios: dict[tuple[int, str], list[float]] = {}
    shares = []
    for compute, in_step, tiny, whole, *together in zip(*seconds.values(), strict=True):
        moving = max(whole - tiny, 1e-9)  # 2 (n - 1) / n is 1 between two
        links = Links(nbytes / moving, nbytes / moving, tiny / 2, tiny / 2)
        shares.append(all_reduce_seconds(2, nbytes, links) / compute)
        for accumulated, took in enumerate(together, 1):
            case = compute, accumulated, nbytes, links
            waiting = max(0.0, in_step - tiny - compute)
            models = {
                "no overlap, the slower process": update_seconds(2, *case, 0.0) + waiting,
                "no overlap": update_seconds(2, *case, 0.0),
                "overlap of the last backward": update_seconds(2, *case, OVERLAP["gradnorm"]),
                "no communication": accumulated * compute,
            }
            for name, expected in models.items():
                ratios.setdefault((accumulated, name), []).append(expected / took)
    return {
        "all_reduce_over_compute": spread(shares),
        "rows": [
            {"grad_accum_steps": n, "model": name, "predicted_over_measured": spread(values)}
            for (n, name), values in ratios.items()
        ],
    }


def check_here(args: argparse.Namespace) -> dict[str, Any]:
    """The record, without versions."""
    load = os.getloadavg()[0]
    measured = two_processes(args.rounds, args.calls, args.batch or 2)
    return {
        "meaning": "two gloo processes on one CPU: the ratios alone mean something",
        "load_average_before": load,
        "schedule": "exact-eager",
        "method": "gradnorm",
        "batch": args.batch or 2,
        "rounds": args.rounds,
        "calls": args.calls,
        "gradient_bytes": measured["gradient_bytes"],
        **compare(measured),
        "meaningless_seconds": {n: spread(values) for n, values in measured["seconds"].items()},
    }


# -------------------------------------------------------------------------------- the command line


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Raises UserError."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("--images-per-s", type=float, help="of one GPU")
    rate.add_argument("--cost", type=Path, help="cost.py's record of a GPU: its exact gradnorm")
    rate.add_argument("--predict", type=Path, help="predict.py's record: its exact gradnorm")
    rate.add_argument("--check", action="store_true", help="against two processes here; no GPU")
    parser.add_argument("--card", choices=NVLINK_GB_PER_S, help="that of --cost, or h200")
    parser.add_argument("--model", default="swin_b", help="--cost and --predict have their own")
    parser.add_argument("--model-kwargs", nargs="*", default=[], help="such as 'depths=(2, 2)'")
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--batch", type=int, help="images of a GPU's micro-batch; the record's, 64")
    parser.add_argument("--grad-accum-steps", type=int, default=1)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument(
        "--intra-node", type=float, help="GB/s of each GPU in one direction; --card's NVLink"
    )
    parser.add_argument("--inter-node", type=float, default=400.0, help="Gbit/s of each GPU")
    parser.add_argument(
        "--overlap", type=float, default=OVERLAP["compiled"],
        help="share of a micro-batch's compute beside which gradients are reduced",
    )  # fmt: skip
    parser.add_argument("--epochs", type=float, default=100.0)
    parser.add_argument("--rounds", type=int, default=8, help="of --check")
    parser.add_argument("--calls", type=int, default=4, help="of each arm in a round of --check")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    source = args.check or args.cost or args.predict or args.images_per_s is not None
    check(
        bool(source),
        "one GPU's speed is missing: give --images-per-s, --cost FILE or --predict FILE",
    )
    names = ("images_per_s", "batch", "grad_accum_steps", "gpus_per_node", "intra_node")
    for name in (*names, "inter_node", "epochs", "calls"):
        value = getattr(args, name)
        check(
            value is None or 0 < value < math.inf,
            f"--{name.replace('_', '-')} {value} must be positive and finite",
        )
    check(min(args.gpus) > 0, f"--gpus {min(args.gpus)} must be at least 1")
    check(0 <= args.overlap <= 1, f"--overlap {args.overlap} must lie in [0, 1]")
    check(args.rounds > 1, f"--rounds {args.rounds} must be at least 2, to have a spread")
    return args


def table(record: dict[str, Any]) -> str:
    """A prediction's, in Markdown."""
    lines = ["| GPUs | nodes | global batch | images/s | efficiency | days |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    lines += [
        f"| {r['gpus']} | {r['nodes']} | {r['global_batch']} | {r['images_per_s']:.0f} "
        f"| {100 * r['efficiency']:.1f} % | {r['days']:.2f} |"
        for r in record["rows"]
    ]
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    record = check_here(args) if args.check else predict(args)
    name = "check_cpu" if args.check else f"{record['model']}_{record['card']}"
    output = args.output or RESULTS / f"scaling_{name}.json"
    write_json(
        output,
        {"script": "benchmarks/step/scaling.py", "file": output.name, **record, **environment()},
    )
    if args.check:
        print(record["meaning"])
        for row in record["rows"]:
            median, mean, std, n = row["predicted_over_measured"].values()
            print(
                f"{row['grad_accum_steps']} micro-batches, {row['model']:30} predicted : measured "
                f"median {median:.2f}, mean {mean:.2f} ± {std:.2f} (n = {n})"
            )
    else:
        print(f"prediction; one GPU's speed: {record['source']}")
        print(table(record))
    print(f"-> {output}")


def main(argv: Sequence[str] | None = None) -> int:
    """Its exit status: 2 for a mistake of the user's."""
    try:
        run(parse(list(sys.argv[1:] if argv is None else argv)))
    except UserError as error:
        print(f"scaling.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
