"""Proof that a job of several ranks survives faults and trains the same network.

    python -m benchmarks.evidence.faults  # about half an hour on two cores

Each trial trains a toy Swin on the digits on four gloo ranks under the agent of torchrun, with
`--max-restarts`, and lets one fault happen at a random moment:

- kill: SIGKILL ends one rank.
- stop: SIGSTOP stops one rank, so that the others wait until `--rank-timeout` has passed.
- shrink: one of two machines with two ranks each is lost together with its agent, under
  `--nnodes 1:2`. Two ranks train the rest with the same global batch.

A trial is lost if the job fails, and it hangs if the job has not ended after LIMIT_S seconds. Where
the number of ranks stays the same, everything that the run has written has to be the same to the
last bit as in an undisturbed run, except for the clock's columns. After a shrink, the weights have
to be the same up to rounding.

The agents are forked by a server that has imported fastgn.train, so that a start takes no imports.
Writes benchmarks/results/faults_cpu.json after each trial. The same command continues.
"""

import dataclasses
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.launcher.api import LaunchConfig, launch_agent

from benchmarks.common.arguments import RESULTS, make_parser, positive_int
from benchmarks.common.records import earlier, hold, write_record
from benchmarks.common.tables import Record, make_table, with_notes
from benchmarks.evidence.kills import contents, differences
from fastgn import train
from fastgn.checkpoint import Checkpoints, load_checkpoint
from fastgn.metrics import environment

ARGUMENTS = (
    *("--model", "swin_t", "--img-size", "16", "--model-kwargs", "patch_size=4", "embed_dim=8"),
    *("depths=(1, 1)", "num_heads=(1, 2)", "window_size=2", "--data", "digits"),
    *("--batch-size", "24", "--global-batch-size", "96", "--epochs", "2", "--warmup-epochs", "0"),
    *("--lr", "0.003", "--eval-images", "48", "--log-interval", "4", "--checkpoint-interval", "3"),
    *("--max-updates", "16", "--rank-timeout", "0.33"),
)
"""Command line of the training: 16 updates of 96 images, 14 of which are an epoch."""
DRAWS = ("--mixup", "0.8", "--cutmix", "1.0", "--reprob", "0.25", "--drop-path", "0.1")
"""Options that make each rank draw random numbers, except in the trials that lose ranks."""
ARMS = ("kill", "stop", "shrink")
"""Names of the faults."""
LIMIT_S = 600.0
"""Seconds after which a job counts as hung. Other programs may use the same cores."""
ROUNDING = 1e-4
"""Largest relative difference of weights that rounding explains."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault of one trial."""

    arm: str
    """Name of the fault, one of ARMS."""
    rank: int
    """Rank that has the fault. The second machine is lost with all its ranks."""
    after_s: float
    """Seconds from the start of the rank's training to the fault."""
    mark: str
    """File that the fault creates when it happens."""

    def happen(self) -> None:
        """Ends or stops this process, or its agent with all ranks of the machine."""
        Path(self.mark).touch()
        match self.arm:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "shrink":
                os.killpg(0, signal.SIGKILL)


def train_rank(args: Sequence[str], fault: Fault | None) -> None:
    """Trains as one rank, and lets the fault happen if it is this rank's."""
    torch.set_num_threads(1)
    rank = int(os.environ["LOCAL_RANK" if fault and fault.arm == "shrink" else "RANK"])
    if fault is not None and fault.rank == rank and not Path(fault.mark).exists():
        timer = threading.Timer(fault.after_s, fault.happen)
        timer.daemon = True
        timer.start()
    status = train.main(list(args))
    if status:
        sys.exit(status)


def run_agent(machines: int, port: int, args: Sequence[str], fault: Fault | None, log: str) -> None:
    """Runs the agent of torchrun for a machine, with all of the four ranks or with two of them."""
    os.setsid()  # a lost machine is a lost process group
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # see docs/training.md
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=machines,
        nproc_per_node=4 // machines,
        run_id="faults",
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_configs={"last_call_timeout": 5},
        max_restarts=9,
        start_method="fork",
        local_addr="127.0.0.1",
        shutdown_timeout=3,
    )
    launch_agent(config, train_rank, [args, fault])


class Job:
    """Starts jobs whose processes a server forks that has imported fastgn.train."""

    def __init__(self, work: Path):
        """Starts the server. work: folder for the runs."""
        self.work = work
        self.server = multiprocessing.get_context("forkserver")
        self.server.set_forkserver_preload(["fastgn.train"])

    def run(self, name: str, args: Sequence[str], fault: Fault | None, machines: int = 1) -> str:
        """Runs a job to its end, and returns "done", "lost" or "hung".

        name: name of the run's folder. args: arguments for fastgn.train. machines: number of
        agents.
        """
        log, folder = str(self.work / f"{name}.log"), str(self.work / name)
        port = find_free_port()
        line = (*args, "--output", folder, "--resume", "auto")
        agents = []
        for number in range(machines):
            own = fault if number == machines - 1 else None
            agent = self.server.Process(
                target=run_agent, args=(machines, port, line, own, f"{log}{number}")
            )
            agent.start()
            agents.append(agent)
            if number == 0 and machines > 1:
                wait_until(lambda: is_served(port))  # the first agent serves the store
        deadline = time.monotonic() + LIMIT_S
        for agent in agents:
            agent.join(max(deadline - time.monotonic(), 0))
        hung = any(agent.is_alive() for agent in agents)
        for agent in agents:
            if agent.is_alive():
                os.killpg(agent.pid or 0, signal.SIGKILL)
            agent.join()
        if hung:
            return "hung"
        done = (Path(folder) / "model.safetensors").exists()
        return "done" if done and any(agent.exitcode == 0 for agent in agents) else "lost"


