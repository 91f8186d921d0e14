"""Runs studies: a study trains several arms with several seeds, attacks them, and writes a record.

An arm is one way of training, such as a method with its options and its number of epochs. A cell is
the result of one arm with one seed. A program declares its arms as a `Study`, and makes its own
table from the record.

Each finished cell goes into the record at once. A later call, also on another machine, reads the
cells from the record and makes the ones that are missing. Each cell has digests of the network, the
objective, the training and the evaluation that made it. If a digest differs, the cell is not used.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.special import stdtrit

from benchmarks.common import arguments
from benchmarks.common.arguments import ROOT, device_name, positive_float, positive_int
from benchmarks.common.records import earlier, write_record
from benchmarks.common.tables import Row
from benchmarks.common.timing import summary
from benchmarks.evidence import trials
from benchmarks.evidence.trials import Trial
from fastgn.errors import check
from fastgn.lock import lock_folder
from fastgn.metrics import environment

Results = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Arm:
    """One row of a study's record: a way of training, with one training per seed."""

    head: Mapping[str, Any]
    """First keys of the row, such as the arm's name and its cost."""
    trials: Sequence[Trial]
    """One training per seed. Their names are unique within the study."""


@dataclasses.dataclass(frozen=True)
class Study:
    """Everything that a program declares about its study."""

    arms: Sequence[Arm]
    head: Mapping[str, Any]
    """Keys of the record that describe the study."""
    measure: Callable[[Trial, Path], Results] = lambda trial, work: {}
    """Takes a finished training and the folder with all trainings. Returns further results of the
    training. Accuracies among them are appended to those of the evaluations."""
    summarize: Callable[[Results], Results] = lambda row: {}
    """Takes an arm's row with the results of at least one seed. Returns further keys for it."""


def make_parser(
    description: str | None, *, data: Sequence[str], seeds: int
) -> argparse.ArgumentParser:
    """Returns a parser with the options of all studies.

    data: names of the data sets, the default first. seeds: default number of seeds.
    """
    processes = 1 if torch.cuda.is_available() else 2
    parser = arguments.make_parser(description)
    add = parser.add_argument
    add("--data", choices=data, default=data[0])
    add("--data-dir", help="CIFAR-10, as fastgn.train --data-dir takes it")
    add("--seeds", type=positive_int, default=seeds, help="number of seeds, from 0")
    add(
        "--minutes", type=positive_float, default=1e6,
        help="stop after so many minutes; the same command continues",
    )  # fmt: skip
    add("--processes", type=positive_int, default=processes, help="trainings at a time")
    add("--work", type=Path, help="folder that keeps finished trainings; default: below runs/")
    add("--smoke", action="store_true", help="use toy sizes and APGD-CE alone")
    return parser


def run_program(
    name: str,
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    plan: Callable[[argparse.Namespace, Path, Results], Study],
) -> int:
    """Parses the command line, runs the study that `plan` returns, and returns the exit status.

    The status is 2 for a user's mistake, 1 if every training failed, and else 0. No other process
    works in the same folder.

    name: name of the program. plan: function of the options, the folder for the trainings and the
    record of an earlier call ({} if there is none).
    """
    args = parser.parse_args(argv)
    began = time.time()
    folder = f"{name}_{args.data}{'_smoke' if args.smoke else ''}"
    work = (args.work or ROOT / "runs" / folder).absolute()

    def run() -> int:
        with lock_folder(work, f"--work {work}"):
            free = {"data_dir", "minutes", "processes", "work", "data"}
            free |= {"seeds"} if args.seeds >= parser.get_default("seeds") else set()
            device = "cuda" if torch.cuda.is_available() else "cpu"
            file = f"{name}_{args.data}_{device}.json"
            output = arguments.output_for(file, parser, args, free)
            before = earlier(output)
            study = plan(args, work, before)
            head = {
                "script": f"benchmarks/evidence/{name}.py",
                "file": output.name,
                "data": args.data,
                "device": device_name(),
                "precision": device_precision(),
                "seeds": args.seeds,
                **environment(),
            }
            study = dataclasses.replace(study, head=head | study.head)
            deadline = began + 60 * args.minutes
            return run_study(study, before, output, work, args.processes, deadline)

    return arguments.exit_status(f"{name}.py", run)


def run_study(
    study: Study, before: Results, output: Path, work: Path, processes: int, deadline: float
) -> int:
    """Makes the results that are missing. Writes the record after each. Returns the exit status.

    before: record of an earlier call. output: file of the record. work: folder that holds the
    trainings. deadline: latest time, in seconds as time.time() gives.
    """
    planned = {trial.name: trial for arm in study.arms for trial in arm.trials}
    cells = reusable_cells(before, planned, output)
    failures: Results = {}

    def save(complete: bool = False) -> Path:
        for name in planned.keys() - cells.keys() - failures.keys():
            if found := collect(study, planned[name], work):
                (failures if found["failed"] else cells)[name] = found
        rows = [row_of(arm, cells, failures, study.summarize) for arm in study.arms]
        begun = [row for row in rows if row["seeds"] or row["failed"]]
        return write_record(output, {**study.head, "complete": complete, "rows": begun})

    save()
    # trains all arms with one seed before any arm with the next seed
    todo = sorted((t for name, t in planned.items() if name not in cells), key=lambda t: t.seed)
    finished = trials.run_all(todo, work, processes=processes, deadline=deadline, save=save)
    written = save(complete=finished)
    print(f"{len(cells)} of {len(planned)} trainings finished -> {written}")
    if not finished:
        print("stopped: run the same command again to continue")
    return int(len(failures) == len(planned))


