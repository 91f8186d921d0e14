"""Runs studies: a study trains several arms with several seeds, attacks them, and writes a record.

An arm is one way of training, such as a method with its options and its number of epochs. A cell is
the result of one arm with one seed. A program declares its arms as a `Study`, and makes its own
table from the record.

Each finished cell goes into the record at once. A later call, also on another machine, reads the
cells from the record and makes the ones that are missing. Each cell has digests (short hashes) of
the network, the objective, the training and the evaluation that made it. If one of them differs
from what the later call would use, the cell is not used.
"""

import argparse
import dataclasses
import functools
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.special import stdtrit

from benchmarks.common import arguments
from benchmarks.common.arguments import Option, Program, open_record, option
from benchmarks.common.records import earlier, write_record
from benchmarks.common.tables import Row, make_table
from benchmarks.common.timing import summary
from benchmarks.evidence import trials
from benchmarks.evidence.trials import Trial
from fastgn.errors import check
from fastgn.lock import lock_folder

Results = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way of training that a study compares with others. It becomes a row of the JSON record."""

    head: Mapping[str, Any]
    """First entries of the row, such as the name of the way of training and its cost."""
    trials: Sequence[Trial]
    """One training per seed. Each has a name that no other training of the study has."""


@dataclasses.dataclass(frozen=True)
class Study:
    """Everything that a program declares about its study."""

    arms: Sequence[Arm]
    head: Mapping[str, Any]
    """Entries of the JSON record that describe the study as a whole."""


def study_program(
    *options: Option, data: Sequence[str], seeds: int
) -> Callable[[Callable[[argparse.Namespace], Study]], Program]:
    """Returns a decorator that makes a program which runs a study.

    The decorated function takes the options. The program's exit status is 2 for a user's mistake,
    1 if every training failed, and else 0.

    options: flags besides those of all studies. data: names of the data sets, the default first.
    seeds: default number of seeds.
    """

    def run(plan: Callable[[argparse.Namespace], Study], args: argparse.Namespace) -> int:
        began, name = time.time(), Path(inspect.getfile(plan)).stem
        folder = f"{name}_{args.data}{'_smoke' if args.smoke else ''}"
        work = (args.work or arguments.ROOT / "runs" / folder).absolute()
        with lock_folder(work, f"--work {work}"):  # so that only one process trains in it
            free = {"data_dir", "minutes", "processes", "work", "data"}
            free |= {"seeds"} if args.seeds >= seeds else set()
            file = f"{name}_{args.data}_{arguments.DEVICE.type}.json"
            output, head = open_record(args, file, free)
            study = plan(args)
            head |= {"script": f"benchmarks/evidence/{name}.py"}
            head |= {"data": args.data, "precision": arguments.PRECISION, "seeds": args.seeds}
            study = dataclasses.replace(study, head=head | study.head)
            return run_study(study, output, work, args.processes, began + 60 * args.minutes)

    limit = "stop after so many minutes; the same command continues"
    every = (
        option("--data", choices=data, default=data[0]),
        option("--data-dir", help="CIFAR-10, as fastgn.train --data-dir takes it"),
        option("--seeds", default=seeds, help="number of seeds, from 0"),
        option("--minutes", default=1e6, help=limit),
        option("--processes", default=1 if arguments.ON_GPU else 2, help="at a time"),
        option("--work", type=Path, help="folder of the trainings; default: below runs/"),
        option("--smoke", action="store_true", help="use toy sizes and APGD-CE alone"),
        *options,
    )
    return lambda plan: Program(functools.update_wrapper(functools.partial(run, plan), plan), every)


def run_study(study: Study, output: Path, work: Path, processes: int, deadline: float) -> int:
    """Makes the results that a study's JSON record lacks, and writes the record after each.

    Returns the exit status. output: file of the JSON record. work: folder of the trainings.
    deadline: latest time, in seconds as time.time() gives.
    """
    planned = {trial.name: trial for arm in study.arms for trial in arm.trials}
    cells = reusable_cells(earlier(output), planned, output)
    failures: Results = {}

    def save(complete: bool = False) -> Path:
        for name in planned.keys() - cells.keys() - failures.keys():
            if found := collect(planned[name], work, study.head):
                (failures if found["failed"] else cells)[name] = found
        rows = [row_of(arm, cells, failures) for arm in study.arms]
        begun = [row for row in rows if row["seeds"] or row["failed"]]
        return write_record(output, {**study.head, "complete": complete, "rows": begun})

    save()
    # trains wave after wave, and in each wave all trainings with seed 0 first, then seed 1, etc.
    todo = [trial for name, trial in planned.items() if name not in cells]
    todo.sort(key=lambda trial: (trial.wave, trial.seed))
    finished = trials.run_all(todo, work, processes=processes, deadline=deadline, save=save)
    written = save(complete=finished)
    print(f"{len(cells)} of {len(planned)} trainings finished -> {written}")
    if not finished:
        print("stopped: run the same command again to continue")
    return int(len(failures) == len(planned))


def reusable_cells(before: Results, planned: Mapping[str, Trial], output: Path) -> Results:
    """Returns the results in an earlier JSON record that this study can use: name -> result.

    Ignores results that other code or options have made, if the record is complete. If the record
    is incomplete, raises UserError for such a result, because this study would overwrite it.

    before: the earlier record. planned: name of each training -> the training. output: file for
    the study's record.
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


