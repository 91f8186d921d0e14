"""Measures accuracy and time of the quickstart over several seeds.

    python -m benchmarks.evidence.quickstart --seeds 3

Runs the commands of `make train` for each seed and writes
benchmarks/results/quickstart_<device>.json. The same command continues an interrupted one with the
first seed that is not finished.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.arguments import DEVICE, finish, open_record, option, program
from benchmarks.common.records import taken_over, write_record
from benchmarks.common.tables import Record, make_table, over_seeds, percent, with_notes
from benchmarks.common.timing import summary

METHODS = ("natural", "gradnorm")
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


def run_seed(seed: int, folder: Path) -> dict[str, Any]:
    """Trains and evaluates the quickstart's two models with a seed.

    Returns the seed, the CPU seconds of each command, and the models' entries in evaluation.json.
    folder: folder for the runs.
    """
    times, runs = {}, {method: str(folder / method) for method in METHODS}
    for method, output in runs.items():
        start = ["--initial-checkpoint", runs["natural"]] if method == "gradnorm" else []
        flags = ("--recipe", f"quickstart_{method}", "--seed", str(seed), "--output", output)
        times[f"train_{method}"] = cpu_seconds("fastgn.train", *flags, *start)
    file = folder / "evaluation.json"
    attacks = ("--eps", "0.025", "--attacks", "clean", "pgd-20", "autoattack")
    flags = ("--checkpoint", *runs.values(), *attacks, "--output", str(file), "--seed", str(seed))
    times["evaluate"] = cpu_seconds("fastgn.evaluate", *flags, processes=PROCESSES)
    models = json.loads(file.read_text())["models"]
    return {"seed": seed, "cpu_seconds": times, "models": models}


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
    return with_notes(
        make_table(first["results"], columns),
        record,
        f"{first['images']} held-out digits, Linf, pixels in 0..1",
        over_seeds(len(seeds)),
        f"{record['hardware']['cpu_count']} CPU cores",
    )


@program(
    option("--seeds", default=1, help="number of seeds, from 0"),
)
def main(args: argparse.Namespace) -> int:
    """Runs the quickstart for each seed that the JSON record lacks. Writes it after each."""
    output, head = open_record(args, f"quickstart_{DEVICE.type}.json", ("seeds",))
    seeds = taken_over(output, {"complete": False}).get("seeds", [])
    for seed in range(len(seeds), args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            seeds.append(run_seed(seed, Path(folder)))
        write_record(output, head | {"complete": False, "seeds": seeds})
    return finish(output, head | {"seeds": seeds}, table)


if __name__ == "__main__":
    sys.exit(main())
