"""Accuracy of edge regularisation and of natural training on attacked digits.

For each seed, all arms start from the same natural weights and train for the same number of epochs.
PGD-20 and AutoAttack's APGD-CE and APGD-T then attack all held-out images. An image survives
APGD-CE+T if it survives both.

    python -m benchmarks.evidence.edge  # the same command continues an interrupted one

Writes benchmarks/results/edge_digits_<device>.json.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.arguments import output_for, positive_int
from benchmarks.common.records import write_record
from benchmarks.common.tables import (
    Record,
    accuracy_columns,
    make_table,
    over_seeds,
    with_notes,
)  # fmt: skip
from benchmarks.evidence import trials
from benchmarks.evidence.robustness import digits
from benchmarks.evidence.trials import Trial, statistics_of
from fastgn.config import Config
from fastgn.metrics import environment

ARMS: dict[str, dict[str, Any]] = {
    "natural": {"method": "natural"},
    "edge": {"method": "edge"},
    "edge, an RMS per image": {"method": "edge", "edge_rms": "image"},
    "edge, its largest weight at once": {"method": "edge", "ramp_epochs": 0.0},
}
"""Name of each training that is compared -> options of fastgn.train in which it differs."""
START_EPOCHS, EPOCHS, EPS = 30, 15, 0.025
TRAINING = {
    **{"smoothing": 0.1, "eval_eps": EPS, "eval_interval": EPOCHS, "warmup_epochs": 1.0},
    **{"ramp_start": 1 / 19, "ramp_epochs": 200.0},  # the paper's weight: 1 + 0.09 * epoch
}
"""Options of fastgn.train that all compared trainings share."""
FLAGS = (
    *("--attacks", "clean", "pgd-20", "apgd-ce", "apgd-t"),
    *("--eps", repr(EPS), "--num-images", "360"),
)
"""Command-line flags of fastgn.evaluate that all evaluations share."""


def base_config(smoke: bool) -> tuple[Config, dict[str, Any]]:
    """Returns the configuration that all trainings share, and its options that define the network.

    smoke: whether to return toy sizes, which only show that the program runs.
    """
    study = digits()
    network = next(iter(study.networks.values()))
    cfg = study.base.replace(**network, **TRAINING)
    return (cfg.replace(eval_images=16) if smoke else cfg), network


def survivors(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the accuracy under both APGD-CE and APGD-T, from the evaluation of one model."""
    (model,) = evaluation["models"]
    bits = [r["correct"] for r in model["results"] if r["attack"] in ("apgd-ce", "apgd-t")]
    assert len(bits) == 2, "both attacks were run"
    right = sum(a == b == "1" for a, b in zip(*bits, strict=True))
    images = len(bits[0])
    return {"attack": "apgd-ce+t", "eps": EPS, "accuracy": right / images, "images": images}


def row_of(arm: str, runs: Sequence[tuple[int, Trial]], work: Path) -> dict[str, Any]:
    """Returns the results of one training method: each finished seed, and means over the seeds.

    arm: name of the method. runs: each seed and its training. work: folder that holds the
    trainings.
    """
    seeds, failed = [], []
    for seed, trial in runs:
        found = trials.result(trial, work)
        if found is None:
            continue
        if found["failed"]:
            failed.append({"seed": seed, "why": found["failed"]})
            continue
        (flags,) = trial.evaluations
        path = trials.evaluation_file(trial, work / trial.key, flags)
        if path.exists():
            rows = [*found["accuracy"], survivors(json.loads(path.read_text()))]
            seeds.append({"seed": seed, "accuracy": rows, "final": found["final"]})
    return {"arm": arm, "seeds": seeds, "failed": failed, "accuracy": statistics_of(seeds)}


def table(record: Record) -> str:
    """Returns this benchmark's Markdown table, made from its JSON record."""
    shown = ("clean", "pgd-20", "apgd-ce+t")
    rows = [
        row | {"accuracy": [a for a in row["accuracy"] if a["attack"] in shown]}
        for row in record["rows"]
    ]
    columns = {"arm": [row["arm"] for row in rows]} | accuracy_columns(rows)
    epochs, training = record["epochs"], record["training"]
    weight = 19  # --edge-weight, which the record does not name
    start = weight * training["ramp_start"]
    growth = (weight - start) / training["ramp_epochs"]
    return with_notes(
        make_table(rows, columns),
        record,
        f"{record['data']}, a Swin of 16 pixels, {over_seeds(record['seeds'])}",
        f"{record['images']} held-out images",
        f"{epochs['start']} natural epochs, then {epochs['arm']} of each arm",
        f"weight of the edges: {start:.3g} + {growth:.3g} per epoch, or {weight} from the first "
        "epoch on",
        "APGD-CE+T: images that are right after APGD-CE and after targeted APGD",
    )


def run(parser: Any, args: Any) -> int:
    """Makes the trainings that are missing, and writes the JSON record after each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    free = {"minutes", "processes", "work", "data"}
    output = output_for(f"edge_digits_{device}.json", parser, args, free)
    work = trials.work_folder(args, "edge")
    base, network = base_config(args.smoke)
    epochs = {"start": 2, "arm": 2} if args.smoke else {"start": START_EPOCHS, "arm": EPOCHS}
    flags = (*FLAGS[:-1], "8") if args.smoke else FLAGS

    plan: dict[str, list[tuple[int, Trial]]] = {arm: [] for arm in ARMS}
    for seed in range(args.seeds):
        natural = base.replace(seed=seed, method="natural", epochs=epochs["start"])
        start = Trial(f"start_s{seed}", natural)
        for index, (arm, values) in enumerate(ARMS.items()):
            cfg = base.replace(**values, seed=seed, epochs=epochs["arm"])
            plan[arm].append((seed, Trial(f"arm{index}_s{seed}", cfg, (flags,), start)))
    every = [trial for runs in plan.values() for _, trial in runs]
    options = {"processes": args.processes, "deadline": time.time() + 60 * args.minutes}
    finished = trials.run_with_starts(every, work, **options)
    rows = [row_of(arm, runs, work) for arm, runs in plan.items()]
    record = {
        "script": "benchmarks/evidence/edge.py",
        "file": output.name,
        "network": network,
        **{"data": "digits", "device": device, "precision": "fp32"},
        **{"eps": EPS, "epochs": epochs, "training": TRAINING, "arms": ARMS},
        **{"images": int(flags[-1]), "seeds": args.seeds, "complete": finished},
        "rows": [row for row in rows if row["seeds"] or row["failed"]],
        **environment(),
    }
    print(write_record(output, record))
    return trials.exit_status(rows, finished, len(every))


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, runs the benchmark, and returns the exit status.

    The status is 2 for a user's mistake, 1 if every training failed, and else 0.
    """
    parser = trials.make_parser(__doc__)
    parser.add_argument("--seeds", type=positive_int, default=3, help="number of seeds, from 0")
    parser.set_defaults(data="digits")
    args = parser.parse_args(argv)
    return trials.run_alone("edge", args, lambda: run(parser, args))


if __name__ == "__main__":
    sys.exit(main())
