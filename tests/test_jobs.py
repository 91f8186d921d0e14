"""Jobs are not lost: one writer in a folder, ranks that stop or die, restarts by torchrun."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from support.images import image_folder
from support.processes import TORCHRUN, free_port, on_two_ranks, start_two
from support.runs import contents, error_line, tiny_run
from support.states import differences, read_state
from torch import Tensor

from fastgn import distributed, evaluate, heartbeat, lock, setup, train
from fastgn.checkpoint import find_checkpoint
from fastgn.config.cli import parse_config
from fastgn.data import pack
from fastgn.errors import UserError
from fastgn.interrupt import STOPPED
from fastgn.metrics import read_rows
from fastgn.run import Run

ENDLESS = ("--epochs", "100000", "--batch-size", "24", "--log-interval", "1", "--eval-images", "0")
LIMIT_S = 10


def wait_for_rows(folder: Path, count: int, processes: list[BaseProcess]) -> None:
    deadline = time.monotonic() + 400
    while len(read_rows(folder / "metrics.csv")) < count:
        assert all(p.is_alive() for p in processes) and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("stopped", "seed"), [(0, 0), (1, 1), (1, 2)])
def test_a_rank_that_is_stopped_ends_the_job(stopped: int, seed: int, tmp_path: Path) -> None:
    """At a random moment, and whichever rank serves the store."""
    folder = tmp_path / "run"
    args = [*tiny_run(folder, *ENDLESS), "--rank-timeout", str(LIMIT_S / 60)]
    ranks = start_two(tmp_path, train.main, args)
    try:
        wait_for_rows(folder, 3, ranks)
        time.sleep(random.Random(seed).uniform(0, 0.5))
        os.kill(ranks[stopped].pid or 0, signal.SIGSTOP)
        ranks[1 - stopped].join(LIMIT_S + 5)
        assert ranks[1 - stopped].exitcode == 1
        said = (tmp_path / f"log{1 - stopped}").read_text()
        assert "Traceback" not in said
        (line,) = (x for x in said.splitlines() if x.startswith("error: "))
        assert re.match(rf"error: no sign of life from rank {stopped} ", line), line
    finally:
        for process in ranks:
            process.kill()
            process.join()


@pytest.mark.slow
def test_a_signal_to_any_rank_saves(tmp_path: Path) -> None:
    """And all ranks say by their exit status that the run is not done."""
    folder = tmp_path / "run"
    ranks = start_two(tmp_path, train.main, tiny_run(folder, *ENDLESS))
    try:
        wait_for_rows(folder, 3, ranks)
        os.kill(ranks[1].pid or 0, signal.SIGUSR1)
        for process in ranks:
            process.join(400)
        assert [process.exitcode for process in ranks] == [STOPPED, STOPPED]
    finally:
        for process in ranks:
            process.kill()
            process.join()
    last = read_state(find_checkpoint(folder))["update"]
    assert last == read_rows(folder / "metrics.csv")[-1]["update"]
    assert f"stopped at update {last}; continue with" in (tmp_path / "log0").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [1, 0])
def test_a_rank_that_is_killed_is_named(killed: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ranks = start_two(tmp_path, train.main, tiny_run(folder, *ENDLESS))
    try:
        wait_for_rows(folder, 2, ranks)
        ranks[killed].kill()
        ranks[1 - killed].join(200)  # sooner than the default of --rank-timeout
        assert ranks[1 - killed].exitcode == 2
        said = (tmp_path / f"log{1 - killed}").read_text()
        assert "Traceback" not in said
        (line,) = (x for x in said.splitlines() if "error: " in x)
        assert re.search(rf"error: rank {killed} .*ended before the other ranks", line), line
    finally:
        for process in ranks:
            process.kill()
            process.join()


@pytest.mark.slow
def test_a_rank_that_never_comes_ends_the_job(tmp_path: Path) -> None:
    args = [*tiny_run(tmp_path / "run", *ENDLESS), "--rank-timeout", str(LIMIT_S / 60)]
    ranks = start_two(tmp_path, train.main, args)
    try:
        os.kill(ranks[1].pid or 0, signal.SIGSTOP)
        ranks[0].join(LIMIT_S + 30)
        assert ranks[0].exitcode == 1
        said = (tmp_path / "log0").read_text()
        assert said.startswith("error: no sign of life from rank 1 ") and said.count("\n") == 1
        assert not (tmp_path / "run").exists()
    finally:
        for process in ranks:
            process.kill()
            process.join()


def be_late_once(args: list[str]) -> int:
    """Trains, and sleeps before the second rank's third update is done."""
    apply, sleep_s = Run.apply_gradients, 5.0

    def late(self: Run, lr: float) -> Tensor:
        if self.world.rank == 1 and self.update == 2:
            time.sleep(sleep_s)
        return apply(self, lr)

    heartbeat.WAITING_S, Run.apply_gradients = 1.2, late  # type: ignore[method-assign]
    return train.main(args)