def find_free_port() -> int:
    """Returns a port of this machine on which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def is_served(port: int) -> bool:
    """Returns whether something listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(ready: Callable[[], bool]) -> None:
    """Waits until a condition holds, or for a minute."""
    deadline = time.monotonic() + 60
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.02)


def compare_weights(folder: Path, other: Path) -> float:
    """Returns the difference of two runs' weights, relative to the second run's."""
    flat = []
    for run in (folder, other):
        last = Checkpoints(run, 1).last()
        assert last is not None, f"{run} has no checkpoint"
        flat.append(torch.cat([w.double().flatten() for w in load_checkpoint(last).model.values()]))
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def run_trial(job: Job, arm: str, number: int, life_s: float, seed: int) -> dict[str, Any]:
    """Runs a trial and returns its row of the record.

    life_s: seconds that a rank of an undisturbed run trains. The fault comes within them. If the
    run is faster, the trial is repeated with an earlier fault.
    """
    draw = random.Random(f"{seed} {arm} {number}")
    machines, args = (2, ARGUMENTS) if arm == "shrink" else (1, (*ARGUMENTS, *DRAWS))
    rank, after_s = draw.randrange(4), draw.uniform(0, life_s)
    if arm == "shrink":
        rank = 0
    for attempt in range(6):
        name = f"{arm}{number}_{attempt}"
        mark = job.work / f"{name}.mark"
        began = time.monotonic()
        ended = job.run(name, args, Fault(arm, rank, after_s, str(mark)), machines)
        if mark.exists():
            break
        after_s /= 2
    row: dict[str, Any] = {"arm": arm, "trial": number, "rank": rank, "after_s": after_s}
    row |= {"ended": ended, "seconds": time.monotonic() - began, "happened": mark.exists()}
    unbroken, folder = job.work / f"unbroken{machines}", job.work / name
    if ended == "done" and arm == "shrink":
        row["weights"] = compare_weights(folder, unbroken)
    elif ended == "done":
        row["different"] = differences(contents(folder), contents(unbroken))
    return row


def study(
    work: Path, trials: int, seed: int, record: dict[str, Any], save: Callable[[], object]
) -> None:
    """Runs the trials that are missing in a record.

    work: folder for the runs. trials: number of trials for each fault. save: called after each
    trial.
    """
    job = Job(work)
    rows: list[dict[str, Any]] = record["trials"]
    there = {(row["arm"], row["trial"]) for row in rows}
    missing = [(a, n) for a in ARMS for n in range(trials) if (a, n) not in there]
    lives: dict[int, float] = {}
    for machines, more in ((1, DRAWS), (2, ())):
        if any((arm == "shrink") == (machines == 2) for arm, _ in missing):
            job.run("warm-up", [*ARGUMENTS, "--max-updates", "1"], None)
            began = time.monotonic()
            ended = job.run(f"unbroken{machines}", (*ARGUMENTS, *more), None, machines)
            assert ended == "done", (work / f"unbroken{machines}.log0").read_text()
            lives[machines] = time.monotonic() - began
    for arm, number in missing:
        rows.append(run_trial(job, arm, number, lives[2 if arm == "shrink" else 1], seed))
        save()
        print(rows[-1], file=sys.stderr, flush=True)


def is_sound(row: Record) -> bool:
    """Returns whether a trial's job has ended with the network of an undisturbed run."""
    same = not row.get("different") and row.get("weights", 0.0) < ROUNDING
    return bool(row["ended"] == "done" and row["happened"] and same)


def table(record: Record) -> str:
    """Returns this benchmark's Markdown table, made from its JSON record.

    It says for each fault how many jobs were lost or hung, and how many results differed.
    """
    columns: dict[str, Callable[[str], str]] = {
        "fault": lambda arm: arm,
        "trials": lambda arm: str(len(of(arm))),
        "lost": lambda arm: str(sum(row["ended"] == "lost" for row in of(arm))),
        "hung": lambda arm: str(sum(row["ended"] == "hung" for row in of(arm))),
        "another result": lambda arm: str(
            sum(row["ended"] == "done" and not is_sound(row) for row in of(arm))
        ),
        "largest difference of weights": lambda arm: (
            f"{max(row.get('weights', 0.0) for row in of(arm)):.1g}"
        ),
    }

    def of(arm: str) -> list[Record]:
        return [row for row in record["trials"] if row["arm"] == arm]

    return with_notes(make_table([arm for arm in ARMS if of(arm)], columns), record)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and writes its JSON record.

    Returns 1 if a job was lost or hung, or trained another network, else 0.
    """
    parser = make_parser(__doc__)
    parser.add_argument("--trials", type=positive_int, default=20, help="trials for each fault")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.set_defaults(output=RESULTS / "faults_cpu.json")
    args = parser.parse_args(argv)
    hold(args.output)
    before = earlier(args.output)
    known = before.get("trials", []) if before.get("seed") == args.seed else []
    record: dict[str, Any] = {"complete": False, "seed": args.seed, "trials": known}
    record |= {"arguments": list(ARGUMENTS), "draws": list(DRAWS), "file": args.output.name}
    record |= environment()
    with tempfile.TemporaryDirectory() as folder:
        study(
            Path(folder), args.trials, args.seed, record, lambda: write_record(args.output, record)
        )
    record["complete"] = True
    path = write_record(args.output, record)
    print(f"{table(record)}\n-> {path}")
    return int(not all(map(is_sound, record["trials"])))


if __name__ == "__main__":
    sys.exit(main())