def collect(trial: Trial, work: Path, head: Mapping[str, Any]) -> Results | None:
    """Returns the results of one training as a dict, or None if the training is not finished.

    If the training failed, the key "failed" holds the message. work: folder that holds all
    trainings. head: first entries of the JSON record.
    """
    found = trials.result(trial, work)
    if found is None or found["failed"]:
        return found
    made_on = {key: head[key] for key in ("device", "commit")}
    own = {"seed": trial.seed, "name": trial.name, "made_by": trial.made_by, "made_on": made_on}
    return own | found


def row_of(arm: Arm, cells: Results, failures: Results) -> Results:
    """Returns a row of the JSON record, with the results of one way of training and their means.

    cells: name of each finished training -> its results. failures: name of each failed training ->
    dict whose key "failed" holds the error's message.
    """
    seeds = [cells[t.name] for t in arm.trials if t.name in cells]
    bad = [(trial.seed, failures.get(trial.name)) for trial in arm.trials]
    failed = [{"seed": seed, "why": found["failed"]} for seed, found in bad if found]
    return {**arm.head, "seeds": seeds, "failed": failed, "accuracy": statistics_of(seeds)}


def statistics_of(cells: Sequence[Row]) -> list[Results]:
    """Returns the statistics of accuracies over the seeds of one way of training.

    There is a dict for each combination of attack, eps and number of images that all seeds have.
    Its key "accuracy" holds a `timing.summary` over the seeds. cells: the results of each seed.
    """
    out = []
    keys = ("attack", "eps", "images")
    for first in cells[0]["accuracy"] if cells else []:
        same = [a for c in cells for a in c["accuracy"] if all(a[k] == first[k] for k in keys)]
        if len(same) == len(cells):
            values = summary([a["accuracy"] for a in same])
            out.append({k: first[k] for k in keys} | {"accuracy": values})
    return out


def points_of(row: Row, attack: str, eps: float) -> dict[int, float]:
    """Returns the accuracies of one way of training in percent: seed -> accuracy.

    Seeds without this attack and eps are left out. row: row of the JSON record.
    """
    found = {}
    for cell in row["seeds"]:
        for a in cell["accuracy"]:
            if (a["attack"], a["eps"]) == (attack, eps):
                found[cell["seed"]] = 100 * a["accuracy"]
    return found


def differences(row: Row, other: Row, attack: str, eps: float) -> list[float]:
    """Returns the differences in accuracy of two ways of training, in percentage points.

    There is one for each seed that has both accuracies. row, other: rows of the JSON record.
    """
    ours, theirs = (points_of(r, attack, eps) for r in (row, other))
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def with_differences(table: str, rows: Sequence[Mapping[str, str]], note: str) -> str:
    """Adds a second Markdown table to a first one, with a line that explains `mean_difference`.

    rows: rows of the second table, each as heading -> text. If there are none, nothing is added.
    note: what the differences are between.
    """
    if not rows:
        return table
    second = make_table(rows, {name: name for name in rows[0]})
    return f"{table}\n\n{second}\n\nDifferences of accuracy in points, {note}; {DIFFERENCES}."


DIFFERENCES = "mean ± half of its 95 % interval by Student's t, * if that does not contain 0"
"""Explanation of the results of `mean_difference`, for the lines below tables."""


def mean_difference(points: Sequence[float]) -> str:
    """Returns the mean of differences, one for each seed, as a text such as "+5.0 ± 3.6 *".

    The second number is half the width of the 95 % interval of the mean by Student's t. A star
    follows if the interval does not contain 0. The text is empty if there are no differences.
    """
    if len(points) < 2:
        return f"{points[0]:+.1f}" if points else ""
    mean, std, n = (summary(points)[key] for key in ("mean", "std", "n"))
    half_width = stdtrit(n - 1, 0.975) * std / n**0.5
    return f"{mean:+.1f} ± {half_width:.1f}{' *' if abs(mean) > half_width else ''}"
