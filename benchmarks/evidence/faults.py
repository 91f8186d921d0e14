"""Checks that a training survives faults, and that its weights are the same as without them.

    python -m benchmarks.evidence.faults  # about an hour on two cores

Each trial trains a toy Swin on the digits, with a checkpoint after every third update, and lets a
fault happen at a random moment:

- kill: SIGKILL ends one of four gloo ranks under the agent of torchrun, with `--max-restarts`.
- stop: SIGSTOP stops one of four ranks, so that the others wait until `--rank-timeout` has passed.
- memory: on one of four ranks, one operator of a random update raises an out-of-memory error. All
  ranks repeat the update in halved micro-batches.
- shrink: one of two machines with two ranks each is lost together with its agent, under
  `--nnodes 1:2`. Two ranks train the rest with the same global batch.

A trial is lost if the job fails, and it hangs if the job has not ended after LIMIT_S seconds. If
the number of ranks stays the same, all files must be the same to the last bit as those of an
undisturbed run, except for the columns of metrics.csv that hold times. Halved micro-batches round
differently. Therefore a run of `memory` is compared with one in which the same operator raises the
error on all ranks. After `shrink`, the weights must be the same up to rounding.

A server imports all modules once and forks the processes, so that they start fast.
Writes benchmarks/results/faults_cpu.json after each trial. The same command continues.
"""

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.distributed.launcher.api import LaunchConfig, launch_agent
from torch.multiprocessing import ProcessContext
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common.arguments import finish, open_record, option, program
from benchmarks.common.records import taken_over, write_record
from benchmarks.common.tables import Record, make_table, with_notes
from fastgn import train
from fastgn.checkpoint import Checkpoints, load_checkpoint
from fastgn.metrics import read_rows
from fastgn.step.step import Step

ARGUMENTS = (
    *("--model", "swin_t", "--img-size", "16", "--model-kwargs", "patch_size=4", "embed_dim=8"),
    *("depths=(1, 1)", "num_heads=(1, 2)", "window_size=2", "--data", "digits"),
    *("--batch-size", "24", "--global-batch-size", "96", "--epochs", "2", "--warmup-epochs", "0"),
    *("--lr", "0.003", "--eval-images", "48", "--log-interval", "4", "--checkpoint-interval", "3"),
    *("--max-updates", "16"),
)
"""Command line of the training: 16 updates of 96 images. An epoch has 14 updates, a log row 4, and
a checkpoint follows every third update, so they end at different updates."""
DRAWS = ("--mixup", "0.8", "--cutmix", "1.0", "--reprob", "0.25", "--drop-path", "0.1")
"""Options that make each rank draw random numbers. The trials of `shrink` do not use them."""
UPDATES, OPERATORS, LAST = 16, 1300, "update_00000016"
"""Number of updates, number of PyTorch operators in an update (at least), and name of the last
checkpoint."""
ARMS = {"kill": 1, "stop": 1, "memory": 1, "shrink": 2}
"""Name of a fault -> number of agents of torchrun. Each stands for a machine."""
IMPORTS = (
    *("fastgn.train", "sklearn.datasets", "torch.distributed.launcher.api"),
    "torch.utils.tensorboard",
)
"""Modules that the server imports before it forks the processes of a training."""
LIMIT_S = 1800.0
"""Seconds after which a job counts as hung. A job takes 10 s, or minutes on a busy machine."""
ROUNDING = 1e-4
"""Largest relative difference between the weights of two runs that rounding explains."""
STATE = ("update", "best", "accuracy", "sums", "summed", "model", "ema", "optimizer")
"""Keys of a checkpoint that faults must not change."""
CLOCK = ("images_per_s", "data_wait_share", "seconds")
"""Columns of metrics.csv that depend on the machine's speed and are therefore not compared."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault that this benchmark causes in a job with several ranks, such as a killed rank."""

    arm: str
    """Name of the fault, one of ARMS."""
    rank: int | None
    """Rank that has the fault. None means all ranks."""
    moment: dict[str, Any]
    """When the fault happens: {"after_s": [seconds after the start of the rank's training]}, or
    {"update": index of an update, "operator": index of an operator in this update}."""

    def prepare(self, folder: Path) -> None:
        """Prepares the fault if this rank has it, and if the run in `folder` has not had it yet."""
        rank = int(os.environ["LOCAL_RANK" if self.arm == "shrink" else "RANK"])
        if self.rank is not None and (self.rank != rank or mark_of(folder).exists()):
            return
        if self.arm != "memory":
            timer = threading.Timer(self.moment["after_s"][0], self.happen, [folder])
            timer.daemon = True
            timer.start()
            return
        compute = Step.__call__

        def compute_once(step: Step, batches: Any, ramp: Any, update: int, *rest: Any) -> Any:
            if update != self.moment["update"]:
                return compute(step, batches, ramp, update, *rest)
            Step.__call__ = compute  # type: ignore[method-assign]
            with NoMemory(self.moment["operator"], mark_of(folder)):
                return compute(step, batches, ramp, update, *rest)

        Step.__call__ = compute_once  # type: ignore[assignment,method-assign]

    def happen(self, folder: Path) -> None:
        """Makes the fault happen, with a signal to this process.

        For `shrink`, all processes of the simulated machine are killed. folder: the run's folder.
        """
        mark_of(folder).write_text(describe(folder))
        if self.arm == "shrink":
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGSTOP if self.arm == "stop" else signal.SIGKILL)


