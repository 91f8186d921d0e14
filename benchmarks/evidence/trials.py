"""Runs trials. A trial is one training by fastgn.train and its evaluations by fastgn.evaluate.

The folder of a trial is named after everything that the trial's weights depend on. So a later call
finds a finished trial, which never runs again, and continues an interrupted one.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence.digests import digest, digests_of
from fastgn import evaluate, train
from fastgn.config import Config
from fastgn.files import write_bytes, write_json
from fastgn.interrupt import STOPPED
from fastgn.metrics import read_rows


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training and its evaluations. The training starts from the weights of another trial, or
    from random weights."""

    name: str
    cfg: Config
    evaluations: tuple[tuple[str, ...], ...] = ()
    """Command-line flags of each evaluation by fastgn.evaluate, without --checkpoint and
    --output."""
    start: "Trial | None" = None
    wave: int = 0
    """A study runs the trials of wave 0 first, then those of wave 1, and so on."""

    @property
    def seed(self) -> int:
        """Seed of the training."""
        return self.cfg.run.seed

    @functools.cached_property
    def weights_made_by(self) -> dict[str, str]:
        """Digests of what the weights depend on: network, objective and training."""
        found = digests_of(self.cfg)
        start = self.start.weights_made_by if self.start else None
        return found | {"training": digest([found["training"], start])}

    @property
    def made_by(self) -> dict[str, str]:
        """Digests of what the results depend on: network, objective, training and evaluation."""
        return self.weights_made_by | {"evaluation": digest(self.evaluations)}

    @property
    def key(self) -> str:
        """Name of the training's folder: the trial's name, and a digest of `weights_made_by`."""
        return f"{self.name}_{digest(self.weights_made_by)}"


HISTORY = {
    **{"epoch": "epoch", "clean": "clean_accuracy", "pgd10": "pgd10_accuracy"},
    **{"ce": "ce", "penalty": "penalty"},
}
"""Key in a training's "history" in the JSON record -> column of its metrics.csv."""


class Stopped(Exception):  # noqa: N818 - not an error
    """The time limit is over, or the user pressed Ctrl-C. The same command continues."""


class Failed(Exception):  # noqa: N818 - the other trials go on
    """A training or evaluation failed. The message is one line."""


def evaluation_file(folder: Path, flags: Sequence[str]) -> Path:
    """Returns the path of the JSON file with an evaluation's results.

    folder: output folder of the training. flags: the evaluation's command-line flags.
    """
    return folder / f"evaluation_{digest(flags)}.json"


def missing(trial: Trial, work: Path) -> bool:
    """Returns whether the trial's training, or one of its evaluations, is not finished.

    work: folder that holds all trainings.
    """
    folder = work / trial.key
    files = [folder / "model.safetensors"]
    files += [evaluation_file(folder, flags) for flags in trial.evaluations]
    return not (folder / "failed.json").exists() and not all(f.exists() for f in files)


def run_trial(trial: Trial, work: Path, deadline: float) -> str | None:
    """Runs the training of a trial and its evaluations, except for those that are finished.

    Returns None, or one line that says what has failed. Raises Stopped when the time is over.

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
                    run_evaluation(folder, flags)
    except KeyboardInterrupt:
        raise Stopped from None
    except (Failed, RuntimeError) as error:  # saved, so that later calls skip this trial
        line = " ".join((str(error) or type(error).__name__).split())[:300]
        write_json(folder / "failed.json", {"failed": line})
        return line
    finally:
        torch.compiler.reset()  # frees compiled code, because a process trains dozens of models
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return None


def run_training(trial: Trial, work: Path, folder: Path) -> None:
    """Runs or continues the training of a trial. folder: its output folder, below `work`."""
    values = {"output": str(folder)}
    if trial.start is not None:
        values["initial_checkpoint"] = str(work / trial.start.key)
    recipe = folder / "recipe.toml"
    write_bytes(recipe, trial.cfg.replace(**values).to_toml())
    check_status(train.main(["--recipe", str(recipe), "--resume", "auto"]), folder)


def run_evaluation(folder: Path, flags: Sequence[str]) -> None:
    """Evaluates a trained model, unless that is done already. flags: flags of fastgn.evaluate."""
    output = evaluation_file(folder, flags)
    if not output.exists():
        files = ("--checkpoint", str(folder), "--output", str(output))
        check_status(evaluate.main([*files, *flags]), folder)


def check_status(code: int, folder: Path) -> None:
    """Raises Stopped if the exit status `code` says so, and Failed for any other error."""
    if code in (STOPPED, 130):
        raise Stopped
    if code:
        lines = (folder / "log.txt").read_text().strip().splitlines()
        raise Failed(lines[-1] if lines else "no message")


@contextlib.contextmanager
def until(deadline: float) -> Iterator[None]:
    """Raises KeyboardInterrupt in the with block at a given time, as Ctrl-C does.

    A training therefore saves a checkpoint before it ends. deadline: the given time, in seconds as
    time.time() gives.
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


def run_all(
    trials: Sequence[Trial],
    work: Path,
    *,
    processes: int,
    deadline: float,
    save: Callable[[], None] = lambda: None,
) -> bool:
    """Runs all trials, and before them the trainings (starts) from whose weights they start.

    Returns False if the time was over. With one process, each start is trained right before the
    first trial that needs it, so that some results are complete if the time is short. With several
    processes, all starts are trained first.

    work: folder that holds all trainings. deadline: latest time, in seconds as time.time() gives.
    save: function that is called after each training.
    """
    stages = [[t.start for t in trials if t.start is not None], trials]
    if processes == 1:
        stages = [[t for trial in trials for t in (trial.start, trial) if t is not None]]
    for stage in stages:
        left = [t for t in {t.key: t for t in stage}.values() if missing(t, work)]
        try:
            for trial, failure in outcomes(left, work, processes, deadline):
                print(f"{trial.name}: {f'failed: {failure}' if failure else 'finished'}")
                save()
        except Stopped:
            return False
    return True


def outcomes(
    trials: Sequence[Trial], work: Path, processes: int, deadline: float
) -> Iterator[tuple[Trial, str | None]]:
    """Runs trials, `processes` at a time, and yields each trial and its failure when it has ended.

    The failure is one line, or None if the trial has succeeded. Raises Stopped if the time is over.
    """
    if processes == 1:
        for trial in trials:
            yield trial, run_trial(trial, work, deadline)
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # as in `make train`
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        processes, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures = {pool.submit(run_trial, t, work, deadline): t for t in trials}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        except (KeyboardInterrupt, Stopped):  # the workers were interrupted, too, and end soon
            pool.shutdown(wait=True, cancel_futures=True)
            raise Stopped from None


def result(trial: Trial, work: Path) -> dict[str, Any] | None:
    """Returns the results of a training and of its evaluations, for the JSON record.

    Returns None if one of them is not finished. If the training failed, the key "failed" holds the
    message.
    """
    if missing(trial, work):
        return None
    folder = work / trial.key
    if (folder / "failed.json").exists():
        return json.loads((folder / "failed.json").read_text())
    rows = read_rows(folder / "metrics.csv")
    models = [
        model
        for flags in trial.evaluations
        for model in json.loads(evaluation_file(folder, flags).read_text())["models"]
    ]
    return {
        "failed": None,
        "history": [
            {name: r[key] for name, key in HISTORY.items() if key in r}
            for r in rows
            if "clean_accuracy" in r
        ],
        "accuracy": [
            {k: row[k] for k in ("attack", "eps", "accuracy")} | {"images": model["images"]}
            for model in models
            for row in model["results"]
            if row["attack"] != "worst case"
        ],
    }