@pytest.mark.slow
def test_a_late_rank_is_named(tmp_path: Path) -> None:
    """By one of those that wait, again when twice as much time has passed, and the job goes on."""
    args = tiny_run(tmp_path / "run", "--max-updates", "4", "--batch-size", "24")
    said = on_two_ranks(tmp_path, be_late_once, [*args, "--rank-timeout", str(LIMIT_S / 60)])
    lines = [line for line in said[0].splitlines() if "waiting" in line]
    pattern = r"warning: waiting for rank 1 \(process \d+ on host .*\) for [\d.]+ minutes?"
    assert lines and all(re.fullmatch(pattern, line) for line in lines), lines
    assert not any("waiting for rank 1" in line for line in said[1].splitlines())


def wait_for_a_device(folder: str) -> int:
    """Waits for a device that takes its time."""

    class SlowNumber(Tensor):
        def item(self) -> float:
            time.sleep(4)
            return 3.0

    heartbeat.WAITING_S = 1.2
    with distributed.session("cpu", rank_timeout=LIMIT_S / 60) as world:
        assert world.read(torch.zeros(()).as_subclass(SlowNumber)) == 3
        assert world.read(torch.ones(())) == 1
    return 0


def test_ranks_that_wait_for_their_devices_say_so(tmp_path: Path) -> None:
    """For no rank is late if one device hangs."""
    for rank, said in enumerate(on_two_ranks(tmp_path, wait_for_a_device, str(tmp_path))):
        lines = [line for line in said.splitlines() if "warning" in line]
        pattern = rf"warning: rank {rank} \(.*\) has waited for its own device for "
        assert lines and all(re.match(pattern, line) for line in lines), said


@pytest.mark.parametrize(
    ("ranks", "workers", "cores", "best"),
    [(8, 8, 64, None), (8, 9, 64, 8), (1, 8, 4, None), (2, 8, 4, 2), (4, 1, 2, 1), (2, 0, 1, None)],
)
def test_too_many_workers_are_named(ranks: int, workers: int, cores: int, best: int | None) -> None:
    said: list[str] = []
    cfg = parse_config(["--data", "digits", "--workers", str(workers)])
    run = type("Run", (), {"cfg": cfg, "print": staticmethod(said.append)})
    setup.warn_of_workers(run, ranks, cores)  # type: ignore[arg-type]
    line = (
        f"warning: {ranks} ranks on this machine x --workers {workers} are more than the {cores} "
        f"cores of the job, and slow each other down: use --workers {best}"
    )
    assert said == ([] if best is None else [line])


