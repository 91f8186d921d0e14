"""Measures accuracy and time of the quickstart over several seeds.

    python -m benchmarks.evidence.quickstart --seeds 3

Runs the commands of `make train` for each seed and writes
benchmarks/results/quickstart_<device>.json. The same command continues an interrupted one with the
first seed that is not finished.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.arguments import RESULTS, make_parser, positive_int
from benchmarks.common.records import hold, started, write_record
from benchmarks.common.tables import Record, make_table, over_seeds, spread, with_notes
from fastgn.metrics import environment

METHODS = ("natural", "gradnorm")
PROCESSES = torch.cuda.device_count() or min(os.cpu_count() or 1, 2)
TRAIN = ("-m", "fastgn.train")
EVALUATE = (
    *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)),
    *("-m", "fastgn.evaluate"),
)


def timed(*args: str) -> dict[str, float]:
    """Runs a command that must succeed, with one thread per process as in `make train`.

    Returns the seconds of the command and the CPU seconds of all its processes. CPU seconds depend
    less on other programs on the machine.
    """
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *args], check=True, env=env)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - start, "cpu_seconds": cpu_s}


def run_seed(seed: int, folder: Path) -> dict[str, Any]:
    """Trains and evaluates the quickstart's two models with a seed. Returns times and results."""
    parts, runs = {}, {m: str(folder / m) for m in METHODS}
    for method in METHODS:
        start = ["--initial-checkpoint", runs["natural"]] if method == "gradnorm" else []
        flags = ("--recipe", f"quickstart_{method}", "--seed", str(seed), "--output", runs[method])
        parts[f"train_{method}"] = timed(*TRAIN, *flags, *start)
    output = folder / "evaluation.json"
    attacks = ("--eps", "0.025", "--attacks", "clean", "pgd-20", "autoattack")
    flags = ("--checkpoint", *runs.values(), *attacks, "--output", str(output))
    parts["evaluate"] = timed(*EVALUATE, *flags, "--seed", str(seed))
    kinds = ("seconds", "cpu_seconds")
    times = {kind: {name: part[kind] for name, part in parts.items()} for kind in kinds}
    return {"seed": seed, **times, "models": json.loads(output.read_text())["models"]}


def table(record: Record) -> str:
    """Returns the accuracy of the quickstart's two models as Markdown, from the JSON record."""
    seeds = record["seeds"]
    first = seeds[0]["models"][0]

    def cells(model: int) -> list[str]:
        values = [
            [100 * s["models"][model]["results"][index]["accuracy"] for s in seeds]
            for index in range(len(first["results"]))
        ]
        return [f"{spread(v, '.1f')} %" for v in values]

    columns = {
        "attack": [row["attack"] for row in first["results"]],
        "eps": ["" if r["attack"] == "clean" else f"{r['eps']:g}" for r in first["results"]],
        "natural": cells(0),
        "gradnorm": cells(1),
    }
    return with_notes(
        make_table(first["results"], columns),
        record,
        f"{first['images']} held-out digits, Linf, pixels in 0..1",
        over_seeds(len(seeds)),
        f"{record['hardware']['cpu_count']} CPU cores",
    )


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=positive_int, default=1, help="number of seeds, from 0")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    output = args.output or RESULTS / f"quickstart_{device}.json"
    hold(output)
    seeds = started(output).get("seeds", [])
    for seed in range(len(seeds), args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            seeds.append(run_seed(seed, Path(folder)))
        record = {"device": device, "complete": seed + 1 == args.seeds, "seeds": seeds}
        write_record(output, record | environment())  # after each seed
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