def reusable_cells(before: Results, planned: Mapping[str, Trial], output: Path) -> Results:
    """Returns the results (cells) in an earlier record that this study can use: name -> cell.

    Leaves out cells of another study if the record is complete. If it is incomplete, raises
    UserError instead, because this study would overwrite those cells.

    planned: name of each training -> the training. output: file of the record.
    """
    found = {}
    for cell in (cell for row in before.get("rows", ()) for cell in row["seeds"]):
        name = cell.get("name", "without a name")
        made_by = planned[name].made_by if name in planned else {"study": ""}
        theirs = cell.get("made_by", {})
        other = [what for what, digest in made_by.items() if theirs.get(what) != digest]
        if not other:
            found[name] = cell
        check(
            not other or before.get("complete", True),
            f"{output}: the result {name} is of another {' and '.join(other)}: remove the file, "
            "or give another one as --output",
        )
    return found


def collect(study: Study, trial: Trial, work: Path) -> Results | None:
    """Returns the results (cell) of a training, or None if the training is not finished.

    If the training failed, the key "failed" holds the message.
    """
    found = trials.result(trial, work)
    if found is None or found["failed"]:
        return found
    more = study.measure(trial, work)
    return {
        **{"seed": trial.seed, "name": trial.name, "made_by": trial.made_by},
        "made_on": {key: study.head[key] for key in ("device", "commit")},
        **found,
        **more,
        "accuracy": found["accuracy"] + more.get("accuracy", []),
    }


def row_of(
    arm: Arm, cells: Results, failures: Results, summarize: Callable[[Results], Results]
) -> Results:
    """Returns an arm's row of the record: its head, the results of each seed, and their means."""
    seeds = [cells[t.name] for t in arm.trials if t.name in cells]
    row = {**arm.head, "seeds": seeds, "failed": [], "accuracy": statistics_of(seeds)}
    for trial in arm.trials:
        if trial.name in failures:
            row["failed"].append({"seed": trial.seed, "why": failures[trial.name]["failed"]})
    for key in ("seconds", "joules"):
        if values := [cell[key] for cell in seeds if cell[key] is not None]:
            row[key] = summary(values)
    return row | (summarize(row) if seeds else {})


def statistics_of(cells: Sequence[Row]) -> list[Results]:
    """Returns mean and spread of an arm's accuracies over its cells, the results of its seeds.

    Only those combinations of attack, eps and number of images are returned that all cells have.
    """
    out = []
    keys = ("attack", "eps", "images")
    for first in cells[0]["accuracy"] if cells else []:
        same = [a for c in cells for a in c["accuracy"] if all(a[k] == first[k] for k in keys)]
        if len(same) == len(cells):
            values = summary([a["accuracy"] for a in same])
            out.append({k: first[k] for k in keys} | {"accuracy": values})
    return out


@dataclasses.dataclass(frozen=True)
class Difference:
    """Differences in accuracy of two arms, in points, one for each seed that both have."""

    points: Sequence[float]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.points)

    @property
    def std(self) -> float:
        """Standard deviation over the seeds, 0 if there is only one seed."""
        return statistics.stdev(self.points) if len(self.points) > 1 else 0.0

    @property
    def half_width(self) -> float:
        """Half the width of the mean's 95 % interval by Student's t, infinite for one seed."""
        n = len(self.points)
        return float(stdtrit(n - 1, 0.975)) * self.std / n**0.5 if n > 1 else float("inf")

    @property
    def significant(self) -> bool:
        """Whether the 95 % interval of the mean does not contain 0."""
        return abs(self.mean) > self.half_width

    def __str__(self) -> str:
        """Returns the mean and the standard deviation. A star marks a significant difference."""
        if len(self.points) == 1:
            return f"{self.mean:+.1f}"
        return f"{self.mean:+.1f} ± {self.std:.1f}{' *' if self.significant else ''}"


def paired_difference(row: Row, other: Row, attack: str, eps: float) -> Difference | None:
    """Returns the accuracy of an arm minus that of another arm, under one attack.

    Returns None if no seed has both accuracies. row, other: rows of the two arms in the record.
    """
    ours, theirs = (
        {
            cell["seed"]: a["accuracy"]
            for cell in r["seeds"]
            for a in cell["accuracy"]
            if (a["attack"], a["eps"]) == (attack, eps)
        }
        for r in (row, other)
    )
    points = [100 * (ours[seed] - theirs[seed]) for seed in ours if seed in theirs]
    return Difference(points) if points else None


def device_precision() -> str:
    """Returns bf16 if the GPU supports it, else fp32."""
    modern = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return "bf16" if modern else "fp32"