class NoMemory(TorchDispatchMode):
    """Raises an out-of-memory error in one operator of this thread, as if memory were full."""

    def __init__(self, operator: int, mark: Path):
        """Sets which operator raises the error.

        operator: its index, from 0 when the mode begins. mark: file for the operator's name.
        """
        super().__init__()
        self.left, self.mark = operator, mark

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator, but raises torch.OutOfMemoryError if it is the chosen one."""
        self.left -= 1
        if self.left < 0:
            turn = "forward" if torch._C._current_graph_task_id() < 0 else "backward"
            self.mark.write_text(f"{turn}: {func}")
            raise torch.OutOfMemoryError(f"out of memory in {func}")
        return func(*args, **(kwargs or {}))


def mark_of(folder: Path) -> Path:
    """Returns the path of the file in which a fault records what the run was doing at the time."""
    return folder.with_suffix(".mark")


def describe(folder: Path) -> str:
    """Returns what a run is doing, such as "training", as the files in its folder show."""
    checkpoints = Checkpoints(folder, 1)
    if any(checkpoints.folder.glob(".*.tmp")):
        return "writing a checkpoint"
    if not (folder / "config.toml").exists():
        return "starting"
    return "finishing" if (checkpoints.folder / f"{LAST}.pt").exists() else "training"


def train_rank(folder: Path, agents: int, fault: Fault | None) -> None:
    """Trains as one rank of a job.

    folder: the run's folder. agents: number of torchrun's agents. fault: fault of the job, which
    happens if it is for this rank. None means no fault.
    """
    torch.set_num_threads(1)
    if fault is not None:
        fault.prepare(folder)
    args = [*ARGUMENTS, *(() if agents == 2 else DRAWS), "--output", str(folder)]
    if agents == 2 or (fault is not None and fault.arm == "stop"):
        args += [
            "--rank-timeout",
            "0.12",
        ]  # minutes, about 7 s: a busy machine is slow
    status = train.main([*args, "--resume", "auto"])
    if status:
        sys.exit(status)


def run_agent(number: int, agents: int, port: int, folder: Path, fault: Fault | None) -> None:
    """Runs agent `number` of torchrun with its share of 4 ranks."""
    os.setsid()  # makes a process group, which stands for a machine that can be killed
    log = os.open(folder.with_suffix(f".log{number}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # see docs/training.md
    # torch would wait for 30 seconds until it ends a rank that SIGSTOP has stopped
    ProcessContext.join.__defaults__ = (None, 1.0)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=agents,
        nproc_per_node=4 // agents,
        run_id="faults",
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_configs={"last_call_timeout": 3, "is_host": number == 0},
        max_restarts=9,
        start_method="fork",
        local_addr="127.0.0.1",
        shutdown_timeout=1,
    )
    launch_agent(config, train_rank, [folder, agents, fault if number == agents - 1 else None])


def run_job(folder: Path, agents: int, fault: Fault | None = None) -> str:
    """Runs a job to its end. Returns "done", "lost" if the job failed, or "hung" after LIMIT_S.

    folder: the run's folder. agents: number of torchrun's agents. fault: fault that happens in the
    job.
    """
    server, deadline = multiprocessing.get_context("forkserver"), time.monotonic() + LIMIT_S
    server.set_forkserver_preload(list(IMPORTS))
    port = get_free_port()
    processes = [
        server.Process(target=run_agent, args=(number, agents, port, folder, fault))
        for number in range(agents)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
    hung = any(process.is_alive() for process in processes)
    for process in processes:
        if process.is_alive():
            with contextlib.suppress(ProcessLookupError):  # if it has no process group yet
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.kill()
        process.join()
    if hung:
        return "hung"
    done = (folder / "model.safetensors").exists()
    return "done" if done and any(process.exitcode == 0 for process in processes) else "lost"


def contents(folder: Path) -> dict[str, Any]:
    """Returns everything that a finished run has written and that faults must not change.

    The keys are paths to the values, such as "/best/model/head.weight".
    """
    checkpoints = folder / "checkpoints"
    rows = read_rows(folder / "metrics.csv")
    found: dict[str, Any] = {
        "metrics": [{k: v for k, v in row.items() if k not in CLOCK} for row in rows],
        "export": load_file(folder / "model.safetensors"),
        "files": [sorted(path.name for path in f.iterdir()) for f in (folder, checkpoints)],
    }
    for name in ("best", LAST):
        state = load_checkpoint(checkpoints / f"{name}.pt")
        found[name] = {key: getattr(state, key) for key in STATE}
    return flatten(found)


def flatten(value: Any, place: str = "") -> dict[str, Any]:
    """Returns path -> value for nested dictionaries and lists. A path is such as "/best/ema/0"."""
    if not isinstance(value, (dict, list)):
        return {place: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, part in items for k, v in flatten(part, f"{place}/{key}").items()}


def differences(mine: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Returns the keys whose values in two results of `contents` differ in at least one bit."""

    def exact(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.dtype, value.shape, value.numpy().tobytes()
        return repr(value)

    return sorted(k for k in {**mine, **other} if exact(mine.get(k)) != exact(other.get(k)))


def compare_weights(mine: dict[str, Any], other: dict[str, Any]) -> float:
    """Compares the last weights in two results of `contents`.

    Returns the L2 norm of their difference, divided by that of the second weights.
    """
    names = [place for place in other if place.startswith(f"/{LAST}/model/")]
    a, b = (torch.cat([c[name].double().flatten() for name in names]) for c in (mine, other))
    return float((a - b).norm() / b.norm())


def run_trial(work: Path, arm: str, number: int, usual_s: dict[int, float], seed: int) -> Record:
    """Runs one trial of a fault and returns its entry for the JSON record.

    The trial is repeated if its run ends before the fault. work: folder for the runs. arm: name of
    the fault. number: index of the trial. usual_s: number of agents -> seconds of an undisturbed
    run, in which the fault must happen. seed: seed of the fault's moment.
    """
    draw, agents = random.Random(f"{seed} {arm} {number}"), ARMS[arm]
    for attempt in range(9):
        folder, began = work / f"{arm}{number}_{attempt}", time.monotonic()
        moment: dict[str, Any] = {"after_s": [draw.uniform(0, usual_s[agents])]}
        if arm == "memory":
            moment = {"update": draw.randrange(UPDATES), "operator": draw.randrange(OPERATORS)}
        fault = Fault(arm, draw.randrange(4) if agents == 1 else 0, moment)
        ended, mark = run_job(folder, agents, fault), mark_of(folder)
        places = [mark.read_text()] if mark.exists() else []
        seconds = time.monotonic() - began
        if not places or arm == "memory":
            usual_s[agents] = seconds  # other programs may have made this machine slower
        if places:
            break
    row = {"arm": arm, "trial": number, "rank": fault.rank, **moment, "places": places}
    row |= {"ended": ended, "seconds": seconds}
    unbroken = work / f"unbroken{agents}"
    if arm == "memory" and ended == "done":
        unbroken = work / f"{folder.name}_all"
        row["ended"] = run_job(unbroken, agents, dataclasses.replace(fault, rank=None))
    if row["ended"] == "done":
        mine, other = contents(folder), contents(unbroken)
        row["different"] = [] if arm == "shrink" else differences(mine, other)
        row["weights"] = compare_weights(mine, other)
    return row


def study(work: Path, trials: int, seed: int, record: Record, save: Callable[[], object]) -> None:
    """Runs the trials that are missing in a JSON record, and adds them to it.

    work: folder for the runs. trials: number of trials for each fault. save: called after each
    trial.
    """
    rows: list[Record] = record["trials"]
    there = {(row["arm"], row["trial"]) for row in rows}
    usual_s: dict[int, float] = {}
    for arm, number in ((a, n) for n in range(trials) for a in ARMS if (a, n) not in there):
        agents = ARMS[arm]
        if not usual_s:
            run_job(work / "warm-up", 1)  # starts the server, which imports its modules
        if agents not in usual_s:
            began = time.monotonic()
            assert run_job(work / f"unbroken{agents}", agents) == "done", f"see {work}"
            usual_s[agents] = time.monotonic() - began
        rows.append(run_trial(work, arm, number, usual_s, seed))
        save()
        print(rows[-1], file=sys.stderr, flush=True)


def is_sound(row: Record) -> bool:
    """Returns whether a trial had a fault, and still the results of an undisturbed run."""
    same = not row.get("different") and row.get("weights", 0.0) < ROUNDING
    return bool(row["ended"] == "done" and row["places"] and same)


def table(record: Record) -> str:
    """Returns this benchmark's Markdown table, made from its JSON record.

    It says for each fault how many jobs were lost or hung, how many results differed, and what the
    runs were doing when the faults happened.
    """

    def of(arm: str) -> list[Record]:
        return [row for row in record["trials"] if row["arm"] == arm]

    def places(arm: str) -> list[str]:
        return [place.partition(":")[0] for row in of(arm) for place in row["places"]]

    def count(wanted: Callable[[Record], bool]) -> Callable[[str], str]:
        return lambda arm: str(sum(map(wanted, of(arm))))

    columns: dict[str, Callable[[str], str]] = {
        "fault": lambda arm: arm,
        "trials": count(lambda row: True),
        "faults": lambda arm: str(len(places(arm))),
        "lost": count(lambda row: row["ended"] == "lost"),
        "hung": count(lambda row: row["ended"] == "hung"),
        "another result": count(lambda row: row["ended"] == "done" and not is_sound(row)),
        "largest difference of weights": lambda arm: (
            f"{max(row.get('weights', 0.0) for row in of(arm)):.1g}"
        ),
        "what the run was doing": lambda arm: ", ".join(
            f"{place} {n}" for place, n in Counter(places(arm)).most_common()
        ),
    }
    arms = list(dict.fromkeys(row["arm"] for row in record["trials"]))
    return with_notes(make_table(arms, columns), record)


@program(
    option("--trials", default=20, help="trials for each fault"),
    option("--seed", default=0, type=int, help="seed of the faults' moments"),
)
def main(args: argparse.Namespace) -> int:
    """Runs the trials that are missing in the JSON record. Writes the record after each trial.

    Returns 1 if a job was lost, hung, or had other results than an undisturbed run, else 0.
    """
    output, head = open_record(args, "faults_cpu.json")
    same = {"seed": args.seed, "arguments": list(ARGUMENTS), "draws": list(DRAWS)}
    record = {"complete": False, "trials": taken_over(output, same).get("trials", [])} | same | head
    with tempfile.TemporaryDirectory() as work:
        study(Path(work), args.trials, args.seed, record, lambda: write_record(output, record))
    finish(output, record | {"complete": True}, table)
    return int(not all(map(is_sound, record["trials"])))


if __name__ == "__main__":
    sys.exit(main())