# -------------------------------------------------------------------------------------------- locks


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Another process that holds `folder` and `file.json`."""
    code = (
        "import time\nfrom pathlib import Path\nfrom fastgn.lock import lock_file, lock_folder\n"
        "with lock_folder(Path('folder'), 'f'), lock_file(Path('file.json'), 'f'):\n"
        "    print('held', flush=True)\n    time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("program", ["train", "evaluate", "pack"])
def test_a_program_leaves_what_another_process_writes_to(
    program: str,
    holder: subprocess.Popen,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    shared_folder: Path,
) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file.json"
    match program:
        case "train":
            name, status = "fastgn.train", train.main(tiny_run(folder))
        case "evaluate":
            run = shared_folder / "jobs"
            if not run.exists():
                assert train.main(tiny_run(run, "--max-updates", "1")) == 0
                capsys.readouterr()
            args = ["--checkpoint", str(run), "--attacks", "clean", "--output", str(file)]
            name, status = "fastgn.evaluate", evaluate.main(args)
        case _:
            data = image_folder(tmp_path / "data")
            name, status = "fastgn.data.pack", pack.main([str(data), str(folder)])
    assert status == 2
    line = error_line(capsys.readouterr().err, name)
    assert f"is in use by process {holder.pid} on host " in line
    assert contents(folder).keys() == {".lock"} and not file.exists()


def test_a_lock_goes_with_its_process(holder: subprocess.Popen, tmp_path: Path) -> None:
    holder.kill()
    holder.wait()
    assert (tmp_path / "folder" / ".lock").exists(), "a kill leaves the file, and not the lock"
    with lock.lock_folder(tmp_path / "folder", "--output folder"):
        with pytest.raises(lock.HeldError, match="--output folder is in use by this process"):
            with lock.lock_folder(tmp_path / "folder", "--output folder"):
                pass
    assert not (tmp_path / "folder").exists() or not list((tmp_path / "folder").iterdir())


def test_what_a_lock_has_made_goes_with_it(tmp_path: Path) -> None:
    with lock.lock_folder(tmp_path / "a" / "b", "--output"):
        assert (tmp_path / "a" / "b" / ".lock").is_file()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_starts_in_one_folder(tmp_path: Path) -> None:
    """One goes on undisturbed, the other leaves with one line."""
    folder, alone = tmp_path / "run", tmp_path / "alone"
    often = ("--checkpoint-interval", "1", "--log-interval", "1")
    command = [sys.executable, "-m", "fastgn.train", *tiny_run(folder, *often)]
    pipe = subprocess.PIPE
    both = [subprocess.Popen(command, stderr=pipe, stdout=pipe, text=True) for _ in range(2)]
    said = [process.communicate(timeout=400)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    winner = next(i for i in range(2) if both[i].returncode == 0)
    line = error_line(said[1 - winner], "fastgn.train")
    taken = f"is in use by process {both[winner].pid} " in line
    assert taken or "holds a run already" in line  # it may have been done before
    assert train.main(tiny_run(alone, *often)) == 0
    states = [read_state(find_checkpoint(f)) for f in (folder, alone)]
    keys = ("update", "model", "ema", "optimizer", "best")
    assert differences(*({k: state[k] for k in keys} for state in states)) == []


@pytest.mark.parametrize("below", ["file/run", "/proc/nowhere/run"])
def test_a_folder_that_cannot_be_is_one_line(
    below: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    output = tmp_path / below
    assert train.main(tiny_run(output)) == 2
    line = error_line(capsys.readouterr().err, "fastgn.train")
    assert line.startswith(f"--output {output} cannot be written: ")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("reason", [28, 13])  # no space left, permission denied
def test_a_folder_that_takes_nothing_is_one_line(
    reason: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: object) -> int:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(os, "ftruncate", refuse)
    assert train.main(tiny_run(tmp_path / "run")) == 2
    assert os.strerror(reason) in error_line(capsys.readouterr().err, "fastgn.train")
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------- torchrun's variables


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE=2 is set without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: ",
        ),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is set without "),
        (
            {"WORLD_SIZE": "2", "RANK": "2"},
            "RANK=2 LOCAL_RANK=0 MASTER_PORT=1 contradict each other",
        ),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK=-1 "),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "99999"},
            "MASTER_PORT=99999 contradict each other",
        ),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x "),
    ],
)
def test_variables_that_torchrun_would_not_set(
    given: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest = {"LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in ({**rest, **given} if "RANK" in given else given).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said), distributed.session("cpu"):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_torchruns_restarts_continue_the_run(number: int, tmp_path: Path) -> None:
    """Without --output and --resume, as it was first started. A rank that was asked to stop is not
    started again."""
    args = tiny_run(tmp_path, "--checkpoint-interval", "1", "--log-interval", "1")
    args = args[: args.index("--output")] + args[args.index("--output") + 2 :]
    command = [*TORCHRUN, "--nproc-per-node", "1", "--max-restarts", "1", "--master-port"]
    command += [str(free_port()), "-m", "fastgn.train", *args]
    log = tmp_path / "log"
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 400
        while not list(tmp_path.glob("runs/*/checkpoints/update_*.pt")):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        (folder,) = (tmp_path / "runs").iterdir()
        worker = (folder / ".lock").read_text().split()[1]
        os.kill(int(worker), number)
        assert process.wait(400) == 0, log.read_text()
    finally:
        process.kill()
    assert [p.name for p in (tmp_path / "runs").iterdir()] == [folder.name]
    stopped = number == signal.SIGUSR1
    assert ("resumed at update " in log.read_text()) == (not stopped)
    assert (read_state(find_checkpoint(folder))["update"] == 29) == (not stopped)
    assert (folder / "summary.json").exists() == (not stopped)
