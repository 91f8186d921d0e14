"""Checks that a killed training continues to bitwise the same result.

Trainings are killed at random moments until each has finished, and are then compared with one that
was not killed.

    python -m benchmarks.evidence.kills  # about 10 minutes on a CPU

A run trains a toy Swin on the digits for 42 updates, with a checkpoint after every third update.
Each of its processes is killed by SIGKILL at a random moment. The moment is drawn uniformly from
the time that an undisturbed process takes from start-up to its last file. The next process
continues with --resume auto. A run is over when a process ends by itself. The run's files must then
be the same to the last bit: weights, their average, the optimizer's state, best.pt, the export, and
metrics.csv except for its columns of times.

A server that has imported fastgn.train once forks the processes. So the processes and the kills are
real, but each start saves six seconds of imports.

Writes benchmarks/results/kills_cpu.json.
"""

import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from benchmarks.common.arguments import RESULTS, make_parser, positive_int
from benchmarks.common.records import hold, write_json
from benchmarks.common.tables import Record, make_table, with_notes
from fastgn import train
from fastgn.checkpoint import Checkpoints, load_checkpoint
from fastgn.metrics import environment, read_rows

ARGUMENTS = (
    *("--model", "swin_t", "--img-size", "16", "--model-kwargs", "patch_size=4", "embed_dim=8"),
    *("depths=(1, 1)", "num_heads=(1, 2)", "window_size=2", "--data", "digits"),
    *("--batch-size", "96", "--epochs", "3", "--warmup-epochs", "0", "--lr", "0.003"),
    *("--mixup", "0.8", "--cutmix", "1.0", "--reprob", "0.25", "--drop-path", "0.1"),
    *("--eval-images", "48", "--log-interval", "4", "--checkpoint-interval", "3"),
)
"""Command line of the training that is killed.

It makes 42 updates in epochs of 14, so that log rows, checkpoints and epochs end at different
updates.
"""
STATE = ("update", "best", "accuracy", "sums", "summed", "model", "ema", "optimizer")
"""Keys of a checkpoint that are compared between a killed and an undisturbed training."""
CLOCK = ("images_per_s", "data_wait_share", "seconds")
"""Columns of metrics.csv that depend on the machine's speed and are therefore not compared."""


def contents(folder: Path) -> dict[str, Any]:
    """Returns all results of a finished training that must not depend on interruptions.

    folder: output folder of the training.
    """
    last = Checkpoints(folder, 1).last()
    assert last is not None, f"{folder} has no checkpoint"
    rows = read_rows(folder / "metrics.csv")
    found: dict[str, Any] = {
        "metrics.csv": [{k: v for k, v in row.items() if k not in CLOCK} for row in rows],
        "model.safetensors": load_file(folder / "model.safetensors"),
        "files": sorted(p.name for p in folder.iterdir()),
        "checkpoints": sorted(p.name for p in (folder / "checkpoints").iterdir()),
    }
    for path in (last, folder / "checkpoints" / "best.pt"):
        state = load_checkpoint(path)
        found[path.name] = {key: getattr(state, key) for key in STATE}
    return found


def differences(mine: Any, other: Any, where: str = "") -> list[str]:
    """Returns the places at which two nested values are not the same to the last bit.

    where: name of the place of both values, which begins each result.
    """
    if type(mine) is not type(other):
        return [where]
    if isinstance(mine, torch.Tensor):
        return [] if mine.dtype == other.dtype and torch.equal(mine, other) else [where]
    if isinstance(mine, dict):
        if mine.keys() != other.keys():
            return [where]
        return [d for k in mine for d in differences(mine[k], other[k], f"{where}/{k}")]
    if isinstance(mine, list) and len(mine) == len(other):
        pairs = enumerate(zip(mine, other, strict=True))
        return [d for i, pair in pairs for d in differences(*pair, f"{where}/{i}")]
    return [] if mine == other else [where]


