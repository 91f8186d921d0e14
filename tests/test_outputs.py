"""What the programs write: never over what they read, and only where files can be."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import small_state

from fastgn import evaluate, lock, sweep, train
from fastgn.checkpoint import Checkpoints
from fastgn.data import check, pack
from fastgn.errors import UserError

MAINS = {
    "train": (train.main, ["--output", "run"]),
    "evaluate": (evaluate.main, ["--checkpoint", "run"]),
    "sweep": (sweep.main, ["--space", "lr=1e-3:1e-2"]),
    "pack": (pack.main, ["source", "output"]),
    "check": (check.main, ["source", "--output", "report.json"]),
}


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Content of each file below a folder, and None for each folder."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


# -------------------------------------------------------------------------------------------- locks


@pytest.mark.parametrize("program", MAINS)
def test_a_removed_working_directory_is_one_line(program, tmp_path, capsys, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    main, args = MAINS[program]
    assert main(args) == 2
    assert capsys.readouterr().err.endswith(
        ": error: the working directory was removed: change to another one\n"
    )


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_a_lock_that_is_no_file_is_named(kind, tmp_path):
    path = tmp_path / ".lock"
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "link": lambda: path.symlink_to("x")}[
        kind
    ]()
    with pytest.raises(UserError, match=rf"^--output .*{path}, is no plain file: remove it$"):
        with lock.lock_folder(tmp_path, f"--output {tmp_path}"):
            pass
    assert os.path.lexists(path) and len(list(tmp_path.iterdir())) == 1


def test_a_folder_in_which_nothing_can_be_created_is_one_line():
    code = (
        "from pathlib import Path; from fastgn import errors, lock\n"
        "try:\n"
        "    with lock.lock_file(Path('/proc/x.json'), '--output /proc/x.json'): pass\n"
        "except errors.UserError as error:\n"
        "    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith("--output /proc/x.json cannot be written: ")


# ------------------------------------------------------------------- folders where files should be


def test_folders_with_the_names_of_files_are_left_alone(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    left = [checkpoints.folder / ".x.tmp", checkpoints.path(1), tmp_path / ".metrics.csv.ab.tmp"]
    for folder in left:
        folder.mkdir(parents=True)
    checkpoints.remove_leftovers()
    lock.remove_leftovers(tmp_path, ["metrics.csv"])
    assert checkpoints.last() is None
    for update in (2, 3):
        checkpoints.save(small_state(update), update)
    assert [p.name for p in checkpoints.all()] == ["update_00000003.pt"]
    assert all(folder.is_dir() for folder in left)


def test_a_folder_in_place_of_a_checkpoint_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    path = checkpoints.epoch_path(1)
    path.mkdir(parents=True)
    with pytest.raises(UserError, match=f"^{path} is a folder"):
        checkpoints.save(small_state(1), 1, best=True, keep_epoch=1)


# ----------------------------------------------------------------------------------- unclear lines


def test_a_write_that_fails_says_why(tmp_path):
    """A limit on the size of files stands in for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        with pytest.raises(UserError, match="cannot be written: File too large; what was there"):
            Checkpoints(tmp_path, 1).save(small_state(1, model={"weight": torch.ones(50_000)}), 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_without_a_run_is_named_by_its_flag(tmp_path, capsys):
    assert evaluate.main(["--checkpoint", str(tmp_path)]) == 2
    assert f"error: --checkpoint {tmp_path}: no checkpoint below it" in capsys.readouterr().err
