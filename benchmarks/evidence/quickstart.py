"""The quickstart over seeds: accuracy with its spread, and the time of its parts.

    python -m benchmarks.evidence.quickstart --seeds 3

Runs the commands of `make train` for each seed and writes
benchmarks/results/quickstart_<device>.json. If it is ended early, the same call goes on with the
first seed that it has not finished.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common.arguments import RESULTS
from benchmarks.common.records import hold, started, write_record
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

    Returns its seconds, and the CPU seconds of all its processes, which other programs on the
    machine change less.
    """
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *args], check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - start, "cpu_seconds": cpu_s}


def one_seed(seed: int, folder: Path) -> dict:
    parts, runs = {}, {m: str(folder / m) for m in METHODS}
    for method in METHODS:
        start = ["--initial-checkpoint", runs["natural"]] if method == "gradnorm" else []
        parts[f"train_{method}"] = timed(
            *TRAIN,
            *("--recipe", f"quickstart_{method}", "--seed", str(seed), "--output", runs[method]),
            *start,
        )
    output = folder / "evaluation.json"
    attacks = ("--eps", "0.025", "--attacks", "clean", "pgd-20", "autoattack")
    parts["evaluate"] = timed(
        *EVALUATE,
        *("--checkpoint", *runs.values(), *attacks, "--output", str(output), "--seed", str(seed)),
    )
    models = json.loads(output.read_text())["models"]
    kinds = ("seconds", "cpu_seconds")
    times = {kind: {name: part[kind] for name, part in parts.items()} for kind in kinds}
    return {"seed": seed, **times, "models": models}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = RESULTS / f"quickstart_{device}.json"
    hold(path)
    seeds = started(path).get("seeds", [])
    for seed in range(len(seeds), args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            seeds.append(one_seed(seed, Path(folder)))
        record = {"device": device, "complete": seed + 1 == args.seeds, "seeds": seeds}
        write_record(path, record | environment())  # each as it is done
    print(path)


if __name__ == "__main__":
    main()
