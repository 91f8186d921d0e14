"""Trainings with their evaluations, each of which is made once.

A trial lies in a folder whose name follows from all that it depends on. So a finished trial is
found again, and an interrupted one goes on. fastgn.train and fastgn.evaluate do the work.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import gc
import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common import arguments
from benchmarks.common.arguments import ROOT, positive_float, positive_int
from benchmarks.common.energy import Meter, NoMeterError
from benchmarks.common.timing import summary
from fastgn import evaluate, train
from fastgn.config import Config
from fastgn.files import write_bytes, write_json
from fastgn.lock import lock_folder
from fastgn.metrics import read_rows

LOCAL = ("output", "initial_checkpoint", "resume")
"""Options of fastgn.train that say where files lie. They do not change the weights."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training and its evaluations. It starts from the weights of another one or from
    scratch."""

    name: str
    cfg: Config
    evaluations: tuple[tuple[str, ...], ...] = ()
    """Command-line flags of each evaluation by fastgn.evaluate, without --checkpoint and
    --output."""
    start: "Trial | None" = None

    @property
    def key(self) -> str:
        """Name of the training's folder, made from its name and from all options that change its
        weights."""
        values = {k: v for k, v in self.cfg.flat().items() if k not in LOCAL}
        content = [values, self.start.key if self.start else None]
        return f"{self.name}_{digest(content)}"


def digest(content: Any) -> str:
    """Returns ten characters that identify some content, which must fit into JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


class Stopped(Exception):  # noqa: N818 - not an error
    """The time limit is over, or the user pressed Ctrl-C. The same command continues."""


class Failed(Exception):  # noqa: N818 - the other trials go on
    """A training or evaluation failed. The message is one line."""


def evaluation_file(trial: Trial, folder: Path, flags: Sequence[str]) -> Path:
    """Returns the path of an evaluation's results.

    folder: output folder of the training. flags: the evaluation's command-line flags.
    """
    # the name of a list of images says all of its content
    content = [Path(f).name if f.endswith(".txt") else f for f in flags]
    return folder / f"evaluation_{digest(content)}.json"


def missing(trial: Trial, work: Path) -> bool:
    """Returns whether the training, or one of its evaluations, has not been finished.

    work: folder that holds all trainings.
    """
    folder = work / trial.key
    files = [folder / "model.safetensors"]
    files += [evaluation_file(trial, folder, flags) for flags in trial.evaluations]
    return not (folder / "failed.json").exists() and not all(f.exists() for f in files)


def run_trial(trial: Trial, work: Path, deadline: float) -> str | None:
    """Makes the parts of a training and its evaluations that are not finished.

    Returns the failure in one line, or None. Raises Stopped when the time is over.

    work: folder that holds all trainings. deadline: latest time, in seconds as time.time() gives.
    """
    folder = work / trial.key
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open(folder / "log.txt", "a") as log, until(deadline):
            with contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
                if not (folder / "model.safetensors").exists():
                    run_training(trial, work, folder)
                for flags in trial.evaluations:
                    run_evaluation(trial, folder, flags)
    except KeyboardInterrupt:
        raise Stopped from None
    except (Failed, RuntimeError) as error:  # the same call would fail again
        line = " ".join((str(error) or type(error).__name__).split())[:300]
        write_json(folder / "failed.json", {"failed": line})
        return line
    finally:
        torch.compiler.reset()  # a process compiles dozens of models
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return None


def run_training(trial: Trial, work: Path, folder: Path) -> None:
    """Trains or continues a training, and writes down its seconds and joules.

    Raises Stopped if the time is over, and Failed if the training fails.
    """
    values = {"output": str(folder)}
    if trial.start is not None:
        values["initial_checkpoint"] = str(work / trial.start.key)
    recipe = folder / "recipe.toml"
    write_bytes(recipe, trial.cfg.replace(**values).to_toml())
    try:
        measuring: Any = Meter().measuring()
    except NoMeterError:
        measuring = contextlib.nullcontext()
    began = time.perf_counter()
    with measuring as reading:
        code = train.main(["--recipe", str(recipe), "--resume", "auto"])
    parts = json.loads(there.read_text()) if (there := folder / "cost.json").exists() else []
    cost = {"seconds": time.perf_counter() - began}
    if reading is not None and reading.joules == reading.joules:
        cost["joules"] = reading.joules
    write_json(there, [*parts, cost])
    if code == 130 or (code == 0 and not (folder / "model.safetensors").exists()):
        raise Stopped
    if code:
        raise Failed(last_line(folder / "log.txt"))


