"""Measures accuracy and time of the quickstart over several seeds.

    python -m benchmarks.evidence.quickstart --seeds 3
    python -m benchmarks.evidence.quickstart --seeds 3 --precision fp16 --attacks clean pgd-20

Runs the commands of `make train` for each seed and writes
benchmarks/results/quickstart_<device>.json, or quickstart_<device>_<precision>.json for a precision
other than fp32. The same command continues an interrupted one with the first seed that is not
finished.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.arguments import DEVICE, finish, open_record, option, program
from benchmarks.common.records import taken_over, write_record
from benchmarks.common.tables import Record, make_table, over_seeds, percent, with_notes
from benchmarks.common.timing import summary
from fastgn.metrics import read_rows
from fastgn.step.precision import PRECISIONS

METHODS = ("natural", "gradnorm")
ATTACKS = ("clean", "pgd-20", "autoattack")
PROCESSES = torch.cuda.device_count() or min(os.cpu_count() or 1, 2)


def cpu_seconds(module: str, *args: str, processes: int = 1) -> float:
    """Runs a module that must succeed, and returns the CPU seconds of all its processes.

    args: command-line arguments. processes: number of processes, which torchrun starts if there are
    several.

    Each process has one thread, as in `make train`. CPU seconds depend less on other programs on
    the machine than seconds do.
    """
    many = ("torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m")
    command = (sys.executable, "-m", *(many if processes > 1 else ()), module, *args)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def run_seed(seed: int, folder: Path, precision: str, attacks: Sequence[str]) -> dict[str, Any]:
    """Trains and evaluates the quickstart's two models with a seed.

    Returns the seed, the CPU seconds of each command, the number of updates that fp16 skipped in
    each training, and the models' entries in evaluation.json. folder: folder for the runs.
    precision: precision of the trainings. attacks: values of fastgn.evaluate's --attacks.
    """
    times, runs = {}, {method: str(folder / method) for method in METHODS}
    skipped = {}
    for method, output in runs.items():
        start = ["--initial-checkpoint", runs["natural"]] if method == "gradnorm" else []
        flags = ("--recipe", f"quickstart_{method}", "--seed", str(seed), "--output", output)
        flags += ("--precision", precision)
        times[f"train_{method}"] = cpu_seconds("fastgn.train", *flags, *start)
        rows = read_rows(Path(output) / "metrics.csv")
        skipped[method] = round(sum(row.get("skipped_updates", 0) for row in rows))
    file = folder / "evaluation.json"
    options = ("--eps", "0.025", "--attacks", *attacks)
    flags = ("--checkpoint", *runs.values(), *options, "--output", str(file), "--seed", str(seed))
    times["evaluate"] = cpu_seconds("fastgn.evaluate", *flags, processes=PROCESSES)
    models = json.loads(file.read_text())["models"]
    return {"seed": seed, "cpu_seconds": times, "skipped_updates": skipped, "models": models}


def table(record: Record) -> str:
    """Returns the accuracy of the quickstart's two models as Markdown, from the JSON record."""
    seeds = record["seeds"]
    first = seeds[0]["models"][0]

    def cells(model: int) -> list[str]:
        results = [seed["models"][model]["results"] for seed in seeds]
        values = [[row["accuracy"] for row in rows] for rows in zip(*results, strict=True)]
        return [f"{percent(summary(accuracies))} %" for accuracies in values]

    columns = {
        "attack": [row["attack"] for row in first["results"]],
        "eps": ["" if r["attack"] == "clean" else f"{r['eps']:g}" for r in first["results"]],
        **{method: cells(index) for index, method in enumerate(METHODS)},
    }
    precision = record.get("training_precision", "fp32")
    notes = [] if precision == "fp32" else [f"trained in {precision}"]
    return with_notes(
        make_table(first["results"], columns),
        record,
        *notes,
        f"{first['images']} held-out digits, Linf, pixels in 0..1",
        over_seeds(len(seeds)),
        f"{record['hardware']['cpu_count']} CPU cores",
    )


@program(
    option("--seeds", default=1, help="number of seeds, from 0"),
    option("--precision", default="fp32", choices=PRECISIONS, help="precision of the trainings"),
    option("--attacks", nargs="+", default=list(ATTACKS), choices=ATTACKS),
)
def main(args: argparse.Namespace) -> int:
    """Runs the quickstart for each seed that the JSON record lacks. Writes it after each."""
    suffix = "" if args.precision == "fp32" else f"_{args.precision}"
    free = ("seeds", "precision", "attacks")
    output, head = open_record(args, f"quickstart_{DEVICE.type}{suffix}.json", free)
    head |= {"training_precision": args.precision, "attacks": args.attacks}
    same = {key: head[key] for key in ("training_precision", "attacks")}
    seeds = taken_over(output, same | {"complete": False}).get("seeds", [])
    for seed in range(len(seeds), args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            seeds.append(run_seed(seed, Path(folder), args.precision, args.attacks))
        write_record(output, head | {"complete": False, "seeds": seeds})
    return finish(output, head | {"seeds": seeds}, table)


if __name__ == "__main__":
    sys.exit(main())
