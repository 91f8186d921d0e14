"""Checkpoints are written while the training goes on: the same files, and no error is lost."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import on_two_ranks
from support.runs import tiny_run
from support.states import read_state, small_state
from torch import nn

from fastgn import checkpoint, train
from fastgn.checkpoint import Checkpoints, find_checkpoint
from fastgn.errors import UserError
from fastgn.run import Run
from fastgn.state import TrainState

SLOW_S = 3.0


def trained() -> tuple[nn.Module, torch.optim.Optimizer, TrainState]:
    """A network with tied weights after an update, its optimizer, and its state."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    model[3].weight = nn.Parameter(torch.rand(4, 4).t())  # not contiguous
    groups = [{"params": [p], "weight_decay": 0.1} for p in model.parameters()]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    update(model, optimizer)
    found = {"model": model.state_dict(), "ema": model.state_dict()}
    return model, optimizer, small_state(1, optimizer=optimizer.state_dict(), **found)


def update(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.rand(3, 4)).sum().backward()
    optimizer.step()


def test_the_file_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    model, optimizer, state = trained()
    at_once = Checkpoints(tmp_path / "a", 1).save(state).read_bytes()
    later = Checkpoints(tmp_path / "b", 1)
    later.save_later(state)
    later.wait()
    assert later.path(1).read_bytes() == at_once
    update(model, optimizer)
    assert Checkpoints(tmp_path / "c", 1).save(state).read_bytes() != at_once, "it is live"


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Holds a file back, before its rename, until the event is set."""
    released, fsync = threading.Event(), os.fsync

    def wait(descriptor: int) -> None:
        assert released.wait(400)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", wait)
    return released


def test_later_updates_do_not_change_the_file(held: threading.Event, tmp_path: Path) -> None:
    model, optimizer, state = trained()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save_later(state)
    update(model, optimizer)
    state.accuracy["clean_accuracy"] = 0.0
    assert checkpoints.last() is None
    held.set()
    checkpoints.close()
    saved = read_state(checkpoints.path(1))
    assert all(torch.equal(saved["model"][k], v) for k, v in before.items())
    assert saved["accuracy"] == {"clean_accuracy": 0.5}


def test_one_file_is_written_at_a_time(held: threading.Event, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save_later(small_state(1), best=True)
    threading.Timer(0.5, held.set).start()
    began = time.monotonic()
    checkpoints.save_later(small_state(2))  # waits for the first
    assert time.monotonic() - began > 0.3
    checkpoints.wait()
    names = sorted(p.name for p in checkpoints.folder.iterdir())
    assert names == ["best.pt", "update_00000002.pt"]


def test_an_error_is_raised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    checkpoints = Checkpoints(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        checkpoints.save_later(small_state(1))
        with pytest.raises(UserError, match="update_00000001.pt cannot be written: No space left"):
            checkpoints.save_later(small_state(2))
        checkpoints.save_later(small_state(3))
        with pytest.raises(UserError, match="update_00000003.pt"):
            checkpoints.wait()
        checkpoints.wait()
    checkpoints.save_later(small_state(4))
    checkpoints.close()
    assert [p.name for p in checkpoints.folder.iterdir()] == ["update_00000004.pt"]


def refuse_to_unlink(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Makes the removal of files with a name fail, as in a folder without the right to write."""
    unlink = Path.unlink

    def fail(self: Path, missing_ok: bool = False) -> None:
        if self.name == name:
            raise PermissionError(13, os.strerror(13), str(self))
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", fail)


def test_an_old_file_that_cannot_be_removed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the new checkpoint is there, so that the run can continue from it."""
    folder, old = tmp_path / "run", "update_00000002.pt"
    refuse_to_unlink(monkeypatch, old)
    args = tiny_run(folder, "--checkpoint-interval", "2", "--eval-images", "0")
    assert train.main([*args, "--checkpoint-hist", "1", "--max-updates", "6"]) == 2
    said = capsys.readouterr().err.splitlines()
    path = folder / "checkpoints" / old
    new = folder / "checkpoints" / "update_00000004.pt"
    assert said[-1] == (
        f"fastgn.train: error: {path} cannot be replaced or removed: Permission denied; the new "
        f"checkpoint was saved as {new}"
    )
    assert find_checkpoint(folder) == new and read_state(new)["update"] == 4


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=["python", "torch"],
)
def test_a_host_without_memory_for_the_copy_is_one_line(
    error: Exception,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Which does not advise to use fewer images at a time."""
    copy = TrainState.copy_to_host

    def fail(self: TrainState) -> TrainState:
        if self.update == 4:
            raise error
        return copy(self)

    monkeypatch.setattr(TrainState, "copy_to_host", fail)
    args = tiny_run(tmp_path / "run", "--checkpoint-interval", "2", "--eval-images", "0")
    assert train.main([*args, "--max-updates", "6"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "no memory left to copy the checkpoint of update 4" in said
    assert "update_00000002.pt" in said and "images at a time" not in said


@pytest.mark.parametrize("update", [2, 4])
def test_a_full_disk_is_one_line(
    update: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At the next checkpoint, or at the end of the run, which then has no export."""
    save, folder = Checkpoints.save, tmp_path / "run"

    def fail(self: Checkpoints, state: TrainState, **options: Any) -> Path:
        if state.update == update:
            raise UserError("the disk is full")
        return save(self, state, **options)

    monkeypatch.setattr(Checkpoints, "save", fail)
    args = tiny_run(folder, "--checkpoint-interval", "2", "--eval-images", "0")
    assert train.main([*args, "--max-updates", "4"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "fastgn.train: error: the disk is full"
    assert not any("warning" in line for line in said)
    assert not (folder / "model.safetensors").exists() and not list(folder.rglob("*.tmp"))
    if update == 4:
        assert find_checkpoint(folder).name == "update_00000002.pt"


def save_slowly(args: list[str], folder: str) -> int:
    """Trains with files that take SLOW_S, and writes down how long each `save` took."""
    save, save_later, seconds = Checkpoints.save, Run.save, []

    def slow(self: Checkpoints, *args: Any, **options: Any) -> Path:
        time.sleep(SLOW_S)
        return save(self, *args, **options)

    def timed(self: Run) -> None:
        began = time.monotonic()
        save_later(self)
        seconds.append(time.monotonic() - began)
        rank = self.world.rank
        (Path(folder) / f"seconds{rank}").write_text(" ".join(map(str, seconds)))

    checkpoint.Checkpoints.save, Run.save = slow, timed  # type: ignore[method-assign]
    return train.main(args)


@pytest.mark.slow
def test_no_rank_waits_for_a_file(tmp_path: Path) -> None:
    """Neither the first rank, which writes it, nor another one, which meets the first."""
    args = tiny_run(tmp_path / "run", "--batch-size", "24", "--eval-images", "0")
    on_two_ranks(tmp_path, save_slowly, [*args, "--max-updates", "5"], str(tmp_path))
    for rank in range(2):
        (waited,) = map(float, (tmp_path / f"seconds{rank}").read_text().split())
        assert waited < SLOW_S / 2
    assert find_checkpoint(tmp_path / "run").name == "update_00000005.pt"
    assert (tmp_path / "run" / "model.safetensors").exists()