def run_evaluation(trial: Trial, folder: Path, flags: Sequence[str]) -> None:
    """Evaluates a trained model, unless that is done already.

    flags: flags of fastgn.evaluate. Raises Stopped if the time is over, and Failed if it fails.
    """
    output = evaluation_file(trial, folder, flags)
    if output.exists():
        return
    code = evaluate.main(["--checkpoint", str(folder), "--output", str(output), *flags])
    if code == 130:
        raise Stopped
    if code:
        raise Failed(last_line(folder / "log.txt"))


def last_line(log: Path) -> str:
    """Returns the last line of a log file."""
    lines = log.read_text().strip().splitlines()
    return lines[-1] if lines else "no message"


@contextlib.contextmanager
def until(deadline: float) -> Iterator[None]:
    """Raises KeyboardInterrupt in the with block at a given time, as Ctrl-C does.

    A training therefore saves a checkpoint before it ends. deadline: in seconds, as time.time()
    gives.
    """
    left = deadline - time.time()
    if left <= 0:
        raise Stopped
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, min(left, 1e6))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the options that all programs which train several networks share."""
    processes = 1 if torch.cuda.is_available() else 2
    parser = arguments.make_parser(description)
    add = parser.add_argument
    add("--data-dir", help="CIFAR-10, as fastgn.train --data-dir takes it")
    add(
        "--minutes", type=positive_float, default=1e6,
        help="stop after so many minutes; the same command continues",
    )  # fmt: skip
    add("--processes", type=positive_int, default=processes, help="trainings at a time")
    add("--work", type=Path, help="folder that keeps finished trainings; default: below runs/")
    add("--smoke", action="store_true", help="use toy sizes and APGD-CE alone")
    return parser


def work_folder(args: argparse.Namespace, script: str) -> Path:
    """Returns the folder in which a program keeps its trainings.

    script: name of the program.
    """
    name = f"{script}_{args.data}{'_smoke' if args.smoke else ''}"
    return (args.work or ROOT / "runs" / name).absolute()


def device_precision() -> str:
    """Returns bf16 if the GPU supports it, else fp32."""
    modern = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return "bf16" if modern else "fp32"


def one_thread() -> None:
    """Limits PyTorch to one thread."""
    torch.set_num_threads(1)


def run_alone(script: str, args: argparse.Namespace, run: Callable[[], int]) -> int:
    """Calls `run` while no other process works in the program's folder, and returns its exit
    status.

    Returns 2 after a user's mistake, and also if another process works in that folder.

    script: name of the program.
    """
    work = work_folder(args, script)

    def locked() -> int:
        with lock_folder(work, f"--work {work}"):
            return run()

    return arguments.exit_status(f"{script}.py", locked)


def run_with_starts(
    trials: Sequence[Trial], work: Path, *, processes: int, deadline: float
) -> bool:
    """Makes trainings, and first the trainings from whose weights they start.

    Returns False if the time was over. One process makes each start right before the first training
    that needs it, so that some results are complete if it stops early. Several processes make all
    starts first.

    work: folder that holds all trainings. deadline: latest time, in seconds as time.time() gives.
    """
    options: dict[str, Any] = {"processes": processes, "deadline": deadline}
    if processes == 1:
        order = [t for trial in trials for t in (trial.start, trial) if t is not None]
        return run_all(order, work, **options)
    starts = [trial.start for trial in trials if trial.start is not None]
    return run_all(starts, work, **options) and run_all(trials, work, **options)


def run_all(trials: Sequence[Trial], work: Path, *, processes: int, deadline: float) -> bool:
    """Makes the missing parts of all trainings, `processes` at a time.

    Returns False if the time was over. deadline: latest time, in seconds as time.time() gives.
    """
    left = [t for t in {t.key: t for t in trials}.values() if missing(t, work)]
    stopped = False
    with tqdm(total=len(left), unit="trial", disable=None) as bar:

        def done(trial: Trial, failure: str | None) -> None:
            bar.update()
            print(f"{trial.name}: {f'failed: {failure}' if failure else brief(trial, work)}")

        if processes == 1:
            for trial in left:
                try:
                    done(trial, run_trial(trial, work, deadline))
                except Stopped:
                    return False
            return True
        os.environ["OMP_NUM_THREADS"] = "1"  # as in `make train`
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(
            processes, mp_context=context, initializer=one_thread
        ) as pool:
            futures = {pool.submit(run_trial, t, work, deadline): t for t in left}
            try:
                for future in concurrent.futures.as_completed(futures):
                    try:
                        done(futures[future], future.result())
                    except (Stopped, concurrent.futures.CancelledError):
                        stopped = True
                        pool.shutdown(wait=False, cancel_futures=True)
            except KeyboardInterrupt:  # the workers were interrupted, too
                pool.shutdown(wait=True, cancel_futures=True)
                return False
    return not stopped


def exit_status(rows: Sequence[Mapping[str, Any]], finished: bool, number: int) -> int:
    """Prints the failures in the results, and returns 1 if all `number` trainings failed, else 0.

    rows: results of the JSON record. finished: whether the program came to its end in time.
    """
    failed = [(row, failure) for row in rows for failure in row["failed"]]
    for row, failure in failed:
        name = row.get("arm") or row["activation"]
        print(f"FAILED: {name}, seed {failure['seed']}: {failure['why']}")
    if not finished:
        print("stopped: run the same command again to continue")
    return int(bool(number) and len(failed) == number)


def statistics_of(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns mean and spread of the accuracy over seeds.

    results: one dict per seed. Only pairs of attack and eps that all seeds have are returned.
    """
    out = []
    for first in results[0]["accuracy"] if results else []:
        key = first["attack"], first["eps"], first["images"]
        values = [
            row["accuracy"]
            for r in results
            for row in r["accuracy"]
            if (row["attack"], row["eps"], row["images"]) == key
        ]
        if len(values) == len(results):
            row = dict(zip(("attack", "eps", "images"), key, strict=True))
            out.append(row | {"accuracy": summary(values)})
    return out


