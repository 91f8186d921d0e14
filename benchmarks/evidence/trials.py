"""Trainings with their evaluations, each made once: what is finished is found again by all that it
depends on, what was stopped goes on. By fastgn.train and fastgn.evaluate themselves."""

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

from benchmarks.common.arguments import ROOT, positive_float, positive_int
from benchmarks.common.energy import Meter, NoMeterError
from fastgn import evaluate, train
from fastgn.config import Config
from fastgn.files import write_bytes, write_json
from fastgn.lock import lock_folder
from fastgn.metrics import read_rows

LOCAL = ("output", "initial_checkpoint", "resume")
"""Where things lie, which decides nothing."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """A training, from the weights of another or from scratch, and its evaluations."""

    name: str
    cfg: Config
    evaluations: tuple[tuple[str, ...], ...] = ()
    """fastgn.evaluate's flags, without --checkpoint and --output; a file each."""
    start: "Trial | None" = None

    @property
    def key(self) -> str:
        """The folder's name: of the trial and what its weights depend on, but for the code."""
        values = {k: v for k, v in self.cfg.flat().items() if k not in LOCAL}
        content = [values, self.start.key if self.start else None]
        return f"{self.name}_{digest(content)}"


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


class Stopped(Exception):  # noqa: N818 - no error
    """The time is over, or the user wants no more: the same call goes on."""


class Failed(Exception):  # noqa: N818 - one arm's end, not the study's
    """What the training or evaluation said."""


def evaluation_file(trial: Trial, folder: Path, flags: Sequence[str]) -> Path:
    # a list of images has a name that says all
    content = [Path(f).name if f.endswith(".txt") else f for f in flags]
    return folder / f"evaluation_{digest(content)}.json"


def missing(trial: Trial, work: Path) -> bool:
    """Whether anything of a trial is left to do."""
    folder = work / trial.key
    files = [folder / "model.safetensors"]
    files += [evaluation_file(trial, folder, flags) for flags in trial.evaluations]
    return not (folder / "failed.json").exists() and not all(f.exists() for f in files)


def run_trial(trial: Trial, work: Path, deadline: float) -> str | None:
    """What is left of a trial; its failure in a line, or None. Raises Stopped.

    deadline: by time.time().
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
    except (Failed, RuntimeError) as error:  # one arm's end: the same call would fail again
        line = " ".join((str(error) or type(error).__name__).split())[:300]
        write_json(folder / "failed.json", {"failed": line})
        return line
    finally:
        torch.compiler.reset()  # of one model; a process makes dozens
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return None


def run_training(trial: Trial, work: Path, folder: Path) -> None:
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
    output = evaluation_file(trial, folder, flags)
    if output.exists():
        return
    code = evaluate.main(["--checkpoint", str(folder), "--output", str(output), *flags])
    if code == 130:
        raise Stopped
    if code:
        raise Failed(last_line(folder / "log.txt"))


def last_line(log: Path) -> str:
    lines = log.read_text().strip().splitlines()
    return lines[-1] if lines else "no message"


@contextlib.contextmanager
def until(deadline: float) -> Iterator[None]:
    """Interrupts the block as Ctrl-C would, when the time is over: a training saves first."""
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every script of trials."""
    add = parser.add_argument
    add("--data-dir", help="CIFAR-10's, as fastgn.train takes it")
    add("--minutes", type=positive_float, default=1e6, help="then it stops; the same call goes on")
    add("--processes", type=positive_int, default=1 if torch.cuda.is_available() else 2)
    add("--work", type=Path, help="where finished trainings are kept; default: below runs/")
    add("--smoke", action="store_true", help="toy sizes and APGD-CE alone, to see that it runs")
    add("--output", type=Path, help="JSON")


def work_folder(args: argparse.Namespace, script: str) -> Path:
    name = f"{script}_{args.data}{'_smoke' if args.smoke else ''}"
    return (args.work or ROOT / "runs" / name).absolute()


def device_precision() -> str:
    """bf16 where the GPU has it."""
    modern = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return "bf16" if modern else "fp32"


def one_thread() -> None:
    torch.set_num_threads(1)


def run_all(
    trials: Sequence[Trial],
    work: Path,
    *,
    processes: int,
    deadline: float = float("inf"),
    said: Callable[[str], None] = print,
) -> bool:
    """What is left of all trials, so many at a time; False where the time was over before. Raises
    UserError where another process is at work in the folder."""
    with lock_folder(work, f"--work {work}"):
        return _run_all(trials, work, processes, deadline, said)


def _run_all(
    trials: Sequence[Trial],
    work: Path,
    processes: int,
    deadline: float,
    said: Callable[[str], None],
) -> bool:
    left = [t for t in {t.key: t for t in trials}.values() if missing(t, work)]
    stopped = False
    with tqdm(total=len(left), unit="trial", disable=None) as bar:

        def done(trial: Trial, failure: str | None) -> None:
            bar.update()
            said(f"{trial.name}: {f'failed: {failure}' if failure else brief(trial, work)}")

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
            except KeyboardInterrupt:  # the workers have had it, too
                pool.shutdown(wait=True, cancel_futures=True)
                return False
    return not stopped


def result(trial: Trial, work: Path) -> dict[str, Any] | None:
    """What a finished training and its evaluations until now have given; None before that."""
    folder = work / trial.key
    if (folder / "failed.json").exists():
        return json.loads((folder / "failed.json").read_text())
    if not (folder / "model.safetensors").exists():
        return None
    rows = read_rows(folder / "metrics.csv")
    there = folder / "cost.json"
    cost = json.loads(there.read_text()) if there.exists() else []  # a kill may have come before it
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
    """Over the last epoch's rows of metrics.csv."""
    there = [r for r in rows if key in r]
    last = [r[key] for r in there if r["epoch"] > there[-1]["epoch"] - 1]
    return sum(last) / len(last) if last else None


def brief(trial: Trial, work: Path) -> str:
    """A finished trial's accuracies in a line."""
    found = result(trial, work)
    assert found is not None
    return ", ".join(
        " ".join([r["attack"], *([f"{r['eps']:.4g}"] if r["eps"] else []), f"{r['accuracy']:.1%}"])
        for r in found["accuracy"]
    )
