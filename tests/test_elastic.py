"""A run that goes on with another number of ranks has the same images in each update."""

import os
import re
import signal
import subprocess
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from support.processes import TORCHRUN, free_port
from support.runs import tiny_run
from support.states import read_state

from fastgn import train
from fastgn.checkpoint import Checkpoints, find_checkpoint
from fastgn.config.cli import parse_config
from fastgn.data.datasets import load_dataset
from fastgn.data.loader import build_loader
from fastgn.distributed import World
from fastgn.errors import UserError
from fastgn.resolved import Batching, batch_images
from fastgn.state import TrainState

CPU = torch.device("cpu")


def batching_of(ranks: int, flags: str, state: TrainState | None = None) -> Batching:
    """How a run on the digits is divided."""
    cfg = parse_config(["--data", "digits", *flags.split()])
    return batch_images(cfg, load_dataset(cfg.dataset), World(0, ranks, CPU), state)


def saved(ranks: int, flags: str) -> TrainState:
    """The checkpoint of such a run, without its weights."""
    cfg = parse_config(["--data", "digits", *flags.split()])
    state = TrainState.__new__(TrainState)
    state.__dict__.update(
        config=cfg.to_toml(), ranks=ranks, global_batch=batching_of(ranks, flags).global_batch
    )
    return state


@pytest.mark.parametrize(
    ("before", "flags", "after", "expected"),
    [
        (2, "--batch-size 24", 1, (24, 2)),
        (1, "--batch-size 24 --grad-accum-steps 2", 2, (24, 1)),
        (1, "--batch-size 48", 2, (24, 1)),
        (3, "--batch-size 24", 2, (18, 2)),
        (3, "--batch-size 24 --grad-accum-steps 2", 4, (18, 2)),
        (4, "", 1, (8, 4)),
        (2, "--batch-size 25", 5, (10, 1)),
        (2, "--batch-size 30 --mixup 0.8", 3, (20, 1)),
        (2, "--batch-size 18 --mixup 0.8", 3, (12, 1)),
        (5, "--batch-size 6 --mixup 0.8", 3, (2, 5)),
        (2, "--batch-size 24 --schedule subset --subset-fraction 0.25", 3, (16, 1)),
        (8, "--global-batch-size 48", 1, (48, 1)),
        (1, "--global-batch-size 48 --batch-size 24", 4, (12, 1)),
        (2, "--batch-size 24 --schedule auto", 1, (48, 1)),
        (2, "--batch-size 24", 2, (24, 1)),
    ],
)
def test_the_global_batch_stays(
    before: int, flags: str, after: int, expected: tuple[int, int]
) -> None:
    state = saved(before, flags)
    batching = batching_of(after, flags, state)
    assert (batching.batch_size, batching.grad_accum_steps) == expected
    assert batching.global_batch == state.global_batch
    # and at the next start, with the same options, of as many ranks
    state.__dict__["ranks"] = after
    assert batching_of(after, flags, state) == batching


def test_options_decide_where_they_have_changed() -> None:
    """The refusal of another global batch is in test_resume.py."""
    state = saved(2, "--batch-size 24")
    assert batching_of(1, "--batch-size 12", state) == Batching(12, 4, 1)
    assert batching_of(2, "--batch-size 12", state) == Batching(12, 1, 2)
    assert batching_of(1, "--batch-size 24 --global-batch-size 96", state) == Batching(24, 4, 1)
    assert batching_of(1, "--batch-size 24") == Batching(24, 1, 1)


@pytest.mark.parametrize(
    ("before", "flags", "after", "said"),
    [
        (2, "--batch-size 24", 5, "48 images cannot be divided among 5 ranks in micro-batches"),
        (2, "--batch-size 3", 2, ""),
        (6, "--batch-size 1", 3, ""),
        (5, "--batch-size 2 --mixup 0.8", 2, "10 images cannot be divided among 2 ranks"),
    ],
)
def test_what_does_not_divide_is_refused(before: int, flags: str, after: int, said: str) -> None:
    state = saved(before, flags)
    if not said:
        assert batching_of(after, flags, state).global_batch == state.global_batch
        return
    with pytest.raises(UserError, match=said):
        batching_of(after, flags, state)