def result(trial: Trial, work: Path) -> dict[str, Any] | None:
    """Returns the results of a training and its finished evaluations, for the JSON record.

    Returns None if the training is not finished. If it failed, the key "failed" holds the message.
    """
    folder = work / trial.key
    if (folder / "failed.json").exists():
        return json.loads((folder / "failed.json").read_text())
    if not (folder / "model.safetensors").exists():
        return None
    rows = read_rows(folder / "metrics.csv")
    there = folder / "cost.json"
    cost = json.loads(there.read_text()) if there.exists() else []  # absent after a kill
    measured = bool(cost) and all("joules" in part for part in cost)
    out: dict[str, Any] = {
        "failed": None,
        "seconds": sum(part["seconds"] for part in cost) if cost else None,
        "joules": sum(part["joules"] for part in cost) if measured else None,
        "history": [
            {"epoch": r["epoch"], "clean": r["clean_accuracy"], "pgd10": r["pgd10_accuracy"]}
            for r in rows
            if "clean_accuracy" in r
        ],
        "final": {k: rows_mean(rows, k) for k in ("loss", "ce", "penalty", "grad_l1")},
        "accuracy": [],
    }
    for flags in trial.evaluations:
        path = evaluation_file(trial, folder, flags)
        if path.exists():
            (model,) = json.loads(path.read_text())["models"]
            out["accuracy"] += [
                {k: row[k] for k in ("attack", "eps", "accuracy")} | {"images": model["images"]}
                for row in model["results"]
                if row["attack"] != "worst case"
            ]
    return out


def rows_mean(rows: Sequence[Mapping[str, float]], key: str) -> float | None:
    """Returns the mean of column `key` of metrics.csv over the last epoch, None if it is empty.

    rows: rows of metrics.csv.
    """
    there = [r for r in rows if key in r]
    last = [r[key] for r in there if r["epoch"] > there[-1]["epoch"] - 1]
    return sum(last) / len(last) if last else None


def brief(trial: Trial, work: Path) -> str:
    """Returns the accuracies of a finished training as one line."""
    found = result(trial, work)
    assert found is not None
    return ", ".join(
        " ".join([r["attack"], *([f"{r['eps']:.4g}"] if r["eps"] else []), f"{r['accuracy']:.1%}"])
        for r in found["accuracy"]
    )
