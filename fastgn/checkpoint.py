"""Writes, keeps and reads the checkpoints of a run.

A checkpoint is written completely or not at all. Everything in it is checked when it is read.
"""

import os
import re
import secrets
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from fastgn.archive import read_archive
from fastgn.config import Config, run_folder
from fastgn.errors import UserError, check, first_line, tolerate_failure
from fastgn.files import atomic_open, check_regular, remove_file
from fastgn.state import TrainState, as_dict, read_fields

FORMAT = 1
"""Version number of a checkpoint's content. It is increased when the content changes so much that
older versions of fastgn could not use it."""


class Checkpoints:
    """The folder checkpoints/ of a run.

    It holds the last few checkpoints as update_*.pt, and the best one as best.pt. It also holds the
    checkpoints of the epochs that --keep-epochs names, as epoch_*.pt.
    """

    def __init__(self, folder: Path, keep: int):
        """Uses the folder checkpoints/ in a run's folder.

        folder: the run's folder. keep: number of the newest update_*.pt files that `save` keeps.
        """
        self.folder = folder / "checkpoints"
        self.keep = keep
        self._thread = ThreadPoolExecutor(1)
        """Thread that writes files while the training goes on. It starts with the first file."""
        self._writing: Future[Path] | None = None
        """Future for the file that the thread is writing. It becomes None when `wait` is called."""

    def path(self, update: int) -> Path:
        """Returns the path of the checkpoint that is saved after an update.

        update: number of updates done.
        """
        return self.folder / f"update_{update:08d}.pt"

    def epoch_path(self, epoch: int) -> Path:
        """Returns the path of a checkpoint that is saved at the end of an epoch and never
        removed."""
        return self.folder / f"epoch_{epoch:04d}.pt"

    def all(self) -> list[Path]:
        """Returns the paths of all files update_*.pt, oldest first. Folders with such a name are
        left out."""
        found = (
            p
            for p in self.folder.glob("update_*.pt")
            if re.fullmatch(r"update_\d+\.pt", p.name) and p.is_file()
        )
        return sorted(found, key=lambda p: int(p.stem.split("_")[1]))

    def last(self) -> Path | None:
        """Returns the path of the newest file update_*.pt, or None if no such file exists."""
        paths = self.all()
        return paths[-1] if paths else None

    def save(
        self,
        state: TrainState,
        *,
        best: bool = False,
        keep_epoch: int | None = None,
    ) -> Path:
        """Writes a checkpoint as update_N.pt, after N updates, and returns its path.

        Also removes the oldest files update_*.pt, so that `keep` of them stay. Files of later
        updates are removed too. They exist if the run was continued from an earlier checkpoint.

        best: whether the new file also gets the name best.pt. keep_epoch: number M of an epoch, or
        None. If it is not None, the new file also gets the name epoch_M.pt.

        Raises UserError if the file cannot be written, or if an old file cannot be removed.
        """
        path = self.path(state.update)
        names = [self.folder / "best.pt"] if best else []
        names += [] if keep_epoch is None else [self.epoch_path(keep_epoch)]
        # write update_N.pt last. A run killed earlier then continues from the previous checkpoint.
        first, *others = [*names, path]
        with atomic_open(first) as file:
            torch.save({"format": FORMAT, **as_dict(state)}, file)
        try:
            for other in others:
                self._link(first, other)
            there = self.all()
            end = there.index(path) + 1
            for old in there[: max(end - self.keep, 0)] + there[end:]:
                remove_file(old)
        except OSError as error:
            raise UserError(
                f"{error.filename or self.folder} cannot be replaced or removed: "
                f"{error.strerror or first_line(error)}; the new checkpoint was saved as {first}"
            ) from None
        return path

    def save_later(
        self, state: TrainState, *, best: bool = False, keep_epoch: int | None = None
    ) -> None:
        """Copies the run's state to the host's memory. A thread then calls `save` with the copy.

        First waits until the previous file is written, as `wait` does. See `save` for best and
        keep_epoch. Raises UserError if the host has no memory for the copy.
        """
        self.wait()
        try:
            copied = state.copy_to_host()
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
                raise
            last = self.last()
            raise UserError(
                f"the host has no memory left to copy the checkpoint of update {state.update}, "
                "which takes as much as the weights, their moving average and the optimizer's "
                "state: use fewer --workers, or give the job more memory; "
                + (f"the last checkpoint is {last}" if last else "no checkpoint was written before")
            ) from None
        self._writing = self._thread.submit(self.save, copied, best=best, keep_epoch=keep_epoch)

    def wait(self) -> None:
        """Waits until the file of the last `save_later` is written.

        Raises UserError if the file cannot be written, but only in the first call after
        `save_later`.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def settle(self) -> None:
        """Waits until the last checkpoint is written. Prints a warning if it cannot be written."""
        with tolerate_failure("the last checkpoint"):
            self.wait()

    def close(self) -> None:
        """Waits until the last checkpoint is written, and ends the thread that writes files."""
        self.settle()
        self._thread.shutdown()

    def remove_leftovers(self) -> None:
        """Removes files that a killed process has left half-written.

        Only a process that holds the lock of the run's folder may call this, because another
        process could still be writing such a file.
        """
        for left in self.folder.glob(".*.tmp"):
            remove_file(left)

    @staticmethod
    def _link(path: Path, name: Path) -> None:
        """Makes `name` a hard link to the file `path`, or a copy if hard links are not possible."""
        check_regular(name)
        temporary = name.with_name(f".{name.name}.{secrets.token_hex(8)}.tmp")
        try:
            os.link(path, temporary)
        except OSError:  # the file system has no hard links
            with open(path, "rb") as source, atomic_open(name) as file:
                shutil.copyfileobj(source, file)
            return
        os.replace(temporary, name)


def load_checkpoint(path: Path) -> TrainState:
    """Returns the content of a checkpoint, with its tensors on the CPU.

    No code from the file is run. Raises UserError if the file is missing or damaged, which its
    checksums show. Also raises UserError if the file is not a checkpoint of fastgn.train, belongs
    to another version, or holds more than tensors and plain values.
    """
    check(path.is_file(), f"{path}: there is no such checkpoint")
    try:
        content = read_archive(path)
    except UserError as error:
        others = ", ".join(p.name for p in sorted(path.parent.glob("*.pt")) if p != path)
        hint = f"; other checkpoints in its folder: {others}" if others else ""
        raise UserError(f"{error}{hint}") from None
    found = content.get("format") if isinstance(content, dict) else None
    check(
        type(found) is int and found >= 1,
        f"{path} is not a checkpoint of fastgn.train with format {FORMAT}",
    )
    check(
        found == FORMAT,
        f"{path} has format {found}, but this version of fastgn reads format {FORMAT}: update "
        "fastgn",
    )
    state = read_fields({k: v for k, v in content.items() if k != "format"}, TrainState, str(path))
    read_config(state.config, path)
    return state


def read_config(text: str, path: Path) -> Config:
    """Returns the configuration that a checkpoint or an export was made with.

    text: the configuration as TOML. path: the file, for messages. Raises UserError if the
    configuration is invalid.
    """
    try:
        return Config.from_toml(text)
    except UserError as error:
        raise UserError(f"{path} contains an invalid configuration: {error}") from None


def find_checkpoint(where: Path, flag: str = "--resume") -> Path:
    """Returns the path of the checkpoint that a flag names.

    where: the checkpoint itself, or a run's folder, which stands for its last checkpoint. flag: the
    flag, for messages. Raises UserError if no checkpoint is found.
    """
    if where.is_file():
        return where
    check(where.is_dir(), f"{flag} {where}: there is no such run or checkpoint")
    last = Checkpoints(run_folder(where / "config.toml"), 1).last()
    if last is None:
        raise UserError(f"{flag} {where}: there is no checkpoint in this folder")
    return last