@pytest.mark.parametrize("loader", ["device", "torch"])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_each_update_has_the_same_images_in_the_same_order(loader: str, after: int) -> None:
    flags = f"--batch-size 12 --img-size 16 --loader {loader} --workers 0 --grad-accum-steps 2"
    cfg = parse_config(["--data", "digits", *flags.split()])
    dataset, state = load_dataset(cfg.dataset), saved(3, flags)

    def update(batching: Batching, number: int) -> torch.Tensor:
        """All images of an update, as its micro-batches and ranks have them one after another."""
        parts = []
        for rank in range(batching.ranks):
            batches = build_loader(
                cfg,
                dataset,
                **{"img_size": 16, "mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1)},
                **vars(batching),
                rank=rank,
                device=CPU,
            ).epoch(3, number * batching.grad_accum_steps)
            parts.append([b.images_BCHW for b in islice(batches, batching.grad_accum_steps)])
        return torch.cat([parts[r][m] for m in range(len(parts[0])) for r in range(len(parts))])

    wanted = update(batching_of(3, flags), 5)
    mine = update(batching_of(after, flags, state), 5)
    assert wanted.shape == (72, 3, 16, 16) and torch.equal(mine, wanted)


# -------------------------------------------------------------------------- torchrun's --nnodes 1:2


def start_agent(log: Path, port: int, host: bool, args: list[str]) -> subprocess.Popen:
    """One of at most two machines, with one rank. host: whether it serves torchrun's store."""
    command = [*TORCHRUN, "--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "x"]
    conf = f"last_call_timeout=10,is_host={str(host).lower()}"
    command += ["--rdzv-conf", conf, "--local-addr", "127.0.0.1"]
    names = {"GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(log, "w") as out:
        return subprocess.Popen(
            [*command, "-m", "fastgn.train", *args],
            **{"stdout": out, "stderr": out, "env": os.environ | names},
        )


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_job_goes_on_with_fewer_machines(tmp_path: Path) -> None:
    """One of two is lost, with its agent. On a slow machine it comes when the other has begun
    alone. The weights are those of a run that lost none."""
    folder, alone = tmp_path / "run", tmp_path / "alone"
    common = ("--log-interval", "1", "--checkpoint-interval", "2", "--eval-images", "0")
    common += ("--epochs", "2", "--global-batch-size", "48")
    args = [*tiny_run(folder, *common, "--batch-size", "24"), "--resume", "auto"]
    port, logs = free_port(), [tmp_path / "log0", tmp_path / "log1"]
    agents = [start_agent(log, port, log == logs[0], args) for log in logs]
    try:
        deadline = time.monotonic() + 400

        def wait() -> None:
            said = "\n".join(log.read_text() for log in logs if log.exists())
            assert agents[0].poll() is None and time.monotonic() < deadline, said
            time.sleep(0.05)

        found = None
        while found is None or read_state(found)["ranks"] != 2:
            wait()
            found = Checkpoints(folder, 1).last()
        lost = [*children(agents[1].pid), agents[1].pid]
        for pid in lost:
            os.kill(pid, signal.SIGKILL)
        assert agents[0].wait(400) == 0, logs[0].read_text()
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    said = logs[0].read_text()
    assert "24 images x 2 accumulated x 1 processes" in said
    assert re.search(r"resumed at update \d+; ranks: 1, not 2", said)
    assert read_state(find_checkpoint(folder))["update"] == 58
    assert train.main(tiny_run(alone, *common)) == 0
    states = (read_state(find_checkpoint(f))["model"].values() for f in (folder, alone))
    mine, theirs = (torch.cat([w.flatten() for w in weights]) for weights in states)
    assert (mine - theirs).norm() / theirs.norm() < 1e-3