def phase(folder: Path) -> tuple[str, int]:
    """Returns what a killed training was doing, as its files show, and its last saved update."""
    checkpoints = Checkpoints(folder, 1)
    last = checkpoints.last()
    update = int(last.stem.split("_")[1]) if last else 0
    if any(checkpoints.folder.glob(".*.tmp")):
        return "writing a checkpoint", update
    if not (folder / "config.toml").exists():
        return "start-up of a new run", update
    return ("finishing" if update == 42 else "resuming or training"), update


def train_quietly(folder: str, log: str) -> None:
    """Trains into a folder or continues the training there, and then ends the process.

    log: file to which the output is appended.
    """
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    sys.exit(train.main([*ARGUMENTS, "--output", folder, "--resume", "auto"]))


def study(work: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kills trainings until `kills` processes were killed, and returns the JSON record.

    work: folder for the trainings. seed: seed of the random moments.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["fastgn.train"])
    draw = random.Random(seed)

    def run(name: str, kill_after_s: float | None = None) -> float | None:
        """Returns the seconds that a process took, or None if it was killed.

        name: name of the training's folder. kill_after_s: seconds until the kill, None for no kill.
        """
        began = time.monotonic()
        process = server.Process(
            target=train_quietly, args=(str(work / name), str(work / f"{name}.log"))
        )
        process.start()
        process.join(kill_after_s)
        if process.is_alive():
            process.kill()
        process.join()
        assert process.exitcode in (0, -9), (work / f"{name}.log").read_text()
        return None if process.exitcode else time.monotonic() - began

    run("warm-up")  # lets the server make its imports
    life_s = run("unbroken")
    assert life_s is not None
    wanted = contents(work / "unbroken")
    moments: list[dict[str, Any]] = []
    found: list[str] = []
    runs = 0
    with tqdm(total=kills, unit="kill", disable=None) as bar:
        while len(moments) < kills:
            runs += 1
            name = f"run{runs}"
            fresh = True
            while True:
                after_s = draw.uniform(0, life_s) if len(moments) < kills else None
                took_s = run(name, after_s)
                if took_s is not None:
                    life_s = took_s if fresh else life_s  # other programs may change it
                    break
                fresh = False
                what, update = phase(work / name)
                moments.append({"run": runs, "seconds": after_s, "update": update, "while": what})
                bar.update()
            found += differences(contents(work / name), wanted, name)
    return {
        "kills": len(moments),
        "runs": runs,
        "different": found,
        "seed": seed,
        "undisturbed_s": life_s,
        "processes": "forked by a server that has imported fastgn.train",
        "arguments": list(ARGUMENTS),
        "moments": moments,
    }


def table(record: Record) -> str:
    """Returns this benchmark's Markdown table, made from its JSON record.

    It says how many kills hit which part of a training, and whether any result differed.
    """
    rows = list(Counter(moment["while"] for moment in record["moments"]).items())
    columns = {"killed while": lambda r: r[0], "kills": lambda r: str(r[1])}
    found = len(record["different"])
    note = f"{record['kills']} kills in {record['runs']} runs; {found or 'no'} differences"
    return with_notes(make_table(rows, columns), record, note)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and writes its JSON record.

    Returns 1 if a training that was killed differs from the undisturbed one, else 0.
    """
    parser = make_parser(__doc__)
    parser.add_argument("--kills", type=positive_int, default=50, help="number of kills in all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.set_defaults(output=RESULTS / "kills_cpu.json")
    args = parser.parse_args(argv)
    hold(args.output)
    with tempfile.TemporaryDirectory() as folder:
        record = study(Path(folder), args.kills, args.seed)
    record |= {"file": args.output.name} | environment()
    write_json(args.output, record)
    print(f"{table(record)}\n-> {args.output}")
    return int(bool(record["different"]))


if __name__ == "__main__":
    sys.exit(main())
