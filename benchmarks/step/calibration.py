"""Predicts Table 3 of arXiv 2409.20139 for fastgn on V100s, from the paper's own seconds.

    python -m benchmarks.step.calibration    # takes a minute and needs no GPU

The paper's updates are eager and in fp32. Their operations and bytes are counted, and divided by
the rates in a V100's data sheet. Two models turn these seconds into the paper's. One has an
efficiency for operations and another for bytes. The other has one efficiency for both, and constant
seconds per update for what is not counted, such as the optimizer, the loader and the host. Both are
applied to fastgn's compiled updates, which predict.py has counted. The efficiencies of compiled
kernels and of fp16 are assumed to be the same. For 8 GPUs, all-reduces are added.

Reads predict_swin_b.json and writes calibration_v100.json. Nothing is measured.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.common.arguments import RESULTS, finish, open_record, program
from benchmarks.common.records import read_json
from benchmarks.common.tables import Column, Record, Row, make_table, with_notes
from benchmarks.step.arms import Arm
from benchmarks.step.cost import PAPER
from benchmarks.step.predict import Network
from benchmarks.step.pretend import GPUS
from benchmarks.step.scaling import Links, flat_sums, gradient_bytes_of
from benchmarks.step.table3 import MICRO_BATCHES

GPU = GPUS["v100"]
MODELS: dict[str, Callable[[Row], tuple[float, float]]] = {
    "two efficiencies": lambda row: (row["operations_s"], row["bytes_s"]),
    "one efficiency, a constant": lambda row: (row["operations_s"] + row["bytes_s"], 1.0),
}
"""Name of a model -> function that returns the factors of its two numbers for an update. The sum of
the products is the seconds of the update. An efficiency is the inverse of a number."""


def row_of(update: str, precision: str, flops: float, nbytes: float) -> dict[str, Any]:
    """Returns an update with its seconds at the rates in the data sheet, for the JSON record."""
    seconds = {"operations_s": flops / GPU.flop_per_s[precision]}
    seconds |= {"bytes_s": nbytes / GPU.bytes_per_s}
    paper_s = PAPER[update.removesuffix("-paper")]["seconds_a_batch"]
    return {"update": update, "precision": precision, "paper_s": paper_s} | seconds


def fit(model: str, rows: Sequence[Row]) -> list[float]:
    """Returns a model's two numbers with the least sum of squared relative errors."""
    factors = [[x / row["paper_s"] for x in MODELS[model](row)] for row in rows]
    matrix = torch.tensor(factors, dtype=torch.float64)
    return torch.linalg.lstsq(matrix, torch.ones_like(matrix[:, :1])).solution.flatten().tolist()


def table(record: Record) -> str:
    """Returns the Markdown table of the paper's updates and of those that are predicted."""
    columns: dict[str, Column] = {
        **{"update": "update", "precision": "precision", "paper, s": "paper_s:.3f"},
        **{"operations, s": "operations_s:.3f", "bytes, s": "bytes_s:.3f"},
    }
    for model in MODELS:
        columns[f"{model}: 1 V100, s"] = f"{model}/one_s:.3f"
        columns[f"{model}: 8 V100s, s"] = f"{model}/eight_s:.3f"
        columns[f"{model}: over paper"] = f"{model}/over_paper:.3f"
    (flop, moved), (both, constant_s) = record["numbers"].values()
    notes = [
        "Predictions but for the column of the paper",
        f"{record['model']}, {record['img_size']} px, batch {record['batch']}",
        f"two efficiencies: {1 / flop:.3f} for operations, {1 / moved:.3f} for bytes",
        f"one efficiency: {1 / both:.3f}, and {constant_s:.3f} s per update",
    ]
    return with_notes(make_table(record["rows"], columns), record, *notes)


@program()
def main(args: argparse.Namespace) -> int:
    """Counts, fits and predicts, and writes the JSON record."""
    output, head = open_record(args, "calibration_v100.json")
    counted = read_json(RESULTS / "predict_swin_b.json")
    size = {k: counted[k] for k in ("model", "model_kwargs", "img_size", "classes", "batch")}
    batch = size["batch"]
    network = Network(size["model"], size["img_size"], batch).build("reference")
    rows: list[dict[str, Any]] = []
    for arm in (Arm(f"{method}-paper") for method in PAPER):
        count = arm.count(network, batch, size["classes"])
        nbytes = MICRO_BATCHES.get(arm.method, 1) * count.fixed_traffic_bytes
        nbytes += batch * count.traffic_bytes
        rows.append(row_of(arm.method, arm.precision, batch * count.flops, nbytes))
    numbers = {model: fit(model, rows) for model in MODELS}
    for r in counted["rows"]:
        if (r["gpu"], r["kernels"], r["schedule"]) == ("v100", "triton", "exact"):
            per_update = (batch * r[k] for k in ("flops_an_image", "bytes_an_image"))
            rows.append(row_of(r["method"], r["precision"], *per_update))
    rows[3:] = sorted(rows[3:], key=lambda r: (r["precision"] == "fp16", r["paper_s"]))
    links = Links(GPU.link_bytes_per_s, GPU.link_bytes_per_s)
    sums_s = sum(links.all_reduce_seconds(8, s.nbytes) for s in flat_sums(gradient_bytes_of(size)))
    for number, row in enumerate(rows):
        for model, factors in MODELS.items():
            seconds = sum(n * x for n, x in zip(numbers[model], factors(row), strict=True))
            eight_s = seconds + sums_s if number > 2 else seconds
            row[model] = {"one_s": seconds if number > 2 else None, "eight_s": eight_s}
            row[model]["over_paper"] = eight_s / row["paper_s"]
    head |= size | {"script": "benchmarks/step/calibration.py", "prediction": True}
    return finish(output, head | {"numbers": numbers, "rows": rows}, table)


if __name__ == "__main__":
    sys.exit(main())
